"""Text towers, their tokenizers, and the projection to the image tower's embedding dimension. No
images here."""
