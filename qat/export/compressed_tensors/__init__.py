"""The compressed-tensors formats "pack-quantized" and "int-quantized": writer, config, keys and values."""
