"""A served teacher against the same model here, through a real HTTP server."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from decoct.losses.settings import LossSettings
from decoct.models.common.errors import UserError
from decoct.models.settings import CacheSettings, ServedSettings
from decoct.models.teachers import LocalTeacher
from decoct.trainer.loop.objective import Objective
from decoct.trainer.soft_targets.cached import CachedTeacher, SparseTeacher, row_format
from decoct.trainer.soft_targets.capture import capture, stack
from decoct.trainer.soft_targets.served import ServedTeacher
from decoct.trainer.soft_targets.store import open_store

Answer = Callable[[dict[str, Any]], tuple[int, Any]]
Serve = Callable[[Answer], Any]
AsVllm = Callable[[Any], Answer]


@pytest.fixture
def teacher(training: ModuleType) -> LocalTeacher:
    return LocalTeacher(training.tiny_model(2, dropout=0.0), v_eff=training.VOCAB)


@pytest.fixture
def batch(training: ModuleType) -> dict[str, torch.Tensor]:
    return stack(training.RandomWindows(8), [0, 3, 5])


@pytest.fixture
def packed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    length = batch["input_ids"].shape[1]
    positions = torch.cat([torch.arange(5), torch.arange(1), torch.arange(length - 6)]).expand(3, -1)
    labels = batch["input_ids"].masked_fill(positions == 0, -100)
    return {"input_ids": batch["input_ids"], "labels": labels, "attention_mask": torch.ones_like(labels), "position_ids": positions}


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_the_loss_is_that_of_the_model_here(
    kind: str, serve: Serve, as_vllm: AsVllm, teacher: LocalTeacher, training: ModuleType, request: pytest.FixtureRequest
) -> None:
    batch = request.getfixturevalue("batch" if kind == "padded" else "packed")
    server = serve(as_vllm(teacher.model))
    served = ServedTeacher(server.settings(tokens=training.VOCAB - 1), training.VOCAB)
    assert isinstance(served, SparseTeacher)
    student = training.tiny_model(1, dropout=0.0)
    both = [Objective(who, LossSettings(), v_eff=training.VOCAB)(student, batch) for who in (served, teacher)]
    ours, theirs = both
    assert int(ours.tokens) == int(theirs.tokens) > 0
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-4)
    assert float(ours.teacher_entropy) == pytest.approx(float(theirs.teacher_entropy), rel=1e-4)
    assert int(ours.top1_matches) == int(theirs.top1_matches)
    gradients = [torch.autograd.grad(sums.loss, list(student.parameters())) for sums in both]
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert all(len(body["prompt"]) > 1 for body in server.asked)


def test_few_tokens_are_the_bucket_form(
    serve: Serve, as_vllm: AsVllm, teacher: LocalTeacher, training: ModuleType, batch: dict[str, torch.Tensor]
) -> None:
    served = ServedTeacher(serve(as_vllm(teacher.model)).settings(tokens=5), training.VOCAB)
    sums = [Objective(who, LossSettings(), v_eff=training.VOCAB)(training.tiny_model(1), batch) for who in (served, teacher)]
    assert 0 < float(sums[0].kl) < float(sums[1].kl)
    assert 0 < float(sums[0].covered_mass) < int(sums[0].tokens)


def test_it_can_be_cached(
    serve: Serve, as_vllm: AsVllm, teacher: LocalTeacher, training: ModuleType, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    server = serve(as_vllm(teacher.model))
    served = ServedTeacher(server.settings(tokens=12), training.VOCAB)
    form = row_format(CacheSettings(mode="top_k", tokens=12), training.VOCAB, 1.0)
    store = open_store(tmp_path / "cache", {"bytes_per_token": form.bytes})
    list(capture(served, training.RandomWindows(8), [0, 3, 5], store, form))
    store.refresh()
    asked = len(server.asked)
    student = training.tiny_model(1)
    ours, theirs = (
        Objective(who, LossSettings(), v_eff=training.VOCAB)(student.eval(), batch) for who in (CachedTeacher(store, form, "t"), served)
    )
    # the server also names the token that stands there; the cache leaves it to the tail where it is none of the likeliest
    assert 0.9 * float(theirs.kl) < float(ours.kl) < 1.01 * float(theirs.kl)
    (shard,) = store.shards.values()
    assert 0 <= shard.figures["kl"] / shard.figures["tokens"] < 5e-3
    assert len(server.asked) == 2 * asked


def test_a_server_that_is_busy_is_asked_again(
    serve: Serve,
    as_vllm: AsVllm,
    teacher: LocalTeacher,
    training: ModuleType,
    batch: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("decoct.trainer.soft_targets.served.time.sleep", pauses.append)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    good, seen = as_vllm(teacher.model), []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body)
        return (503, {"error": "busy"}) if len(seen) <= 2 else good(body)

    server = serve(answer)
    one = {key: value[:1] for key, value in batch.items()}
    ServedTeacher(server.settings(retries=2, requests=1), training.VOCAB).sparse_targets(one)
    assert len(seen) == 3
    assert pauses == [0.5, 1.0]
    assert server.keys == ["Bearer secret"] * 3


WRONG: dict[str, tuple[Answer, str]] = {
    "a model that is not there": (lambda _: (404, {"error": "no model big"}), "HTTP 404.*no model big.*the model's name"),
    "busy for good": (lambda _: (503, b"busy"), "gave no answer.*503"),
    "not JSON": (lambda _: (200, b"<html>"), "gave no answer"),
    "a server without prompt_logprobs": (lambda _: (200, {"choices": [{"text": ""}]}), r"no choices\[0\]\.prompt_logprobs"),
    "tokens added": (lambda body: (200, {"choices": [{"prompt_logprobs": [None] * (len(body["prompt"]) + 1)}]}), "must not add or cut"),
    "foreign tokens": (
        lambda body: (200, {"choices": [{"prompt_logprobs": [None] + [{"999999": {"logprob": -1.0}}] * (len(body["prompt"]) - 1)}]}),
        "none of the vocabulary's tokens",
    ),
    "probabilities above 1": (
        lambda body: (200, {"choices": [{"prompt_logprobs": [None] + [{"1": {"logprob": 2.0}}] * (len(body["prompt"]) - 1)}]}),
        "invalid log-probabilities",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_answers_that_are_none_are_told(case: str, serve: Serve, training: ModuleType, batch: dict[str, torch.Tensor]) -> None:
    answer, expected = WRONG[case]
    with pytest.raises(UserError, match=expected):
        ServedTeacher(serve(answer).settings(), training.VOCAB).sparse_targets(batch)


def test_a_server_that_does_not_run_is_told(training: ModuleType, batch: dict[str, torch.Tensor]) -> None:
    settings = ServedSettings(url="http://127.0.0.1:9/v1", model="big", retries=0, timeout=2)
    with pytest.raises(UserError, match=r"teacher\.served\.url.*Check that it runs"):
        ServedTeacher(settings, training.VOCAB).sparse_targets(batch)
