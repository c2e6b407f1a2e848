"""Local distillation: the error is that of the parent's own states, only what lowers it is kept, and a killed one ends in the same bits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.models.calibration.layer_storage import ReadShelf
from decoct.models.families import decoder_layers, decoder_linears
from decoct.models.family_map import family_of
from decoct.models.folder.streaming import open_files
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.local_distillation import LayerResult, LocalHow, amount_of_work, distill_layers
from decoct.models.pruning.parent_layers import ParentLayers
from decoct.models.pruning.structured import cut

from ...support.pruned_families import FFN, HIDDEN, LAYERS, VOCABULARY, tiny

NARROW = [0, 1, 3, 4, 5, 8, 9, 12, 14, 17, 20, 23]
HOW = LocalHow(learning_rate=3e-3, epochs=2, seed=0, inputs="parent")
OWN = replace(HOW, inputs="student")
CPU = torch.device("cpu")


def text(seed: int, rows: int = 12) -> list[dict[str, Tensor]]:
    made = torch.randint(1, VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(made)
    # padding, whose states count nowhere
    mask[:, 13:] = 0
    return [{"input_ids": ids, "attention_mask": kept} for ids, kept in zip(made.split(3), mask.split(3))]


FIT, HELD_OUT = text(1), text(2, rows=6)


def half(family: str, layers: list[int], hidden: list[int] | None = None) -> tuple[Any, Any, Kept]:
    """(parent, student, kept): half of the FFN channels of some layers."""
    parent: Any = tiny(family, dtype=torch.float32)
    kept = Kept(layers=layers, ffn=[list(range(0, FFN, 2)) for _ in layers], hidden=hidden)
    return parent, cut(parent, kept), kept


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Kill(Exception):  # noqa: N818 - what ends a process is no error
    """The process ends here."""


class Shelf:
    """A ledger in memory that is killed after some layers."""

    def __init__(self, until: int) -> None:
        self.until, self.kept = until, dict[int, tuple[LayerResult, dict[str, Tensor]]]()

    def get(self, layer: int) -> tuple[LayerResult, dict[str, Tensor]] | None:
        return self.kept.get(layer)

    def put(self, result: LayerResult, weights: Mapping[str, Tensor]) -> None:
        self.kept[result.layer] = result, {name: tensor.detach().clone() for name, tensor in weights.items()}
        if len(self.kept) == self.until:
            raise Kill


@torch.no_grad()
def error_by_hand(parent: Any, student: Any, position: int, first: int, last: int, hidden: list[int] | None) -> float:
    """Mean of ||student - parent||^2 / ||parent||^2 over unmasked held-out tokens, from the hidden states of a whole pass."""
    total, tokens = 0.0, 0
    for batch in HELD_OUT:
        seen: dict[str, Tensor] = {}

        def look(key: str, seen: dict[str, Tensor] = seen) -> Any:
            def hook(_module: Any, args: Any, kwargs: Any, output: Any = None) -> None:
                value = output if output is not None else (args[0] if args else kwargs["hidden_states"])
                seen[key] = (value[0] if isinstance(value, tuple) else value).clone()

            return hook

        theirs = decoder_layers(parent)
        handles = [
            theirs[first].register_forward_pre_hook(look("in"), with_kwargs=True),
            theirs[last].register_forward_hook(look("out"), with_kwargs=True),
        ]
        parent.base_model(**batch, use_cache=False)
        chosen = list(range(HIDDEN)) if hidden is None else hidden

        def give(_module: Any, args: Any, kwargs: Any, seen: dict[str, Tensor] = seen, chosen: list[int] = chosen) -> Any:
            given = seen["in"][..., chosen]
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

        own = decoder_layers(student)[position]
        handles += [
            own.register_forward_pre_hook(give, with_kwargs=True),
            own.register_forward_hook(look("own"), with_kwargs=True),
        ]
        student.base_model(**batch, use_cache=False)
        for handle in handles:
            handle.remove()
        wanted, mask = seen["out"][..., chosen], batch["attention_mask"].bool()
        total += float(((seen["own"] - wanted).square().sum(-1) / wanted.square().sum(-1))[mask].sum())
        tokens += int(mask.sum())
    return total / tokens


@torch.no_grad()
def error_of_the_last(parent: Any, student: Any) -> float:
    """The error behind the last layer of whole passes of both models."""
    total, tokens = 0.0, 0
    for batch in HELD_OUT:
        outputs: list[Tensor] = []

        def note(_module: Any, _args: Any, output: Any, outputs: list[Tensor] = outputs) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [decoder_layers(model)[-1].register_forward_hook(note) for model in (parent, student)]
        parent.base_model(**batch, use_cache=False)
        student.base_model(**batch, use_cache=False)
        for handle in handles:
            handle.remove()
        wanted, mask = outputs[0][..., NARROW], batch["attention_mask"].bool()
        total += float(((outputs[1] - wanted).square().sum(-1) / wanted.square().sum(-1))[mask].sum())
        tokens += int(mask.sum())
    return total / tokens


@pytest.mark.parametrize(
    ("family", "hidden"),
    # gpt2 and opt have no hidden size without other heads
    [("mistral", None), ("mistral", NARROW), ("gemma3_text", NARROW), ("phi3", NARROW), ("olmo2", None), ("gpt2", None), ("opt", None)],
)
def test_each_layer_comes_nearer_to_its_parent_on_the_parents_own_inputs(family: str, hidden: list[int] | None) -> None:
    parent, student, kept = half(family, list(range(LAYERS)), hidden)
    before = [error_by_hand(parent, student, index, index, index, hidden) for index in range(LAYERS)]
    outside = {name: value for name, value in weights_of(student).items() if family_of(parent).place(name)[0] is None}
    work: list[int] = []
    results = distill_layers(student, ParentLayers(parent, CPU), kept, FIT, HELD_OUT, HOW, advance=work.append)
    assert [result.layer for result in results] == [result.parent for result in results] == list(range(LAYERS))
    assert [result.before for result in results] == pytest.approx(before, rel=1e-4)
    after = [error_by_hand(parent, student, index, index, index, hidden) for index in range(LAYERS)]
    assert [result.after for result in results] == pytest.approx(after, rel=1e-4)
    assert all(result.kept for result in results)
    assert sum(after) < 0.96 * sum(before)
    # what is outside the layers did not move, and everything was counted
    assert all(torch.equal(student.get_parameter(name), value) for name, value in outside.items())
    assert sum(work) == amount_of_work(HOW, LAYERS, LAYERS, 12 * 13, 6 * 13)


def test_a_layer_before_dropped_ones_learns_the_output_after_these() -> None:
    parent, student, kept = half("mistral", [0, LAYERS - 1])
    before = error_by_hand(parent, student, 0, 0, LAYERS - 2, None)
    results = distill_layers(student, ParentLayers(parent, CPU), kept, FIT, HELD_OUT, HOW)
    assert [result.parent for result in results] == [LAYERS - 2, LAYERS - 1]
    assert results[0].before == pytest.approx(before, rel=1e-4)
    assert results[0].after == pytest.approx(error_by_hand(parent, student, 0, 0, LAYERS - 2, None), rel=1e-4)


def test_a_result_that_is_not_better_leaves_the_layer_as_it_was() -> None:
    parent, student, kept = half("mistral", list(range(LAYERS)))
    before = weights_of(student)
    wild = LocalHow(learning_rate=30.0, epochs=1, seed=0)
    results = distill_layers(student, ParentLayers(parent, CPU), kept, FIT, HELD_OUT, wild)
    assert not any(result.kept for result in results)
    assert all(result.after > result.before for result in results)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(student).items())


def test_zeros_of_a_mask_stay_and_others_move() -> None:
    parent: Any = tiny("mistral", dtype=torch.float32)
    student: Any = tiny("mistral", dtype=torch.float32)
    names = list(decoder_linears(student))
    sparse = [name for name in names if "up_proj" not in name]
    for name in names:
        student.get_submodule(name).weight.data[:, ::2] = 0
    distill_layers(student, ParentLayers(parent, CPU), Kept(layers=list(range(LAYERS))), FIT, HELD_OUT, HOW, sparse=sparse)
    for name in names:
        share = float((student.get_submodule(name).weight == 0).float().mean())
        # of a channel that the mask of down_proj leaves out, up_proj has no gradient
        assert share == 0.5 if name in sparse else share < 0.3, name
        assert not torch.equal(student.get_submodule(name).weight, parent.get_submodule(name).weight)


def test_a_parent_read_from_its_files_gives_the_same_bits(tmp_path: Path) -> None:
    parent, student, kept = half("mistral", [0, 1, LAYERS - 1], NARROW)
    parent.save_pretrained(tmp_path)
    again = cut(parent, kept)
    whole = distill_layers(student, ParentLayers(parent, CPU), kept, FIT, HELD_OUT, HOW)
    with open_files(tmp_path, None, torch.float32) as (model, files):
        assert model is not None
        assert files is not None
        layers = decoder_layers(model)
        streamed = distill_layers(again, ParentLayers(model, CPU, ReadShelf(model, layers, files, CPU)), kept, FIT, HELD_OUT, HOW)
        # no layer stayed in memory
        assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())
    assert streamed == whole
    assert all(torch.equal(value, student.get_parameter(name)) for name, value in weights_of(again).items())


def test_on_the_students_own_states_layers_make_up_for_the_errors_before_them() -> None:
    parent, student, kept = half("mistral", [0, 1, LAYERS - 1], NARROW)
    work: list[int] = []
    first, *_, last = distill_layers(student, ParentLayers(parent, CPU), kept, FIT, HELD_OUT, OWN, advance=work.append)
    assert first.after == pytest.approx(error_by_hand(parent, student, 0, 0, 0, NARROW), rel=1e-4)
    # the last layer's output is that of the whole student, given the parent's embeddings
    assert last.after == pytest.approx(error_of_the_last(parent, student), rel=1e-4)
    assert sum(work) == amount_of_work(OWN, 3, LAYERS, 12 * 13, 6 * 13)


@pytest.mark.parametrize(("family", "how"), [("mistral", HOW), ("gpt2", HOW), ("mistral", OWN)])
def test_killed_after_any_layer_ends_in_the_same_bits(family: str, how: LocalHow) -> None:
    parent, student, kept = half(family, list(range(LAYERS)))
    whole = distill_layers(student, ParentLayers(parent, CPU), kept, FIT, HELD_OUT, how)
    ledger, starts = Shelf(0), 0
    for until in (1, 3, 0):
        ledger.until, again = until, cut(parent, kept)
        starts += 1
        work: list[int] = []
        try:
            found = distill_layers(again, ParentLayers(parent, CPU), kept, FIT, HELD_OUT, how, ledger=ledger, advance=work.append)
        except Kill:
            continue
        assert found == whole
        assert sum(work) == amount_of_work(how, LAYERS, LAYERS, 12 * 13, 6 * 13)
        assert all(torch.equal(value, student.get_parameter(name)) for name, value in weights_of(again).items())
    assert starts == 3
    assert len(ledger.kept) == LAYERS
