"""Proves that an export is the measured model: element by element against its source, and later by recorded hashes.

Hashes cover the fp32 tensor that the independent reader rebuilds, not the file: they describe the numbers that a runtime multiplies with,
however their bytes are arranged.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from ..readers.compressed_tensors import PackedFolder
from ..readers.gguf_model import GgufModel
from ..readers.open import ExportReader, open_export
from ..readers.tensors import Decoded
from .exact_kv_cache import cache_differences, cache_values
from .gguf_metadata import code_problems

if TYPE_CHECKING:
    from ..source.quantized_source import ExportSource


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Result of the independent reader for an export."""

    weights: dict[str, str]
    """``weight_hash`` of each rebuilt tensor by original name."""
    scales: dict[str, str]
    """``weight_hash`` of the scales of each quantized module, and of each attention module whose keys and values are rounded."""
    problems: list[str]
    """Differences from the source, one sentence each; [] if the export is exact."""


def weight_hash(values: NDArray[np.float32]) -> str:
    """Return the hex sha256 of a tensor's little-endian fp32 bytes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").data).hexdigest()


def prove(folder: Path, source: "ExportSource") -> Proof:
    """Rebuild every tensor of an export, compare it with its source and hash it; each packed module is decoded only once.

    Raises:
        UserError: the export cannot be read.
    """
    opened = open_export(folder)
    quantized = {f"{module}.weight": module for module in source.state.modules}
    wanted = set(quantized) | set(source.plain)
    shapes = opened.shapes()
    problems = [f"{name} is missing" for name in sorted(wanted - set(shapes))]
    problems += [f"{name} is not in the source" for name in sorted(set(shapes) - wanted)]
    problems += cache_differences(opened, source)
    weights: dict[str, str] = {}
    scales: dict[str, str] = {}
    for name in shapes:
        module = name.removesuffix(".weight")
        # one tensor at a time: memory holds it twice, rebuilt and expected
        rebuilt, packed = _decoded(opened, name)
        weights[name] = weight_hash(rebuilt)
        if packed is not None:
            scales[module] = _scale_hash(opened, module, packed)
            # GGUF blocks are wider than some codes, so equal weights do not prove codes in range
            problems += code_problems(module, packed, source.state.spec_of(module)) if isinstance(opened, GgufModel) else []
        # the others are among the problems already
        if name in wanted:
            expected = opened.as_stored(name, source_weight(source, name, quantized.get(name)))
            # equal in every element, without a tolerance: exporters move bits
            if not np.array_equal(expected, rebuilt):
                problems.append(f"{name} is not the source's: {_differing(expected, rebuilt)}")
    scales |= {name: weight_hash(values) for name, values in cache_values(opened).items()}
    return Proof(weights=weights, scales=scales, problems=problems)


def _decoded(opened: ExportReader, name: str) -> tuple[NDArray[np.float32], Decoded | None]:
    """Return (a tensor as fp32, the decoded module of a packed weight or None for a plain tensor)."""
    module = name.removesuffix(".weight")
    if module not in opened.modules:
        return opened.tensor(name), None
    packed = opened.decode(module)
    return packed.weight, packed


def source_weight(source: "ExportSource", name: str, module: str | None) -> NDArray[np.float32]:
    """Return an fp32 tensor of a quantized folder: a module's decoded weight, or a plain tensor (``module`` None)."""
    if module is None:
        return source.tensor(name).float().numpy()
    return source.state.dequantized(module).numpy()


def check_recorded(folder: Path, record: dict[str, Any]) -> tuple[int, list[str]]:
    """Rebuild every tensor of an export and compare it with the hashes in ``decoct.json`` (exports of other tools have none).

    Every flipped bit of a tensor's bytes is found: in a code or plain value by the hash, in a scale by the hash of the scales, in unused
    bits and shapes by the reader.

    Returns:
        (number of tensors compared with a hash, one sentence per problem).
    """
    try:
        opened = open_export(folder)
        shapes = opened.shapes()
        cache = cache_values(opened)
    except UserError as error:
        return 0, [str(error)]
    # None: another tool's export, which can only be read, not compared
    recorded = record.get("export", {}).get("weights")
    problems = [] if recorded is None else [f"{name} is missing" for name in sorted(set(recorded) - set(shapes))]
    scales = record.get("export", {}).get("scales") or {}
    problems += [
        f"{name}: its k_scale and v_scale are not those that were exported"
        for name, values in cache.items()
        if recorded is not None and scales.get(name) != weight_hash(values)
    ]
    compared = 0
    for name in shapes:
        try:
            rebuilt, packed = _decoded(opened, name)
            hashes = None if recorded is None else record["export"].get("scales")
            problem = None if recorded is None or packed is None else _scale_problem(opened, name.removesuffix(".weight"), packed, hashes)
            found = weight_hash(rebuilt)
        except UserError as error:
            # the other tensors are examined too, so that the report names all damaged ones
            problems.append(str(error))
            continue
        if problem:
            problems.append(problem)
        if recorded is not None:
            compared += 1
            if recorded.get(name) != found:
                what = "is not the weight that was exported" if name in recorded else "was not there when the model was exported"
                problems.append(f"{name} {what} (sha256 of the rebuilt fp32 tensor)")
    return compared, problems


def _scale_hash(opened: ExportReader, name: str, module: Decoded) -> str:
    """Return the hash of a module's scales, with its global scale and the scale and zero point of its inputs if they are stored."""
    inputs, whole = (opened.inputs(name), opened.global_scale(name)) if isinstance(opened, PackedFolder) else (None, None)
    beside = [] if whole is None else [whole]
    beside += [] if inputs is None or inputs.scale is None else [inputs.scale, inputs.zero]
    # one hash for all numbers that a module stores beside its codes
    return weight_hash(np.append(module.scales.ravel(), np.array(beside, np.float32)) if beside else module.scales)


def _scale_problem(opened: ExportReader, name: str, module: Decoded, recorded: dict[str, str] | None) -> str | None:
    """Return what is wrong with a module's scales; the weights do not show it where all codes are zero.

    Records of older exports have no hash of the scales (``recorded`` None); there, decoct stored groups of zeros with scale 1.
    """
    if recorded is not None:
        return None if recorded.get(name) == _scale_hash(opened, name, module) else f"{name}: its scales are not those that were exported"
    # [out, groups]: groups of zeros, where a changed scale changes no weight
    empty = ~module.codes.reshape(*module.scales.shape, -1).any(axis=2)
    return f"{name}.weight_scale: a group of zeros has another scale than 1" if (module.scales[empty] != 1).any() else None


def _differing(expected: NDArray[np.float32], found: NDArray[np.float32]) -> str:
    if expected.shape != found.shape:
        return f"shape {found.shape} instead of {expected.shape}"
    return f"{int((expected != found).sum())} of {expected.size} elements differ"
