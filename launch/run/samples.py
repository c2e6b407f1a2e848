"""Samples for the report: how teacher and model go on from the beginnings of held-out text, greedy and short."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...losses.shift import MASKED
from ...models.common.files import sha256_json
from ...models.common.host_memory import available_bytes
from ...models.folder.model_folder import content_hash
from ...qat.footprint import folder_bytes
from ...trainer.data.windows import Windows
from ...trainer.evaluation.model_row import best_device, open_for_measuring, too_large_to_measure
from ...trainer.settings import EvaluateSettings
from ..answers.answer import Sampling, answer
from ..answers.opened import Opened
from .stored_figures import read_figures, store_figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...trainer.stages.context import RunContext

PROMPT_TOKENS = 24
"""Tokens of a document that a prompt has; in conversations it goes up to the first answer."""
_FEWEST = 4
Samples = dict[str, Any]


def report_samples(
    settings: EvaluateSettings,
    run: "RunContext",
    path: str,
    revision: str | None,
    open_teacher: "Callable[[], PreTrainedModel | None]",
    file: Path,
) -> Samples | None:
    """``{prompts, answers}``, texts by the name of the model and in the order of the prompts; None when none are wanted or possible.

    Args:
        settings: Of the evaluate stage.
        run: The held-out text, the tokenizer, the console.
        path: The model.
        revision: Hub revision of the model.
        open_teacher: Gives the teacher in fp32; None without one.
        file: Keeps the samples of the same models and prompts.
    """
    prompts = _prompts(settings, run)
    if not prompts:
        return None
    if problem := _too_large(path, revision):
        run.say(f"no samples: {problem}")
        return None
    key = sha256_json([content_hash(path, revision), run.teacher and run.teacher.content, prompts, settings.sample_tokens])
    before = read_figures(file)
    if before.get("key") == key:
        return before["row"]
    with run.console.status("sampling"):
        said = {"teacher": _answers(open_teacher(), run, prompts, settings.sample_tokens)}
        said["model"] = _answers(open_for_measuring(path, revision), run, prompts, settings.sample_tokens)
    found = {"prompts": [_text(run, ids) for ids in prompts], "answers": {name: texts for name, texts in said.items() if texts}}
    store_figures(file, key, found)
    return found


def _prompts(settings: EvaluateSettings, run: "RunContext") -> list[list[int]]:
    if settings.sample_prompts:
        return [list(run.tokenizer(text)["input_ids"]) for text in settings.sample_prompts]  # pyright: ignore[reportArgumentType] - one text gives one list
    return beginnings(run.data.evaluation, settings.samples)


def beginnings(windows: Windows, count: int) -> list[list[int]]:
    """Beginnings of windows from all over the text, of one document each, at most ``count``."""
    found: list[list[int]] = []
    for number in range(min(count, len(windows))):
        window = windows[number * len(windows) // count]
        learned = (window["labels"] != MASKED).nonzero().flatten().tolist()
        # a conversation begins with a prompt, which is not learned
        end = max(PROMPT_TOKENS, learned[0] if learned else 0)
        if "position_ids" in window:
            # the next document begins where positions start anew
            starts = (window["position_ids"][1:] == 0).nonzero().flatten().tolist()
            end = min([end, *(start + 1 for start in starts)])
        ids = window["input_ids"][: min(end, int(window["attention_mask"].sum()))].tolist()
        if len(ids) >= _FEWEST:
            found.append(ids)
    return found


def _too_large(path: str, revision: str | None) -> str | None:
    """Why sampling would read the weights from disk for every token; None when it would not."""
    room = available_bytes()
    if room is not None and Path(path).is_dir() and folder_bytes(Path(path)) > room:
        return "the model's files are larger than the free memory"
    return too_large_to_measure(path, revision)


def _answers(model: "PreTrainedModel | None", run: "RunContext", prompts: Sequence[list[int]], tokens: int) -> list[str]:
    if model is None:
        return []
    live: Any = model
    live.to(best_device())
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    opened = Opened("the model", model, run.tokenizer, run.v_eff, limit if isinstance(limit, int) else None)
    texts = []
    for ids in prompts:
        made = answer(opened, ids, Sampling(max_tokens=tokens))
        if made.finish == "interrupted":
            raise KeyboardInterrupt
        texts.append(made.text)
    return texts


def _text(run: "RunContext", ids: list[int]) -> str:
    return str(run.tokenizer.decode(ids))
