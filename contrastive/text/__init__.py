"""Text towers and their tokenizers. Knows nothing of images."""
