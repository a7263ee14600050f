"""From shards to batches: the order of samples, what fills a batch, and the loaders. Knows
nothing of models."""
