"""An index in Milvus instead of a folder: for more vectors than one machine holds.

Nothing here is imported before an address `milvus:URI/NAME` is given, nor does anything here search
in FAISS.
"""
