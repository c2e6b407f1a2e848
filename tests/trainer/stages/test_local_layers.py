"""Local distillation in stage `prune`: what it reads, writes and says; a killed stage goes on at its layer; zeros of masks stay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record
from decoct.models.pruning.parent_outputs import ParentOutputs
from decoct.trainer.learning_rates import local_rate
from decoct.trainer.settings_local import LocalSettings
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings, StructuredSettings
from decoct.trainer.settings_sparsity import WandaSettings
from decoct.trainer.stages import local_layers, prune
from decoct.trainer.stages.calibration import calibration_text
from decoct.trainer.stages.context import StageContext, StageResult
from decoct.trainer.stages.local_layers import LayerFiles, split_text

MakeContext = Callable[..., StageContext]
LOCAL = LocalSettings(tokens=2048, learning_rate=3e-3, epochs=4)


def pruned(context: StageContext, local: LocalSettings | None = LOCAL, **kept: Any) -> StageResult:
    settings = PruneSettings(structured=StructuredSettings(**(kept or {"ffn": 32})), calibration_tokens=256, local=local)
    return prune.finish(settings, context, None)


def said(context: StageContext) -> str:
    return context.run.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def held_out_kl(context: StageContext, folder: Path, parent: Path) -> float:
    judge = ParentOutputs(load_model(parent, dtype=torch.float32), split_text(context, LOCAL.tokens, 256)[1])
    return judge.kl(load_model(folder, dtype=torch.float32))


@pytest.mark.parametrize(("kept", "start"), [({"ffn": 32}, "cut"), ({"ffn": 32, "repair": True}, "repaired")])
def test_the_folder_is_nearer_to_the_parent_and_its_record_says_so(
    make_context: MakeContext, trained_folder: Path, kept: dict[str, Any], start: str
) -> None:
    plain, context = make_context("01-prune", kind="prune"), make_context("02-prune", kind="prune")
    pruned(plain, None, **kept)
    done = pruned(context, **kept)
    before, after = held_out_kl(context, plain.model, trained_folder), held_out_kl(context, context.model, trained_folder)
    assert after < 0.9 * before
    record = read_record(context.model)
    # the folder is in bf16, what the stage measured is not
    assert record["local_kl"][start] == pytest.approx(before, rel=0.1)
    assert record["local_kl"]["local"] == pytest.approx(after, rel=0.1)
    assert record["local_kl"] == done.facts["local_kl"]
    assert [layer["layer"] for layer in record["local"]] == [0, 1, 2]
    assert all(layer["error_after"] < layer["error_before"] for layer in record["local"] if layer["kept"])
    words = {"cut": "as cut", "repaired": "as cut, "}[start]
    assert words in said(context)
    assert f"{record['local_kl']['local']:.4f} after local distillation" in said(context)
    assert "each of 3 layers learns its parent's output on 4 passes over 2,048 tokens at rate 0.003" in said(context)
    assert "layer tokens" in said(context)


def test_shape_and_indices_are_those_of_the_cut_alone(make_context: MakeContext) -> None:
    plain, context = make_context("01-prune", kind="prune"), make_context("02-prune", kind="prune")
    shape: dict[str, Any] = {"ffn": 64, "heads": 2, "hidden": 36, "layers": 2}
    pruned(plain, None, **shape)
    pruned(context, **shape)
    assert read_record(context.model)["kept"] == read_record(plain.model)["kept"]
    assert "local" not in read_record(plain.model)
    # the dropped layer's work is learnt by the one before it
    assert [layer["parent"] for layer in read_record(context.model)["local"]] == [1, 2]
    loaded: Any = AutoModelForCausalLM.from_pretrained(context.model)
    assert loaded.config.num_hidden_layers == 2


def test_a_killed_stage_goes_on_at_its_layer_and_ends_in_the_same_bits(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "killed").mkdir()
    whole, context = make_context("01-prune", kind="prune"), make_context("01-prune", kind="prune", folder=tmp_path / "killed")
    pruned(whole)
    put = LayerFiles.put

    def killed(self: LayerFiles, result: Any, weights: Any) -> None:
        put(self, result, weights)
        if result.layer == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(LayerFiles, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        pruned(context)
    assert not context.model.exists()
    monkeypatch.setattr(LayerFiles, "put", put)
    learnt: list[int] = []
    monkeypatch.setattr(LayerFiles, "put", lambda self, result, weights: learnt.append(result.layer) or put(self, result, weights))
    pruned(context)
    assert learnt == [2]
    assert (context.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()
    assert read_record(context.model)["local"] == read_record(whole.model)["local"]


def test_layers_of_other_settings_do_not_count(tmp_path: Path) -> None:
    from decoct.models.pruning.local_distillation import LayerResult

    result = LayerResult(layer=3, parent=4, before=0.5, after=0.25, kept=True)
    LayerFiles(tmp_path / "local", "a").put(result, {"w": torch.ones(2)})
    found = LayerFiles(tmp_path / "local", "a").get(3)
    assert found is not None
    assert found[0] == result
    assert torch.equal(found[1]["w"], torch.ones(2))
    assert LayerFiles(tmp_path / "local", "b").get(3) is None
    assert LayerFiles(tmp_path / "local", "a").get(2) is None
    # a kill between the two files leaves a layer that is not finished, and is written again
    (tmp_path / "local" / "00003.json").unlink()
    assert LayerFiles(tmp_path / "local", "a").get(3) is None
    LayerFiles(tmp_path / "local", "a").put(result, {"w": torch.zeros(2)})


@pytest.mark.parametrize(
    "method", [{"wanda": WandaSettings(pattern="2:4"), "calibration_tokens": 512}, {"magnitude": MagnitudeSettings(keep=0.5)}]
)
def test_masks_stay_and_the_model_comes_nearer(make_context: MakeContext, trained_folder: Path, method: dict[str, Any]) -> None:
    plain, context = make_context("01-prune", kind="prune"), make_context("02-prune", kind="prune")
    prune.finish(PruneSettings(**method), plain, None)
    told = prune.finish(PruneSettings(**method, local=LOCAL), context, None)
    assert len(told.facts["local"]) == 3
    before, after = load_model(plain.model, dtype=torch.float32), load_model(context.model, dtype=torch.float32)
    for name in read_record(context.model)["sparse"]:
        own, earlier = after.get_parameter(f"{name}.weight"), before.get_parameter(f"{name}.weight")
        assert torch.equal(own == 0, earlier == 0), name
        assert not torch.equal(own, earlier)
    assert held_out_kl(context, context.model, trained_folder) < held_out_kl(context, plain.model, trained_folder)


def test_what_judges_is_never_learnt_from(make_context: MakeContext) -> None:
    context = make_context("01-prune", kind="prune")

    def windows(batches: Any) -> set[tuple[int, ...]]:
        return {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}

    train = context.run.data.train
    fit, judges = split_text(context, 256, 512)
    assert windows(fit) == windows(calibration_text(train, 256, 0).batches)
    assert len(windows(judges)) == 4
    assert not windows(judges) & windows(calibration_text(train, 512, 0).batches)
    # more than there is: the last quarter judges
    fit, judges = split_text(context, 10**6, 256)
    assert not windows(judges) & windows(fit)
    assert len(judges) < len(fit)


def test_settings_that_train_already_are_refused() -> None:
    with pytest.raises(ValueError, match="'local' distils a model that was pruned in one shot, and this stage trains already"):
        PruneSettings(magnitude=MagnitudeSettings(keep=0.5), tokens=1000, local=LOCAL)


def test_the_default_rate_falls_with_the_width() -> None:
    assert (local_rate(192), local_rate(768)) == (1.5e-3, pytest.approx(3.75e-4, rel=0.02))


def test_one_window_is_refused(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context("01-prune", kind="prune")
    one = calibration_text(context.run.data.train, 1, 0)
    monkeypatch.setattr(local_layers, "calibration_text", lambda *_given: one)
    with pytest.raises(UserError, match="needs two windows of training text, one to fit on and one to judge by"):
        split_text(context, 256)
