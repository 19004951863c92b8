"""Train reward models on preference pairs."""
