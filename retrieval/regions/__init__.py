"""Search by region: windows of pictures as vectors beside those of whole pictures, in an index of
their own within the index's folder. Encodes no query."""
