"""Writes the model folder of a stage, with the facts that the next stage and the report need."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.folder.model_folder import save_model_folder
from ...models.pruning.kept_record import ROOT
from ...models.pruning.zeros_record import joined
from .context import StageContext, StageResult, Trained
from .zeros import input_record, input_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


CARRIED = "carried"
"""Fact of a stage that renames matrices: the record of zeros of its input under their new names; never written itself."""


def stage_record(context: StageContext, facts: dict[str, Any]) -> dict[str, Any]:
    """Content of decoct.json for a folder of this stage: facts of the run and of the stage, and the record of zeros of its input."""
    # zeros that an earlier stage made stay a mask in every later folder, under the names that the stage gave their matrices
    carried = facts.pop(CARRIED) if CARRIED in (facts := dict(facts)) else input_record(context)
    facts["sparse"] = joined(carried, facts.get("sparse", []))
    # which indices of the first model are left, also after stages that change weights alone
    if (root := input_root(context)) is not None:
        facts.setdefault(ROOT, root)
    return {
        **context.record,
        "kind": context.kind,
        "stage": context.name,
        "stage_key": context.key,
        # empty facts are left out: an absent entry and an empty one mean the same to readers
        **{k: v for k, v in facts.items() if v},
    }


def save_student(
    model: "PreTrainedModel", context: StageContext, facts: dict[str, Any], check: Callable[[Path], None] | None = None
) -> None:
    """Write ``model`` in the save dtype of the recipe (``trainer.save_dtype``).

    Args:
        model: The model.
        context: Context of the stage.
        facts: Entries that the stage adds to decoct.json.
        check: Called with the written files; if it raises, no folder is left.
    """
    run, record = context.run, stage_record(context, facts)
    save_model_folder(context.model, model, run.tokenizer, record, dtype=_DTYPES[run.trainer.save_dtype], write_extra=check)


def save_trained(trained: Trained, context: StageContext, check: Callable[[Path], None] | None = None) -> StageResult:
    """Write the student of a training stage as a model folder, with ``check`` as in ``save_student``."""
    save_student(trained.student, context, trained.facts, check)
    return StageResult(model=context.model, tokens=trained.tokens, seconds=trained.seconds, facts=trained.watched())
