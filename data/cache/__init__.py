"""What is computed once per shard and kept on disk: image features, captions and token ids. Holds
files, never the code that computes a feature."""
