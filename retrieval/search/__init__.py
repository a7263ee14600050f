"""Searching an index by texts, images or vectors, at any patch size. Writes nothing into an index
but its cache of refined vectors."""
