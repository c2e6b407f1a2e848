"""Writing a stage's model folder, with what the next stage and the report need to know beside the weights."""

from typing import TYPE_CHECKING, Any

import torch

from ...models.folder.model_folder import save_model_folder
from ...models.pruning.zeros_record import joined
from .context import StageContext, StageResult, Trained
from .zeros import input_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def stage_record(context: StageContext, facts: dict[str, Any]) -> dict[str, Any]:
    """decoct.json of a folder that this stage writes: the run's facts, the stage's own, and the record of zeros of its input."""
    facts = {**facts, "sparse": joined(input_record(context), facts.get("sparse", []))}
    return {
        **context.record,
        "kind": context.kind,
        "stage": context.name,
        "stage_key": context.key,
        **{k: v for k, v in facts.items() if v},
    }


def save_student(model: "PreTrainedModel", context: StageContext, facts: dict[str, Any]) -> None:
    """Write ``model`` in the recipe's save dtype."""
    run = context.run
    save_model_folder(context.model, model, run.tokenizer, stage_record(context, facts), dtype=_DTYPES[run.trainer.save_dtype])


def save_trained(trained: Trained, context: StageContext) -> StageResult:
    """Write what a training stage ended with."""
    save_student(trained.student, context, trained.facts)
    return StageResult(model=context.model, tokens=trained.tokens, seconds=trained.seconds)
