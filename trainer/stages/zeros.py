"""Exact zeros of a stage's input: their record, and the hook that keeps them at zero (law 4, docs/architecture.md)."""

from typing import TYPE_CHECKING, Any

from ...models.folder.loading import find_model_folder
from ...models.folder.model_folder import read_record
from ...models.pruning.kept_record import ROOT
from ...models.pruning.zeros_record import TOLD_FROM, check_sparse, sparse_modules, unlisted_zeros
from .context import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..loop.hooks import StepHook


def input_record(context: StageContext) -> list[str]:
    """Names of the matrices of the stage's input whose exact zeros are a pruning mask."""
    return sparse_modules(context.input, context.input_revision)


def input_root(context: StageContext) -> dict[str, Any] | None:
    """Entry ``root`` of the stage's input: which indices of the first model of a chain of cuts are left; None without one."""
    found = read_record(find_model_folder(context.input, context.input_revision, weights=False))
    if ROOT not in found and "kept" in found and "parent_shape" in found:
        return {"shape": found["parent_shape"], "kept": found["kept"]}
    return found.get(ROOT)


def input_zeros(context: StageContext, model: "PreTrainedModel") -> list[str]:
    """``input_record`` after a check that every name is a linear of ``model``, the stage's input."""
    names = input_record(context)
    check_sparse(names, model)
    return names


def keep_zeros_hooks(context: StageContext, model: "PreTrainedModel") -> "list[StepHook]":
    """A list with the hook that keeps the zeros of the stage's input; empty when its record has none.

    Raises:
        UserError: a name in the record is not a linear layer of ``model``.
    """
    # imported late: the hooks import torch's sharded tensors, which `decoct plan` does not need
    from ..loop.hooks import KeepZeros

    names = input_zeros(context, model)
    return [KeepZeros(names)] if names else []


def tell_unlisted_zeros(context: StageContext, model: "PreTrainedModel") -> None:
    """Print a warning when the input has many zeros that no record lists, as in a folder pruned by another tool: training moves them."""
    if "quant" in read_record(find_model_folder(context.input, context.input_revision, weights=False)):
        return  # zeros of a quantized folder come from rounding, not from pruning
    # a warning and no mask: without a record, pruned weights cannot be distinguished from weights that happen to be zero
    share = unlisted_zeros(model, input_record(context))
    if share >= TOLD_FROM:
        context.say(
            f"  {share:.0%} of the student's linear weights are exact zeros that its decoct.json does not list, and training moves them. "
            "To keep them, put a stage before this one that lists them and removes nothing else: "
            "prune: {magnitude: {keep: 0.99, scope: global}}"
        )
