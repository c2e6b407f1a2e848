"""The formats of compressed-tensors for integers and floats: writer, config, and scales of keys and values."""
