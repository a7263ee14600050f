"""Bulk embedding of shards, and the files it writes."""
