"""Image towers from other libraries' checkpoints, a module per format; no texts, no training."""
