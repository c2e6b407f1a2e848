"""Scores are computed once for a model and a text: kept whole, read back bit for bit, shared by processes, and made again when damaged."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.models.axis_map import Axis
from decoct.models.common.errors import NonFiniteError
from decoct.models.family_map import family_of
from decoct.models.pruning import score_cache
from decoct.models.pruning.grams import Grams
from decoct.models.pruning.ranks import Ranks
from decoct.models.pruning.repair import refitted
from decoct.models.pruning.score_cache import ScoreCache
from decoct.models.pruning.score_store import ScoreStore
from decoct.models.pruning.shape_choice import select, selected
from decoct.models.sizes import ChannelScore, DepthScore

from ...support.pruned_families import LAYERS, VOCABULARY, tiny

SHAPE: dict[Axis, int] = {"ffn": 20, "heads": 2, "kv_heads": 1, "hidden": 24, "layers": 3}
OTHER: dict[Axis, int] = {"ffn": 12, "layers": 2}


def text(rows: int = 6) -> list[dict[str, Tensor]]:
    made = torch.randint(1, VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(made)
    mask[1, 9:] = 0
    return [{"input_ids": ids, "attention_mask": kept} for ids, kept in zip(made.split(2), mask.split(2), strict=True)]


def no_more_text(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: pytest.fail("the text was read again"))


def shape_of(kind: str, shape: dict[Axis, int]) -> dict[Axis, int]:
    return {axis: number for axis, number in shape.items() if axis != "kv_heads"} if kind == "gpt2" else shape


@pytest.mark.parametrize("score", ["weight_activation", "activation", "magnitude", "taylor"])
@pytest.mark.parametrize("depth_score", ["block_influence", "greedy_loss", "contiguous"])
def test_other_shapes_are_chosen_without_reading_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: ChannelScore, depth_score: DepthScore
) -> None:
    model = tiny("qwen3", dtype=torch.float32)
    options: dict[str, Any] = {"score": score, "depth_score": depth_score}
    alone = {number: select(model, text(), shape, **options) for number, shape in enumerate((SHAPE, OTHER))}
    first = ScoreCache(model, text(), ScoreStore(tmp_path))
    assert selected(first, OTHER, **options) == alone[1]
    if depth_score == "contiguous":
        # blocks of another length are other measurements
        selected(ScoreCache(model, text(), ScoreStore(tmp_path)), SHAPE, **options)
    assert first.computed
    no_more_text(monkeypatch, model)
    again = ScoreCache(model, text(), ScoreStore(tmp_path))
    assert selected(again, SHAPE, **options) == alone[0]
    assert selected(again, OTHER, **options) == alone[1]
    assert not again.computed


@pytest.mark.parametrize("kind", ["gpt2", "opt", "olmo2", "phi3", "gemma2"])
def test_every_family_keeps_all_its_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = tiny(kind, dtype=torch.float32)
    family = family_of(model)
    names = refitted(family, ["ffn", "heads"], LAYERS)
    fresh = dict(Grams(model, text(), names))
    ScoreCache(model, text(), ScoreStore(tmp_path)).prepare("weight_activation", names)
    monkeypatch.setattr(score_cache, "activation_scores", lambda *_, **__: pytest.fail("scored again"))
    monkeypatch.setattr(score_cache, "summed", lambda *_, **__: pytest.fail("summed again"))
    again = ScoreCache(model, text(), ScoreStore(tmp_path))
    assert again.channels("activation").axes["ffn"][1].shape == again.channels("weight_activation").axes["ffn"][1].shape
    kept = dict(again.grams(names))
    assert list(kept) == names
    for name, gram in kept.items():
        assert torch.equal(gram, fresh[name])
        assert torch.equal(gram, gram.T)


def test_scores_and_gram_matrices_take_one_pass_as_far_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", dtype=torch.float32)
    passes: list[int] = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *given, **named: (passes.append(1), forward(*given, **named))[1])
    names = refitted(family_of(model), ["ffn", "kv_heads"], LAYERS)
    assert len(names) == 2 * LAYERS
    ScoreCache(model, text(), ScoreStore(tmp_path / "a")).prepare("activation", names)
    assert len(passes) == 3
    passes.clear()
    monkeypatch.setattr("decoct.models.pruning.grams.BUDGET", 1)
    ScoreCache(model, text(), ScoreStore(tmp_path / "b")).prepare("activation", names)
    assert len(passes) == 3 * len(names)
    passes.clear()
    # too large to be kept: summed each time, and the same
    monkeypatch.setattr("decoct.models.pruning.grams.BUDGET", 2**30)
    monkeypatch.setattr(score_cache, "MOST_GRAMS", 1)
    once = dict(ScoreCache(model, text(), ScoreStore(tmp_path / "c")).grams(names))
    assert len(passes) == 3
    assert not list(tmp_path.glob("c/gram*"))
    monkeypatch.setattr(score_cache, "MOST_GRAMS", 2**30)
    kept = dict(ScoreCache(model, text(), ScoreStore(tmp_path / "b")).grams(names))
    assert all(torch.equal(kept[name], once[name]) for name in names)


def test_a_damaged_part_is_made_again(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    whole = ScoreCache(model, text(), ScoreStore(tmp_path)).channels("activation")
    file = tmp_path / "activation.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    (tmp_path / "weight_activation.safetensors").write_bytes(b"half")
    again = ScoreCache(model, text(), ScoreStore(tmp_path))
    assert torch.equal(again.channels("activation").axes["heads"][2], whole.axes["heads"][2])
    assert again.computed
    assert not ScoreCache(model, text(), ScoreStore(tmp_path)).computed
    assert ScoreStore(tmp_path).has("weight_activation")


def test_a_loss_that_was_measured_before_a_kill_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.models.pruning import depth

    model = tiny("llama", dtype=torch.float32)
    wanted = ScoreCache(model, text()).layers(2, "greedy_loss")
    measured: list[int] = []

    def loss(*given: Any, **named: Any) -> float:
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return mean_loss(*given, **named)

    mean_loss = depth.mean_loss
    monkeypatch.setattr(depth, "mean_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        ScoreCache(model, text(), ScoreStore(tmp_path)).layers(2, "greedy_loss")
    # the first removal of two candidates is kept, the second one is made again
    assert [file.name for file in tmp_path.iterdir()] == ["without-1.json"]
    assert ScoreCache(model, text(), ScoreStore(tmp_path)).layers(2, "greedy_loss") == wanted
    assert len(measured) == 4


def test_nothing_is_kept_of_scores_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    torch.nn.init.constant_(model.model.layers[1].mlp.gate_proj.weight, 1e38)
    with pytest.raises(NonFiniteError, match="are not finite"):
        ScoreCache(model, text(), ScoreStore(tmp_path)).channels("weight_activation")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("score", ["weight_activation", "taylor"])
def test_processes_that_share_the_text_find_what_one_finds(tmp_path: Path, score: ChannelScore) -> None:
    models = [tiny("qwen3", dtype=torch.float32) for _ in range(2)]
    alone = ScoreCache(copy.deepcopy(models[0]), text())
    meeting, given = threading.Barrier(2, timeout=60), dict[int, Tensor]()
    found: dict[int, Any] = {}
    names = refitted(family_of(models[0]), ["ffn"], LAYERS)

    def work(rank: int) -> None:
        def add_up(values: Tensor) -> Tensor:
            given[rank] = values.clone()
            meeting.wait()
            values.copy_(given[0] + given[1])
            meeting.wait()
            return values

        # only the first one has a store, as on machines of their own
        store = ScoreStore(tmp_path) if rank == 0 else None
        cache = ScoreCache(models[rank], text(), store, ranks=Ranks(rank, 2, add_up))
        cache.prepare(score, names)
        found[rank] = cache.layers(2, "greedy_loss")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = ScoreCache(models[0], text(), ScoreStore(tmp_path))
    for axis in ("ffn", "heads", "kv_heads"):
        torch.testing.assert_close(kept.channels(score).axes[axis], alone.channels(score).axes[axis])
    torch.testing.assert_close(kept.channels(score).hidden_of([0, 1]), alone.channels(score).hidden_of([0, 1]))
    for (_, ours), (_, theirs) in zip(kept.grams(names), alone.grams(names), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[0] == found[1] == alone.layers(2, "greedy_loss")
    assert not kept.computed
