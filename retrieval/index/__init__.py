"""The index folder: FAISS indexes, segments, metadata, and every change of them. Knows vectors
only: texts and images are encoded in `retrieval.search` and `retrieval.photos`."""
