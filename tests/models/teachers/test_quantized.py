"""nf4 and int8 teachers hold bitsandbytes' weights and predict nearly what the bf16 teacher predicts."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.models import low_bit
from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.models.low_bit import load_bitsandbytes
from decoct.models.teachers import LocalTeacher, open_teacher
from decoct.models.teachers.quantized import NF4_BLOCK

SavedModel = Callable[..., Path]


def _log_probabilities(teacher: LocalTeacher, batch: dict[str, Tensor]) -> Tensor:
    hidden, weight, _, transform = teacher.hidden_and_head(batch)
    return transform.apply(hidden.float() @ weight.float().T).log_softmax(-1)[batch["attention_mask"].bool()]


def _kl(teacher: LocalTeacher, other: LocalTeacher, batch: dict[str, Tensor]) -> float:
    p, q = _log_probabilities(teacher, batch), _log_probabilities(other, batch)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rounded_teachers_predict_nearly_the_same(saved_model: SavedModel, batch: dict[str, Tensor], family: str) -> None:
    folder = saved_model(family)
    plain = open_teacher(folder, load_in="bf16", v_eff=128)
    exact = open_teacher(folder, load_in="fp32", v_eff=128)
    entropy = -(_log_probabilities(plain, batch).exp() * _log_probabilities(plain, batch)).sum(-1).mean().item()
    assert entropy < 4.8, "the model says something: ln(128) = 4.85 would be nothing"
    int8, nf4 = (_kl(plain, open_teacher(folder, load_in=kind, v_eff=128), batch) for kind in ("int8", "nf4"))
    assert _kl(exact, plain, batch) < 1e-4
    assert 0 < int8 < 3e-4
    assert int8 < nf4 < 2e-2


def test_nf4_weights_are_those_of_the_library(saved_model: SavedModel) -> None:
    folder = saved_model()
    reference: Any = load_model(folder, dtype=torch.bfloat16)
    functional = load_bitsandbytes("the test").functional
    model: Any = open_teacher(folder, load_in="nf4", v_eff=128).model
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        module: Any = model.get_submodule(f"model.layers.1.{name}")
        linear: Any = reference.get_submodule(f"model.layers.1.{name}")
        codes, state = functional.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=False, blocksize=NF4_BLOCK)
        dequantized = functional.dequantize_4bit(codes, state).float()
        inputs = torch.randn(3, 7, linear.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        expected = inputs.float() @ dequantized.T
        assert not torch.equal(dequantized, linear.weight.float())
        torch.testing.assert_close(module(inputs).float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
        assert module.weight.numel() * module.weight.element_size() == linear.weight.numel() // 2
        assert module.weight.quant_state.absmax.numel() == linear.weight.numel() // NF4_BLOCK


def test_int8_weights_are_rounded_row_by_row(saved_model: SavedModel) -> None:
    folder = saved_model()
    linear = load_model(folder, dtype=torch.bfloat16).get_submodule("model.layers.0.mlp.up_proj")
    module: Any = open_teacher(folder, load_in="int8", v_eff=128).model.get_submodule("model.layers.0.mlp.up_proj")
    codes, scales = module.state.CB, module.state.SCB
    assert codes.dtype == torch.int8
    assert scales.shape == (96,)
    weight: Any = linear.weight
    assert ((codes * scales[:, None] / 127 - weight.float()).abs() <= 0.51 * scales[:, None] / 127).all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_everything_but_the_decoder_linears_stays_bf16(saved_model: SavedModel, kind: Any) -> None:
    folder = saved_model("qwen2", tie_word_embeddings=True)
    teacher, reference = open_teacher(folder, load_in=kind, v_eff=128, name="small"), load_model(folder, dtype=torch.bfloat16)
    parameters = dict(teacher.model.named_parameters())
    for name, expected in reference.named_parameters():
        if "proj.weight" not in name:
            assert torch.equal(parameters[name], expected), name
    assert parameters.keys() == dict(reference.named_parameters()).keys()
    assert teacher.model.get_parameter("lm_head.weight") is teacher.model.get_parameter("model.embed_tokens.weight")
    assert not any(parameter.requires_grad for parameter in parameters.values())
    count = sum(parameter.numel() for parameter in reference.parameters())
    assert f"{count:,} parameters, {kind}, replicated, 128 tokens" in teacher.describe()


def test_a_rounded_teacher_stays_where_it_was_made(saved_model: SavedModel) -> None:
    teacher = open_teacher(saved_model(), load_in="nf4", v_eff=128)
    assert teacher.to("cpu") is teacher
    with pytest.raises(UserError, match="was opened for cpu and cannot move to cuda:1"):
        teacher.to("cuda:1")


def test_int8_products_are_quiet(saved_model: SavedModel, batch: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        open_teacher(saved_model(), load_in="int8", v_eff=128).hidden_and_head(batch)
    assert caplog.text == ""


def test_a_model_that_cannot_be_streamed_is_rounded_all_the_same(
    saved_model: SavedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_model("qwen2")
    expected = open_teacher(folder, load_in="nf4", v_eff=128).hidden_and_head(batch)[0]
    monkeypatch.setattr("decoct.models.folder.streaming._fits", lambda *_: False)
    assert torch.equal(open_teacher(folder, load_in="nf4", v_eff=128).hidden_and_head(batch)[0], expected)


def test_without_bitsandbytes_the_key_is_named(saved_model: SavedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    low_bit.load_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"teacher\.load_in: nf4 needs bitsandbytes, which is not installed"):
        open_teacher(saved_model(), load_in="nf4", v_eff=128)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_gpu_rounded_teachers_are_small_and_close(saved_model: SavedModel, batch: dict[str, Tensor], kind: Any) -> None:
    folder = saved_model()
    plain = open_teacher(folder, load_in="bf16", v_eff=128, device="cuda")
    rounded = open_teacher(folder, load_in=kind, v_eff=128, device="cuda")
    on_gpu = {key: value.cuda() for key, value in batch.items()}
    assert 0 < _kl(plain, rounded, on_gpu) < 2e-2
