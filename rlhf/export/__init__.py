"""Write a reward model for loaders and engines that do not know prudent, with a card that says how to load it."""
