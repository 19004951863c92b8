"""Score texts and measure reward models."""
