"""Samples of the student or the teacher in place of a share of a stage's windows (``samples`` of a stage).

Which windows are replaced, by whom, and with which random numbers are functions of seed and position alone; each rank draws the samples
of its own windows. So the result depends on the number of ranks and on the batches of drawing by rounding only.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.common.files import sha256_json
from ...models.drawing import Drawing, drawn_ids, own_chances
from ...models.eval_mode import eval_mode
from ..checkpoints.read import step_folders
from ..data.order import StepBatches, WindowOrder
from ..data.prompts import prompts_of
from ..data.windows import WindowSource
from ..plan import TrainingPlan, derive_seed
from ..processes.world import World, gather_bytes
from ..settings_samples import SamplesSettings
from .held_out import Watcher
from .module import TrainingModule
from .rng import capture_generators, restore_generators
from .sample_file import Sample, SampleRow, file_of, read_samples, row_from, stored_steps, write_samples
from .split_sums import OWN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
"""Version of the drawing; raise it whenever the same settings would give other samples."""
_LOOKED_AT = 256
"""Windows in which a prompt is looked for before a stage begins."""


@dataclass(frozen=True, kw_only=True)
class Writers:
    """The models that write, and what ends their texts."""

    v_eff: int
    """Ids from here on mean no token and are never drawn."""
    student_ends: Sequence[int]
    """Ids that end a text of the student."""
    teacher: "PreTrainedModel | None" = None
    """None if the student alone writes."""
    teacher_ends: Sequence[int] = ()
    """Ids that end a text of the teacher."""

    @property
    def ends(self) -> frozenset[int]:
        """All ids that end a text."""
        return frozenset([*self.student_ends, *self.teacher_ends])


class Samples:
    """The samples of a stage.

    Args:
        settings: Who writes how much of the text.
        windows: Training windows, whose beginnings are the prompts.
        plan: Plan of the stage.
        writers: The models.
        chat: Whether the windows hold conversations.
        folder: Folder of the stage; samples lie in ``samples``, beside its checkpoints.

    Raises:
        UserError: no window has a prompt with room for a completion.
    """

    def __init__(
        self, settings: SamplesSettings, windows: WindowSource, plan: TrainingPlan, writers: Writers, *, chat: bool, folder: Path
    ) -> None:
        self.settings, self._windows, self._plan, self._writers, self._chat = settings, windows, plan, writers, chat
        self._folder, self._checkpoints = folder / "samples", folder / "checkpoints"
        first = windows[0]
        self._length, self._packed = len(first["input_ids"]), "position_ids" in first
        # which samples these are: files of other settings or of another start are not read
        changing = {name: value for name, value in asdict(settings).items() if name != "batch"}
        self._key = sha256_json({"format": FORMAT, "plan": plan.identity(), "samples": changing})
        self._base: int | None = None
        self._rows: dict[int, SampleRow] = {}
        # of the teacher, where windows come again: window -> its samples
        self._known: dict[int, tuple[Sample, ...]] = {}
        self._keeps = settings.by_teacher and WindowOrder(windows, plan.seed).repeats(plan.total_steps * plan.batch.global_windows)
        self._restored = False
        if settings.share and not any(self._prompts(index) for index in range(min(len(windows), _LOOKED_AT))):
            raise UserError(
                f"samples: no prompt leaves room for {settings.max_new_tokens:,} new tokens in the {self._length:,} of a window; lower "
                "samples.max_new_tokens, or raise data.seq_length"
            )

    def writer_at(self, position: int) -> str | None:
        """student or teacher for the window at ``position`` of the stream; None = the given text stays."""
        share = self.settings.share
        # evenly spread: so many of the first n positions are samples for every n
        number = floor(position * share)
        if floor((position + 1) * share) == number:
            return None
        if self.settings.from_ == "mix":
            return "teacher" if number % 2 else "student"
        return self.settings.from_

    def prepare(
        self,
        module: TrainingModule,
        step: int,
        forward_context: AbstractContextManager[None],
        world: World,
        say: Callable[[str], None] = lambda text: None,
    ) -> dict[str, float | int | None]:
        """Draws or reads the samples for the step after ``step``, if it begins a refresh or the stage; all ranks call it.

        Returns:
            Figures of what was drawn for ``metrics.jsonl``; {} if the samples of this step were there already.
        """
        base = step - step % self.settings.refresh
        if base == self._base:
            return {}
        self._restore(base, world)
        content = self._read(base, world)
        if content is None:
            if step != base:
                say(
                    f"the samples of step {base} are missing or damaged in {self._folder}; they are drawn anew by the student of step "
                    f"{step}, so the stage will not end in the same bits as one that was not interrupted"
                )
            content = self._drawn(module, base, forward_context, world)
        rows = [row_from(plain) for plain in content["rows"]]
        self._base, self._rows = base, {row.position: row for row in rows}
        self._learn(rows)
        # a line of metrics has them once, at the first step of a refresh
        return _figures(rows, content["seconds"], content["left_out"]) if step == base else {}

    def fill(self, batch: dict[str, Tensor], step: int, micro: int, world: World) -> None:
        """Puts the samples into the micro-batch number ``micro`` of this rank in the step after ``step``, in place."""
        plan = self._plan.batch
        first = step * plan.global_windows + world.rank * (plan.global_windows // world.size) + micro * plan.micro_batch
        own = torch.zeros_like(batch["input_ids"][:, 0])
        for at in range(len(own)):
            row = self._rows.get(first + at)
            if row is None:
                continue
            own[at] = row.writer == "student"
            for key, value in row.as_window(self._length, packed=self._packed).items():
                batch[key][at] = value.to(batch[key].device)
        batch[OWN] = own

    def _prompts(self, window: int) -> list[list[int]]:
        return prompts_of(self._windows[window], self.settings, self._writers.ends, chat=self._chat)

    def _read(self, base: int, world: World) -> dict[str, Any] | None:
        """The stored samples of a refresh, the same on every rank: the first one reads them for all."""
        content = read_samples(self._folder, base, self._key) if world.is_first else None
        found: dict[str, Any] | None = json.loads(gather_bytes(json.dumps(content).encode() if world.is_first else b"")[0])
        return found

    def _restore(self, base: int, world: World) -> None:
        """After a start in the middle of a stage: what the teacher wrote in earlier refreshes is not drawn again."""
        if self._restored or not self._keeps:
            return
        self._restored = True
        for earlier in range(0, base, self.settings.refresh):
            if (content := self._read(earlier, world)) is not None:
                self._learn([row_from(plain) for plain in content["rows"]])

    def _learn(self, rows: Sequence[SampleRow]) -> None:
        if self._keeps:
            self._known.update({row.window: row.samples for row in rows if row.writer == "teacher"})

    def _drawn(self, module: TrainingModule, base: int, forward_context: AbstractContextManager[None], world: World) -> dict[str, Any]:
        """Draws the samples of a refresh, each rank its part; the first rank stores them."""
        began = time.perf_counter()
        own, again = self._places(base, world)
        rows, left_out = self._own_rows(module, own, forward_context)
        mine = {"rows": [row.plain() for row in rows], "left_out": left_out, "seconds": time.perf_counter() - began}
        parts = [json.loads(part) for part in gather_bytes(json.dumps(mine).encode())]
        every = [row_from(plain) for part in parts for plain in part["rows"]]
        # of all ranks: a window of this rank may have been written on another one, in an earlier epoch or in this refresh
        known = self._known | {row.window: row.samples for row in every if row.writer == "teacher"}
        every += [SampleRow(position, window, "teacher", False, known[window]) for position, window in again if window in known]
        content = {
            "step": base,
            "key": self._key,
            "seconds": max(part["seconds"] for part in parts),
            "left_out": sum(part["left_out"] for part in parts) + sum(window not in known for _, window in again),
            "rows": [row.plain() for row in sorted(every, key=lambda row: row.position)],
        }
        if world.is_first:
            write_samples(self._folder, base, content)
            self._drop_old()
        return content

    def _places(self, base: int, world: World) -> tuple[dict[int, tuple[int, str]], list[tuple[int, int]]]:
        """Where the samples of a refresh stand.

        Returns:
            (position in the stream -> (window, writer) of those that this rank draws, (position, window) of those that the teacher
            draws or has drawn at another place, on all ranks).
        """
        plan = self._plan
        whole, end = plan.batch.global_windows, min(base + self.settings.refresh, plan.total_steps)
        order = StepBatches(
            self._windows, global_batch=whole, micro_batch=whole, rank=0, world=1, seed=plan.seed, start_step=base, total_steps=end
        )
        own: dict[int, tuple[int, str]] = {}
        again: list[tuple[int, int]] = []
        seen = set(self._known)
        for position, window in enumerate(itertools.chain.from_iterable(order), base * whole):
            writer = self.writer_at(position)
            if writer == "teacher" and window in seen:
                again.append((position, window))
            elif writer is not None and position % whole // (whole // world.size) == world.rank:
                own[position] = (window, writer)
            if writer == "teacher":
                seen.add(window)
        return own, again

    def _own_rows(
        self, module: TrainingModule, own: dict[int, tuple[int, str]], forward_context: AbstractContextManager[None]
    ) -> tuple[list[SampleRow], int]:
        """(the rows that this rank draws, windows that stay as they are because they have no prompt)."""
        found = {position: prompts for position, (window, _) in own.items() if (prompts := self._prompts(window))}
        planned = {position: own[position] for position in found}
        texts = {
            **self._written("student", module.student, found, planned, forward_context),
            **self._written("teacher", self._writers.teacher, found, planned, None),
        }
        for hook in module.hooks:
            # ranges of static scales must come from the text of the steps alone, each seen once
            if isinstance(hook, Watcher):
                hook.forget_seen()
        rows = [SampleRow(position, window, writer, True, tuple(texts[position])) for position, (window, writer) in planned.items()]
        return rows, len(own) - len(planned)

    def _written(
        self,
        writer: str,
        model: Any,
        prompts: dict[int, list[list[int]]],
        planned: dict[int, tuple[int, str]],
        forward_context: AbstractContextManager[None] | None,
    ) -> dict[int, list[Sample]]:
        """Position -> completions of its prompts by ``writer``."""
        jobs = [
            (prompt, position, part)
            for position, (_, by) in planned.items()
            if by == writer
            for part, prompt in enumerate(prompts[position])
        ]
        done: dict[int, list[Sample]] = {position: [] for _, position, _ in jobs}
        if not jobs:
            return done
        settings = self.settings
        ends = self._writers.student_ends if writer == "student" else self._writers.teacher_ends
        drawing = Drawing(
            ends=ends, v_eff=self._writers.v_eff, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature
        )  # fmt: skip
        # prompts of similar length together, for less padding; the sort is stable, so the order is that of seed and position
        jobs.sort(key=lambda job: len(job[0]))
        found: dict[tuple[int, int], Sample] = {}
        device = next(model.parameters()).device
        generators = capture_generators(device)
        # the student in the arithmetic of its training, the teacher in its own dtype
        context = forward_context or torch.autocast(device.type, enabled=False)
        with torch.no_grad(), eval_mode(model), context:
            for first in range(0, len(jobs), settings.batch):
                some = jobs[first : first + settings.batch]
                # a sample of the teacher belongs to its window, one of the student to the place at which it is trained on
                seeds = [
                    derive_seed(self._plan.seed, "samples", writer, place if writer == "student" else planned[place][0], part)
                    for _, place, part in some
                ]
                given = [prompt for prompt, _, _ in some]
                for (prompt, place, part), own in zip(some, drawn_ids(model, given, drawing, own_chances(seeds, settings.max_new_tokens))):
                    found[place, part] = Sample(prompt, own, own[-1] not in ends)
        restore_generators(generators, device)
        for place, part in sorted(found):
            done[place].append(found[place, part])
        return done

    def _drop_old(self) -> None:
        """Removes files that no checkpoint can continue from; those of a teacher whose windows come again are kept."""
        saved = [int(path.name.removeprefix("step-")) for path in step_folders(self._checkpoints)]
        if self._keeps or not saved:
            return
        oldest = min(saved) - min(saved) % self.settings.refresh
        for step in stored_steps(self._folder):
            if step < oldest:
                file_of(self._folder, step).unlink(missing_ok=True)


def _figures(rows: Sequence[SampleRow], seconds: float, left_out: int) -> dict[str, float | int | None]:
    samples = [one for row in rows if row.fresh for one in row.samples]
    tokens = sum(len(one.own) for one in samples)
    drawn = len(samples)
    return {
        "samples": drawn,
        "sample_tokens": tokens,
        "sample_length": tokens / drawn if drawn else None,
        "samples_cut": sum(one.cut for one in samples) / drawn if drawn else None,
        "windows_without_prompt": left_out,
        "sampling_seconds": seconds,
        "sampling_tokens_per_second": tokens / seconds if drawn and seconds > 0 else None,
    }
