"""What transformers needs to load an export, and how close its logits must be to the fake-quant model's.

In fp32 they are equal to 1e-5: compressed-tensors, plain weights, NF4 of bitsandbytes, and symmetric GPTQ up to 4 bits, which GPTQModel
unpacks in fp16 without loss. compressed-tensors unpacks nvfp4 to bf16, GPTQModel unpacks other weights with one rounding to fp16, its AWQ
kernels compute in fp16, bitsandbytes rounds inputs of int8 layers to fp16 first, and transformers unpacks zero points of compressed-tensors
in the dtype of the scales, bf16: these follow the rule for a runtime's own arithmetic, with a perplexity within 0.2 %.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ..readers.awq import AwqFolder
from ..readers.bitsandbytes import BitsandbytesFolder
from ..readers.compressed_tensors import PackedFolder
from ..readers.gptq import GptqFolder
from ..readers.open import open_folder


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one format is loaded and judged."""

    packages: tuple[str, ...]
    """Import names of the packages that transformers needs for the format."""
    exact: bool
    """Logits in fp32 must be equal; else only the predictions."""
    unreadable: str = ""
    """Why transformers cannot load the export at all, though other stacks do."""

    @property
    def absent(self) -> tuple[str, ...]:
        """Return the packages that are not installed."""
        return tuple(name for name in self.packages if importlib.util.find_spec(name) is None)


def rule_for(folder: Path) -> Rule:
    """Return the rule for an export; UserError if it cannot be read."""
    opened = open_folder(folder)
    if isinstance(opened, GptqFolder):
        schemes = [opened.scheme_of(module) for module in opened.modules]
        return Rule(
            packages=("optimum", "gptqmodel"),
            # products of such codes and bf16 scales fit the 11 significant bits of fp16
            exact=all(scheme.symmetric and scheme.bits <= 4 for scheme in schemes),
            unreadable=""
            if len(set(schemes)) <= 1
            else "optimum, which reads GPTQ for it, does not support modules with their own settings (dynamic)",
        )
    # AWQ's kernels compute in fp16 whatever the dtype of the model
    if isinstance(opened, AwqFolder):
        return Rule(packages=("accelerate", "gptqmodel"), exact=False)
    if isinstance(opened, BitsandbytesFolder):
        # its int8 kernel rounds inputs to fp16 first, and leaves whole columns of several tokens unrounded
        return Rule(packages=("bitsandbytes", "accelerate"), exact=opened.nf4)
    if isinstance(opened, PackedFolder):
        groups = opened.scheme.groups
        # packed zero points and codes of 4-bit floats make transformers dequantize on loading, in the dtype of the scales or in bf16
        zeros = any(group.format == "pack-quantized" and not group.weights.symmetric for group in groups)
        floats = [group for group in groups if group.weights.kind in ("mxfp4", "nvfp4")]
        unreadable = ""
        if any(group.inputs is not None for group in floats):
            unreadable = "transformers rounds inputs to 4-bit floats in bf16, where many fall to other codes than in the model's fp32"
        elif (zeros or floats) and len(groups) > 1:
            unreadable = "transformers unpacks zero points and 4-bit floats only on loading, and then supports one scheme, not several"
        # bf16 holds the products of mxfp4, not those of nvfp4
        exact = not zeros and all(group.weights.kind == "mxfp4" for group in floats)
        return Rule(packages=("compressed_tensors",), exact=exact, unreadable=unreadable)
    return Rule(packages=(), exact=True)
