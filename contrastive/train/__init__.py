"""Training a text tower against the locked image tower (LiT)."""
