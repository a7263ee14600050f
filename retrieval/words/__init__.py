"""Finding texts by their words: SQLite's FTS5 per segment of an index, one BM25 over all of them.

No vectors, and nothing of index folders: it is given files, rows and which of them count.
"""
