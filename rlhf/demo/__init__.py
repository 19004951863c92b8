"""The demo: a model, its reward ensemble, best-of-n and PPO."""
