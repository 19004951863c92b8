"""Plan the memory of a PPO run, and verify the plan."""
