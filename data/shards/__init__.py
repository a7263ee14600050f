"""Tars, here or remote: their names, their index, and reading them by number or as a stream. Knows
no batches and needs no torch."""
