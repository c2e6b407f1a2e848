"""Run by the interpreter that DECOCT_MLX_PYTHON names: mlx-lm loads an AWQ export, and the weights that it then has are written as fp32.

python mlx_judge.py EXPORT WEIGHTS
"""

import sys
from pathlib import Path

import mlx.core as mx  # pyright: ignore[reportMissingImports]
import mlx.nn as nn  # pyright: ignore[reportMissingImports]
import numpy as np
from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file


def main() -> None:
    """Load, unpack, write."""
    export, target = sys.argv[1:]
    model, _ = load_model(Path(export))
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            numbers = {"group_size": module.group_size, "bits": module.bits}
            # products in fp32: a fp16 one rounds what the kernels keep in fp32
            scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
            found[f"{name}.weight"] = np.array(mx.dequantize(module.weight, scales, biases, **numbers))
        elif isinstance(module, nn.Embedding):
            found[f"{name}.weight"] = np.array(module.weight.astype(mx.float32))
    save_file(found, target)


if __name__ == "__main__":
    main()
