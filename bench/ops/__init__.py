"""The benchmark cases of each op: shapes, checks, and the variants it is timed against."""
