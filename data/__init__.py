"""What goes in: shards, images, captions, class names, and caches of features and captions. Imports
no other package of this project and no torch.nn."""
