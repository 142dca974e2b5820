"""The model: transformer, pooling, heads, losses, LoRA, and other people's weights to start from."""
