"""Tars on disk or elsewhere: which ones a pattern names, what is in them, and reading it. Knows
nothing of batches."""
