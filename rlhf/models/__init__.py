"""Load models, tokenisers and scorers; compute and cache features."""
