"""PET: make a reward pessimistic against best-of-n (arXiv 2505.20556)."""
