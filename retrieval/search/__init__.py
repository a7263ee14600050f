"""Searching an index by words, pictures or vectors, at any patch size."""
