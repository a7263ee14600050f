"""Decoders on the patches of a locked image tower, and their training. Of texts it has the vectors
that it is handed."""
