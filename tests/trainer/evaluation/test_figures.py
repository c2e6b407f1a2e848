"""Figures of a model, against figures taken straight from its logits."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.teachers import LocalTeacher
from decoct.trainer.data.windows import Windows
from decoct.trainer.evaluation import figures as evaluation
from decoct.trainer.evaluation.figures import calibration_error, evaluate_model

V_EFF, PADDED = 50, 64


def llama(seed: int, rows: int = PADDED) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.5,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def head_of(model: PreTrainedModel) -> torch.nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    return head


def text(padded: bool = True) -> Windows:
    generator = np.random.default_rng(3)
    rows = generator.integers(0, V_EFF, (7, 12)).astype(np.int32)
    return Windows(rows, np.array([12, 5, 12, 2, 9, 12, 12], dtype=np.int32) if padded else None)


@torch.no_grad()
def by_hand(model: PreTrainedModel, teacher: PreTrainedModel, windows: Windows) -> dict[str, float]:
    """One window at a time, without its padding, in fp64, from the models' own logits."""
    nll, kl, same, confidence, correct = [], [], [], [], []
    for index in range(len(windows)):
        length = int(windows[index]["attention_mask"].sum())
        ids = windows[index]["input_ids"][None, :length]
        full = model.double()(ids).logits[0, :-1]
        theirs = teacher.double()(ids).logits[0, :-1, :V_EFF].log_softmax(-1)
        mine = full[:, :V_EFF].log_softmax(-1)
        nll.append(-full.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
        kl.append((theirs.exp() * (theirs - mine)).sum(-1))
        same.append(theirs.argmax(-1) == mine.argmax(-1))
        confidence.append(full.softmax(-1).amax(-1))
        correct.append(full.argmax(-1) == ids[0, 1:])
    for used in (model, teacher):
        used.float()
    joined = [torch.cat(parts).double().numpy() for parts in (nll, kl, same, confidence, correct)]
    ece = 0.0
    for k in range(15):
        inside = (joined[3] > k / 15) & (joined[3] <= (k + 1) / 15)
        ece += abs(float((joined[4][inside] - joined[3][inside]).sum())) / len(joined[0])
    counts = torch.tensor([len(part) for part in nll], dtype=torch.float64)
    mean = joined[0].mean()
    rest = torch.stack([part.sum() for part in nll]) - mean * counts
    return {
        "perplexity": math.exp(mean),
        "perplexity_se": math.exp(mean) * math.sqrt(7 / 6 * float((rest**2).sum())) / len(joined[0]),
        "kl": joined[1].mean(),
        "kl_p99": np.percentile(joined[1], 99),
        "top1": joined[2].mean(),
        "ece": ece,
        "tokens": len(joined[0]),
    }


@pytest.mark.parametrize("padded", [True, False])
def test_figures_are_those_of_the_models_own_logits(padded: bool) -> None:
    model, teacher, windows = llama(0), llama(1, rows=56), text(padded)
    expected = by_hand(model, teacher, windows)
    got = evaluate_model(model, LocalTeacher(teacher, v_eff=V_EFF), windows)
    assert got.tokens == expected["tokens"] == windows.tokens - 7
    assert {name: getattr(got, name) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert got.kl_se is not None and got.top1_se is not None
    assert got.top1 is not None
    assert 0 < got.top1 < 1


def test_perplexity_is_over_the_full_head_and_kl_over_the_real_vocabulary() -> None:
    """Rows of the head that no token has take probability from the text, as in a runtime, but do not count against the teacher."""
    model, teacher = llama(0), LocalTeacher(llama(1), v_eff=V_EFF)
    before = evaluate_model(model, teacher, text())
    with torch.no_grad():
        head = head_of(model)
        head.weight = torch.nn.Parameter(torch.cat([head.weight[:V_EFF], 10 * head.weight[V_EFF:]]))
    after = evaluate_model(model, teacher, text())
    assert after.perplexity > before.perplexity * 1.01
    assert (after.kl, after.kl_p99, after.top1) == (before.kl, before.kl_p99, before.top1)


def test_batches_and_parts_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = llama(0), LocalTeacher(llama(1), v_eff=V_EFF)

    def figures(**more: Any) -> tuple[dict[str, float], dict[str, Any]]:
        got = asdict(evaluate_model(model, teacher, text(), **more))
        return got, got.pop("blocks")

    whole, blocks = figures()
    assert blocks["tokens"] == [11, 4, 11, 1, 8, 11, 11]
    for batch, logits in ((2, evaluation.LOGITS), (3, 3 * PADDED)):
        monkeypatch.setattr(evaluation, "LOGITS", logits)
        again, parts = figures(batch=batch)
        assert again == pytest.approx(whole, rel=1e-5)
        assert parts["tokens"] == blocks["tokens"]
        assert parts["kl"] == pytest.approx(blocks["kl"], rel=1e-4)


def test_logits_held_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = evaluation.evaluation_sums
    monkeypatch.setattr(evaluation, "LOGITS", 5 * PADDED)
    monkeypatch.setattr(evaluation, "evaluation_sums", lambda mine, theirs, labels: seen.append(mine.numel()) or real(mine, theirs, labels))
    evaluate_model(llama(0), None, text())
    assert max(seen) == 5 * PADDED


def test_model_against_itself_has_no_divergence() -> None:
    model = llama(0)
    got = evaluate_model(model, LocalTeacher(llama(0), v_eff=V_EFF), text())
    assert got.kl == pytest.approx(0, abs=1e-6)
    assert got.top1 == 1


def test_without_a_teacher_only_the_text_is_measured() -> None:
    got = evaluate_model(llama(0), None, text())
    assert (got.kl, got.kl_p99, got.top1) == (None, None, None)
    assert got.perplexity == evaluate_model(llama(0), LocalTeacher(llama(1), v_eff=V_EFF), text()).perplexity


def test_every_module_is_left_in_its_mode_and_dropout_is_off() -> None:
    model = llama(0)
    expected = evaluate_model(model, None, text())
    model.train()
    model.get_submodule("model.layers.0").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert evaluate_model(model, None, text()) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2


def test_autocast_and_tf32_of_training_do_not_reach_the_figures() -> None:
    model, teacher = llama(0), LocalTeacher(llama(1), v_eff=V_EFF)
    expected = evaluate_model(model, teacher, text())
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert evaluate_model(model, teacher, text()) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    evaluate_model(llama(0), None, text(), batch=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_other_dtypes_and_broken_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is torch\.bfloat16"):
        evaluate_model(llama(0).bfloat16(), None, text())
    model = llama(0)
    teacher = LocalTeacher(model, v_eff=V_EFF)
    with torch.no_grad():
        head_of(model).weight[3, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the model's logits .* evaluation windows 0 to 6"):
        evaluate_model(model, None, text())
    with pytest.raises(NonFiniteError, match=r"the teacher's logits .* evaluation windows 0 to 6"):
        evaluate_model(llama(0), teacher, text())


def test_windows_without_a_token_to_predict_are_passed_over_and_text_of_nothing_else_is_refused() -> None:
    rows = text(padded=False).rows
    prompts = np.concatenate([-1 - rows[:1], rows])
    expected, got = (asdict(evaluate_model(llama(1), None, Windows(each), batch=1)) for each in (rows, prompts))
    assert got.pop("blocks")["tokens"] == [0, *expected.pop("blocks")["tokens"]]
    assert got == pytest.approx(expected)
    with pytest.raises(UserError, match="no window of the held-out text has a token to predict"):
        evaluate_model(llama(1), LocalTeacher(llama(2), v_eff=V_EFF), Windows(-1 - rows))


def test_calibration_error_is_the_gap_of_each_bin() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.50, 0.50, 1.0, 0.0])
    correct = torch.tensor([1, 0, 1, 1, 1, 0])
    assert calibration_error(confidence, correct) == pytest.approx((abs(1 - 1.9 + 0.0) + abs(2 - 1.0)) / 6)
