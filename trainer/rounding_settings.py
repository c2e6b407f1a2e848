"""What the settings of a rounding stage come to: the method, and whether the model is read whole or layer by layer. It imports no torch.

``decoct plan`` and the stage (``stages.quantize``) both ask here.
"""

from typing import TYPE_CHECKING

from ..models.common.host_memory import available_bytes
from ..qat.rounding_method import RoundingMethod

if TYPE_CHECKING:
    from .settings_quantization import QuantizeSettings

BATCH_TOKENS = 4096
"""Calibration tokens per forward pass, padding included. The value is fixed, so that sums are added in the same order on every machine."""


def rounding_of(settings: "QuantizeSettings") -> RoundingMethod:
    """The rounding method with its options. Options that the method does not use keep their defaults."""
    dials = {name: getattr(settings, name) for name in ("scale", "damping", "activation_order", "weighted")}
    # None means that the method has no such option
    given = {name: value for name, value in dials.items() if value is not None}
    return RoundingMethod(
        method=settings.method, activations=settings.activations, kv_cache=settings.kv_cache, transform=settings.transform, **given
    )


def memory_in_whole(parameters: int) -> int:
    """Approximate bytes to round a model in host memory: fp32 weights (4 per parameter), codes (1), and a copy of one output file."""
    return 5 * parameters + min(4 * parameters, 5 * 10**9)


def wants_streaming(settings: "QuantizeSettings", parameters: int) -> bool:
    """Whether a model with this many parameters is rounded layer by layer from its files, if the files allow it."""
    # None where the system does not report it: then ``auto`` keeps the model whole
    room = available_bytes()
    too_large = room is not None and memory_in_whole(parameters) > room
    return settings.stream == "always" or (settings.stream == "auto" and too_large)
