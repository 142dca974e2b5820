"""The model: transformer, pooling, heads, losses, LoRA, and weights of other models to start from."""
