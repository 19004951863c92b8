"""The lean PPO loop: one trunk for policy, reference, critic and reward (`loop.py` reads top to bottom)."""
