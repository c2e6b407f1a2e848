"""QuantState: the codes and scales of a model, how they lie in a model folder, and the checks when they are read back.

A quantized folder holds ``model.safetensors`` with codes * scales in fp32 under the original names, and beside it
``quant.safetensors``: ``<module>.codes`` int8 [out, in], ``<module>.scale`` fp32 [out, groups], for an asymmetric lattice
``<module>.zero_point`` int8 [out, groups], for inputs with a stored scale ``<module>.input_scale`` fp32 and ``.input_zero`` int8, one
number each. ``decoct.json`` records the QuantSpec, the modules and a hash of everything. Export reads the codes and never rounds again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.errors import UserError
from .fake_quant import dequantize
from .fake_quant.reference import GRID_DTYPES
from .spec import ActivationSpec, QuantSpec

QUANT_FILE = "quant.safetensors"
_CODES, _SCALE, _ZERO, _INPUT_SCALE, _INPUT_ZERO = ".codes", ".scale", ".zero_point", ".input_scale", ".input_zero"


@dataclass(frozen=True, kw_only=True)
class QuantState:
    """What is stored and served: codes and scales per module, on the CPU."""

    spec: QuantSpec
    """The lattice of every module that has none of its own."""
    modules: tuple[str, ...]
    """Full module names, in module order."""
    codes: dict[str, Tensor]
    """int8 [out, in] in [qmin, qmax] by module name."""
    scales: dict[str, Tensor]
    """fp32 [out, groups] on the spec's grid by module name."""
    zero_points: dict[str, Tensor] = field(default_factory=dict)
    """int8 [out, groups] in [qmin, qmax] by module name; modules with a symmetric lattice have none."""
    own_specs: dict[str, QuantSpec] = field(default_factory=dict)
    """Lattices of modules that differ from ``spec``."""
    activations: ActivationSpec | None = None
    """How the modules' inputs are rounded; None = not at all."""
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    """fp32 [] by module name: scales of inputs that are rounded with a stored one."""
    input_zeros: dict[str, Tensor] = field(default_factory=dict)
    """int8 [] by module name: zero points of inputs whose stored lattice has one."""

    def spec_of(self, module: str) -> QuantSpec:
        """The lattice of a module."""
        return self.own_specs.get(module, self.spec)

    def dequantized(self, module: str) -> Tensor:
        """fp32 [out, in] = (codes - zero points) * scales: the weight that plain runtimes see."""
        return dequantize(self.codes[module], self.scales[module], self.zero_points.get(module))

    def tensors(self) -> dict[str, Tensor]:
        """The content of ``quant.safetensors``."""
        return {name + suffix: held[name].contiguous() for suffix, held in self._parts() for name in self.modules if name in held}

    def _parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield _CODES, self.codes
        yield _SCALE, self.scales
        yield _ZERO, self.zero_points
        yield _INPUT_SCALE, self.input_scales
        yield _INPUT_ZERO, self.input_zeros

    def hash(self) -> str:
        """sha256 over specs, module names, shapes, codes, scales and whatever else there is."""
        digest = hashlib.sha256(self.spec.hash().encode())
        if more := self._more():
            digest.update(json.dumps(more, sort_keys=True).encode())
        for name in self.modules:
            for tensor in (held[name] for _, held in self._parts() if name in held):
                digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """The ``quant`` entry of ``decoct.json``."""
        return {"spec": self.spec.to_json(), "modules": list(self.modules), "hash": self.hash(), **self._more()}

    def _more(self) -> dict[str, Any]:
        own = {"own_specs": {name: spec.to_json() for name, spec in sorted(self.own_specs.items())}} if self.own_specs else {}
        return own | ({"activations": self.activations.to_json()} if self.activations else {})

    def check(self, where: str) -> None:
        """UserError beginning with ``where`` (a file) unless every code is in range and every scale positive and on the grid."""
        for name in self.modules:
            spec = self.spec_of(name)
            problem = _problem(self.codes[name], self.scales[name], spec) or _zero_problem(
                self.zero_points.get(name), self.scales[name], spec
            )
            if problem := problem or self._input_problem(name):
                raise UserError(f"{where}: module {name}: {problem}. The file is damaged or not decoct's; quantize again.")

    def _input_problem(self, name: str) -> str | None:
        stored = self.activations is not None and self.activations.scaling == "static"
        for part, held, needed in (
            ("scale", self.input_scales, stored),
            ("zero point", self.input_zeros, stored and self.activations is not None and not self.activations.symmetric),
        ):
            if (name in held) != needed:
                return f"its inputs' {part} is {'missing' if needed else 'stored, but the activations have none'}"
            if needed and held[name].numel() != 1:
                return f"its inputs' {part} has shape {tuple(held[name].shape)}; it is one number"
        if stored and not (float(self.input_scales[name]) > 0 and bool(torch.isfinite(self.input_scales[name]).all())):
            return f"its inputs' scale is {float(self.input_scales[name])}, not a positive finite number"
        return None


def _zero_problem(zeros: Tensor | None, scales: Tensor, spec: QuantSpec) -> str | None:
    if spec.symmetric:
        return None if zeros is None else "zero points are stored for a symmetric lattice"
    if zeros is None:
        return "zero points of an asymmetric lattice are missing"
    if zeros.dtype != torch.int8 or zeros.shape != scales.shape:
        return f"zero points are {zeros.dtype} of shape {tuple(zeros.shape)}, not int8 of shape {tuple(scales.shape)}"
    if zeros.numel() and not spec.qmin <= int(zeros.min()) <= int(zeros.max()) <= spec.qmax:
        return f"zero points span {int(zeros.min())}..{int(zeros.max())}, outside {spec.qmin}..{spec.qmax}"
    return None


def _problem(codes: Tensor, scales: Tensor, spec: QuantSpec) -> str | None:
    """Why these tensors are no codes and scales of ``spec``; None when they are."""
    if codes.dtype != torch.int8 or codes.ndim != 2:
        return f"codes are {codes.dtype} of shape {tuple(codes.shape)}, not an int8 matrix"
    try:
        expected = spec.scale_shape(*codes.shape)
    except ValueError as error:
        return str(error)
    if scales.dtype != torch.float32 or tuple(scales.shape) != expected:
        return f"scales are {scales.dtype} of shape {tuple(scales.shape)}, not float32 of shape {expected}"
    if codes.numel() and not spec.qmin <= int(codes.min()) <= int(codes.max()) <= spec.qmax:
        return f"codes span {int(codes.min())}..{int(codes.max())}, outside {spec.qmin}..{spec.qmax}"
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        return "a scale is not a positive finite number"
    grid = spec.grid
    rounded = scales.to(GRID_DTYPES[grid.dropped_bits]).to(torch.float32).clamp(grid.smallest, grid.largest)
    if not torch.equal(rounded, scales):
        return f"a scale is not on the grid {spec.scale_grid}"
    return None


def load_quant_state(folder: Path) -> QuantState:
    """The codes and scales of a quantized model folder, checked against its record and its weights.

    Raises:
        UserError: the folder holds no codes, they are damaged, or ``model.safetensors`` holds other weights than codes * scales.
    """
    from ..models.folder import read_record

    file = folder / QUANT_FILE
    record = read_record(folder).get("quant")
    if record is None or not file.is_file():
        raise UserError(f"{folder} holds no codes ({QUANT_FILE} and its record): run the stage 'qat' or 'quantize' on the model first.")
    state = _from_record(record, _read_tensors(file), file)
    state.check(str(file))
    if state.hash() != record.get("hash"):
        raise UserError(f"{file}: codes or scales differ from what decoct.json recorded; the file was changed. Quantize again.")
    _check_weights(folder, state)
    return state


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from ..models.safetensors_file import read_header

    read_header(file)
    return load_file(file)


def _from_record(record: Any, tensors: Mapping[str, Tensor], file: Path) -> QuantState:
    """The state that ``decoct.json`` describes, made of exactly the tensors of the file."""
    try:
        spec, modules = QuantSpec.from_json(record["spec"]), tuple(str(name) for name in record["modules"])
        own = {str(name): QuantSpec.from_json(given) for name, given in record.get("own_specs", {}).items()}
        activations = ActivationSpec.from_json(record["activations"]) if record.get("activations") else None
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{file.parent / 'decoct.json'}: the entry 'quant' cannot be read ({error}); quantize again.") from error
    expected = {name + suffix for name in modules for suffix in (_CODES, _SCALE)}
    expected |= {name + _ZERO for name in modules if not own.get(name, spec).symmetric}
    if activations is not None and activations.scaling == "static":
        expected |= {name + suffix for name in modules for suffix in (_INPUT_SCALE, *([] if activations.symmetric else [_INPUT_ZERO]))}
    differing = sorted(expected ^ set(tensors))
    if differing:
        what = "missing" if differing[0] in expected else "unexpected"
        raise UserError(f"{file}: tensor {differing[0]} is {what} ({len(differing)} differ from decoct.json); quantize again.")
    return QuantState(
        spec=spec,
        modules=modules,
        codes=_held(tensors, modules, _CODES),
        scales=_held(tensors, modules, _SCALE),
        zero_points=_held(tensors, modules, _ZERO),
        own_specs=own,
        activations=activations,
        input_scales=_held(tensors, modules, _INPUT_SCALE),
        input_zeros=_held(tensors, modules, _INPUT_ZERO),
    )


def _held(tensors: Mapping[str, Tensor], modules: tuple[str, ...], suffix: str) -> dict[str, Tensor]:
    return {name: tensors[name + suffix] for name in modules if name + suffix in tensors}


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for a single or a sharded ``model.safetensors``."""
    from ..models.safetensors_file import read_header

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(read_header(single).tensors, single)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} has neither a readable model.safetensors nor {index.name} ({error}); quantize again.") from error
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise UserError(f"{index}: {outside[0]!r} lies outside the folder; the index is damaged or foreign.")
    for file in set(files.values()):
        read_header(folder / file)
    return {name: folder / file for name, file in files.items()}


def _check_weights(folder: Path, state: QuantState) -> None:
    """UserError unless the stored fp32 weights are the codes times the scales, element by element."""
    from safetensors import safe_open

    files = _weight_files(folder)
    for name in state.modules:
        key = f"{name}.weight"
        if key not in files:
            raise UserError(f"{folder}: {key} is missing from the weights, yet {QUANT_FILE} has codes for it; quantize again.")
        with safe_open(files[key], framework="pt") as opened:
            if key not in opened.keys():  # noqa: SIM118 - not a mapping
                raise UserError(f"{files[key]}: {key} is not in the file that the index names; the folder is damaged.")
            weight = opened.get_tensor(key)
        if weight.dtype != torch.float32 or not torch.equal(weight, state.dequantized(name)):
            raise UserError(f"{files[key]}: {key} is not codes * scales of {QUANT_FILE}; the weights were changed. Quantize again.")
