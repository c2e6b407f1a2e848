"""bitsandbytes folders: int8 and NF4 as its own tensors have them, every weight exact, its own layers agree, and refusals with remedies."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoct.models.common.errors import UserError
from decoct.models.folder.record import seal_record
from decoct.qat.codes.state import load_quant_state
from decoct.qat.export.bitsandbytes import pack_pairs
from decoct.qat.export.export import export_folder
from decoct.qat.fake_quant import fake_quant_activation
from decoct.qat.readers.open import open_export
from decoct.qat.rebuild_inputs import like_bitsandbytes
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.qat.verify.verify import verify_folder

Build = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"
NF4, INT8 = QuantSpec(kind="nf4", group_size=64), QuantSpec(bits=8, group_size="channel")
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
INPUTS = ActivationSpec(outliers=2.5)


@pytest.fixture
def made(quantized_folder: Build) -> Callable[..., Path]:
    """Builds a quantized folder whose inputs are rounded as asked."""

    def make(spec: QuantSpec, inputs: ActivationSpec | None = None, **more: Any) -> Path:
        given: dict[str, Any] = {"scheme": QuantScheme(weights=spec), **WIDE, **more}
        folder = quantized_folder("llama", **given)
        if inputs is not None:
            state = replace(load_quant_state(folder), activations=inputs)
            save_file(state.tensors(), folder / "quant/codes.safetensors")
            record = json.loads((folder / "decoct.json").read_text())
            seal_record(folder, record | {"quant": state.record(), "files": {}})
        return folder

    return make


def exported(folder: Path, target: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    export_folder(folder, target, "bitsandbytes", runtimes=False)
    return load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())["quantization_config"]


def test_the_first_of_two_codes_is_in_the_high_bits() -> None:
    assert pack_pairs(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x12], [0xF0]]


def test_int8_rows_are_those_that_bitsandbytes_stores(made: Any, tmp_path: Path) -> None:
    folder = made(INT8, INPUTS)
    stored, config = exported(folder, tmp_path / "out")
    state = load_quant_state(folder)
    assert stored[f"{Q_PROJ}.weight"].dtype == torch.int8
    assert torch.equal(stored[f"{Q_PROJ}.weight"], state.codes[Q_PROJ])
    assert torch.equal(stored[f"{Q_PROJ}.SCB"].double(), state.scales[Q_PROJ].double().flatten() * 127)
    assert stored[f"{Q_PROJ}.weight_format"].tolist() == 0
    assert (config["load_in_8bit"], config["load_in_4bit"], config["llm_int8_threshold"]) == (True, False, 2.5)
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    assert np.array_equal(open_export(tmp_path / "out").tensor(f"{Q_PROJ}.weight"), state.dequantized(Q_PROJ).numpy())
    report = verify_folder(tmp_path / "out", runtimes=False)
    assert report.ok, report.problems


def test_nf4_blocks_are_decoded_by_bitsandbytes_to_the_same_weights(made: Any, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    folder = made(NF4)
    stored, config = exported(folder, tmp_path / "out")
    state = load_quant_state(folder)
    name = f"{Q_PROJ}.weight"
    parts = {part: tensor for part, tensor in stored.items() if part.startswith(f"{name}.")}
    described = functional.QuantState.from_dict({part.removeprefix(f"{name}."): tensor for part, tensor in parts.items()}, device="cpu")
    found = functional.dequantize_4bit(stored[name], described)
    assert found.dtype == torch.float32
    assert torch.equal(found, state.dequantized(Q_PROJ))
    assert np.array_equal(open_export(tmp_path / "out").tensor(name), found.numpy())
    assert (config["load_in_4bit"], config["bnb_4bit_quant_type"], config["bnb_4bit_compute_dtype"]) == (True, "nf4", "bfloat16")
    report = verify_folder(tmp_path / "out", runtimes=False)
    assert report.ok, report.problems


@pytest.mark.parametrize(("spec", "inputs"), [(NF4, None), (INT8, ActivationSpec()), (INT8, INPUTS)], ids=["nf4", "int8", "outliers"])
def test_transformers_with_bitsandbytes_computes_what_was_measured(made: Any, spec: Any, inputs: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = export_folder(made(spec, inputs), tmp_path / "out", "bitsandbytes")
    seen = result.runtimes["transformers"]
    assert seen["status"] == "agrees", seen
    # NF4 is compared logit by logit; int8 by its predictions, as bitsandbytes rounds inputs of fp16
    assert ("arithmetic" in seen) == (spec is INT8)
    assert "bitsandbytes" in seen["version"]


def test_a_layer_of_bitsandbytes_gives_the_products_of_single_tokens_with_outliers(made: Any, tmp_path: Path) -> None:
    modules = pytest.importorskip("bitsandbytes.nn")
    folder = made(INT8, INPUTS)
    stored, _ = exported(folder, tmp_path / "out")
    layer = modules.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=2.5)
    layer.weight = modules.Int8Params(stored[f"{Q_PROJ}.weight"], requires_grad=False, has_fp16_weights=False)
    layer.weight.CB, layer.weight.SCB = stored[f"{Q_PROJ}.weight"], stored[f"{Q_PROJ}.SCB"]
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) * 1.5
    # numbers that fp16 holds, since it rounds the inputs to fp16
    x = x.half().float()
    assert 0 < int((x.abs() >= 2.5).sum()) < 20
    expected = fake_quant_activation(x, INPUTS) @ load_quant_state(folder).dequantized(Q_PROJ).T
    without = fake_quant_activation(x, ActivationSpec()) @ load_quant_state(folder).dequantized(Q_PROJ).T
    with torch.no_grad():
        found = layer.eval()(x)
    # its sums of int8 products and its columns of outliers pass through fp16
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert float((found - without).abs().max()) > 4 * float((found - expected).abs().max())


def test_a_rebuilt_model_rounds_several_tokens_as_a_layer_of_bitsandbytes_does() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)) * 1.5
    for spec in (ActivationSpec(), INPUTS):
        codes, absmax, columns = functional.int8_vectorwise_quant(x.half(), threshold=spec.outliers or 0.0)
        expected = codes.float() * absmax[:, None] / 127
        if columns is not None:
            expected[:, columns] = x[:, columns]
        assert torch.allclose(like_bitsandbytes(x, spec), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("spec", "inputs", "more", "message"),
    [
        (INT8, None, {}, r"rounds the inputs of int8 weights to int8, .*not measured so; quantize with activations: \{kind: int8"),
        (INT8, ActivationSpec(symmetric=False), {}, r"without zero points, not int8, dynamic; quantize with .*symmetric: true"),
        (NF4, ActivationSpec(), {}, r"multiplies NF4 weights with unrounded inputs; leave 'activations' out"),
        (replace(NF4, group_size=32), None, {}, r"NF4 in blocks of 64 to 4096 weights, .*not nf4 in groups of 32 .*group_size=64"),
        (QuantSpec(bits=4, group_size=64), None, {}, r"int8 with one scale per row, or NF4, not 4 bits .*bits=8, group_size='channel'"),
        (
            NF4,
            None,
            {"scheme": QuantScheme(weights=NF4, overrides={"*.mlp.*": SpecChange(kind="int", bits=8, group_size="channel")})},
            r"has one scheme for all modules, not 8 bits with one scale per row and nf4|has one scheme for all modules, not nf4",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_with_the_remedy(
    made: Any, spec: Any, inputs: Any, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        exported(made(spec, inputs, **more), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_that_are_not_exact_times_127_are_refused(made: Any, tmp_path: Path) -> None:
    folder = made(replace(INT8, scale_grid="fp32"), ActivationSpec())
    state = load_quant_state(folder)
    scale = next(value for value in torch.linspace(0.01, 0.02, 1000) if (value * 127).double().div(127).float() != value)
    state.scales[Q_PROJ][3] = scale
    save_file(state.tensors(), folder / "quant/codes.safetensors")
    seal_record(folder, json.loads((folder / "decoct.json").read_text()) | {"quant": state.record(), "files": {}})
    with pytest.raises(UserError, match=r"127 times the scale in fp32, .*scale_grid 'bf16_fp16'"):
        exported(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight.quant_map", torch.arange(16.0), "is not the table of NF4"),
        ("weight.quant_state.bitsandbytes__nf4", torch.tensor([123], dtype=torch.uint8), "does not describe NF4 codes"),
        ("weight.absmax", torch.zeros(64), "not finite and positive"),
        ("weight.absmax", None, "weight.absmax is missing"),
        ("weight.nested_absmax", torch.ones(3), "double quant"),
    ],
)
def test_a_damaged_folder_is_named(made: Any, part: str, value: Any, message: str, tmp_path: Path) -> None:
    stored, _ = exported(made(NF4), tmp_path / "out")
    stored |= {f"{Q_PROJ}.{part}": value}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_export(tmp_path / "out").tensor(f"{Q_PROJ}.weight")


def test_skipped_modules_are_named(made: Any, tmp_path: Path) -> None:
    _, config = exported(made(NF4, scheme=QuantScheme(weights=NF4, skip=("*.0.mlp.down_proj",))), tmp_path / "out")
    assert config["llm_int8_skip_modules"] == ["model.layers.0.mlp.down_proj", "lm_head"]
    file = tmp_path / "out" / "config.json"
    whole = json.loads(file.read_text())
    (tmp_path / "out" / "decoct.json").unlink()
    assert verify_folder(tmp_path / "out", runtimes=False).ok
    whole["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    file.write_text(json.dumps(whole))
    assert "0.mlp.down_proj is not packed, but" in " ".join(verify_folder(tmp_path / "out", runtimes=False).problems)
