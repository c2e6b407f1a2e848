"""Stages that the recipe imports: what the user's function gets, and what becomes of its result (``parts.stage``)."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ...parts import PartError
from ..settings_own import OwnStageSettings
from .context import StageContext, StageResult

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.windows import Windows


@dataclass(kw_only=True)
class OwnContext:
    """What an imported stage works with. It runs on rank 0; the other ranks wait."""

    name: str
    """Name of the stage's folder, such as '02-smooth'."""
    input: Path
    """Model folder that the stage starts from."""
    output: Path
    """Model folder that the stage writes; it does not exist yet. ``save`` writes it."""
    work: Path
    """Folder of the stage, for files of its own. They are kept when an interrupted stage starts again."""
    seed: int
    """Seed of this stage: drawn from the recipe's seed and the stage's name."""
    device: "torch.device"
    """The GPU of rank 0, or the CPU."""
    tokenizer: "PreTrainedTokenizerBase"
    """The run's tokenizer."""
    train: "Windows"
    """Training windows: ``train[i]`` is a dict of input_ids, labels, attention_mask and, if packed, position_ids, each int64 [S]."""
    evaluation: "Windows"
    """Held-out windows, of the same form. What a stage learns from them makes the report's figures worthless."""
    teacher: str | None
    """Model folder or hub id of the recipe's teacher; None without one."""
    _stage: StageContext = field(repr=False)
    _zeros: "dict[str, Tensor]" = field(default_factory=dict, repr=False)

    def say(self, text: str) -> None:
        """Print a line of the run's output."""
        self._stage.say(f"  {text}")

    def load(self) -> "PreTrainedModel":
        """The input model in fp32 on ``device``, in eval mode."""
        from ...models.families import decoder_linears
        from .student_and_teacher import whole_student
        from .zeros import input_zeros

        model = whole_student(self._stage).eval()
        linears = decoder_linears(model)
        # kept as bits of the stage's start: what the user's code does to the model must not turn removed weights back on
        self._zeros = {name: (linears[name].weight == 0).cpu() for name in input_zeros(self._stage, model)}
        return model

    def save(self, model: "PreTrainedModel", facts: dict[str, Any] | None = None) -> Path:
        """Write ``model`` as this stage's model folder, in the dtype of ``trainer.save_dtype``; returns ``output``.

        Zeros that an earlier stage pruned stay zero, if ``load`` gave the model and their matrices still have their shapes.

        Args:
            model: A causal language model of transformers.
            facts: Entries for decoct.json (JSON), under ``facts``.
        """
        import torch

        from ...models.families import decoder_linears
        from .saving import save_student

        linears = decoder_linears(model)
        with torch.no_grad():
            for name, zeros in self._zeros.items():
                if name in linears and linears[name].weight.shape == zeros.shape:
                    linears[name].weight.masked_fill_(zeros.to(linears[name].weight.device), 0.0)
        save_student(model, self._stage, {"facts": facts} if facts else {})
        return self.output

    def batches(self, windows: "Windows", size: int = 8) -> "Iterator[dict[str, Tensor]]":
        """Batches of ``size`` windows in their order, on ``device``; the last may be smaller."""
        import torch

        for at in range(0, len(windows), size):
            rows = [windows[index] for index in range(at, min(at + size, len(windows)))]
            yield {key: torch.stack([row[key] for row in rows]).to(self.device) for key in rows[0]}


def finish(settings: OwnStageSettings, context: StageContext, trained: None) -> StageResult:
    """Run the user's function (rank 0), and check what it leaves."""
    started, part = time.perf_counter(), settings.part
    facts = part.call(own_context(context), options=settings.own_options())
    what = f"{part.place}: stage '{part.name}'"
    if facts is not None and not isinstance(facts, dict):
        raise PartError(f"{what} must return nothing or a dict of facts; it returned {type(facts).__name__}")
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PartError(f"{what} returned facts that are no JSON: {error}") from error
    if context.model.is_dir() != part.makes_model:
        expected = "wrote no model" if part.makes_model else "wrote a model"
        remedy = (
            "call context.save(model), or register it with makes_model=False" if part.makes_model else "register it with makes_model=True"
        )
        raise PartError(f"{what} {expected}; {remedy}")
    if part.makes_model:
        _complete(context, what)
    own = {"facts": facts} if facts else {}
    return StageResult(model=context.model if part.makes_model else None, seconds=time.perf_counter() - started, facts=own)


def own_context(context: StageContext) -> OwnContext:
    """What the user's function gets of a stage's context."""
    from ...models.folder.loading import find_model_folder
    from ..plan import derive_seed
    from .student_and_teacher import current_device

    run = context.run
    return OwnContext(
        name=context.name,
        input=find_model_folder(context.input, context.input_revision, weights=True),
        output=context.model,
        work=context.folder,
        seed=derive_seed(run.seed, context.name),
        device=current_device(),
        tokenizer=run.tokenizer,
        train=run.data.train,
        evaluation=run.data.evaluation,
        teacher=None if run.teacher is None else run.teacher.path,
        _stage=context,
    )


def _complete(context: StageContext, what: str) -> None:
    """Add tokenizer and record to a folder that the user's code wrote without ``save``; refuse one that does not load."""
    from ...models.folder.loading import load_config
    from ...models.folder.record import RECORD, write_record
    from .saving import stage_record

    if (context.model / RECORD).is_file():
        return
    try:
        load_config(str(context.model))
    except UserError as error:
        raise PartError(f"{what} wrote a folder that is no model folder: {error}") from error
    if not (context.model / "tokenizer.json").exists():
        context.run.tokenizer.save_pretrained(context.model)
    write_record(context.model, stage_record(context, {}))
