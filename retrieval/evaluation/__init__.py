"""Zero-shot classification, and how well it and retrieval do on published data sets. Builds no
index, serves nothing."""
