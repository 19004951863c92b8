"""Preference pairs, rows and gold scores from files and data sets."""
