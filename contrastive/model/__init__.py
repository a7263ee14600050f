"""The image-text model, its losses and its model card. Knows nothing of optimisers or runs."""
