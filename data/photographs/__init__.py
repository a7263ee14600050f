"""Photographs with captions and classes from a Debian package, for evaluation alone."""
