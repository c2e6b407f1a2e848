"""Stage `prune` where it sets single weights to zero: what it writes, says and records, and what it refuses."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.losses.settings import LossSettings
from decoct.models.common.errors import DecoctError, UserError
from decoct.models.families import decoder_linears
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record
from decoct.models.pruning import layerwise
from decoct.models.pruning.pattern import Pattern
from decoct.models.pruning.selection import follows
from decoct.models.pruning.zeros_record import sparse_modules
from decoct.trainer.settings import TrainerSettings
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings
from decoct.trainer.settings_sparsity import MovementSettings, SparseGptSettings, WandaSettings
from decoct.trainer.stages import prune
from decoct.trainer.stages.context import StageContext

MakeContext = Callable[..., StageContext]
WANDA = PruneSettings(wanda=WandaSettings(keep=0.5), calibration_tokens=512)
SPARSEGPT = PruneSettings(sparsegpt=SparseGptSettings(pattern="2:4"), calibration_tokens=512)
STEPS: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2, "warmup": 0.0, "loss": LossSettings(hard_weight=0.5)}
TRAINER = TrainerSettings(precision="32", global_batch_tokens=128)


def said(context: StageContext) -> str:
    return cast(Any, context.run.console.file).getvalue()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: linear.weight for name, linear in decoder_linears(load_model(folder, dtype=torch.float32)).items()}


@pytest.mark.parametrize("settings", [WANDA, SPARSEGPT], ids=["wanda", "sparsegpt"])
def test_a_stage_on_text_writes_zeros_their_record_and_the_errors(make_context: MakeContext, settings: PruneSettings) -> None:
    context = make_context("01-prune", kind="prune")
    prune.finish(settings, context, None)
    before, after = load_model(context.input, dtype=torch.float32), weights_of(context.model)
    record = read_record(context.model)["pruning"]
    total = sum(weight.numel() for weight in after.values())
    nonzero = sum(int((weight != 0).sum()) for weight in after.values())
    assert (record["method"], record["keep"], record["kept"], record["of"]) == (settings.method, 0.5, total // 2, total)
    assert nonzero == total // 2
    assert sparse_modules(context.model) == list(after)
    for name, weight in after.items():
        source = before.get_submodule(name).get_parameter("weight").detach()
        if settings.wanda:
            assert bool(((weight != 0).sum(1) == round(0.5 * weight.shape[1])).all()), name
            assert torch.equal(weight, source * (weight != 0)), "what stays keeps its value"
        else:
            assert follows(weight, Pattern(2, 4)), name
            assert not torch.equal(weight, source * (weight != 0)), "what stays makes up for what goes"
    # a head that is tied to the embedding is never pruned
    heads = [cast(Any, model).lm_head.weight for model in (before, load_model(context.model, dtype=torch.float32))]
    assert torch.equal(*heads) and before.config.tie_word_embeddings
    # what the record says is what was printed
    assert record["calibration"]["tokens"] == 512 and record["calibration"]["sha256"][:12] in said(context)
    for kind, error in record["relative_error"].items():
        assert 0 < error["pruned"] < 1 and 0 < error["by_magnitude"] < 1 and error["linears"] == 3
        # Wanda keeps the same share of every row, magnitude only of the matrix: on a model this small either may be ahead
        assert settings.wanda or error["pruned"] < error["by_magnitude"], kind
        assert re.search(rf"{re.escape(kind)} +squared output error {error['pruned']:.2e} of the whole, \S+ by magnitude", said(context))
    assert record.get("damping") == (0.01 if settings.sparsegpt else None)
    how = "wanda" if settings.wanda else "sparsegpt 2:4"
    assert f"50.00% of {total:,} weights are zero in the written files ({how})" in said(context)
    assert "pruned among 100% of the decoder's weights" in said(context)
    assert "sparsity_config" not in (context.model / "config.json").read_text()


def test_the_same_text_and_seed_give_the_same_bits(make_context: MakeContext) -> None:
    folders = []
    for name, seed in (("01-prune", 0), ("02-prune", 0), ("03-prune", 1)):
        context = make_context(name, kind="prune", seed=seed)
        prune.finish(SPARSEGPT, context, None)
        folders.append(load_file(context.model / "model.safetensors"))
    assert all(torch.equal(tensor, folders[1][name]) for name, tensor in folders[0].items())
    assert not all(torch.equal(tensor, folders[2][name]) for name, tensor in folders[0].items())


def test_a_raised_damping_is_said_and_recorded(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    real = layerwise.factorize
    monkeypatch.setattr(layerwise, "factorize", lambda hessian, damping, **more: real(hessian, 10 * damping, **more))
    context = make_context("01-prune", kind="prune")
    prune.finish(SPARSEGPT, context, None)
    notes = read_record(context.model)["pruning"]["notes"]
    assert len(notes) == 12 and "damping raised to 0.1: their Hessian has no Cholesky factor with 0.01" in notes[0]
    assert notes[0] in said(context) and "and 7 more notes in decoct.json (pruning.notes)" in said(context)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_magnitude_writes_as_many_zeros_as_it_claims(make_context: MakeContext, scope: Any) -> None:
    context = make_context("01-prune", kind="prune")
    prune.finish(PruneSettings(magnitude=MagnitudeSettings(keep=0.3, scope=scope)), context, None)
    after, record = weights_of(context.model), read_record(context.model)["pruning"]
    assert sum(int((weight != 0).sum()) for weight in after.values()) == record["kept"]
    assert (record["method"], "pattern" in record) == ("magnitude", False)


def test_magnitude_follows_a_pattern_in_one_shot_and_along_a_schedule(make_context: MakeContext) -> None:
    once = make_context("01-prune", kind="prune")
    prune.finish(PruneSettings(magnitude=MagnitudeSettings(pattern="2:4")), once, None)
    for name, weight in weights_of(once.model).items():
        source = load_model(once.input, dtype=torch.float32).get_submodule(name).get_parameter("weight").abs().reshape(-1, 4)
        kept = (weight != 0).reshape(-1, 4)
        assert bool((kept.sum(1) == 2).all()) and bool((source[kept].reshape(-1, 2).amin(1) >= source[~kept].reshape(-1, 2).amax(1)).all())
    trained = make_context("02-prune", kind="prune", trainer=TRAINER)
    settings = PruneSettings(magnitude=MagnitudeSettings(pattern="1:4", update_every=1), **STEPS)
    prune.finish(settings, trained, prune.train(settings, trained))
    assert all(follows(weight, Pattern(1, 4)) for weight in weights_of(trained.model).values())
    assert "75.00% of" in said(trained) and "(magnitude 1:4)" in said(trained)
    assert read_record(trained.model)["pruning"]["pattern"] == "1:4"


def test_movement_keeps_its_share_of_every_matrix(make_context: MakeContext) -> None:
    context = make_context("01-prune", kind="prune", trainer=TRAINER)
    settings = PruneSettings(movement=MovementSettings(keep=0.4, update_every=1), **STEPS)
    prune.finish(settings, context, prune.train(settings, context))
    for name, weight in weights_of(context.model).items():
        assert int((weight != 0).sum()) == round(0.4 * weight.numel()), name
    assert read_record(context.model)["pruning"]["method"] == "movement"


def test_movement_without_a_gradient_is_refused(make_context: MakeContext) -> None:
    context = make_context("01-prune", kind="prune", trainer=TRAINER)
    settings = PruneSettings(movement=MovementSettings(keep=0.4), steps=2)
    with pytest.raises(UserError, match="01-prune: movement scores weights by their gradients, and a student that learns from its"):
        prune.train(settings, context)


def nan(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = torch.nan


def dead(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj.weight.data.zero_()


def test_what_cannot_be_pruned_is_refused_and_nothing_is_written(make_context: MakeContext, words: Any, tmp_path: Path) -> None:
    def folder(name: str, kind: str, change: Callable[[Any], None] = lambda model: None, **fields: Any) -> str:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(words), **fields)).eval()
        change(model)
        # as transformers writes it: a folder of ours would not be written with a NaN
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 46, **heads}
    mixtral = {**small, "num_local_experts": 4, "num_experts_per_tok": 2}
    cases: list[tuple[str, PruneSettings, str]] = [
        (folder("odd", "llama", **small), SPARSEGPT, r"pattern 2:4: model\.layers\.0\.mlp\.down_proj has 46 inputs"),
        (folder("nan", "llama", nan, **small), WANDA, r"NaN or infinite"),
        (folder("dead", "llama", dead, **small), WANDA, r"inputs of model\.layers\.1\.mlp\.down_proj are all zero on the calibration text"),
        (folder("experts", "mixtral", **mixtral), WANDA, r"only 1\d\.\d%.*allow_partial=true in stage prune"),
        (folder("conv", "gpt2", n_embd=32, n_layer=2, n_head=4), SPARSEGPT, r"none of its decoder weights is in an nn\.Linear"),
    ]
    for number, (place, settings, told) in enumerate(cases):
        context = make_context(f"{number:02d}-prune", kind="prune", input=place)
        with pytest.raises(DecoctError, match=told):
            prune.finish(settings, context, None)
        assert not context.model.exists() and not list(context.folder.iterdir()), place


def test_too_little_text_is_refused_with_the_widest_linear(make_context: MakeContext) -> None:
    context = make_context("01-prune", kind="prune")
    few = PruneSettings(sparsegpt=SparseGptSettings(keep=0.5), calibration_tokens=64)
    with pytest.raises(
        UserError,
        match=r"64 tokens are too few to calibrate on: \S+down_proj has 96 inputs, and method sparsegpt .*use prune\.wanda",
    ):
        prune.finish(few, context, None)
    assert not context.model.exists()
    # Wanda takes norms, which any number of tokens has
    prune.finish(PruneSettings(wanda=WandaSettings(keep=0.5), calibration_tokens=64), context, None)
    assert "calibrates on 64 tokens in 2 windows" in said(context)
