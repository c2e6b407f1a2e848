"""The drift of a rounded teacher is the KL of its logits, token by token."""

from types import ModuleType

import numpy as np
import pytest
import torch

from decoct.models.teachers import LocalTeacher
from decoct.trainer.data.windows import Windows
from decoct.trainer.evaluation import teacher_drift as drift
from decoct.trainer.evaluation.teacher_drift import teacher_drift


def windows(vocab: int) -> Windows:
    rows = torch.randint(0, vocab, (6, 16), generator=torch.Generator().manual_seed(0)).numpy().astype(np.int32)
    return Windows(rows, starts=np.array([0, 5, 40, 41], dtype=np.int64))


def test_it_is_the_mean_kl_over_the_predicted_tokens(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, held = (LocalTeacher(training.tiny_model(seed, dropout=0.0), v_eff=training.VOCAB) for seed in (1, 2))
    text = windows(training.VOCAB)
    monkeypatch.setattr(drift, "_BATCH_TOKENS", 32)
    found = teacher_drift(exact, held, text, "cpu")
    kl, same, tokens = 0.0, 0, 0
    with torch.no_grad():
        for row in (text[index] for index in range(len(text))):
            given = {"input_ids": row["input_ids"][None], "position_ids": row["position_ids"][None], "use_cache": False}
            log_p, log_q = (teacher.model(**given).logits[0, :-1].double().log_softmax(-1) for teacher in (exact, held))
            kept = row["labels"][1:] != -100
            kl += (log_p.exp() * (log_p - log_q)).sum(-1)[kept].sum().item()
            same += int((log_p.argmax(-1) == log_q.argmax(-1))[kept].sum())
            tokens += int(kept.sum())
    assert found["tokens"] == tokens == 6 * 15 - 3
    assert found["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert found["top1"] == pytest.approx(same / tokens)


def test_a_teacher_does_not_drift_from_itself_and_a_long_text_is_cut(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = LocalTeacher(training.tiny_model(1, dropout=0.0), v_eff=training.VOCAB)
    monkeypatch.setattr(drift, "DRIFT_TOKENS", 32)
    assert teacher_drift(teacher, teacher, windows(training.VOCAB), "cpu") == {"kl": pytest.approx(0, abs=1e-7), "top1": 1, "tokens": 29}
