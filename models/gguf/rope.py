"""Rotary positions of a GGUF file as ``rope_parameters`` of a transformers config.

llama.cpp keeps the base and a scaling in the metadata, Llama 3's scaling as one divisor per frequency (``rope_freqs.weight``) and that of
long-context Phi-3 as two such tensors. Llama 3's four numbers are found from the divisors, and give the same divisors or are refused.

Source: llama.cpp ``llama-model.cpp`` (load_hparams), ``conversion/llama.py`` and ``phi3.py``; transformers ``modeling_rope_utils.py``.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UserError
from .fields import Fields, shortest
from .unpack import unpack

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are part of the hyperparameters."""
_TRAINED = (8192, 4096, 2048, 16384, 32768, 65536, 131072, 1024, 512, 256, 128, 64)
"""Context lengths before scaling that are tried, the usual ones first."""
_TOLERANCE = 1e-5


def rope_parameters(fields: Fields, head_dim: int) -> dict[str, Any]:
    """``rope_parameters`` of a model with one kind of attention.

    Args:
        fields: The file's metadata.
        head_dim: Channels per attention head.

    Raises:
        UserError: a scaling that transformers has no equal of, or that cannot be told from the file.
    """
    # llama.cpp's default base
    theta = fields.number(".rope.freq_base", 10000.0)
    width = fields.whole(".rope.dimension_count", head_dim, least=2)
    if width > head_dim:
        raise fields.error(".rope.dimension_count", width, f"at most the {head_dim} channels of a head")
    rope: dict[str, Any] = {"rope_theta": theta}
    # part of the channels of a head is rotated (StableLM, Nemotron, Phi)
    if width != head_dim:
        rope["partial_rotary_factor"] = width / head_dim
    # Llama 3's scaling is stored as divisors
    if "rope_freqs.weight" in fields.file.tensors:
        return rope | _llama3(fields, theta, width)
    return rope | _scaling(fields, width)


def _scaling(fields: Fields, width: int) -> dict[str, Any]:
    tensors = fields.file.tensors
    if any(name in tensors for name in ROPE_TENSORS[1:]):
        return _longrope(fields, width)
    # older files have only the factor
    factor = fields.number(".rope.scaling.factor", None) or fields.number(".rope.scale_linear", None)
    kind = fields.text(".rope.scaling.type", "linear" if factor and factor != 1 else "none")
    if kind == "none" or (kind == "linear" and factor in (None, 1)):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or factor is None:
        raise fields.error(".rope.scaling.type", kind, "none, linear, or yarn with a factor")
    for key in (".rope.scaling.attn_factor", ".rope.scaling.yarn_log_multiplier", ".rope.scaling.yarn_ext_factor"):
        if fields.get(key) not in (None, 1.0):
            raise fields.error(key, fields.get(key), "no such entry: only plain yarn is read")
    trained = fields.whole(".rope.scaling.original_context_length")
    bounds = {name: fields.number(f".rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
        **{name: value for name, value in bounds.items() if value is not None},
    }


def _longrope(fields: Fields, width: int) -> dict[str, Any]:
    long, short = (_divisors(fields, f"rope_factors_{name}.weight", width) for name in ("long", "short"))
    trained, context = fields.whole(".rope.scaling.original_context_length"), fields.whole(".context_length")
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [shortest(float(one)) for one in long],
        "short_factor": [shortest(float(one)) for one in short],
        "original_max_position_embeddings": trained,
    }
    given = fields.number(".rope.scaling.attn_factor", None)
    # transformers computes this factor itself; only another one has to be written down
    usual = math.sqrt(1 + math.log(context / trained) / math.log(trained)) if context > trained else 1.0
    if given is not None and abs(given - usual) > 1e-4:
        found["attention_factor"] = given
    return found


def _llama3(fields: Fields, theta: float, width: int) -> dict[str, Any]:
    divisors = _divisors(fields, "rope_freqs.weight", width)
    factor = shortest(float(divisors.max()))
    # no divisor above 1: the scaling is plain
    if factor <= 1:
        return {"rope_type": "default"}
    named = fields.whole(".rope.scaling.original_context_length", None)
    # a file need not name the length before scaling: usual ones are tried, and only one that gives the same divisors is taken
    for trained in (named, *_TRAINED) if named else _TRAINED:
        for high in (4.0, 2.0, 8.0, 16.0):
            guess = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": trained}
            if np.allclose(_llama3_divisors(guess, theta, width), divisors, rtol=_TOLERANCE, atol=0):
                return {"rope_type": "llama3", **guess}
    raise UserError(
        f"{fields.file.path}: rope_freqs.weight divides the frequencies in a way that is not Llama 3's scaling with a usual context "
        "before scaling; transformers has no equal that could be found, so the model cannot be imported"
    )


def _llama3_divisors(rope: dict[str, Any], theta: float, width: int) -> NDArray[np.float64]:
    """The divisor of each frequency, fp64 [width / 2]: 1 for short wavelengths, the factor for long ones, between them interpolated."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, width, 2) / width)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _divisors(fields: Fields, name: str, width: int) -> NDArray[np.float32]:
    tensor = fields.file.tensors.get(name)
    if tensor is None or tensor.type.name != "F32" or tensor.shape != (width // 2,):
        found = "missing" if tensor is None else f"{tensor.type.name} of shape {tensor.shape}"
        raise UserError(f"{fields.file.path}: {name} is {found}; expected F32 of shape ({width // 2},)")
    values = unpack("F32", fields.file.row_blocks(tensor, 0, 1).reshape(-1, 4)).reshape(-1)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise UserError(f"{fields.file.path}: {name} holds numbers that are not above 0; fetch or convert the file again")
    return values
