"""Text on its way to the model: sources, tokenizer, token shards, batches. It knows nothing of the model."""
