"""Measures held-out KL and perplexity while a stage trains, on a few windows at intervals, without any effect on the training.

The figures are means over tokens in the arithmetic of training, as in the training metrics, but on text that is never trained on. They show
the trend. The report's figures, in fp32 on all held-out text, are the measurement.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...losses.settings import LossSettings
from ...losses.shift import MASKED
from ...models.eval_mode import eval_mode
from ...models.teachers import Teacher
from ..data.blend import largest_remainder
from ..data.joined_windows import with_part
from ..data.order import blend_of
from ..data.windows import WindowSource
from ..processes.world import World, sum_over_ranks
from ..soft_targets.cached import SparseTeacher, knows_given_text_alone
from .module import Objectivelike, TrainingModule
from .objective import Objective
from .rng import capture_generators, restore_generators
from .split_sums import PART_SUMS
from .standing import EVALUATIONS, spread

SHARE = 0.04
"""Windows of all evaluations of a stage, as a share of its training windows. Without a backward pass a window costs a third (no teacher)
to six tenths (a teacher of twice the student) of a training window: about two percent of the stage's time."""
MOST_TOKENS = 32_768
"""Largest number of tokens of one evaluation."""
LEAST_DECIDING = 4096
"""Smallest number of tokens of an evaluation that decides what a stage ends with: on fewer, chance decides (docs/lab-book.md)."""
FIGURES = ("held_out_kl", "held_out_perplexity")
"""Names in metrics.jsonl."""


@runtime_checkable
class Watcher(Protocol):
    """A hook that observes the tensors of the student while it trains."""

    def forget_seen(self) -> None:
        """Drops what was observed since the last step: it was held-out text."""
        ...


@dataclass(frozen=True, kw_only=True)
class Watch:
    """When to evaluate, and on how many windows."""

    every: int
    """Optimizer steps between evaluations; the start and the last step are evaluated too."""
    windows: int
    """Windows per evaluation over all ranks."""


def derive_watch(
    every: int | Literal["auto"],
    *,
    total_steps: int,
    step_windows: int,
    seq_length: int,
    available: int,
    ranks: int,
    decides: bool = False,
    texts: int = 1,
) -> Watch | None:
    """Derives when a stage is evaluated and on how many windows; None = never (``every`` is 0, the stage is too short, or no text).

    Args:
        every: Steps between evaluations; auto = about ``EVALUATIONS`` evaluations, fewer if even one window each would cost too much.
        total_steps: Optimizer steps of the stage.
        step_windows: Windows per optimizer step.
        seq_length: Tokens per window.
        available: Number of held-out windows.
        ranks: Processes that share the work, each with the same number of windows.
        decides: The evaluations decide what the stage ends with. Then they are the same for any number of ranks, on at least
            ``LEAST_DECIDING`` tokens, and a stage that is too short for ``auto`` is evaluated too.
        texts: Texts of a blend; each has a window at least.
    """
    if every == 0 or not available:
        return None
    budget = int(SHARE * total_steps * step_windows)
    if every == "auto":
        # one window before the first step and one after the last are the least that shows a difference
        if budget < 2 and not decides:
            return None
        every = spread(total_steps, EVALUATIONS if decides else min(EVALUATIONS, budget - 1))
    evaluations = -(-total_steps // every) + 1
    # at least one, even if that is above the budget, because ``every`` is the user's explicit choice
    least = -(-LEAST_DECIDING // seq_length) if decides else 1
    windows = min(max(least, texts, budget // evaluations), max(texts, MOST_TOKENS // seq_length), available)
    # of a blend a few windows less may be all of a text
    if decides or windows < ranks or texts > 1:
        return Watch(every=every, windows=windows)
    # a multiple of the ranks, so that each has the same number
    return Watch(every=every, windows=windows // ranks * ranks)


class HeldOut:
    """Evaluates the student of a stage on held-out windows.

    Args:
        text: Held-out windows.
        watch: When to evaluate, and on how many windows; they are evenly spread and always the same.
        teacher: The stage's teacher. A cache or a server has no targets for this text, so only the perplexity is measured.
        v_eff: Number of tokens in the real vocabulary.
    """

    def __init__(self, text: WindowSource, watch: Watch, teacher: Teacher | SparseTeacher | None, v_eff: int) -> None:
        self.watch = watch
        self._text = text
        blend = blend_of(text)
        self._texts = blend.names if blend else ()
        self._chosen = _chosen_windows(text, watch.windows)
        # hard_weight decides what runs: 1 leaves the teacher out, 0 measures the KL; the cross-entropy is summed in both cases
        dense = None if isinstance(teacher, SparseTeacher) or knows_given_text_alone(teacher) else teacher
        self._objective: Objectivelike = Objective(dense, LossSettings(hard_weight=1.0 if dense is None else 0.0), v_eff=v_eff)

    @property
    def figure(self) -> str:
        """The figure that tells which evaluation is better: kl, or loss where no KL is measured."""
        return "kl" if self._objective.has_teacher else "loss"

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the student is evaluated after ``step``."""
        return step % self.watch.every == 0 or step == total_steps

    def evaluate(self, module: TrainingModule, forward_context: AbstractContextManager[None], world: World) -> dict[str, float | None]:
        """``FIGURES`` of the current student, and ``<figure>.<text>`` of each text of a blend, the same on every rank; all ranks call it.

        Random generators, modules' modes and the hooks' observations are as before afterwards, and nothing reaches the optimizer.
        """
        generators = capture_generators(module.device)
        self._objective.to(module.device)
        # tokens, KL, cross-entropy; fp64, because sums over ranks and windows must not depend on their order in a visible digit
        totals = torch.zeros(3 + len(PART_SUMS) * len(self._texts), dtype=torch.float64, device=module.device)
        try:
            # the precision plugin's context: autocast as in training, so the figures are those of the model that trains
            with torch.no_grad(), eval_mode(module.student), forward_context:
                for batch in self._batches(module, world):
                    totals += module.evaluation_sums(batch, self._objective)
        finally:
            # FSDP2 frees gathered weights in the backward pass, and there was none
            module.reshard()
            restore_generators(generators, module.device)
        for hook in module.hooks:
            # ranges of static scales must come from training text alone
            if isinstance(hook, Watcher):
                hook.forget_seen()
        # the one collective here (a sharded student has its own), and the one transfer to the host
        tokens, kl, cross_entropy, *rest = sum_over_ranks(totals).tolist()
        found = self._figures(tokens, kl, cross_entropy)
        for number, name in enumerate(self._texts):
            tokens, _, kl, cross_entropy = rest[number * len(PART_SUMS) : (number + 1) * len(PART_SUMS)]
            found |= {f"{figure}.{name}": value for figure, value in self._figures(tokens, kl, cross_entropy).items()}
        return found

    def _figures(self, tokens: float, kl: float, cross_entropy: float) -> dict[str, float | None]:
        if not tokens:
            return dict.fromkeys(FIGURES)
        return {
            "held_out_kl": _finite(kl / tokens) if self._objective.has_teacher else None,
            # exp(710) overflows a float
            "held_out_perplexity": _finite(math.exp(min(cross_entropy / tokens, 700.0))),
        }

    def _batches(self, module: TrainingModule, world: World) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches: as many as on every other rank, because the ranks of a sharded student compute together."""
        # with fewer windows than ranks every rank takes all of them, which gives the same means
        alone = len(self._chosen) < world.size
        mine: list[int | None] = list(self._chosen if alone else self._chosen[world.rank :: world.size])
        if not alone:
            # a rank with one window fewer than the first takes an empty one, which counts no token
            mine += [None] * (-(-len(self._chosen) // world.size) - len(mine))
        size = module.plan.batch.micro_batch
        for first in range(0, len(mine), size):
            rows = [self._row(index) for index in mine[first : first + size]]
            yield {key: torch.stack([row[key] for row in rows]).to(module.device) for key in rows[0]}

    def _row(self, index: int | None) -> dict[str, Tensor]:
        """A window; None = one without a token to predict."""
        if index is not None:
            return with_part(self._text, index)
        row = with_part(self._text, self._chosen[0])
        return {**row, "labels": torch.full_like(row["labels"], MASKED)}


def _chosen_windows(text: WindowSource, count: int) -> list[int]:
    """Windows evenly spread over the text, and over each text of a blend: the same in every evaluation, so that figures are comparable."""
    blend = blend_of(text)
    sizes, begins = (blend.sizes, blend.begins.tolist()) if blend else ((len(text),), [0])
    counts = largest_remainder([Fraction(size, len(text)) for size in sizes], count, least=min(1, count // len(sizes)))
    return [begin + index * size // own for begin, size, own in zip(begins, sizes, counts) for index in range(own)]


def held_out_text(values: dict[str, float | None]) -> str:
    """The figures as text: 'held-out KL 0.0412, perplexity 104.58'; '' if there are none."""
    whole = _words(values, "")
    texts = [name.removeprefix(f"{FIGURES[1]}.") for name in values if name.startswith(f"{FIGURES[1]}.")]
    listed = "; ".join(f"{name} {words}" for name in texts if (words := _words(values, f".{name}")))
    return f"held-out {whole}" + (f" ({listed})" if listed else "") if whole else ""


def _words(values: dict[str, float | None], ending: str) -> str:
    kl, perplexity = (values.get(f"{name}{ending}") for name in FIGURES)
    parts = [f"KL {kl:.4f}"] if kl is not None else []
    return ", ".join([*parts, *([f"perplexity {perplexity:.2f}"] if perplexity is not None else [])])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
