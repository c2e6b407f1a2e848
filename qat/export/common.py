"""What the exporters of packed weights share: the lattice of a module, checked casts, and which 16-bit float the rest is stored in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.families import FUSED
from ..source.plain_weights import holds
from ..source.quantized_source import ExportSource
from ..spec import QuantSpec

FUSED_NAMES = ("qkv_proj", "gate_up_proj")
"""What servers call those matrices."""
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module's lattice with a scale for each row and group: w = (codes - zeros) * scales."""

    spec: QuantSpec
    codes: Tensor
    """int8 [out, in]."""
    scales: Tensor
    """fp32 [out, groups]."""
    zeros: Tensor | None
    """int8 [out, groups]; None when symmetric."""

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None: the whole row."""
        return None if isinstance(self.spec.group_size, str) else self.spec.group_size


def layer(source: ExportSource, module: str) -> Layer:
    """The lattice of a module; one scale for the whole matrix is repeated for each row, which is the same numbers."""
    state = source.state
    codes, scales, zeros = state.codes[module], state.scales[module], state.zero_points.get(module)
    if tuple(scales.shape) == (1, 1) and state.spec_of(module).group_size == "tensor":
        scales = scales.expand(codes.shape[0], 1)
        zeros = None if zeros is None else zeros.expand(codes.shape[0], 1)
    return Layer(spec=state.spec_of(module), codes=codes, scales=scales, zeros=zeros)


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes as int32 in [0, 2^bits - 1]; ValueError for one out of range, which would spill into its neighbours."""
    moved = codes.to(torch.int32) + (1 << (bits - 1))
    if moved.numel() and not 0 <= int(moved.min()) <= int(moved.max()) < 1 << bits:
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}, which {bits} bits do not hold")
    return moved


def exact_scales(scales: Tensor, dtype: torch.dtype, format: str, module: str) -> Tensor:
    """Scales in another dtype; UserError unless every one stays what it is."""
    stored = scales.to(dtype)
    if not torch.equal(stored.to(torch.float32), scales):
        raise UserError(
            f"{format} stores scales in {NAMES[dtype]}, which does not hold those of {module} exactly; "
            "quantize with scale_grid 'bf16_fp16', whose scales every format holds"
        )
    return stored.contiguous()


def exact_plain(source: ExportSource, name: str, dtype: torch.dtype) -> Tensor:
    """An unquantized tensor in a 16-bit float; UserError unless every value stays what it is."""
    tensor = source.tensor(name)
    if not holds(tensor, dtype):
        word = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, NAMES[dtype])
        raise UserError(
            f"{source.plain[name]}: {name} has values that {word} does not hold, so the export would not be the model that was "
            "measured; quantize the model again (the stages 'qat' and 'quantize' store such tensors on the bf16 grid)"
        )
    return tensor.to(dtype).contiguous()


def plain_dtype(source: ExportSource, preferred: Sequence[torch.dtype]) -> torch.dtype:
    """The first of the dtypes that holds every unquantized tensor exactly; the last when none does (writing then says which)."""
    for dtype in preferred[:-1]:
        if all(holds(source.tensor(name), dtype) for name in source.plain):
            return dtype
    return preferred[-1]


def plain_config(source: ExportSource, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of the model without anything of this machine in it, no code, and with the dtype that is stored."""
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "_name_or_path", "auto_map")}
    return config | {"dtype": NAMES[dtype]}


def check_modules(source: ExportSource, format: str, bits: Sequence[int], *, head: bool, inputs: bool = False) -> None:
    """Refuse lattices that a format of integer codes cannot hold, or that servers cannot load.

    Raises:
        UserError: naming the first such module and the nearest setting that can be stored.
    """
    state = source.state
    if not state.modules:
        raise UserError(f"{source.folder} has no quantized linears, so that there is nothing to pack; export to 'safetensors'")
    if state.activations is not None and not inputs:
        raise UserError(
            f"{format} cannot say that inputs are rounded to {state.activations.kind}, so servers would compute another model; export to "
            "compressed-tensors, or train without activations"
        )
    for module in state.modules:
        spec = state.spec_of(module)
        if spec.kind != "int":
            raise UserError(f"{format} holds integer codes, and {module} has kind={spec.kind!r}; quantize with kind='int'")
        if module == source.structure.embedding:
            raise UserError(f"{format}: readers take {module} for a plain table; leave 'embedding' out, or export to gguf")
        if spec.bits not in bits:
            nearest = min((b for b in (4, 8) if b in bits), key=lambda b: (abs(b - spec.bits), -b))
            raise UserError(f"{format} cannot hold bits={spec.bits} ({module}); quantize with bits={nearest}")
        if module.endswith("lm_head") and source.config.get("tie_word_embeddings"):
            raise UserError(f"{module} is tied to the embedding (tie_word_embeddings), which stays plain; skip it or untie it first")
        if module.endswith("lm_head") and not head:
            raise UserError(f"{format}: readers take {module} for a plain matrix; quantize with skip: ['{module}']")
    for group in fused_groups(state.modules):
        specs = {module: state.spec_of(module) for module in group}
        if len(set(specs.values())) > 1:
            first, other = group[0], next(module for module in group if specs[module] != specs[group[0]])
            raise UserError(
                f"{other} has another lattice than {first} ({_said(specs[other])}; {_said(specs[first])}), but servers make one matrix "
                f"of them; give all of {', '.join(name.rsplit('.', 1)[-1] for name in group)} the same bits and group_size"
            )


def fused_groups(modules: Iterable[str]) -> list[list[str]]:
    """The modules that servers make one matrix of, together, in their order there."""
    present = set(modules)
    parents = dict.fromkeys(name.rpartition(".")[0] for name in present)
    groups = ([f"{parent}.{part}" for part in parts if f"{parent}.{part}" in present] for parent in parents for parts in FUSED)
    return [group for group in groups if group]


def _said(spec: QuantSpec) -> str:
    return f"bits={spec.bits}, group_size={spec.group_size}, symmetric={str(spec.symmetric).lower()}"
