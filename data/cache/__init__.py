"""What is computed once per data set and kept on disk: image features, captions and token ids.
Knows files, never how a feature is computed."""
