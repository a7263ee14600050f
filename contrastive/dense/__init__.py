"""Decoders on the patches of a locked image tower, and their training. Nothing of texts."""
