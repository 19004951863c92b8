"""The cases of each op: its shapes, what it is held to, what it is timed against."""
