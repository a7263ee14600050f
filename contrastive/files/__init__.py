"""Model files on disk, ours and other libraries': JSON, and tensors without pickled code.

Builds no network: what a file means for an image or a text tower is decided in
vision/ and text/.
"""
