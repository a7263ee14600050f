"""Text towers, their tokenizers, and the projection to the image width. No images here."""
