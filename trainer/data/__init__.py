"""Text to windows of tokens: reading, tokenizing once into the cache, and the order in which training sees them."""
