"""Claims about pessimism, tried out over many seeds; `prudent study` runs them."""
