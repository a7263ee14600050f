"""Bulk embedding of shards, and the files it writes. Knows no index."""
