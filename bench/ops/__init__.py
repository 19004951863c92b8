"""The benchmark cases of each op: shapes, checks, and the variants to compare with."""
