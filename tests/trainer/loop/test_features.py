"""Terms on hidden states and relations in a stage's loss: exact per token (law 1), through packing, micro-batches and resuming."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from decoct.losses.settings import LossSettings
from decoct.losses.settings_features import FeatureSettings, HiddenSettings, RelationSettings
from decoct.models.common.errors import UserError
from decoct.models.teachers import LocalTeacher
from decoct.trainer.loop.features import Features, Wanted
from decoct.trainer.loop.split_sums import SplitSums


def _packed_and_padded() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sizes = [5, 1, 7, 3]
    ids = torch.randint(0, 96, (1, sum(sizes)), generator=torch.Generator().manual_seed(1))
    documents = ids[0].split(sizes)
    labels = torch.cat([torch.cat([torch.tensor([-100]), document[1:]]) for document in documents])[None]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    packed = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    rows = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
    real = torch.arange(rows.shape[1])[None] < torch.tensor(sizes)[:, None]
    return packed, {"input_ids": rows, "labels": torch.where(real, rows, -100), "attention_mask": real.long()}


def _hidden_oracle(student: Any, teacher: Any, batch: dict[str, Tensor], pairs: list[tuple[int, int]], weights: Any) -> float:
    """Sum of the mean of nmse over pairs, from transformers' own record of hidden states, position by position."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours, theirs = (model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher))
    # entry 0 is the embedding; the last one has passed the final norm, so no pair is of a last layer
    total = 0.0
    for row, column in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        for own, other in pairs:
            state = weights[own, other].detach().double() @ ours[own + 1][row, column].detach().double()
            target = theirs[other + 1][row, column].detach().double()
            total += float((state - target).square().sum() / target.square().sum()) / len(pairs)
    return total


def test_hidden_term_is_the_mean_over_pairs_of_transformers_own_hidden_states(training: ModuleType) -> None:
    student, teacher = (
        training.tiny_model(1, dropout=0.0, layers=3).double(),
        training.tiny_model(2, dropout=0.0, layers=4, hidden=48).double(),
    )
    pairs = [(0, 1), (1, 2)]
    settings = FeatureSettings(hidden=HiddenSettings(weight=0.5, loss="nmse"))
    features = Features(Wanted(settings=settings, hidden=pairs, relations=[]), student, LocalTeacher(teacher, v_eff=96), seed=7)
    assert features.projectors is not None and next(iter(features.projectors.weights.values())).dtype == torch.float64
    _, padded = _packed_and_padded()
    with features.watch(student, 0) as ours:
        student.model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
    with features.watch(teacher, 1) as theirs, torch.no_grad():
        teacher.model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
    weight, found = features.terms(ours, theirs, padded)["hidden"]
    assert weight == 0.5
    assert float(found.detach()) == pytest.approx(_hidden_oracle(student, teacher, padded, pairs, features.projectors.weights), rel=1e-9)


def test_relations_are_those_of_the_projections_that_the_layers_compute(training: ModuleType) -> None:
    """Queries from a layer's own input and weight, relations written out."""
    student, teacher = training.tiny_model(1, dropout=0.0).double(), training.tiny_model(2, dropout=0.0, layers=4, hidden=48).double()
    settings = FeatureSettings(relations=RelationSettings(weight=1.0, of=("qq", "vv"), heads=4))
    features = Features(Wanted(settings=settings, hidden=[], relations=[(1, 3)]), student, LocalTeacher(teacher, v_eff=96), seed=7)
    assert features.projectors is None and features.heads == 4
    _, padded = _packed_and_padded()
    inputs = {key: padded[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        with features.watch(student, 0) as ours:
            states = [model(**inputs, output_hidden_states=True).hidden_states for model in (student,)]
        with features.watch(teacher, 1) as theirs:
            states += [model(**inputs, output_hidden_states=True).hidden_states for model in (teacher,)]
        found = float(features.terms(ours, theirs, padded)["relations"][1])
        total = 0.0
        for word in "qv":
            vectors = []
            for model, known, layer in ((student, states[0], 1), (teacher, states[1], 3)):
                block = model.model.layers[layer]
                vectors.append(block.input_layernorm(known[layer]) @ getattr(block.self_attn, f"{word}_proj").weight.T)
            for row, column in (padded["labels"][:, 1:] != -100).nonzero().tolist():
                for head in range(4):
                    logs = []
                    for states_of in vectors:
                        size = states_of.shape[-1] // 4
                        part = states_of[row, : column + 1, head * size : (head + 1) * size]
                        logs.append((part @ part[column] / math.sqrt(size)).log_softmax(0))
                    total += float((logs[1].exp() * (logs[1] - logs[0])).sum()) / 8
    assert found == pytest.approx(total, rel=1e-9)


def test_packed_documents_give_the_terms_and_gradients_that_they_give_alone(training: ModuleType) -> None:
    # relations of small random vectors are nearly equal, of which fp32 leaves few digits
    student = training.tiny_model(1, dropout=0.0).double()
    objective = training.featured(student, torch.float64)
    weights = objective.features.projectors.weights.values()
    results = [objective(student, batch) for batch in _packed_and_padded()]
    assert all(isinstance(sums, SplitSums) for sums in results)
    for name in ("predictions", "hidden", "relations"):
        own, theirs = (float(sums.terms[name]) for sums in results)
        assert own > 0
        assert own == pytest.approx(theirs, rel=1e-9), name
    expected = results[0].terms["predictions"] + 0.5 * results[0].terms["hidden"] + 0.3 * results[0].terms["relations"]
    torch.testing.assert_close(results[0].loss.detach(), expected)
    leaves = [*student.parameters(), *weights]
    gradients = [torch.autograd.grad(sums.loss, leaves) for sums in results]
    for own, theirs in zip(*gradients):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


def test_a_batch_with_samples_has_the_same_terms(training: ModuleType) -> None:
    student = training.tiny_model(1, dropout=0.0)
    objective = training.featured(student)
    _, batch = _packed_and_padded()
    plain, split = objective(student, batch), objective(student, {**batch, "own": torch.tensor([1, 0, 1, 0])})
    assert isinstance(split, SplitSums) and split.own_tokens is not None and int(split.own_tokens) == 10
    for name, value in plain.terms.items():
        torch.testing.assert_close(split.terms[name], value)
    torch.testing.assert_close(split.loss, plain.loss)


def test_without_a_token_every_term_is_zero_with_a_graph(training: ModuleType) -> None:
    student = training.tiny_model(1, dropout=0.0)
    objective = training.featured(student)
    _, batch = _packed_and_padded()
    sums = objective(student, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    sums.loss.backward()
    assert {float(value) for value in sums.terms.values()} == {0.0}
    assert all(bool((parameter.grad == 0).all()) for parameter in objective.features.projectors.weights.values())


def test_curves_and_projectors_do_not_change_with_the_micro_batch_and_checkpointing(training: ModuleType, tmp_path: Path) -> None:
    lines, projectors = [], []
    for name, options in {"1": {"micro": 1}, "8": {"micro": 8}, "less": {"micro": 8, "checkpointing": 1}}.items():
        training.run_case(training.Case(kind="features", steps=6, dropout=0.0, **options), tmp_path / name)
        lines.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
        saved = load_file(tmp_path / name / "stage/checkpoints/step-00000006/hooks-0.safetensors")
        projectors.append(saved)
    for line in zip(*lines, strict=True):
        for figure in ("loss", "loss_predictions", "loss_hidden", "loss_relations", "grad_norm"):
            assert [row[figure] for row in line[1:]] == pytest.approx([line[0][figure]] * 2, rel=1e-4), figure
        whole = line[0]["loss_predictions"] + 0.5 * line[0]["loss_hidden"] + 0.3 * line[0]["loss_relations"]
        assert line[0]["loss"] == pytest.approx(whole, rel=1e-6)
    assert projectors[0].keys() == {
        f"projectors/{pair}{end}" for pair in ("0-1", "1-3") for end in ("", ".step", ".exp_avg", ".exp_avg_sq")
    }
    for name, value in projectors[0].items():
        torch.testing.assert_close(projectors[1][name], value, rtol=1e-3, atol=1e-5)


def test_the_student_has_no_trace_of_them_and_they_learn(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(kind="features", steps=40, dropout=0.0, rate=1e-2)
    objective = case.objective()
    before = {pair: weight.detach().clone() for pair, weight in objective.features.projectors.weights.items()}
    _, student = training.run_case(case, tmp_path, objective=objective)
    assert student.state_dict().keys() == case.student().state_dict().keys()
    assert not any(module._forward_hooks for module in nn.ModuleList([student, objective.teacher.model]).modules())
    assert all(not torch.equal(before[pair], weight) for pair, weight in objective.features.projectors.weights.items())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss_hidden"] < 0.8 * rows[0]["loss_hidden"]


def test_a_finished_stage_and_one_that_goes_on_end_in_the_same_bits(training: ModuleType, tmp_path: Path) -> None:
    _, straight = training.run_case(training.Case(kind="features", steps=12, every=4), tmp_path / "one")
    _, again = training.run_case(training.Case(kind="features", steps=12, every=4), tmp_path / "one")
    for name, value in straight.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_heads_that_fit_are_chosen_and_others_refused_with_those_that_do(training: ModuleType) -> None:
    student, teacher = training.tiny_model(1), LocalTeacher(training.tiny_model(2, layers=4, hidden=48), v_eff=96)

    def made(heads: int | None) -> Features:
        settings = FeatureSettings(relations=RelationSettings(weight=1.0, heads=heads))
        return Features(Wanted(settings=settings, hidden=[], relations=[(1, 3)]), student, teacher, seed=0)

    assert made(None).heads == 2
    with pytest.raises(UserError, match=r"heads=3 does not divide the widths \[16, 24, 32, 48\] .* use one of 1, 2, 4, 8"):
        made(3)


def test_a_family_whose_layers_cannot_be_read_is_refused_by_name(training: ModuleType) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    student = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=0))
    teacher = LocalTeacher(training.tiny_model(2), v_eff=96)
    hidden = FeatureSettings(hidden=HiddenSettings(weight=1.0))
    Features(Wanted(settings=hidden, hidden=[(0, 0)], relations=[]), student, teacher, seed=0)
    relations = FeatureSettings(relations=RelationSettings(weight=1.0))
    with pytest.raises(UserError, match=r"the student \(model type 'gpt2'\): layer 1 has no q_proj"):
        Features(Wanted(settings=relations, hidden=[], relations=[(1, 1)]), student, teacher, seed=0)
    assert LossSettings(features=hidden).features == hidden
