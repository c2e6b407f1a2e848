"""The compressed-tensors formats "pack-quantized" and "int-quantized": writer, config, and scales of keys and values."""
