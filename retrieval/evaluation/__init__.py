"""Zero-shot classification and retrieval as the field measures them, and the data sets."""
