"""Zero-shot classification, and how well it and retrieval do on published data sets. Writes no
index folder, serves nothing."""
