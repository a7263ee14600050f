"""Image towers: the flexible ViT, other families, and loading them from any format. Knows
nothing of texts."""
