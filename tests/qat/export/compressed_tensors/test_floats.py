"""Floats in compressed-tensors: every element rebuilt by our reader and by the package, their bytes, and what is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decoct.models.common.errors import UserError
from decoct.qat.export.compressed_tensors import writer as compressed_tensors
from decoct.qat.export.compressed_tensors.floats import e4m3_scales, exponent_bytes, pack_pairs
from decoct.qat.readers.compressed_tensors import Inputs, PackedFolder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.rebuild_inputs import like_kernels
from decoct.qat.source.quantized_source import ExportSource
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.qat.verify.verify import verify_folder

Make = Callable[..., ExportSource]
Export = Callable[..., Path]
FORMAT = "compressed-tensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"
FP8 = QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel")
MXFP4, NVFP4 = QuantSpec(kind="mxfp4", group_size=32), QuantSpec(kind="nvfp4", group_size=16)
WIDE: dict[str, Any] = {"intermediate_size": 64}
DYNAMIC, STATIC = ActivationSpec(kind="fp8_e4m3"), ActivationSpec(kind="fp8_e4m3", scaling="static")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("float-quantized", {"spec": FP8, "model_type": "qwen2"}),
    "fp8, one scale": ("float-quantized", {"spec": replace(FP8, group_size="tensor"), "tie_word_embeddings": True}),
    "fp8, dynamic inputs": ("float-quantized", {"spec": FP8, "activations": DYNAMIC}),
    "fp8, static inputs": ("float-quantized", {"spec": FP8, "activations": STATIC, "skip": ("*.1.self_attn.o_proj",)}),
    "mxfp4": ("mxfp4-pack-quantized", {"spec": MXFP4, **WIDE}),
    "nvfp4": ("nvfp4-pack-quantized", {"spec": NVFP4}),
    "mxfp4, inputs too": ("mxfp4-pack-quantized", {"spec": MXFP4, "activations": ActivationSpec(kind="mxfp4"), **WIDE}),
    "nvfp4, inputs too": ("nvfp4-pack-quantized", {"spec": NVFP4, "activations": ActivationSpec(kind="nvfp4", scaling="static")}),
    "mixed": ("mixed-precision", {"spec": NVFP4, "own": {"down_proj": FP8, "o_proj": QuantSpec(bits=8, group_size="channel")}, **WIDE}),
}


def made(make: Make, export: Export, case: str) -> tuple[ExportSource, Path]:
    source = make(**CASES[case][1])
    return source, export(source, FORMAT)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_rebuilt_and_verified(spec_source: Make, export_source: Export, case: str) -> None:
    source, target = made(spec_source, export_source, case)
    opened, state = PackedFolder(target), source.state
    assert set(opened.modules) == set(state.modules)
    for module in state.modules:
        assert np.array_equal(opened.tensor(f"{module}.weight"), state.dequantized(module).numpy()), module
        assert opened.scheme_of(module).kind == state.spec_of(module).kind
    report = verify_folder(target, runtimes=False)
    assert report.ok, report.problems
    stored = load_file(target / "model.safetensors")
    assert compressed_tensors.planned_bytes(source) == sum(tensor.nbytes for tensor in stored.values())
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["format"] == CASES[case][0]


@pytest.mark.parametrize("case", CASES)
def test_the_package_decompresses_the_same_weights(spec_source: Make, export_source: Export, case: str) -> None:
    package = pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    from compressed_tensors.compressors import BaseCompressor

    source, target = made(spec_source, export_source, case)
    parsed = package.QuantizationConfig.model_validate(json.loads((target / "config.json").read_text())["quantization_config"])
    stored, state = load_file(target / "model.safetensors"), source.state
    seen = set()
    for scheme in parsed.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
        for module in state.modules if scheme.targets == ["Linear"] else scheme.targets:
            own: dict[str, Any] = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.startswith(f"{module}.weight")}
            packed, expected = "weight_packed" in own, state.dequantized(module)
            if not packed or own["weight_packed"].dtype != torch.uint8:
                # in bf16 the product of code and scale would be rounded
                own["weight_scale"] = own["weight_scale"].float()
            weight: Any = compressor.decompress(own, scheme)["weight"]
            # the package unpacks codes of 4 bits to bf16, which holds those of mxfp4; products of nvfp4 it rounds
            rounded = expected.bfloat16().float() if state.spec_of(module).kind == "nvfp4" else expected
            assert torch.equal(weight.float(), rounded), module
            seen.add(module)
    assert seen == set(state.modules)


def test_nvfp4_is_exact_in_the_package_where_it_does_not_round(spec_source: Make, export_source: Export) -> None:
    package = pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers", reason="an older layout of the package")
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    source, target = made(spec_source, export_source, "nvfp4")
    parsed = package.QuantizationConfig.model_validate(json.loads((target / "config.json").read_text())["quantization_config"])
    stored = load_file(target / "model.safetensors")
    for module in source.state.modules:
        own = {name: stored[f"{module}.{name}"] for name in ("weight_packed", "weight_scale", "weight_global_scale")}
        rows, half = own["weight_packed"].shape
        codes = helpers.unpack_fp4_from_uint8(own["weight_packed"], rows, 2 * half, torch.float32)
        scale, whole = own["weight_scale"].float(), own["weight_global_scale"]
        weight = dequantize(codes, scale, args=parsed.config_groups["group_0"].weights, dtype=torch.float32, global_scale=whole)
        assert torch.equal(weight, source.state.dequantized(module)), module


def test_bytes_are_where_the_formats_have_them(spec_source: Make, export_source: Export) -> None:
    shapes = {
        "fp8, static inputs": {
            "weight": ("float8_e4m3fn", (32, 32)),
            "weight_scale": ("bfloat16", (32, 1)),
            "input_scale": ("float32", (1,)),
        },
        "mxfp4": {"weight_packed": ("uint8", (32, 16)), "weight_scale": ("uint8", (32, 1))},
        "nvfp4": {
            "weight_packed": ("uint8", (32, 16)),
            "weight_scale": ("float8_e4m3fn", (32, 2)),
            "weight_global_scale": ("float32", (1,)),
        },
    }
    shapes["nvfp4, inputs too"] = {**shapes["nvfp4"], "input_global_scale": ("float32", (1,))}
    for case, expected in shapes.items():
        source, target = made(spec_source, export_source, case)
        stored = load_file(target / "model.safetensors")
        found = {name.removeprefix(f"{Q_PROJ}."): tensor for name, tensor in stored.items() if name.startswith(Q_PROJ)}
        assert {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in found.items()} == expected
        codes = source.state.codes[Q_PROJ]
        if "weight_packed" in expected:
            for row, column in ((0, 0), (0, 1), (7, 18), (31, 31)):
                assert (int(found["weight_packed"][row, column // 2]) >> (4 * (column % 2))) & 15 == int(codes[row, column])
        if case == "mxfp4":
            assert float(source.state.scales[Q_PROJ][9, 0]) == 2.0 ** (int(found["weight_scale"][9, 0]) - 127)


def test_exponents_and_floats_are_moved_and_never_rounded() -> None:
    powers = torch.tensor([2.0**e for e in (-127, -126, -1, 0, 127)]).view(1, -1)
    assert exponent_bytes(powers).tolist() == [[0, 1, 126, 127, 254]]
    for bad in (1.5, 2.0**-128, 0.0, float("inf")):
        with pytest.raises(ValueError, match="not a power of two"):
            exponent_bytes(torch.tensor([[bad]]))
    with pytest.raises(ValueError, match="not a number of float8"):
        e4m3_scales(torch.tensor([[1.0625]]))
    with pytest.raises(ValueError, match="do not fill bytes"):
        pack_pairs(torch.full((1, 2), 16, dtype=torch.uint8))


def test_inputs_are_told_and_rounded_in_a_rebuilt_model(spec_source: Make, export_source: Export) -> None:
    _, target = made(spec_source, export_source, "fp8, static inputs")
    assert PackedFolder(target).inputs(Q_PROJ) == Inputs(dynamic=False, symmetric=True, scale=0.0625, kind="fp8_e4m3")
    linear: Any = load_exported_model(target).get_submodule(Q_PROJ)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    rounded = (x / 0.0625).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.0625
    assert torch.equal(linear(x), torch.nn.functional.linear(rounded, linear.weight, linear.bias))
    for case, found in (
        ("fp8, dynamic inputs", Inputs(dynamic=True, symmetric=True, kind="fp8_e4m3")),
        ("mxfp4, inputs too", Inputs(dynamic=True, symmetric=True, kind="mxfp4")),
        ("nvfp4, inputs too", Inputs(dynamic=False, symmetric=True, kind="nvfp4", scale=0.0625)),
    ):
        _, target = made(spec_source, export_source, case)
        assert PackedFolder(target).inputs(Q_PROJ) == found
        assert load_exported_model(target)(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_nvfp4_inputs_are_those_of_the_package(spec_source: Make, export_source: Export) -> None:
    package = pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    _, target = made(spec_source, export_source, "nvfp4, inputs too")
    parsed = package.QuantizationConfig.model_validate(json.loads((target / "config.json").read_text())["quantization_config"])
    scheme, inputs = parsed.config_groups["group_0"].input_activations, PackedFolder(target).inputs(Q_PROJ)
    assert inputs is not None
    x, whole = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([2688.0 / 3])
    scale, zero = compute_dynamic_scales_and_zp(x, scheme, torch.nn.Identity(), global_scale=whole)
    expected = fake_quantize(x, scale, zero, scheme, global_scale=whole)
    assert torch.equal(like_kernels(x, replace(inputs, scale=float(whole))), expected)


@pytest.mark.parametrize("case", ["fp8, static inputs", "mxfp4", "nvfp4, inputs too"])
def test_any_flipped_bit_is_found(spec_source: Make, export_source: Export, case: str) -> None:
    _, target = made(spec_source, export_source, case)
    file = target / "model.safetensors"
    sound = load_file(file)
    chosen = np.random.default_rng(1)
    for name in (name for name in sound if name.startswith(Q_PROJ)):
        for _ in range(6):
            tensors = {key: tensor.clone() for key, tensor in sound.items()}
            data = tensors[name].view(torch.uint8).view(-1)
            data[int(chosen.integers(len(data)))] ^= 1 << int(chosen.integers(8))
            save_file(tensors, file)
            problems = verify_folder(target, runtimes=False).problems
            # beside the hash of the file the tensor itself is named
            assert any(Q_PROJ in problem for problem in problems), (name, problems)


DAMAGES: dict[str, tuple[str, str, Any, str]] = {
    "a NaN code": ("fp8", "weight", (0, 127), "holds NaN codes"),
    "a NaN exponent": ("mxfp4", "weight_scale", (0, 255), "not finite and positive"),
    "a NaN scale": ("nvfp4", "weight_scale", (0, 127), "not finite and positive"),
    "a negative scale": ("nvfp4", "weight_scale", (0, 200), "not finite and positive"),
    "no scale": ("nvfp4", "weight_scale", None, "weight_scale is missing"),
    "no global scale": ("nvfp4", "weight_global_scale", None, "weight_global_scale is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_refused(spec_source: Make, export_source: Export, damage: str) -> None:
    case, part, change, message = DAMAGES[damage]
    _, target = made(spec_source, export_source, case)
    tensors = load_file(target / "model.safetensors")
    if change is None:
        del tensors[f"{Q_PROJ}.{part}"]
    else:
        data = tensors[f"{Q_PROJ}.{part}"].clone().view(torch.uint8)
        data.view(-1)[change[0]] = change[1]
        tensors[f"{Q_PROJ}.{part}"] = data.view(tensors[f"{Q_PROJ}.{part}"].dtype)
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(UserError, match=message):
        PackedFolder(target).tensor(f"{Q_PROJ}.weight")


CONFIGS: dict[str, tuple[str, str, Any, str]] = {
    "another group": ("nvfp4", "group_size", 32, "weights.group_size is 32; this reader knows 16"),
    "another width": ("fp8", "num_bits", 4, "weights.num_bits is 4; this reader knows 8"),
    "blocks": ("fp8", "strategy", "block", "weights.strategy is 'block'"),
    "dynamic weights": ("mxfp4", "dynamic", True, "weights.dynamic is True"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_configs_are_refused(spec_source: Make, export_source: Export, name: str) -> None:
    case, key, value, message = CONFIGS[name]
    _, target = made(spec_source, export_source, case)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(message)):
        PackedFolder(target)


def test_a_layout_that_is_not_the_announced_one_is_refused(spec_source: Make, export_source: Export) -> None:
    _, target = made(spec_source, export_source, "fp8")
    text = (target / "config.json").read_text()
    (target / "config.json").write_text(text.replace("float-quantized", "naive-quantized"))
    assert PackedFolder(target).scheme_of(Q_PROJ).kind == "fp8_e4m3"
    wrong = text.replace('"float-quantized"', '"int-quantized"').replace('"float"', '"int"')
    (target / "config.json").write_text(wrong)
    with pytest.raises(UserError, match=r"is float-quantized, but its group in config\.json has int-quantized"):
        PackedFolder(target)


def test_parts_of_a_joined_matrix_must_share_their_global_scale(spec_source: Make, export_source: Export) -> None:
    source = spec_source(NVFP4)
    source.state.global_scales[Q_PROJ] = source.state.global_scales[Q_PROJ] * 2
    with pytest.raises(UserError, match=r"one matrix of .*q_proj, .*k_proj, .*v_proj with one global scale, and theirs differ"):
        export_source(source, FORMAT)
