"""Test claims about pessimism over many seeds; `prudent study` runs them."""
