"""Making a fixed-patch ViT flexible: distillation at random patch sizes."""
