"""Repairs of a cut model without training: factors of its norms, and a least-squares refit of its output projections.

Each is fitted on one part of the calibration text and kept only if it lowers the KL divergence from the parent on another part.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..axis_map import Axis, Family
from ..family_map import family_of
from ..sizes import Sizes, sizes_of
from .grams import Grams
from .kept import Kept
from .norm_outputs import NormOutputs, hidden_norms, nearest
from .parent_outputs import ParentOutputs
from .structured import cut, norm_factors, part_rows, scaled_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it before a Gram matrix is inverted (SparseGPT's value)."""
Text = Sequence[Mapping[str, Tensor]]
GramsOf = Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What one repair did."""

    name: str
    """``norms``, ``attention`` or ``ffn``."""
    before: float
    """KL divergence from the parent on held-out windows, in nats per token."""
    after: float
    kept: bool
    """Whether it lowered the divergence; otherwise the model is as before."""

    def record(self) -> dict[str, Any]:
        """For the stage's facts."""
        return {"repair": self.name, "kl_before": self.before, "kl_after": self.after, "kept": self.kept}


def cut_and_repair(
    model: "PreTrainedModel",
    kept: Kept,
    fit: Text,
    held_out: Text,
    *,
    leave: Iterable[str] = (),
    grams: GramsOf | None = None,
    judge: ParentOutputs | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple["PreTrainedModel", list[Repair]]:
    """``cut`` with release, and then each repair that applies.

    Args:
        model: The parent, in fp32; it cannot be used afterwards.
        kept: What stays.
        fit: Text that repairs are fitted on.
        held_out: Text that decides whether they are kept.
        leave: Matrices of the parent whose zeros are a mask: they are not refitted.
        grams: Gives the Gram matrices of linears of the parent on ``fit``, where they are known; None = they are summed.
        judge: The parent's outputs on other text, which decides in place of ``held_out``.
        tell: Gets a line per repair.

    Returns:
        (the student, what each repair did).
    """
    family = family_of(model)
    before = sizes_of(model.config, family)
    after = kept.sizes(before)
    judge = judge or ParentOutputs(model, held_out)
    # what the choice of factors reads of the parent, while it is there
    norms = None
    if _scales(family, before, after):
        norms = NormOutputs(model, fit, list(hidden_norms(family, kept)), kept.hidden), ParentOutputs(model, fit)
    summed: GramsOf = (lambda names: Grams(model, fit, names)) if grams is None else grams
    refits = _refits(model, family, summed, kept, before, set(leave))
    student = cut(model, kept, release=True)
    done: list[Repair] = []
    start = judge.kl(student)
    if norms is not None:
        theirs, fitted = norms
        done.append(_tried(student, "norms", judge, lambda: _choose_factors(student, theirs, fitted, kept, before), tell))
    for name, weights in refits.items():
        done.append(_tried(student, name, judge, lambda weights=weights: _replace(student, weights), tell))
    last = judge.kl(student)
    tell(f"  KL from the parent on held-out windows: {start:.4f} as cut, {last:.4f} after repairs")
    return student, done


def _tried(
    student: "PreTrainedModel", name: str, judge: ParentOutputs, work: Callable[[], dict[str, Tensor]], tell: Callable[[str], None]
) -> Repair:
    """Does one repair and undoes it if the divergence is not lower. ``work`` changes the student and returns the former values."""
    before = judge.kl(student)
    former = work()
    after = judge.kl(student)
    better = after < before
    if not better:
        _replace(student, former)
    what = {"norms": "factors of the norms", "attention": "refit of the attention output", "ffn": "refit of the FFN output"}[name]
    tell(f"  {what}: KL {before:.4f} -> {after:.4f} on held-out windows, {'kept' if better else 'not kept'}")
    return Repair(name=name, before=before, after=after, kept=better)


@torch.no_grad()
def _replace(student: "PreTrainedModel", values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes parameters, and returns what was there."""
    former = {}
    for name, value in values.items():
        parameter = student.get_parameter(name)
        former[name] = parameter.detach().clone()
        parameter.copy_(value)
    return former


def refitted(family: Family, axes: Iterable[Axis], layers: int) -> list[str]:
    """Full names of the projections that the repairs refit after a cut along these axes."""
    cut_along = set(axes)
    modules = [family.attention_out] if cut_along & {"heads", "kv_heads"} else []
    modules += [family.ffn_out] if "ffn" in cut_along else []
    return [f"{family.layers_path}.{layer}.{module}" for module in modules for layer in range(layers)]


def _scales(family: Family, before: Sizes, after: Sizes) -> bool:
    """Whether norms average over fewer channels of the hidden states, with a factor to choose."""
    return after.hidden < before.hidden and not family.layer_norm


@torch.no_grad()
def _choose_factors(student: "PreTrainedModel", theirs: NormOutputs, fitted: ParentOutputs, kept: Kept, before: Sizes) -> dict[str, Tensor]:
    """Chooses each norm's factor among sqrt(before / after), 1 and the ratio of energies, and returns the former weights.

    Four choices are compared by the divergence on the fitted text: each kind of factor for all norms, and for each norm the kind that
    brings its outputs nearest to the parent's. Trying every kind norm by norm would take passes over the text for each norm.
    """
    family = family_of(student)
    after = kept.sizes(before)
    full = (before.hidden / after.hidden) ** 0.5
    names = hidden_norms(family, kept)
    # relative to the factor that ``cut`` has applied
    options = {name: (1.0, 1.0 / full, theirs.ratio(name, kept, before, after) / full) for name in names}
    own = NormOutputs(student, fitted.batches, list(names.values()))
    applied = norm_factors(student, before, after)
    near: dict[str, int] = {}
    for name, renamed in names.items():
        # Gemma's final norm also makes up for the larger table of a tied head, and so gives less
        wanted = theirs.outputs(name) * (applied.get(renamed, 1.0) / full)
        near[name] = nearest(options[name], own.outputs(renamed), wanted)
    weights = {renamed: student.get_parameter(f"{renamed}.weight").detach().clone() for renamed in names.values()}
    found: list[tuple[float, dict[str, int]]] = []
    for choice in (*(dict.fromkeys(names, kind) for kind in range(3)), near):
        _put(student, family, names, weights, options, choice)
        found.append((fitted.kl(student), choice))
    _put(student, family, names, weights, options, min(found, key=lambda pair: pair[0])[1])
    return {f"{renamed}.weight": weight for renamed, weight in weights.items()}


def _put(
    student: "PreTrainedModel",
    family: Family,
    names: Mapping[str, str],
    weights: Mapping[str, Tensor],
    options: Mapping[str, Sequence[float]],
    choice: Mapping[str, int],
) -> None:
    """Writes each norm's weight with the chosen factor."""
    for name, renamed in names.items():
        weight = scaled_norm(weights[renamed], options[name][choice[name]], family.norm_offset)
        student.get_parameter(f"{renamed}.weight").copy_(weight)


def _refits(
    model: "PreTrainedModel", family: Family, grams: GramsOf, kept: Kept, before: Sizes, leave: set[str]
) -> dict[str, dict[str, Tensor]]:
    """Repair -> new weights of the student's output projections, by the least squares of their outputs in the parent."""
    wanted = {"attention": (family.attention_out, "heads", kept.heads), "ffn": (family.ffn_out, "ffn", kept.ffn)}
    found: dict[str, dict[str, Tensor]] = {}
    for repair, (module, axis, indices) in wanted.items():
        if indices is None:
            continue
        names = {f"{family.layers_path}.{layer}.{module}": position for position, layer in enumerate(kept.layers)}
        names = {name: position for name, position in names.items() if name not in leave}
        found[repair] = {}
        for name, gram in grams(list(names)):
            position = names[name]
            columns = part_rows(axis, kept.of(axis, position), before)
            rows = part_rows("hidden", kept.hidden, before)
            weight = model.get_parameter(f"{name}.weight").detach()
            turned = family.layer[f"{module}.weight"][0] != "hidden"
            matrix = (weight.T if turned else weight)[torch.tensor(rows, device=weight.device)]
            new = refit(matrix, gram, torch.tensor(columns, device=weight.device)).to(weight.dtype)
            renamed = family.renumbered(f"{name}.weight", kept.layers)
            assert renamed is not None
            found[repair][renamed] = new.T if turned else new
        if not found[repair]:
            del found[repair]
    return found


def refit(matrix: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
    """The matrix on some of the inputs whose outputs are nearest to those on all of them, in the mean of squares over the text.

    ``W G[:, K] (G[K, K] + damping)^-1``, from the normal equations of ``E ||W a - W' a_K||^2`` with ``G = E[a a^T]``.

    Args:
        matrix: W [out, in].
        gram: G [in, in], fp64.
        columns: K, the inputs that stay.

    Returns:
        W' [out, len(K)], fp64.
    """
    inner = gram[columns][:, columns]
    mean = inner.diagonal().mean()
    # channels that are always zero leave nothing to fit: the damping keeps their weights as they are
    damping = (DAMPING * mean).clamp(min=torch.finfo(torch.float32).tiny)
    kept = matrix.double()[:, columns]
    # around the kept weights: what damping pulls to is the plain cut, not zero
    left = matrix.double() @ gram[:, columns] - kept @ inner
    return kept + torch.linalg.solve(inner + damping * torch.eye(len(inner), dtype=inner.dtype, device=inner.device), left.T).T
