"""The index folder: FAISS indexes, segments, metadata, and every change of them. Knows no
queries in words or pictures."""
