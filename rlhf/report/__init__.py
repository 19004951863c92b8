"""Words, pages and picture styles that reports share."""
