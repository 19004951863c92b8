"""The pictures of a PPO run, in the house style: rows of metrics.jsonl in, a matplotlib Figure out."""
