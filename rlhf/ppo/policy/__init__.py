"""The policy: one trunk, its adapters, attention and precision."""
