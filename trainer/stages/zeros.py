"""Exact zeros of a stage's input: the record of them, and the hook that keeps them (law 4, docs/architecture.md)."""

from typing import TYPE_CHECKING

from ...models.folder.loading import find_model_folder
from ...models.folder.model_folder import read_record
from ...models.pruning.zeros_record import TOLD_FROM, check_sparse, sparse_modules, unlisted_zeros
from .context import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..loop.hooks import StepHook


def input_record(context: StageContext) -> list[str]:
    """Matrices of the stage's input whose exact zeros are a mask."""
    return sparse_modules(context.input, context.input_revision)


def input_zeros(context: StageContext, model: "PreTrainedModel") -> list[str]:
    """``input_record``, checked to name linears of ``model``, the stage's input."""
    names = input_record(context)
    check_sparse(names, model)
    return names


def keep_zeros_hooks(context: StageContext, model: "PreTrainedModel") -> "list[StepHook]":
    """A hook that keeps the zeros of the stage's input; none when its record names none.

    Raises:
        UserError: the record names what is no linear layer of ``model``.
    """
    # the plan reads this module's neighbours, and needs no hooks: theirs bring torch's sharded tensors with them
    from ..loop.hooks import KeepZeros

    names = input_zeros(context, model)
    return [KeepZeros(names)] if names else []


def tell_unlisted_zeros(context: StageContext, model: "PreTrainedModel") -> None:
    """Say that training will move zeros of the input which no record names, as in a folder that another tool has pruned."""
    if "quant" in read_record(find_model_folder(context.input, context.input_revision, weights=False)):
        return  # rounding makes zeros
    share = unlisted_zeros(model, input_record(context))
    if share >= TOLD_FROM:
        context.say(
            f"  {share:.0%} of the student's linear weights are exact zeros that its decoct.json does not list, and training moves them. "
            "To keep them, put a stage before this one that lists them and removes nothing else: "
            "prune: {magnitude: {keep: 0.99, scope: global}}"
        )
