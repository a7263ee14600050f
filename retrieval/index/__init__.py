"""The index folder: FAISS indexes, segments, metadata, and every change of them. Knows
vectors alone: queries in texts or images are `retrieval.search`'s."""
