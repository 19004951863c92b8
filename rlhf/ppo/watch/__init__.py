"""Watch a PPO run: monitors, findings, pictures, report."""
