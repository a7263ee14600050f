"""Image towers of any family, read from any format, flexible where they can be. No texts here."""
