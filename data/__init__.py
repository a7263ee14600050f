"""What goes in: shards, pixels, captions, class names, and the caches of a training. Imports no
other package of this project and no torch.nn."""
