"""Doors into other people's trainers: the wire dialects, a client, and an adapter for each trainer."""
