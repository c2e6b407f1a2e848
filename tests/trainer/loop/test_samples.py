"""Samples in place of windows: masks, who writes where, the loss against a plain loop, refreshes, resuming."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.losses.settings import LossSettings
from decoct.models.common.errors import UserError
from decoct.models.teachers import LocalTeacher
from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.loop.objective import Objective
from decoct.trainer.loop.sample_file import Sample, SampleRow, file_of, read_samples, row_from, stored_steps
from decoct.trainer.loop.samples import Samples
from decoct.trainer.loop.split_sums import OWN
from decoct.trainer.processes.world import World

TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes", "sampling_seconds", "sampling_tokens_per_second")


def _row(*samples: Sample, writer: str = "student") -> SampleRow:
    return SampleRow(0, 0, writer, True, samples)


def test_labels_are_those_of_the_completions_alone() -> None:
    row = _row(Sample([5, 6], [7, 1], False), Sample([8], [9, 10, 11], True))
    packed = row.as_window(10, packed=True)
    assert packed["input_ids"].tolist() == [5, 6, 7, 1, 8, 9, 10, 11, 0, 0]
    # behind 11, where the second sample was cut, nothing is taught: no end, and no beginning of another text
    assert packed["labels"].tolist() == [-100, -100, 7, 1, -100, 9, 10, 11, -100, -100]
    assert packed["position_ids"].tolist()[:8] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert packed["attention_mask"].tolist() == [1] * 8 + [0] * 2
    padded = _row(Sample([5, 6], [7, 1], False)).as_window(6, packed=False)
    assert padded["labels"].tolist() == [-100, -100, 7, 1, -100, -100]
    assert "position_ids" not in padded
    assert row_from(json.loads(json.dumps(row.plain()))) == row


@pytest.fixture
def sampled(training: ModuleType, tmp_path: Path) -> Callable[..., Samples]:
    """``sampled(**changes)``: samples of the tiny stage in a folder of their own."""

    def make(place: str = "work", **changes: Any) -> Samples:
        case = training.Case(samples=changes.pop("samples", "student"), **changes)
        return case.sampled(case.student(), case.objective(), training.RandomWindows(), tmp_path / place)

    return make


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_share_is_exact_and_a_mix_is_half_of_each(sampled: Callable[..., Samples], share: float) -> None:
    mixed = sampled(share=share, samples="mix")
    writers = [mixed.writer_at(place) for place in range(1000)]
    count = round(1000 * share)
    assert sum(writer is not None for writer in writers) == count
    assert abs(writers.count("teacher") - count / 2) <= 0.5
    for first in range(0, 1000, 10):
        assert sum(writer is not None for writer in writers[first : first + 10]) == 10 * share


def _drawn(samples: Samples, student: Any, step: int = 0, world: World | None = None) -> dict[int, SampleRow]:
    module: Any = SimpleNamespace(student=student, hooks=())
    samples.prepare(module, step, nullcontext(), world or World())
    return samples._rows


def test_samples_are_those_of_the_student_as_it_is_and_of_no_batch(sampled: Callable[..., Samples], training: ModuleType) -> None:
    student = training.tiny_model(1)
    generators = torch.random.get_rng_state()
    first = _drawn(sampled("one"), student.train())
    assert student.training
    assert torch.equal(torch.random.get_rng_state(), generators)
    # every second of the 3 x 8 windows of a refresh
    assert sorted(first) == list(range(1, 24, 2))
    assert _drawn(sampled("two", draws=1), student) == first == _drawn(sampled("three", draws=5), student)
    alone = sampled("ranks")
    module: Any = SimpleNamespace(student=student, hooks=())
    parts = [alone._own_rows(module, alone._places(0, World(rank=rank, size=2))[0], nullcontext())[0] for rank in range(2)]
    assert {row.position: row for part in parts for row in part} == first
    assert [{row.position % 8 // 4 for row in part} for part in parts] == [{0}, {1}]
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.5)
    later = _drawn(sampled("four"), student)
    assert later.keys() == first.keys()
    assert later != first
    # random numbers belong to the place: the same prompt is continued in another way there
    same = [[3, 4, 5]] * 4
    places: dict[int, tuple[int, str]] = dict.fromkeys(range(1, 9), (0, "student"))
    drawn = sampled("five")._written("student", student, dict.fromkeys(places, same), places, nullcontext())
    assert len({tuple(one.own) for texts in drawn.values() for one in texts}) > 16
    lengths = {len(one.own) for row in first.values() for one in row.samples}
    assert max(lengths) == 6
    for row in first.values():
        for one in row.samples:
            assert one.cut == (one.own[-1] not in (1, 2, 3))
            assert not one.cut or len(one.own) == 6
            assert not {1, 2, 3} & set(one.own[:-1])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_loss_is_that_of_a_plain_loop_over_the_samples(sampled: Callable[..., Samples], training: ModuleType, divergence: Any) -> None:
    """Each sample alone, without padding and cache, in fp64, token by token; given windows beside them."""
    student, teacher = training.tiny_model(1, dropout=0.0).double(), training.tiny_model(2, dropout=0.0).double()
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(3)
    samples, windows = sampled(), training.RandomWindows()
    _drawn(samples, student)
    rows = [windows[index] for index in range(4)]
    batch: dict[str, Tensor] = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    given = {key: value.clone() for key, value in batch.items()}
    samples.fill(batch, 0, 1, World())
    # micro-batch 1 of four windows: positions 4 to 7, of which 5 and 7 are samples
    assert batch[OWN].tolist() == [0, 1, 0, 1]
    assert all(torch.equal(batch[key][0::2], given[key][0::2]) for key in given)
    objective = Objective(LocalTeacher(teacher, v_eff=training.VOCAB), LossSettings(divergence=divergence), v_eff=training.VOCAB)
    found: Any = objective(student, batch)
    found.loss.backward()

    def terms(ids: list[int], labelled: range) -> list[tuple[Tensor, Tensor]]:
        text = torch.tensor([ids])
        q = student(text).logits[0].log_softmax(-1)
        with torch.no_grad():
            p = teacher(text).logits[0].log_softmax(-1)
        kept = []
        for at in labelled:
            a, b = p[at - 1], q[at - 1]
            forward, m = (a.exp() * (a - b)).sum(), ((a.exp() + b.exp()) / 2).log()
            both = 2 * (a.exp() * (a - m)).sum() + 2 * (b.exp() * (b - m)).sum()
            kept.append((forward, {"forward_kl": forward, "reverse_kl": (b.exp() * (b - a)).sum(), "jsd": both}[divergence]))
        return kept

    gradients = [weight.grad.clone() for weight in student.parameters() if weight.grad is not None]
    student.zero_grad()
    own = [
        term
        for place in (5, 7)
        for one in samples._rows[place].samples
        for term in terms([*one.prompt, *one.own], range(4, 4 + len(one.own)))
    ]
    length = int(given["attention_mask"][0].sum()), int(given["attention_mask"][2].sum())
    others = [term for row, count in zip((0, 2), length) for term in terms(given["input_ids"][row][:count].tolist(), range(1, count))]
    loss: Any = sum(loss for _, loss in own + others)
    loss.backward()
    assert found.own_tokens == len(own)
    assert found.tokens == len(own) + len(others)
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.own_kl, sum(kl for kl, _ in own), rtol=1e-9, atol=1e-12)
    for one, other in zip(gradients, [weight.grad for weight in student.parameters() if weight.grad is not None], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)


class _StopError(Exception):
    pass


def _stopping(training: ModuleType, step: int) -> Any:
    class Stopping(training.Pause):
        name = "pause"

        def after_step(self, now: int) -> None:
            if now == step:
                raise _StopError

    return Stopping(0.0)


def _numbers(work: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def _run(training: ModuleType, case: Any, work: Path, *stops: int) -> Any:
    for stop in stops:
        student = case.student()
        with pytest.raises(_StopError):
            training.run_case(case, work, student=student, hooks=[*case.hooks(student), _stopping(training, stop)])
    return training.run_case(case, work)[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distill", "qat", "learned"])
def test_stopped_twice_between_two_refreshes_ends_in_the_same_bits(training: ModuleType, tmp_path: Path, kind: str) -> None:
    case = training.Case(kind=kind, samples="student", steps=8, every=2, micro=8)
    # checkpoints of steps 2 and 4, refreshes before steps 1, 4 and 7
    straight, hurt = _run(training, case, tmp_path / "straight"), _run(training, case, tmp_path / "hurt", 3, 6)
    assert _numbers(tmp_path / "hurt") == _numbers(tmp_path / "straight")
    for one, other in zip(straight.parameters(), hurt.parameters(), strict=True):
        assert torch.equal(one, other)
    lines = _numbers(tmp_path / "hurt")
    assert [line["step"] for line in lines if "samples" in line] == [1, 4, 7]
    assert all(line["own_kl"] is not None and line["given_kl"] is not None for line in lines)
    # what no checkpoint can continue from is gone: when step 7 was sampled for, those of steps 4 and 6 were kept
    assert stored_steps(tmp_path / "hurt/stage/samples") == [3, 6]


@pytest.mark.slow
def test_a_teacher_writes_each_window_once_also_after_a_stop(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(samples="teacher", share=1.0, steps=6, every=2, micro=8)
    windows = training.RandomWindows(16)

    def run(work: Path, *stops: int) -> Any:
        for stop in stops:
            student = case.student()
            with pytest.raises(_StopError):
                training.run_case(case, work, student=student, windows=windows, hooks=[_stopping(training, stop)])
        return training.run_case(case, work, windows=windows)[1]

    straight, hurt = run(tmp_path / "straight"), run(tmp_path / "hurt", 5)
    for one, other in zip(straight.parameters(), hurt.parameters(), strict=True):
        assert torch.equal(one, other)
    # 48 places for 16 windows, of which the first refresh has 24
    assert sum(line.get("samples") or 0 for line in _numbers(tmp_path / "hurt")) == 16
    key = json.loads(file_of(tmp_path / "hurt/stage/samples", 3).read_text())["key"]
    content = [read_samples(tmp_path / "hurt/stage/samples", step, key) for step in (0, 3)]
    texts: dict[int, Any] = {}
    for row in (row_from(plain) for one in content if one for plain in one["rows"]):
        assert texts.setdefault(row.window, row.samples) == row.samples
    assert len(texts) == 16


def test_a_damaged_file_is_not_read(sampled: Callable[..., Samples], training: ModuleType, tmp_path: Path) -> None:
    student = training.tiny_model(1)
    first = _drawn(sampled(), student)
    path = file_of(tmp_path / "work/stage/samples", 0)
    whole = path.read_text()
    # the same file serves another start, whose student is another one by now
    assert _drawn(sampled(), training.tiny_model(3), step=1) == first
    said: list[str] = []
    module: Any = SimpleNamespace(student=training.tiny_model(3), hooks=())
    path.write_text(whole.replace("5", "6", 1))
    sampled().prepare(module, 1, nullcontext(), World(), said.append)
    assert said == [
        f"the samples of step 0 are missing or damaged in {path.parent}; they are drawn anew by the student of step 1, so the stage will "
        "not end in the same bits as one that was not interrupted"
    ]
    # other settings, other samples: the file of these is not read for those
    assert _drawn(sampled(fresh=5), student) != first


def test_a_text_without_room_is_refused(sampled: Callable[..., Samples]) -> None:
    class Short:
        seq_length = 8

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            ids = torch.full((8,), 2)
            return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(8)}

    samples = sampled()
    with pytest.raises(UserError, match=r"no prompt leaves room for 6 new tokens in the 8 of a window; lower samples.max_new_tokens"):
        Samples(samples.settings, Short(), samples._plan, samples._writers, chat=False, folder=Path())


def test_ranks_other_than_the_first_write_no_metrics(training: ModuleType, tmp_path: Path) -> None:
    from decoct.trainer.settings_samples import SamplesSettings
    from decoct.trainer.stages.sampled_text import sample_facts

    assert sample_facts(None, "01-distill", SamplesSettings()) is None
    sink = MetricsSink(tmp_path / "metrics.jsonl")
    drawn = {"samples": 4, "sample_tokens": 40, "samples_cut": 0.25, "sampling_seconds": 2.0, "windows_without_prompt": 1}
    for step in range(1, 9):
        figures = {"own_kl": 1.0 / step, "given_kl": None, "tokens_per_second": 10.0}
        sink.write("01-distill", step, {**figures, **(drawn if step % 4 == 1 else {})})
    sink.write("02-qat", 1, drawn)
    assert sample_facts(tmp_path / "metrics.jsonl", "01-distill", SamplesSettings(share=0.25)) == {
        "from": "student",
        "share": 0.25,
        "samples": 8,
        "tokens": 80,
        "mean_length": 10.0,
        "cut": 0.25,
        "windows_without_prompt": 2,
        "sampling_seconds": 4.0,
        "sampling_tokens_per_second": 20.0,
        "training_tokens_per_second": 10.0,
        "own_kl": pytest.approx((1 / 7 + 1 / 8) / 2),
        "given_kl": None,
    }
