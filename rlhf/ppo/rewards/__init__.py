"""Where PPO's rewards come from."""
