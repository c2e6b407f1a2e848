"""QuantState: the codes and scales of a model, their layout in a model folder, and the checks on reading them.

A quantized folder holds ``model.safetensors`` with codes * scales in fp32 under the original names, and
``quant/codes.safetensors``: ``<module>.codes`` int8 [out, in], ``<module>.scale`` fp32 [out, groups], for an asymmetric spec
``<module>.zero_point`` int8 [out, groups], for nvfp4 ``.global_scale`` fp32 [1], for q2_k to q6_k the parts of ``SubScales`` as
``.sub_scale``, ``.minimum_scale`` and ``.sub_minimum``, for inputs with a stored scale ``.input_scale`` fp32 and ``.input_zero`` int8, one
number each; ``kv_cache_scales.py`` adds those of keys and values. ``decoct.json`` records the QuantSpec, the modules and a hash of
everything. Export reads the codes and never rounds again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.folder.codes_file import CODES, codes_file
from ..fake_quant import Encoded, decode
from ..fake_quant.super_reference import SubScales
from ..spec import ActivationSpec, QuantSpec
from .code_checks import grid_problem
from .kv_cache_scales import CacheState, cache_from_record

QUANT_FILE = CODES
"""File in which ``save_model_folder`` writes the codes."""
_CODES, _SCALE, _ZERO, _GLOBAL = ".codes", ".scale", ".zero_point", ".global_scale"
_SUB_SCALE, _MINIMUM, _SUB_MINIMUM = ".sub_scale", ".minimum_scale", ".sub_minimum"
_INPUT_SCALE, _INPUT_ZERO = ".input_scale", ".input_zero"


@dataclass(frozen=True, kw_only=True)
class QuantState:
    """Codes and scales per module, as stored and served, on the CPU."""

    spec: QuantSpec
    """The spec of every module without an entry in ``own_specs``."""
    modules: tuple[str, ...]
    """Full module names, in module order."""
    codes: dict[str, Tensor]
    """[out, in] by module name, as in ``fake_quant.Encoded``: int8 in [qmin, qmax] for kind int."""
    scales: dict[str, Tensor]
    """fp32 of shape ``spec.scale_shape`` by module name, on the spec's grid (mxfp4: powers of two; nvfp4: float8 e4m3 values)."""
    zero_points: dict[str, Tensor] = field(default_factory=dict)
    """int8 [out, groups] in [qmin, qmax] by module name; modules with a symmetric spec have none."""
    global_scales: dict[str, Tensor] = field(default_factory=dict)
    """fp32 [1] by module name; the module's scales are divided by it (nvfp4 only)."""
    sub_scales: dict[str, SubScales] = field(default_factory=dict)
    """By module name, what the sub-blocks of q2_k to q6_k store."""
    own_specs: dict[str, QuantSpec] = field(default_factory=dict)
    """Specs of modules that differ from ``spec``."""
    activations: ActivationSpec | None = None
    """How the modules' inputs are rounded; None if they are not."""
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    """fp32 [] by module name: scales of inputs with static scaling."""
    input_zeros: dict[str, Tensor] = field(default_factory=dict)
    """int8 [] by module name: zero points of inputs with asymmetric static scaling."""
    cache: CacheState | None = None
    """How keys and values are rounded; None if they are not."""

    @classmethod
    def of(
        cls, spec: QuantSpec, specs: Mapping[str, QuantSpec], encoded: Mapping[str, Encoded], device: str | None = "cpu"
    ) -> "QuantState":
        """Build the state of encoded modules, in the order of ``encoded``.

        Args:
            spec: The common spec; other specs are kept per module.
            specs: Spec by module name.
            encoded: Codes and scales by module name.
            device: Target device of the tensors; None leaves them where they are.
        """

        def held(part: str) -> dict[str, Any]:
            # parts that a module lacks, such as zero points of symmetric codes, get no entry
            found = {name: value for name, one in encoded.items() if (value := getattr(one, part)) is not None}
            return found if device is None else {name: value.to(device) for name, value in found.items()}

        return cls(
            spec=spec,
            modules=tuple(encoded),
            codes=held("codes"),
            scales=held("scales"),
            zero_points=held("zeros"),
            global_scales=held("global_scale"),
            sub_scales=held("sub"),
            own_specs={name: specs[name] for name in encoded if specs[name] != spec},
        )

    def encoded(self, module: str) -> Encoded:
        """Return a module's codes, scales, zero points and global scale."""
        zeros, whole, sub = (held.get(module) for held in (self.zero_points, self.global_scales, self.sub_scales))
        return Encoded(self.codes[module], self.scales[module], zeros, whole, sub)  # pyright: ignore[reportArgumentType]

    def spec_of(self, module: str) -> QuantSpec:
        """Return the spec of a module."""
        return self.own_specs.get(module, self.spec)

    def dequantized(self, module: str) -> Tensor:
        """Return the decoded weight, fp32 [out, in]: (codes - zero points) * scales for kind int."""
        return decode(self.encoded(module), self.spec_of(module))

    def tensors(self) -> dict[str, Tensor]:
        """Return the content of ``quant/codes.safetensors``."""
        own = {name + suffix: held[name].contiguous() for suffix, held in self._parts() for name in self.modules if name in held}
        return own | (self.cache.tensors() if self.cache else {})

    def renamed(self, names: Mapping[str, str]) -> "QuantState":
        """Return the state with renamed modules; modules missing from ``names`` keep their name."""
        # the common case: module and file have one name
        if not names:
            return self

        def of(held: dict[str, Any]) -> dict[str, Any]:
            return {names.get(name, name): value for name, value in held.items()}

        return replace(
            self,
            modules=tuple(names.get(name, name) for name in self.modules),
            codes=of(self.codes),
            scales=of(self.scales),
            zero_points=of(self.zero_points),
            global_scales=of(self.global_scales),
            sub_scales=of(self.sub_scales),
            own_specs=of(self.own_specs),
            input_scales=of(self.input_scales),
            input_zeros=of(self.input_zeros),
            cache=self.cache and self.cache.renamed(names),
        )

    def _parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        # the order is part of the hash
        yield _CODES, self.codes
        yield _SCALE, self.scales
        yield _ZERO, self.zero_points
        yield _GLOBAL, self.global_scales
        for suffix, part in ((_SUB_SCALE, "scales"), (_MINIMUM, "minimum"), (_SUB_MINIMUM, "minimums")):
            yield suffix, {name: found for name, sub in self.sub_scales.items() if (found := getattr(sub, part)) is not None}
        yield _INPUT_SCALE, self.input_scales
        yield _INPUT_ZERO, self.input_zeros

    def hash(self) -> str:
        """Return the sha256 over specs, module names, dtypes, shapes and all tensors."""
        # recorded in folders: the order of parts, and the omission of absent ones, must never change
        digest = hashlib.sha256(self.spec.hash().encode())
        if more := self._more():
            digest.update(json.dumps(more, sort_keys=True).encode())
        own = ((name, held[name]) for name in self.modules for _, held in self._parts() if name in held)
        for name, tensor in (*own, *(self.cache.tensors().items() if self.cache else ())):
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            # as bytes: numpy has no float8
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """Return the ``quant`` entry of ``decoct.json``."""
        return {"spec": self.spec.to_json(), "modules": list(self.modules), "hash": self.hash(), **self._more()}

    def _more(self) -> dict[str, Any]:
        # absent parts are left out, so that the hashes of older folders stay valid
        own = {"own_specs": {name: spec.to_json() for name, spec in sorted(self.own_specs.items())}} if self.own_specs else {}
        own |= {"activations": self.activations.to_json()} if self.activations else {}
        return own | (self.cache.record() if self.cache else {})

    def check(self, where: str) -> None:
        """Check that every code is in range and every scale is positive and on the grid.

        Raises:
            UserError: something is not; the message begins with ``where`` (a file).
        """
        for name in self.modules:
            spec = self.spec_of(name)
            if problem := grid_problem(self.encoded(name), spec) or self._input_problem(name):
                raise UserError(f"{where}: module {name}: {problem}. The file is damaged or not decoct's; quantize again.")
        if self.cache and (problem := self.cache.problem()):
            raise UserError(f"{where}: {problem}. The file is damaged or not decoct's; quantize again.")

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


class NoCodesError(UserError):
    """The model folder holds no codes."""


def load_quant_state(folder: Path) -> QuantState:
    """Load the codes and scales of a quantized model folder, checked against its record and its weights.

    Raises:
        NoCodesError: the folder holds no codes.
        UserError: the codes are damaged, or the weights in ``model.safetensors`` are not codes * scales.
    """
    from ...models.folder.model_folder import read_record

    # 1. codes, scales and the record that describes them
    file = codes_file(folder)
    record = read_record(folder).get("quant")
    if record is None or file is None:
        raise NoCodesError(f"{folder} holds no codes ({QUANT_FILE} and its record): run the stage 'qat' or 'quantize' on the model first.")
    state = _from_record(record, _read_tensors(file), file, folder)
    # before the hash: a code out of range gets a message that names its module
    state.check(str(file))
    if state.hash() != record.get("hash"):
        raise UserError(f"{file}: codes or scales differ from what decoct.json recorded; the file was changed. Quantize again.")
    # 2. model.safetensors beside them, which loads in plain transformers and could have been changed alone
    _check_weights(folder, state, file.name)
    return state


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from ...models.folder.safetensors_read import read_header

    # raises UserError for a damaged file, which the library would report in its own words
    read_header(file)
    return load_file(file)


def _from_record(record: Any, tensors: Mapping[str, Tensor], file: Path, folder: Path) -> QuantState:
    """Build the state that ``decoct.json`` describes; UserError if the file has missing or unexpected tensors."""
    try:
        # a record may have been edited: any of these may be missing or of another type
        spec, modules = QuantSpec.from_json(record["spec"]), tuple(str(name) for name in record["modules"])
        own = {str(name): QuantSpec.from_json(given) for name, given in record.get("own_specs", {}).items()}
        activations = ActivationSpec.from_json(record["activations"]) if record.get("activations") else None
        cache = cache_from_record(record, tensors)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'decoct.json'}: the entry 'quant' cannot be read ({error}); quantize again.") from error
    # exactly the tensors that the specs imply: a surplus one is a fault too, because nothing would ever read it
    expected = {name + suffix for name in modules for suffix in (_CODES, _SCALE)}
    expected |= {name + _ZERO for name in modules if not own.get(name, spec).symmetric}
    expected |= {name + _GLOBAL for name in modules if own.get(name, spec).kind == "nvfp4"}
    forms = {name: form for name in modules if (form := own.get(name, spec).super_block)}
    expected |= {name + _SUB_SCALE for name in forms}
    expected |= {name + suffix for name, form in forms.items() if form.minimum for suffix in (_MINIMUM, _SUB_MINIMUM)}
    if activations is not None and activations.scaling == "static":
        expected |= {name + suffix for name in modules for suffix in (_INPUT_SCALE, *([] if activations.symmetric else [_INPUT_ZERO]))}
    expected |= set(cache.expected() if cache else ())
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
        global_scales=_held(tensors, modules, _GLOBAL),
        sub_scales={name: sub for name in modules if (sub := stored_sub_scales(tensors, name))},
        own_specs=own,
        activations=activations,
        input_scales=_held(tensors, modules, _INPUT_SCALE),
        input_zeros=_held(tensors, modules, _INPUT_ZERO),
        cache=cache,
    )


def stored_sub_scales(tensors: Mapping[str, Tensor], module: str) -> SubScales | None:
    """Return a module's sub-scales from the tensors of ``QuantState.tensors``; None for kinds without super-blocks."""
    scales, minimum, minimums = (tensors.get(module + suffix) for suffix in (_SUB_SCALE, _MINIMUM, _SUB_MINIMUM))
    return None if scales is None else SubScales(scales, minimum, minimums)


def _held(tensors: Mapping[str, Tensor], modules: tuple[str, ...], suffix: str) -> dict[str, Tensor]:
    return {name: tensors[name + suffix] for name in modules if name + suffix in tensors}


def _check_weights(folder: Path, state: QuantState, codes: str) -> None:
    """Raise UserError unless the stored fp32 weights equal codes times scales, element by element."""
    from ...models.folder.tensor_places import safetensors_files, tensor_places
    from ...models.folder.weights import read_tensor

    places = tensor_places(safetensors_files(folder))
    # the model is built only if a name differs: some families store their weights under other names than their modules have
    called: dict[str, str] = {}
    if any(f"{name}.weight" not in places for name in state.modules) and (folder / "config.json").is_file():
        from ...models.folder.structure import model_structure

        called = model_structure(folder).stored_modules()
    for name in state.modules:
        key = f"{called.get(name, name)}.weight"
        if key not in places:
            raise UserError(f"{folder}: {key} is missing from the weights, yet {codes} has codes for it; quantize again.")
        # one weight at a time: memory holds one fp32 matrix and its decoded counterpart
        weight = read_tensor(places[key].file, key)
        # without a tolerance: both files were written from the same numbers
        if weight.dtype != torch.float32 or not torch.equal(weight, state.dequantized(name)):
            raise UserError(f"{places[key].file}: {key} is not codes * scales of {codes}; the weights were changed. Quantize again.")
