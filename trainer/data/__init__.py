"""Turns text into windows of tokens: reading, tokenizing once into the cache, and the order of training windows."""
