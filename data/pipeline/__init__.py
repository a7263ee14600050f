"""From shards to batches: the order of samples, what fills a slot, and the loaders. Knows no
models."""
