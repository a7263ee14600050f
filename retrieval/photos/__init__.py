"""The index of a folder of photos: which photos it holds, and what is new, changed or gone. How
vectors are stored and searched is decided in `retrieval.index`."""
