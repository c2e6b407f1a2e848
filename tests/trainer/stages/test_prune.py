"""Stage `prune`, structured: what it is scored on, what it writes and says, and that nothing is written when it fails."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoct.models.axis_map import Axis
from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record, save_model_folder
from decoct.models.pruning.repair import cut_and_repair
from decoct.models.pruning.score_store import FORMAT
from decoct.models.pruning.scores import activation_scores
from decoct.models.pruning.shape_choice import select
from decoct.models.pruning.structured import cut
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings, StructuredSettings
from decoct.trainer.stages import prune, prune_structured
from decoct.trainer.stages.calibration import calibration_text
from decoct.trainer.stages.context import StageContext, StageResult

from ...support.pruned_families import tiny

MakeContext = Callable[..., StageContext]
SHAPE: dict[Axis, int] = {"ffn": 64, "heads": 2, "hidden": 36, "layers": 2}


def pruned(context: StageContext, tokens: int = 256, **kept: Any) -> StageResult:
    return prune.finish(PruneSettings(structured=StructuredSettings(**kept), calibration_tokens=tokens), context, None)


def said(context: StageContext) -> str:
    return context.run.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def scored_on(context: StageContext, monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Indices of the training windows that the stage scores channels on."""
    rows: list[torch.Tensor] = []

    def scores(model: Any, batches: Iterable[Any], **options: Any) -> Any:
        batches = list(batches)
        rows.extend(row for batch in batches for row in batch["input_ids"])
        return activation_scores(model, batches, **options)

    monkeypatch.setattr("decoct.models.pruning.score_cache.activation_scores", scores)
    pruned(context, tokens, ffn=48)
    windows = context.run.data.train
    place = {tuple(windows[index]["input_ids"].tolist()): index for index in range(len(windows))}
    return [place[tuple(row.tolist())] for row in rows]


def test_channels_are_scored_on_windows_from_all_over_the_text(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context("01-prune", kind="prune")
    count = len(context.run.data.train)
    seen = scored_on(context, monkeypatch, 16 * 32)
    assert len(set(seen)) == 16
    # in each quarter of the text, where the first 16 windows lie in one
    assert {4 * index // count for index in seen} == {0, 1, 2, 3}
    other = scored_on(make_context("02-prune", kind="prune", seed=1), monkeypatch, 16 * 32)
    assert other != seen
    assert scored_on(make_context("03-prune", kind="prune"), monkeypatch, 32 * 32)[:16] == seen


def test_channels_are_scored_on_the_text_that_rounding_is_calibrated_on(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context("01-prune", kind="prune", seed=3)
    wanted = torch.cat([batch["input_ids"] for batch in calibration_text(context.run.data.train, 300, 3).batches])
    seen = scored_on(context, monkeypatch, 300)
    assert torch.equal(torch.stack([context.run.data.train[index]["input_ids"] for index in seen]), wanted)


@pytest.mark.parametrize(
    ("score", "depth_score"), [(None, None), ("activation", "greedy_loss"), ("magnitude", "contiguous"), ("taylor", "block_influence")]
)
def test_the_folder_is_the_cut_model_with_its_record(make_context: MakeContext, trained_folder: Path, score: Any, depth_score: Any) -> None:
    context = make_context("01-prune", kind="prune")
    done = pruned(context, **{**SHAPE}, score=score, depth_score=depth_score)
    record = read_record(context.model)
    assert record["parent_shape"] == {"ffn": 96, "heads": 4, "kv_heads": 2, "hidden": 48, "layers": 3, "head_dim": 12}
    assert record["kept"]["layers"] == [0, 2]
    parent = load_model(trained_folder, dtype=torch.float32)
    text = calibration_text(context.run.data.train, 256, 0).batches
    options: dict[str, Any] = {"score": score or "weight_activation", "depth_score": depth_score or "block_influence"}
    kept = select(parent, text, SHAPE, **options)
    assert record["kept"]["hidden"] == kept.hidden
    assert kept.heads is not None
    assert record["kept"]["heads"] == {f"model.layers.{layer}.self_attn": heads for layer, heads in zip((0, 2), kept.heads, strict=True)}
    assert "kv_heads" not in record["kept"]
    expected = cut(parent, kept)
    loaded: Any = AutoModelForCausalLM.from_pretrained(context.model, dtype=torch.float32)
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(torch.bfloat16).float()), name
    assert (loaded.config.hidden_size, loaded.config.head_dim, loaded.config.num_attention_heads) == (36, 12, 2)
    assert done.facts["coverage"] == {"share": 1.0, "left": {}}
    for line in (
        "kept 2 of 3 layers",
        "kept 36 of 48 hidden channels",
        "kept 64 of 96 FFN channels in each of 2 layers",
        "kept 2 of 4 query",
    ):
        assert line in said(context)
    assert ("the loss is" in said(context)) == (depth_score in ("greedy_loss", "contiguous"))


def test_a_cut_that_nothing_was_kept_of_is_refused_before_weights_are_read(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decoct.trainer.stages.prune_structured.whole_student", lambda context: pytest.fail("it was loaded"))
    for kept, told in (
        ({"heads": 3}, "structured.heads=3 does not go with the model's 2 key/value heads"),
        ({"hidden": 50}, "structured.hidden=50 keeps more hidden channels than the student's 48; give at most 48"),
        ({"hidden": 46}, "give structured.hidden=44 or 48"),
        ({"layers": 1}, "the first and the last layer are always kept; give 2 to 3"),
        ({"ffn": 96, "layers": 3}, "keep all FFN channels and layers"),
    ):
        context = make_context("01-prune", kind="prune")
        with pytest.raises(UserError, match=told):
            pruned(context, **kept)
        assert not context.model.exists()


def test_broken_weights_and_other_families_leave_nothing_behind(make_context: MakeContext, words: Any, tmp_path: Path) -> None:
    broken = tiny("mistral", dtype=torch.float32, vocab_size=len(words))
    # finite in the file, and beyond fp32 in the forward pass
    for layer in broken.model.layers:
        torch.nn.init.constant_(layer.mlp.gate_proj.weight, 1e38)
    folder = save_model_folder(tmp_path / "broken", broken, words, {}, dtype=torch.float32)
    context = make_context("01-prune", kind="prune", input=str(folder))
    with pytest.raises(NonFiniteError, match="scores of FFN channels are not finite"):
        pruned(context, ffn=8)
    assert not context.model.exists()


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "phi3", "olmo2"])
def test_other_families_are_pruned_by_the_stage(make_context: MakeContext, words: Any, tmp_path: Path, kind: str) -> None:
    folder = save_model_folder(tmp_path / kind, tiny(kind, dtype=torch.float32, vocab_size=len(words)), words, {}, dtype=torch.float32)
    context = make_context("01-prune", kind="prune", input=str(folder))
    done = pruned(context, ffn=9, heads=3 if kind == "gpt2" else 2, hidden=12, layers=3)
    assert done.facts["coverage"]["share"] == 1
    loaded: Any = AutoModelForCausalLM.from_pretrained(context.model)
    assert loaded.config.hidden_size == 12
    assert loaded.config.num_hidden_layers == 3


def test_widths_that_kernels_pad_are_told(make_context: MakeContext, words: Any, tmp_path: Path) -> None:
    model = tiny("qwen2", dtype=torch.float32, vocab_size=len(words), intermediate_size=300)
    folder = save_model_folder(tmp_path / "wide", model, words, {}, dtype=torch.float32)
    context = make_context("01-prune", kind="prune", input=str(folder))
    pruned(context, ffn=200, heads=4)
    assert "structured.ffn=200 is not a multiple of 128: groups of 128 do not divide the down projection" in said(context)
    assert "use 128 or 256" in said(context)
    assert "vLLM's own qwen2 takes head_dim as hidden / heads, which is not 4 in this shape" in said(context)
    # attention is 33 % of what there is, and q and o half of that
    assert "of the decoder's weights along FFN channels and query heads" in said(context)


def test_repairs_are_told_and_recorded_and_held_out_text_judges(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []

    def repairing(model: Any, kept: Any, fit: Any, held_out: Any, **options: Any) -> Any:
        seen.extend([row.tolist() for batch in part for row in batch["input_ids"]] for part in (fit, held_out))
        return cut_and_repair(model, kept, fit, held_out, **options)

    monkeypatch.setattr(prune_structured, "cut_and_repair", repairing)
    plain, context = make_context("01-plain", kind="prune"), make_context("02-repaired", kind="prune")
    pruned(plain, tokens=640, ffn=48, hidden=36)
    done = pruned(context, tokens=640, ffn=48, hidden=36, repair=True)
    assert [repair["repair"] for repair in done.facts["repairs"]] == ["norms", "ffn"]
    assert read_record(context.model)["repairs"] == done.facts["repairs"]
    for repair in done.facts["repairs"]:
        verdict = "kept" if repair["kept"] else "not kept"
        assert f"KL {repair['kl_before']:.4f} -> {repair['kl_after']:.4f} on held-out windows, {verdict}" in said(context)
    assert any(repair["kept"] for repair in done.facts["repairs"])
    assert "repairs" not in read_record(plain.model)
    assert read_record(plain.model)["kept"] == read_record(context.model)["kept"]
    fit, held_out = seen
    assert (len(fit), len(held_out)) == (20, 5)
    scored_rows = [row.tolist() for batch in calibration_text(context.run.data.train, 640, 0).batches for row in batch["input_ids"]]
    assert fit == scored_rows, "repairs are fitted on the windows of the scores"
    assert all(row not in fit for row in held_out)


def test_text_that_ends_is_shared_by_fitting_and_judging(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def repairing(model: Any, kept: Any, fit: Any, held_out: Any, **_options: Any) -> Any:
        sizes.extend(sum(len(batch["input_ids"]) for batch in part) for part in (fit, held_out))
        return cut(model, kept), []

    monkeypatch.setattr(prune_structured, "cut_and_repair", repairing)
    context = make_context("01-prune", kind="prune")
    pruned(context, tokens=10_000_000, ffn=48, repair=True)
    count = len(context.run.data.train)
    assert sizes == [count - count // 4, count // 4]


def test_zeros_of_a_mask_are_not_refitted(make_context: MakeContext, words: Any, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32, vocab_size=len(words))
    listed = [f"model.layers.{layer}.{name}" for layer in range(4) for name in ("mlp.down_proj", "mlp.up_proj")]
    folder = save_model_folder(tmp_path / "sparse", model, words, {"sparse": listed}, dtype=torch.float32)
    context = make_context("01-prune", kind="prune", input=str(folder))
    done = pruned(context, ffn=9, repair=True)
    assert "4 output projections have zeros that stay, and are not refitted" in said(context)
    assert "repairs" not in done.facts


def test_another_shape_is_cut_by_the_scores_of_the_first(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = pruned(make_context("01-prune", kind="prune", seed=7), ffn=64, repair=True)
    context = make_context("02-prune", kind="prune", seed=8)
    pruned(context, ffn=40, hidden=40, repair=True)
    assert "s, and kept for other shapes of this model" in said(context)
    monkeypatch.setattr("decoct.models.pruning.score_cache.activation_scores", lambda *_, **__: pytest.fail("scored again"))
    monkeypatch.setattr("decoct.models.pruning.score_cache.summed", lambda *_, **__: pytest.fail("summed again"))
    again = make_context("03-prune", kind="prune", seed=7)
    once_more = pruned(again, ffn=64, repair=True)
    assert "scores: computed before" in said(again)
    assert once_more.facts == alone.facts
    assert once_more.model is not None and alone.model is not None
    assert (once_more.model / "model.safetensors").read_bytes() == (alone.model / "model.safetensors").read_bytes()
    pruned(make_context("04-prune", kind="prune", seed=8), ffn=72, repair=True)
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        # other text
        pruned(make_context("05-prune", kind="prune", seed=9), ffn=72, repair=True)


def test_scores_of_an_earlier_format_are_made_again(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("decoct.trainer.stages.score_caches.FORMAT", FORMAT - 1)
        pruned(make_context("01-prune", kind="prune", seed=11), ffn=64, score="taylor")
    for folder, said_of_it in (("02-prune", "scores: computed in"), ("03-prune", "scores: computed before")):
        context = make_context(folder, kind="prune", seed=11)
        pruned(context, ffn=64, score="taylor")
        assert said_of_it in said(context)


def test_the_record_has_the_indices_of_the_first_model_through_every_stage(make_context: MakeContext, trained_folder: Path) -> None:
    from decoct.models.family_map import family_of
    from decoct.models.pruning.kept_record import root_of
    from decoct.models.sizes import sizes_of

    first = make_context("01-prune", kind="prune")
    pruned(first, ffn=80, hidden=44, layers=2)
    once = read_record(first.model)
    assert once["root"] == {"shape": once["parent_shape"], "kept": once["kept"]}
    # a stage between them changes weights alone
    between = make_context("02-prune", kind="prune", input=str(first.model))
    prune.finish(PruneSettings(magnitude=MagnitudeSettings(keep=0.9)), between, None)
    second = make_context("03-prune", kind="prune", input=str(between.model))
    pruned(second, ffn=64, heads=2, hidden=36)
    record = read_record(second.model)
    assert record["parent_shape"]["layers"] == 2
    assert record["root"]["shape"] == once["parent_shape"]
    assert record["root"]["kept"]["layers"] == [0, 2]
    assert record["root"]["kept"]["hidden"] == [once["kept"]["hidden"][index] for index in record["kept"]["hidden"]]
    own, before = record["kept"]["ffn"], once["kept"]["ffn"]
    assert record["root"]["kept"]["ffn"] == {
        name: [before[name][index] for index in own[f"model.layers.{place}.mlp"]]
        for place, name in enumerate(("model.layers.0.mlp", "model.layers.2.mlp"))
    }
    # the indices name the very channels of the first model, whose smallest weights are zero and which is cut, but nothing moved
    parent: Any = load_model(trained_folder, dtype=torch.float32)
    cut_twice: Any = load_model(second.model, dtype=torch.float32)
    family = family_of(parent)
    found = root_of(record, family, sizes_of(cut_twice.config, family))
    assert found is not None
    theirs: Any = cut(parent, found[1])
    ours = cut_twice.model.layers[1].mlp.up_proj.weight.detach().flatten()
    wanted = theirs.model.layers[1].mlp.up_proj.weight.detach().flatten()
    assert ours.shape == wanted.shape
    assert float(torch.corrcoef(torch.stack([ours, wanted]))[0, 1]) > 0.99
    # a shape that another tool has changed since ends the chain
    assert root_of(record, family, sizes_of(parent.config, family)) is None
    assert root_of({"root": {"shape": {"ffn": 1}, "kept": {}}}, family, sizes_of(parent.config, family)) is None
