"""A cache of last hidden states: bytes, exactness, every divergence from it, the head beside it."""

import io
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from decoct.losses.settings import DIVERGENCES, Divergence, LossSettings
from decoct.models.common.errors import UserError
from decoct.models.settings import CacheSettings, StoredStates
from decoct.models.teachers import LocalTeacher, TeacherRef, load_teacher
from decoct.trainer.loop.held_out import HeldOut, Watch
from decoct.trainer.loop.objective import Objective
from decoct.trainer.soft_targets.cached import CachedStates, SparseTeacher, knows_given_text_alone
from decoct.trainer.soft_targets.capture import stack
from decoct.trainer.soft_targets.fill import CacheRequest, cached_teacher
from decoct.trainer.soft_targets.hidden_rows import HiddenFormat, divergence_of_states

STEPS: Any = SimpleNamespace(total_steps=100, batch=SimpleNamespace(global_windows=8), seed=0)
SHARP = {"int8": 2e-3, "bf16": 5e-4}
"""KL(cache || teacher) per token that the stored states of the fp32 teacher of these tests stay below."""


def _states(rows: int, width: int) -> torch.Tensor:
    states = torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) * 5
    states[1, 3] = 900.0
    states[2] = 0.0
    return states


@pytest.mark.parametrize(("states", "expected"), [("fp32", 400), ("bf16", 200), ("int8", 104)])
def test_bytes_of_a_row(states: StoredStates, expected: int) -> None:
    form = HiddenFormat(96, 100, states)
    data = form.encode(_states(5, 100))
    assert form.bytes == expected
    assert data.shape == (5, expected) and data.dtype == torch.uint8


def test_floats_come_back_as_they_were() -> None:
    states = _states(5, 100)
    assert torch.equal(HiddenFormat(96, 100, "fp32").decode(HiddenFormat(96, 100, "fp32").encode(states)), states)
    low = HiddenFormat(96, 100, "bf16")
    assert torch.equal(low.decode(low.encode(states.bfloat16())), states.bfloat16())
    assert low.exact("bf16") and low.exact("nf4") and not low.exact("fp32") and HiddenFormat(96, 100, "fp32").exact("fp32")
    assert not HiddenFormat(96, 100, "int8").exact("bf16")


def test_int8_rows_are_codes_and_one_scale_for_64_channels() -> None:
    """Decoded by hand from the bytes; every number within half a step of its group."""
    states, form = _states(40, 100), HiddenFormat(96, 100, "int8")
    data, decoded = form.encode(states), form.decode(form.encode(states))
    for row in range(40):
        raw = bytes(data[row].tolist())
        codes = struct.unpack("<100b", raw[:100])
        # a bf16 is the upper half of an fp32
        scales = [struct.unpack("<f", b"\0\0" + raw[at : at + 2])[0] for at in (100, 102)]
        for channel in range(100):
            scale = scales[channel // 64]
            assert float(decoded[row, channel]) == codes[channel] * scale
            assert abs(float(states[row, channel]) - codes[channel] * scale) <= 0.5000001 * scale
            assert -127 <= codes[channel] <= 127


def test_states_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="NaN or infinite, which a cache cannot keep"):
        HiddenFormat(96, 4, "bf16").encode(torch.tensor([[1.0, torch.nan, 0.0, 0.0]]))


def test_the_divergence_that_is_printed_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    own, theirs = (torch.randn(3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    head, bias = torch.randn(11, 8, generator=generator, dtype=torch.float64), torch.randn(11, generator=generator, dtype=torch.float64)
    bias[4] = -torch.inf
    transform: Any = SimpleNamespace(logit_scale=0.7, softcap=None)
    found = divergence_of_states(own, theirs, head, bias, transform)
    for row in range(3):
        q, p = (torch.softmax((states[row] @ head.T + bias) * 0.7, 0) for states in (own, theirs))
        kept = p > 0
        assert float(found[row]) == pytest.approx(float((q[kept] * (q[kept] / p[kept]).log()).sum()), rel=1e-10)


@pytest.fixture
def folder(training: ModuleType, tmp_path: Path) -> Path:
    """A teacher that says something, as a folder."""
    model = training.tiny_model(2, dropout=0.0, tied=False, hidden=64)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def wanted(folder: Path, training: ModuleType, words: Any, tmp_path: Path) -> Callable[..., CacheRequest]:
    """``wanted(states, load_in=)``: a stage's request; ``asked`` counts how often the teacher was opened."""
    windows = training.RandomWindows(8)
    windows.seq_length = training.SEQ

    def request(states: StoredStates | None = None, load_in: Any = "fp32", **changes: Any) -> CacheRequest:
        dtype = torch.float32 if load_in == "fp32" else torch.bfloat16
        ref = TeacherRef(
            path=str(folder), load_in=load_in, placement="replicated", revision=None, name="big", content="hash"
        )  # fmt: skip
        facts: dict[str, Any] = {
            "stage": "01-distill",
            "teacher": ref,
            "cache": CacheSettings(mode="hidden", states=states, path=str(tmp_path / "cache")),
            "windows": windows,
            "tokenizer": words,
            "v_eff": training.VOCAB,
            "console": Console(file=io.StringIO(), width=300),
            "open_teacher": lambda: load_teacher(folder, dtype=dtype, v_eff=training.VOCAB),
        }
        return CacheRequest(**{**facts, **changes})

    return request


def _opened(request: CacheRequest) -> LocalTeacher:
    teacher = request.open_teacher()
    assert isinstance(teacher, LocalTeacher)
    return teacher


def _sums(teacher: Any, settings: LossSettings, training: ModuleType) -> tuple[Any, torch.Tensor]:
    student = training.tiny_model(1, dropout=0.0)
    windows = training.RandomWindows(8)
    sums = Objective(teacher, settings, v_eff=training.VOCAB)(student, stack(windows, [0, 3, 5, 4]))
    return sums, torch.cat([g.flatten() for g in torch.autograd.grad(sums.loss, list(student.parameters()))])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_and_temperature_is_that_of_the_live_teacher(
    divergence: Divergence, wanted: Callable[..., CacheRequest], training: ModuleType
) -> None:
    settings = LossSettings(divergence=divergence, temperature=2.0, hard_weight=0.25)
    request = wanted("fp32")
    cached = cached_teacher(request, settings, STEPS)
    assert isinstance(cached, CachedStates) and not isinstance(cached, SparseTeacher)
    (ours, own), (theirs, live) = _sums(cached, settings, training), _sums(request.open_teacher(), settings, training)
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-5)
    assert float((own - live).norm()) <= 1e-5 * float(live.norm())
    for figure in ("tokens", "kl", "teacher_entropy", "top1_matches", "covered_mass"):
        assert float(getattr(ours, figure)) == pytest.approx(float(getattr(theirs, figure)), rel=1e-5), figure


def test_bf16_states_of_a_bf16_teacher_are_exact(wanted: Callable[..., CacheRequest], training: ModuleType) -> None:
    settings = LossSettings(divergence="reverse_kl")
    request = wanted(load_in="bf16")
    cached = cached_teacher(request, settings, STEPS)
    assert "KL(cache || teacher) 0: states are stored as they are" in request.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    (ours, own), (theirs, live) = _sums(cached, settings, training), _sums(request.open_teacher(), settings, training)
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-5)
    assert float((own - live).norm()) <= 1e-5 * float(live.norm())


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_rounded_states_stay_within_the_divergence_that_is_printed(
    states: StoredStates, wanted: Callable[..., CacheRequest], training: ModuleType
) -> None:
    request = wanted(states)
    cached = cached_teacher(request, LossSettings(), STEPS)
    said = request.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    figures = [json.loads(file.read_text())["figures"] for file in cached._store.folder.glob("shards/*.json")]
    mean, worst = sum(f["kl"] for f in figures) / sum(f["tokens"] for f in figures), max(f["worst_kl"] for f in figures)
    assert 0 < mean < worst < SHARP[states]
    assert f"KL(cache || teacher) {mean:.2e} nats a token, at most {worst:.2e}" in said
    assert isinstance(cached, CachedStates)
    # against the teacher, measured anew on a batch
    batch = stack(training.RandomWindows(8), [0, 3, 5, 4])
    stored, head, _, _ = cached.hidden_and_head(batch)
    live = _opened(request).hidden_and_head(batch)[0]
    chosen = batch["labels"][:, 1:] != -100
    q, p = ((hidden[:, :-1][chosen].double() @ head.double().T).log_softmax(1) for hidden in (stored, live))
    assert float((q.exp() * (q - p)).sum(1).max()) <= worst * 1.01
    (ours, _), (theirs, _) = _sums(cached, LossSettings(), training), _sums(request.open_teacher(), LossSettings(), training)
    assert float(ours.kl) == pytest.approx(float(theirs.kl), rel=0.02)


def test_the_teacher_is_opened_once_and_again_only_for_what_is_lost(wanted: Callable[..., CacheRequest], tmp_path: Path) -> None:
    opened: list[int] = []

    def opening(request: CacheRequest) -> CacheRequest:
        def teacher() -> LocalTeacher:
            opened.append(1)
            return _opened(request)

        return replace(request, open_teacher=teacher)

    first = cached_teacher(opening(wanted()), LossSettings(), STEPS)
    assert opened == [1]
    # of every temperature and divergence: nothing is asked again
    cached_teacher(opening(wanted()), LossSettings(divergence="jsd", temperature=3.0), STEPS)
    assert opened == [1]
    head = tmp_path / "cache/head.safetensors"
    # copies: loading maps the file, which is damaged in place below
    kept = {name: value.clone() for name, value in load_file(head).items()}
    whole = bytearray(head.read_bytes())
    whole[-1] ^= 1
    head.write_bytes(bytes(whole))
    again = cached_teacher(opening(wanted()), LossSettings(), STEPS)
    assert opened == [1, 1]
    assert all(torch.equal(value, kept[name]) for name, value in load_file(head).items())
    assert again.describe() == first.describe() == "the cache of big (last hidden states in bf16, 128 bytes per position)"
    (tmp_path / "cache/head.json").unlink()
    cached_teacher(opening(wanted()), LossSettings(), STEPS)
    assert opened == [1, 1, 1]


def test_a_capture_that_is_cut_off_continues_with_what_is_missing(
    wanted: Callable[..., CacheRequest], training: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one window a batch, and a shard of each
    monkeypatch.setattr("decoct.trainer.soft_targets.capture.BATCH_TOKENS", training.SEQ)
    monkeypatch.setattr("decoct.trainer.soft_targets.capture.SHARD_SECONDS", 0)
    request, asked, dies = wanted(), [], [4]

    def teacher() -> Any:
        opened = _opened(request)
        answer = opened.hidden_and_head

        def counted(batch: Any) -> Any:
            asked.append(1)
            if len(asked) == dies[0]:
                raise KeyboardInterrupt
            return answer(batch)

        monkeypatch.setattr(opened, "hidden_and_head", counted)
        return opened

    with pytest.raises(KeyboardInterrupt):
        cached_teacher(replace(request, open_teacher=teacher), LossSettings(), STEPS)
    # the head, and two of eight windows
    assert len(asked) == 4
    dies[0] = 0
    cached_teacher(replace(request, open_teacher=teacher), LossSettings(), STEPS)
    assert len(asked) == 4 + 6, "the head and two windows are not asked for again"


def test_another_kind_is_another_cache_and_other_kinds_still_give_forward_kl_alone(wanted: Callable[..., CacheRequest]) -> None:
    cached_teacher(wanted("bf16"), LossSettings(), STEPS)
    with pytest.raises(UserError, match="states is 'bf16' there and 'int8' here"):
        cached_teacher(wanted("int8"), LossSettings(), STEPS)
    with pytest.raises(UserError, match=r"a cache gives forward_kl alone, except with teacher\.cache\.mode: hidden"):
        cached_teacher(wanted(cache=CacheSettings(mode="hybrid")), LossSettings(divergence="jsd"), STEPS)


def test_settings_refuse_what_has_no_effect() -> None:
    assert CacheSettings(mode="hidden").states == "bf16" and CacheSettings().states is None
    with pytest.raises(ValueError, match="tokens=8 has no effect: mode hidden"):
        CacheSettings(mode="hidden", tokens=8)
    with pytest.raises(ValueError, match="states=int8 has no effect: it belongs to mode hidden, and mode is top_k"):
        CacheSettings(mode="top_k", states="int8")


def test_it_knows_the_given_text_alone(wanted: Callable[..., CacheRequest], training: ModuleType) -> None:
    cached = cached_teacher(wanted(), LossSettings(), STEPS)
    assert knows_given_text_alone(cached)
    watched = HeldOut(training.RandomWindows(4, seed=9), Watch(every=1, windows=2), cached, training.VOCAB)
    assert watched.figure == "loss", "held-out text is not in the cache, so no KL is measured on it"
