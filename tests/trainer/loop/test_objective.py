from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from decoct.losses.settings import LossSettings
from decoct.models.common.errors import UserError
from decoct.models.teachers import LocalTeacher
from decoct.trainer.loop.objective import Objective


def _batch(training: ModuleType) -> dict[str, torch.Tensor]:
    windows = training.RandomWindows(4)
    rows = [windows[i] for i in range(4)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_alone_it_is_the_models_own_next_token_loss(training: ModuleType) -> None:
    model, batch = training.tiny_model(), _batch(training)
    sums = Objective(None, LossSettings(hard_weight=1.0), v_eff=training.VOCAB)(model, batch)
    expected = model(**batch).loss
    assert int(sums.tokens) == int((batch["labels"][:, 1:] != -100).sum())
    assert float(sums.loss.detach() / sums.tokens) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(sums.cross_entropy) == pytest.approx(float(sums.loss.detach()), rel=1e-6)


def test_with_a_teacher_it_is_the_divergence_of_both_models_logits(training: ModuleType) -> None:
    student, teacher, batch = training.tiny_model(1), training.tiny_model(2, dropout=0.0), _batch(training)
    settings = LossSettings(hard_weight=0.25)
    sums = Objective(LocalTeacher(teacher, v_eff=training.VOCAB), settings, v_eff=training.VOCAB)(student, batch)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["labels"][:, 1:].reshape(-1)
    with torch.no_grad():
        log_q, log_p = (model(**inputs).logits[:, :-1].reshape(-1, training.VOCAB).double().log_softmax(-1) for model in (student, teacher))
    kept = labels != -100
    kl = F.kl_div(log_q[kept], log_p[kept], log_target=True, reduction="sum")
    hard = F.nll_loss(log_q[kept], labels[kept], reduction="sum")
    assert float(sums.loss.detach()) == pytest.approx(float(0.75 * kl + 0.25 * hard), rel=1e-5)
    assert float(sums.kl) == pytest.approx(float(kl), rel=1e-4)
    assert float(sums.teacher_entropy) == pytest.approx(float(-(log_p[kept].exp() * log_p[kept]).sum()), rel=1e-5)
    assert int(sums.top1_matches) == int((log_q[kept].argmax(-1) == log_p[kept].argmax(-1)).sum())


def test_a_hard_weight_of_one_leaves_the_teacher_unused(training: ModuleType) -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"the teacher was asked for {name}")

    objective = Objective(Untouchable(), LossSettings(hard_weight=1.0), v_eff=training.VOCAB)  # pyright: ignore[reportArgumentType]
    objective.to(torch.device("cpu"))(training.tiny_model(), _batch(training))
    assert not objective.has_teacher


def test_a_loss_on_predictions_needs_a_teacher(training: ModuleType) -> None:
    with pytest.raises(UserError, match=r"hard_weight=0\.5 needs a teacher"):
        Objective(None, LossSettings(hard_weight=0.5), v_eff=training.VOCAB)


def test_padding_rows_of_either_head_change_nothing(training: ModuleType) -> None:
    batch = _batch(training)
    student, teacher = training.tiny_model(1), training.tiny_model(2, dropout=0.0)
    plain = Objective(LocalTeacher(teacher, v_eff=training.VOCAB), LossSettings(), v_eff=training.VOCAB)(student, batch)
    for model, rows in ((student, 104), (teacher, 112)):
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.get_input_embeddings().weight.data[training.VOCAB :] = 50.0
    padded = Objective(LocalTeacher(teacher, v_eff=training.VOCAB), LossSettings(), v_eff=training.VOCAB)(student, batch)
    assert float(padded.loss.detach()) == pytest.approx(float(plain.loss.detach()), rel=1e-6)
    assert isinstance(student, nn.Module)


def test_packed_documents_give_the_sums_and_gradients_that_they_give_alone(training: ModuleType) -> None:
    """Law 1 for packing, and no leakage: neither student nor teacher sees the document before."""
    sizes = [5, 1, 7, 3]
    ids = torch.randint(0, training.VOCAB, (1, sum(sizes)), generator=torch.Generator().manual_seed(1))
    documents = ids[0].split(sizes)
    labels = torch.cat([torch.cat([torch.tensor([-100]), document[1:]]) for document in documents])[None]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    packed = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    rows = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
    real = torch.arange(rows.shape[1])[None] < torch.tensor(sizes)[:, None]
    padded = {"input_ids": rows, "labels": torch.where(real, rows, -100), "attention_mask": real.long()}
    student, teacher = training.tiny_model(1, dropout=0.0), training.tiny_model(2, dropout=0.0)
    objective = Objective(LocalTeacher(teacher, v_eff=training.VOCAB), LossSettings(hard_weight=0.25), v_eff=training.VOCAB)
    results = [objective(student, batch) for batch in (packed, padded)]
    for name in ("loss", "tokens", "kl", "cross_entropy", "teacher_entropy", "top1_matches"):
        own, theirs = (float(getattr(sums, name).detach()) for sums in results)
        assert own == pytest.approx(theirs, rel=1e-5), name
    gradients = [torch.autograd.grad(sums.loss, list(student.parameters())) for sums in results]
    for own, theirs in zip(*gradients):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
