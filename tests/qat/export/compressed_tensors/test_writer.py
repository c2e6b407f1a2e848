"""compressed-tensors beyond one symmetric lattice: zero points, mixed precision, int8 inputs, odd widths; read by us and by the package."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decoct.models.common.errors import UserError
from decoct.models.folder.record import seal_record
from decoct.qat.export.compressed_tensors import writer as compressed_tensors
from decoct.qat.export.export import export_folder
from decoct.qat.fake_quant import dequantize
from decoct.qat.readers.compressed_tensors import Inputs, PackedFolder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.rebuild_inputs import like_kernels, like_package
from decoct.qat.runtimes.check import check_runtimes
from decoct.qat.runtimes.transformers_process import loading_options
from decoct.qat.source.quantized_source import ExportSource
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.qat.verify.verify import verify_folder

Make = Callable[..., ExportSource]
Export = Callable[..., Path]
FORMAT = "compressed-tensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"
W8 = QuantSpec(bits=8, group_size="channel")
CASES: dict[str, dict[str, Any]] = {
    "asymmetric groups": {"spec": QuantSpec(bits=4, group_size=16, symmetric=False), "model_type": "qwen2"},
    "asymmetric rows": {"spec": QuantSpec(bits=8, group_size="channel", symmetric=False)},
    "asymmetric 2 bits": {"spec": QuantSpec(bits=2, group_size=8, symmetric=False)},
    "outputs that fill no word": {"spec": QuantSpec(bits=4, group_size=2, symmetric=False), "intermediate_size": 46},
    "one scale": {"spec": QuantSpec(bits=4, group_size="tensor")},
    "one scale and zero point": {"spec": QuantSpec(bits=8, group_size="tensor", symmetric=False)},
    "mixed": {
        "spec": QuantSpec(bits=4, group_size=16),
        "own": {"down_proj": W8, "0.self_attn.o_proj": QuantSpec(bits=4, group_size=8)},
        "skip": ("*.1.self_attn.o_proj",),
        "model_type": "qwen3",
    },
    "mixed with zero points": {
        "spec": QuantSpec(bits=4, group_size=16),
        "own": {"down_proj": QuantSpec(bits=4, symmetric=False, group_size=16)},
    },
    "w8a8 dynamic": {"spec": W8, "activations": ActivationSpec(), "tie_word_embeddings": True},
    "w8a8 dynamic asymmetric inputs": {"spec": W8, "activations": ActivationSpec(symmetric=False)},
    "w8a8 asymmetric weights": {"spec": QuantSpec(bits=8, group_size="channel", symmetric=False), "activations": ActivationSpec()},
    "w8a8 static": {"spec": W8, "activations": ActivationSpec(scaling="static"), "model_type": "qwen2"},
    "w8a8 static asymmetric inputs": {"spec": W8, "activations": ActivationSpec(scaling="static", symmetric=False)},
}


def made(make: Make, export: Export, case: str) -> tuple[ExportSource, Path]:
    source = make(**CASES[case])
    return source, export(source, FORMAT)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_rebuilt_and_verified(spec_source: Make, export_source: Export, case: str) -> None:
    source, target = made(spec_source, export_source, case)
    opened, state = PackedFolder(target), source.state
    assert set(opened.modules) == set(state.modules)
    for module in state.modules:
        expected = dequantize(state.codes[module], state.scales[module], state.zero_points.get(module))
        assert np.array_equal(opened.tensor(f"{module}.weight"), expected.numpy()), module
    report = verify_folder(target, runtimes=False)
    assert report.ok, report.problems
    stored = load_file(target / "model.safetensors")
    assert compressed_tensors.planned_bytes(source) == sum(tensor.nbytes for tensor in stored.values())
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert "sparsity_config" not in config
    assert config["format"] == ("int-quantized" if "w8a8" in case else "pack-quantized")


@pytest.mark.parametrize("case", CASES)
def test_the_package_unpacks_the_same_weights(spec_source: Make, export_source: Export, case: str) -> None:
    package = pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    from compressed_tensors.compressors import BaseCompressor

    source, target = made(spec_source, export_source, case)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    parsed = package.QuantizationConfig.model_validate(config)
    stored, state = load_file(target / "model.safetensors"), source.state
    assert parsed.config_groups
    seen = set()
    for scheme in parsed.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
        for module in state.modules if scheme.targets == ["Linear"] else scheme.targets:
            local: dict[str, Any] = {
                name.removeprefix(f"{module}."): t for name, t in stored.items() if name.startswith(f"{module}.weight")
            }
            # in bf16 the product of code and scale would be rounded
            local["weight_scale"] = local["weight_scale"].float()
            weight: Any = compressor.decompress(local, scheme)["weight"]
            expected = dequantize(state.codes[module], state.scales[module], state.zero_points.get(module))
            assert torch.equal(weight.float(), expected), module
            seen.add(module)
    assert seen == set(state.modules)


@pytest.mark.slow
@pytest.mark.usefixtures("warm_judges")
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_logits_of_the_rebuilt_model(spec_source: Make, export_source: Export, case: str) -> None:
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    _, target = made(spec_source, export_source, case)
    seen = check_runtimes(target)["transformers"]
    assert seen["status"] == ("skipped" if case == "mixed with zero points" else "agrees"), seen
    unpacked_in_bf16 = "asymmetric" in case and "w8a8" not in case
    assert (seen.get("arithmetic") == "own") is (unpacked_in_bf16 or case in ("outputs that fill no word", "one scale and zero point"))


def test_zero_points_are_packed_along_the_outputs(spec_source: Make, export_source: Export) -> None:
    source, target = made(spec_source, export_source, "asymmetric groups")
    stored, zeros = load_file(target / "model.safetensors"), source.state.zero_points[Q_PROJ]
    words = stored[f"{Q_PROJ}.weight_zero_point"]
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (4, 2))
    for row in range(32):
        for group in range(2):
            assert ((int(words[row // 8, group]) & 0xFFFFFFFF) >> (4 * (row % 8)) & 15) - 8 == int(zeros[row, group])


def test_mixed_lattices_name_their_modules_and_never_the_class(spec_source: Make, export_source: Export) -> None:
    source, target = made(spec_source, export_source, "mixed")
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    assert len(groups) == 3
    assert sorted(target for group in groups for target in group["targets"]) == sorted(source.state.modules)
    by_bits = {group["weights"]["num_bits"]: group for group in groups}
    assert by_bits[8]["targets"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert config["ignore"] == ["model.layers.1.self_attn.o_proj", "lm_head"]
    card = (target / "README.md").read_text()
    assert "2 linears 8 bits with one scale per row" in card


@pytest.mark.parametrize("asymmetric", ["common", "own", "none"])
def test_the_card_loads_as_the_check_does_and_counts_zero_points(asymmetric: str, spec_source: Make, export_source: Export) -> None:
    spec, own = (QuantSpec(bits=4, group_size=16, symmetric=asymmetric != name) for name in ("common", "own"))
    target = export_source(spec_source(spec, own={"down_proj": own}), "compressed-tensors")
    card = (target / "README.md").read_text()
    assert ("CompressedTensorsConfig(dequantize=True)" in card) == bool(loading_options(str(target))) == (asymmetric != "none")
    assert ("12 linears 4 bits in groups of 16, with zero points; 2 linears 4 bits in groups of 16 (" in card) is (asymmetric == "common")
    assert ("12 linears 4 bits in groups of 16; 2 linears 4 bits in groups of 16, with zero points (" in card) is (asymmetric == "own")
    assert ("linears 4 bits" in card) is (asymmetric != "none")


def test_formats_that_differ_are_mixed_precision(spec_source: Make, export_source: Export) -> None:
    """As others write them: int8 linears with int8 inputs beside packed ones."""
    _, target = made(spec_source, export_source, "mixed")
    tensors, file = load_file(target / "model.safetensors"), target / "config.json"
    module, opened = "model.layers.0.mlp.down_proj", PackedFolder(target)
    codes = opened.decode(module).codes
    before = opened.tensor(f"{module}.weight")
    config = json.loads(file.read_text())
    groups = config["quantization_config"]["config_groups"]
    config["quantization_config"]["format"] = "mixed-precision"
    one = next(group for group in groups.values() if module in group["targets"])
    one["targets"].remove(module)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups["more"] = {**one, "targets": ["re:.*0.mlp.down_proj"], "format": "int-quantized", "input_activations": inputs}
    del tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_shape"]
    tensors[f"{module}.weight"] = torch.from_numpy(codes)
    file.write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    (target / "decoct.json").unlink()
    again = PackedFolder(target)
    assert np.array_equal(again.tensor(f"{module}.weight"), before)
    assert again.inputs(module) == Inputs(dynamic=True, symmetric=True)
    assert again.inputs("model.layers.1.mlp.down_proj") is None
    assert verify_folder(target, runtimes=False).ok
    config["quantization_config"]["config_groups"]["more"]["format"] = "pack-quantized"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="is int-quantized, but its group"):
        PackedFolder(target)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_odd_widths_need_a_named_reader(spec_source: Make, export_source: Export, bits: int, symmetric: bool) -> None:
    source = spec_source(QuantSpec(bits=bits, group_size=16, symmetric=symmetric))
    with pytest.raises(UserError, match=f"packs {bits} bits differently.*--reader-version 0.18.0"):
        export_source(source, FORMAT)
    for old in ("0.17.1", "0.9", "newest", ""):
        with pytest.raises(UserError, match=r"it must be 0\.18\.0 or later"):
            export_source(source, FORMAT, reader_version=old)
    target = export_source(source, FORMAT, reader_version="0.18.0")
    assert json.loads((target / "config.json").read_text())["quantization_config"]["version"] == "0.18.0"
    assert verify_folder(target, runtimes=False).ok
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="the package is not installed")
    stored, codes = load_file(target / "model.safetensors"), source.state.codes[Q_PROJ]
    assert torch.equal(helpers.unpack_from_int32(stored[f"{Q_PROJ}.weight_packed"], bits, codes.shape), codes)
    if not symmetric:
        zeros = source.state.zero_points[Q_PROJ]
        assert torch.equal(helpers.unpack_from_int32(stored[f"{Q_PROJ}.weight_zero_point"], bits, zeros.shape, packed_dim=0), zeros)


def test_inputs_that_the_format_has_no_words_for_are_refused(spec_source: Make, export_source: Export) -> None:
    cases = [
        (QuantSpec(bits=4, group_size="channel"), ActivationSpec(), "not with 4 bits .*q_proj.*quantize with bits=8, group_size='channel'"),
        (QuantSpec(bits=8, group_size=16), ActivationSpec(), "not with 8 bits in groups of 16"),
        (
            W8,
            ActivationSpec(kind="fp8_e4m3"),
            "takes fp8 inputs with fp8_e4m3 weights, not with 8 bits with one scale per row .*quantize with activations: {kind: int8}, or "
            "kind='fp8_e4m3', bits=8, group_size='channel', or leave 'activations' out",
        ),
    ]
    for spec, activations, message in cases:
        source = spec_source(spec, activations=activations)
        with pytest.raises(UserError, match=message):
            export_source(source, FORMAT)
    source = spec_source(W8, activations=ActivationSpec(scaling="static"))
    for scale in (torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)):
        source.state.input_scales[Q_PROJ] = scale
        with pytest.raises(UserError, match="no input scale that is one finite positive number"):
            export_source(source, FORMAT)


def test_a_rebuilt_model_rounds_inputs_like_kernels(spec_source: Make, export_source: Export) -> None:
    _, target = made(spec_source, export_source, "w8a8 static")
    model = load_exported_model(target)
    linear: Any = model.get_submodule(Q_PROJ)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    rounded = (x / 0.0625).clamp(-128, 127).round() * 0.0625
    assert torch.equal(linear(x), torch.nn.functional.linear(rounded, linear.weight, linear.bias))


def test_kernels_and_the_package_differ_in_the_divisor() -> None:
    x = torch.tensor([[127.0, 1.0, 0.3], [-127.5, 0.0, 63.0]])
    dynamic = Inputs(dynamic=True, symmetric=True)
    assert like_kernels(x, dynamic)[0].tolist() == [127.0, 1.0, 0.0]
    assert like_package(x, dynamic)[1].tolist() == [-128.0, 0.0, 63.0]
    zeros = torch.zeros(1, 4)
    assert torch.equal(like_package(zeros, dynamic), zeros)
    assert torch.equal(like_package(zeros, Inputs(dynamic=True, symmetric=False)), zeros)


def test_flips_of_zero_points_and_input_scales_are_found(spec_source: Make, export_source: Export) -> None:
    for case, name in (
        ("asymmetric groups", f"{Q_PROJ}.weight_zero_point"),
        ("w8a8 static", f"{Q_PROJ}.input_scale"),
        ("w8a8 static asymmetric inputs", f"{Q_PROJ}.input_zero_point"),
    ):
        _, target = made(spec_source, export_source, case)
        record = json.loads((target / "decoct.json").read_text())
        tensors = load_file(target / "model.safetensors")
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.uint8).flatten()[0] ^= 1
        save_file(tensors, target / "model.safetensors")
        del record["files"]["model.safetensors"]
        seal_record(target, record)
        assert any(name.rpartition(".")[0] in problem for problem in verify_folder(target, runtimes=False).problems), name


@pytest.mark.parametrize(("form", "case"), [(FORMAT, "asymmetric groups"), (FORMAT, "mixed"), (FORMAT, "w8a8 static asymmetric inputs"),
                                            ("gptq_v2", "asymmetric groups"), ("awq", "asymmetric groups")])  # fmt: skip
def test_a_folder_goes_all_the_way(spec_source: Make, tmp_path: Path, form: str, case: str) -> None:
    """Codes, zero points and input scales as they lie in a quantized folder, with no source made by hand."""
    made_up = spec_source(**CASES[case])
    folder, state = made_up.folder, made_up.state
    weights = load_file(folder / "model.safetensors") | {f"{module}.weight": state.dequantized(module) for module in state.modules}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(state.tensors(), folder / "quant/codes.safetensors")
    record = json.loads((folder / "decoct.json").read_text())
    seal_record(folder, record | {"quant": state.record(), "files": {}})
    export_folder(folder, tmp_path / "export", form, runtimes=False)
    report = verify_folder(tmp_path / "export", source=folder, runtimes=False)
    assert report.ok, report.problems
    assert "element by element" in report.checks[-1]
