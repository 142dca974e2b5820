"""Text on its way to the model: sources, tokenizer, shards. Knows nothing of the model."""
