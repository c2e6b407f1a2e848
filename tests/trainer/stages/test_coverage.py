"""Stages say what share of the weights they touched, and one that touches nothing is an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.common.errors import UserError
from decoct.models.folder.model_folder import save_model_folder
from decoct.qat.spec import QuantSpec
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings, StructuredSettings
from decoct.trainer.settings_quantization import QatSettings, QuantizeSettings
from decoct.trainer.stages import prune, qat, quantize
from decoct.trainer.stages.context import StageContext

MakeContext = Callable[..., StageContext]
SPEC = QuantSpec(bits=4, group_size=16)
_MIXTRAL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def said(context: StageContext) -> str:
    return cast(Any, context.run.console.file).getvalue()


def folder_of(tmp_path: Path, words: Any, kind: str, **fields: Any) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(words), **fields)).eval()
    return str(save_model_folder(tmp_path / kind, model, words, {"kind": "x"}, dtype=torch.bfloat16))


def test_conv1d_is_an_error_before_anything_is_written(make_context: MakeContext, words: Any, tmp_path: Path) -> None:
    context = make_context("01-x", input=folder_of(tmp_path, words, "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64))
    one_shot, trained = PruneSettings(magnitude=MagnitudeSettings(keep=0.5)), QatSettings(steps=1, weights=SPEC)
    for work in (
        lambda: prune.finish(one_shot, context, None),
        lambda: prune.train(PruneSettings(magnitude=MagnitudeSettings(keep=0.5), steps=2), context),
        lambda: quantize.finish(QuantizeSettings(weights=SPEC, allow_partial=True), context, None),
        lambda: qat.start(trained, context),
    ):
        with pytest.raises(UserError, match=r"01-x: none of its decoder weights is in an nn\.Linear: 100% Conv1D"):
            work()
    assert not context.model.exists()


def test_part_of_the_weights_is_refused_or_told(make_context: MakeContext, words: Any, tmp_path: Path) -> None:
    context = make_context("01-x", input=folder_of(tmp_path, words, "mixtral", **_MIXTRAL))
    with pytest.raises(UserError, match=r"only 14\.2%.*allow_partial=true in stage quantize"):
        quantize.finish(QuantizeSettings(weights=SPEC), context, None)
    done = quantize.finish(QuantizeSettings(weights=SPEC, allow_partial=True), context, None)
    assert done.facts["coverage"]["share"] == pytest.approx(0.1424, abs=1e-3)
    assert any("MixtralExperts" in words for words in done.facts["coverage"]["left"])
    assert "quantized 14.2% of the decoder's weights; left as they are: 8" in said(context)


def test_every_stage_says_its_share(make_context: MakeContext) -> None:
    context = make_context("01-zeros", kind="prune")
    assert prune.finish(PruneSettings(magnitude=MagnitudeSettings(keep=0.5)), context, None).facts["coverage"] == {"share": 1.0, "left": {}}
    assert "pruned among 100% of the decoder's weights" in said(context)
    narrow = make_context("02-ffn", kind="prune")
    done = prune.finish(PruneSettings(structured=StructuredSettings(ffn=48), calibration_tokens=256), narrow, None)
    assert done.facts["coverage"]["share"] == pytest.approx(3 * 96 / (3 * 96 + 3 * 48))
    assert "cut 66.7% of the decoder's weights along FFN channels" in said(narrow)
    skipping = make_context("03-skip")
    done = quantize.finish(QuantizeSettings(weights=SPEC, skip=("*.down_proj",)), skipping, None)
    assert done.facts["coverage"]["share"] == pytest.approx(1 - 96 / (3 * 96 + 3 * 48))
