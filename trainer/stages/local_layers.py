"""Local distillation in stage `prune`: its text, the parent read layer by layer from its files, and the layers of an earlier start."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...models.calibration.layer_storage import ReadShelf
from ...models.common.errors import UserError
from ...models.common.files import write_json_atomic
from ...models.families import decoder_layers
from ...models.folder.safetensors_write import write_safetensors
from ...models.folder.streaming import can_stream, open_files
from ...models.pruning.kept import Kept
from ...models.pruning.local_distillation import LayerResult, LocalHow, amount_of_work, distill_layers
from ...models.pruning.parent_layers import ParentLayers
from ..evaluation.figures import exact_products
from ..learning_rates import local_rate
from ..plan import derive_seed
from ..progress import token_progress
from ..settings_local import LocalSettings
from .calibration import calibration_text
from .context import StageContext
from .student_and_teacher import current_device, whole_student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP_TOKENS = 1024
"""Tokens of an optimizer step of one layer."""
FOLDER = "local"
"""Folder of a stage with the layers that are finished; deleted when the stage is done."""
Row = dict[str, Tensor]


def split_text(context: StageContext, fit: int, seen: int | None = None, *, step: int = STEP_TOKENS) -> tuple[list[Row], list[Row]]:
    """(batches to learn on, batches that judge) of the stage's calibration text.

    Args:
        context: Context of the stage.
        fit: Tokens to learn on: the first windows in the order of ``calibration_text``.
        seen: Tokens that other parts of the stage learn on; what judges comes after both. Default: ``fit``.
        step: Tokens of a batch.

    Raises:
        UserError: there is one window of text alone.
    """
    train, seed = context.run.data.train, context.run.seed
    known = max(fit, seen or 0)
    learnt = _rows(calibration_text(train, fit, seed).batches)
    before = _rows(calibration_text(train, known, seed).batches)
    # a larger number of tokens keeps the same windows and adds more
    judges = _rows(calibration_text(train, known + max(1, known // 4), seed).batches)[len(before) :]
    if not judges:
        # the text has no more windows: the last quarter of them judges
        quarter = max(1, len(before) // 4)
        judges = before[-quarter:]
        learnt = learnt[: len(before) - quarter]
    if not learnt:
        raise UserError(f"{context.name}: needs two windows of training text, one to fit on and one to judge by; give more text")
    size = max(1, step // train.seq_length)
    return _batched(learnt, size), _batched(judges, size)


def _rows(batches: Sequence[Mapping[str, Tensor]]) -> list[Row]:
    return [{key: values[row] for key, values in batch.items()} for batch in batches for row in range(len(batch["input_ids"]))]


def _batched(rows: list[Row], size: int) -> list[Row]:
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [{key: torch.stack([row[key] for row in group]) for key in group[0]} for group in groups]


def distil_locally(
    settings: LocalSettings, context: StageContext, student: "PreTrainedModel", kept: Kept | None, sparse: Sequence[str], seen: int | None
) -> list[LayerResult]:
    """Lets each layer of ``student`` learn its parent's, the stage's input.

    Args:
        settings: How.
        context: Context of the stage.
        student: The pruned model, fp32.
        kept: What it has of its parent; None = everything.
        sparse: Its linears whose zeros stay.
        seen: Tokens of the calibration text that pruning itself has read, if any.
    """
    layers = len(decoder_layers(student))
    fit, held_out = split_text(context, settings.tokens, seen)
    tokens = [sum(int(batch["attention_mask"].sum()) for batch in part) for part in (fit, held_out)]
    rate = settings.learning_rate or local_rate(student.config.get_text_config().hidden_size)
    how = LocalHow(learning_rate=rate, epochs=settings.epochs, seed=derive_seed(context.run.seed, "local"), inputs=settings.inputs)
    ledger = LayerFiles(context.folder / FOLDER, context.key)
    device = current_device()
    passes = f"{settings.epochs} passes over " if settings.epochs > 1 else ""
    context.say(f"  each of {layers} layers learns its parent's output on {passes}{tokens[0]:,} tokens at rate {rate:.2g}")
    with parent_layers(context, device) as (parent, depth):
        everything = Kept(layers=list(range(depth))) if kept is None else kept
        total = amount_of_work(how, layers, depth, tokens[0], tokens[1])
        with token_progress(context.run.console, context.name, total, "layer tokens") as advance, exact_products(device.type):
            student.to(device)  # pyright: ignore[reportArgumentType] - transformers types `to` by its decorator
            return distill_layers(
                student, parent, everything, fit, held_out, how, sparse=sparse, ledger=ledger, advance=advance, tell=context.say
            )


@contextmanager
def parent_layers(context: StageContext, device: torch.device) -> Iterator[tuple[ParentLayers, int]]:
    """The stage's input layer by layer from its files, or whole where these cannot be streamed; and its number of layers."""
    if not can_stream(context.input, context.input_revision):
        model = whole_student(context)
        yield ParentLayers(model, device), len(decoder_layers(model))
        return
    with open_files(context.input, context.input_revision, torch.float32) as (model, files):
        assert model is not None and files is not None, "can_stream has said so"
        layers = decoder_layers(model)
        yield ParentLayers(model, device, ReadShelf(model, layers, files, device)), len(layers)


class LayerFiles:
    """Finished layers in the stage's folder: a safetensors file each, and beside it what was measured.

    Args:
        folder: The folder; made with the first layer.
        key: Stage key: layers of another one do not count.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def get(self, layer: int) -> tuple[LayerResult, dict[str, Tensor]] | None:
        """Result and parameters of a finished layer; None if it is not finished."""
        from safetensors.torch import load_file

        said = self._folder / f"{layer:05d}.json"
        if not said.exists():
            return None
        told: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
        if told.pop("key") != self._key:
            return None
        return LayerResult(**told), load_file(said.with_suffix(".safetensors"))

    def put(self, result: LayerResult, weights: Mapping[str, Tensor]) -> None:
        """Keep a finished layer."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{result.layer:05d}.safetensors"
        # left by a kill before the measurements were written
        file.unlink(missing_ok=True)
        write_safetensors(file, {name: tensor.detach() for name, tensor in weights.items()})
        # last and in one step: with it the layer is finished
        told = {"layer": result.layer, "parent": result.parent, "before": result.before, "after": result.after, "kept": result.kept}
        write_json_atomic(file.with_suffix(".json"), {"key": self._key, **told})


def told_locally(results: Sequence[LayerResult], say: Callable[[str], None]) -> dict[str, Any]:
    """Prints how many layers were kept, and returns the results as facts of the stage."""
    kept = [result for result in results if result.kept]
    say(f"  local distillation: {len(kept)} of {len(results)} layers have a lower error on held-out windows")
    return {"local": [result.record() for result in results]}
