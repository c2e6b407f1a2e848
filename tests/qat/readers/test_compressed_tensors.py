"""The independent reader: reads what others pack, refuses what is damaged or unknown, and shares no code with the writer."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import decoct.qat.readers.compressed_tensors as reader
from decoct.models.common.errors import UserError
from decoct.qat.readers.compressed_tensors import PackedFolder, read_packed_scheme

MODULE = "model.layers.0.self_attn.q_proj"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def put(tensors: dict[str, Tensor], name: str, index: Any, value: float) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name][index] = value


def minimal(folder: Path, tensors: dict[str, Tensor], **weights: Any) -> Path:
    """A folder as another tool could write it."""
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, **weights}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def weights_of(folder: Path) -> dict[str, NDArray[np.float32]]:
    opened = PackedFolder(folder)
    return {name: opened.tensor(name) for name in opened.shapes()}


def test_reader_shares_no_code_with_the_writer() -> None:
    tree = ast.parse(Path(reader.__file__).read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name for name in imported if "pack" in name or "export" in name or "torch" in name} == set()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [7, 24, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_compressed_tensors_package_packs(tmp_path: Path, bits: int, columns: int, dtype: torch.dtype) -> None:
    package = pytest.importorskip("compressed_tensors.compressors", reason="the compressed-tensors package is not installed")
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), generator=generator, dtype=torch.int8)
    scales = (torch.rand(5, 1, generator=generator) + 0.5).to(dtype)
    tensors = {
        "a.weight_packed": package.pack_quantized.pack_to_int32(codes, bits),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor(codes.shape),
        "b.bias": torch.tensor([0.5, -0.0], dtype=dtype),
    }
    read = weights_of(minimal(tmp_path / "folder", tensors, num_bits=bits))
    assert set(read) == {"a.weight", "b.bias"}
    assert np.array_equal(read["a.weight"], (codes.float() * scales.float()).numpy())
    assert np.array_equal(read["b.bias"], [0.5, -0.0])
    assert all(array.dtype == np.float32 for array in read.values())


def test_reads_groups_in_order(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": torch.tensor([[0x76543210, 0x1EDCBA98]], dtype=torch.int32),
        "a.weight_scale": torch.tensor([[1.0, 10.0, 100.0, 1000.0]]),
        "a.weight_shape": torch.tensor([1, 16]),
    }
    [(name, weight)] = weights_of(minimal(tmp_path / "folder", tensors, strategy="group", group_size=4)).items()
    assert name == "a.weight"
    assert weight.tolist() == [[-8, -7, -6, -5, -40, -30, -20, -10, 0, 100, 200, 300, 4000, 5000, 6000, -7000]]


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "NaN scale": (lambda t: put(t, f"{MODULE}.weight_scale", (0, 0), float("nan")), "not finite and positive"),
    "infinite scale": (lambda t: put(t, f"{MODULE}.weight_scale", (1, 1), float("inf")), "not finite and positive"),
    "zero scale": (lambda t: put(t, f"{MODULE}.weight_scale", (0, 1), 0.0), "not finite and positive"),
    "negative scale": (lambda t: put(t, f"{MODULE}.weight_scale", (0, 1), -1.0), "not finite and positive"),
    "NaN norm": (lambda t: put(t, "model.norm.weight", 0, float("nan")), "model.norm.weight holds NaN"),
    "lost scale": (lambda t: t.pop(f"{MODULE}.weight_scale"), "q_proj.weight_scale is missing"),
    "lost shape": (lambda t: t.pop(f"{MODULE}.weight_shape"), "q_proj.weight_shape is missing"),
    "lost codes": (lambda t: t.pop(f"{MODULE}.weight_packed"), "belongs to no weight_packed"),
    "wrong shape": (lambda t: put(t, f"{MODULE}.weight_shape", 1, 1 << 60), "weight_packed is I32 of shape"),
    "swapped shape": (lambda t: put(t, f"{MODULE}.weight_shape", 0, 31), "weight_packed is I32 of shape"),
    "too few scales": (
        lambda t: t.update({f"{MODULE}.weight_scale": t[f"{MODULE}.weight_scale"][:, :1].contiguous()}),
        "weight_scale is BF16 of shape",
    ),
    "twice": (lambda t: t.update({f"{MODULE}.weight": torch.zeros(32, 32)}), "stored twice"),
    "zero point": (lambda t: t.update({f"{MODULE}.weight_zero_point": torch.zeros(1)}), "zero points"),
    "integers": (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}), "model.norm.weight is I32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses_damaged_tensors(exported: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    edit_tensors(exported, change)
    with pytest.raises(UserError, match=message):
        weights_of(exported)


def test_refuses_bits_behind_the_last_column(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": torch.tensor([[0x10000000]], dtype=torch.int32),
        "a.weight_scale": torch.ones(1, 1),
        "a.weight_shape": torch.tensor([1, 7]),
    }
    with pytest.raises(UserError, match="bits set after the last column"):
        weights_of(minimal(tmp_path / "folder", tensors))


SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "9 bits": ({"num_bits": 9}, "num_bits is 9; this reader knows 2 or 3 or"),
    "float": ({"type": "float"}, "weights.type is 'float'"),
    "neither": ({"symmetric": None}, "weights.symmetric is None"),
    "tensor": ({"strategy": "tensor"}, "weights.strategy is 'tensor'"),
    "no group size": ({"strategy": "group"}, "group_size is None"),
    "zero group size": ({"strategy": "group", "group_size": 0}, "group_size is 0"),
    "dynamic": ({"dynamic": True}, "weights.dynamic is True"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_refuses_unknown_schemes(tmp_path: Path, scheme: str) -> None:
    weights, message = SCHEMES[scheme]
    with pytest.raises(UserError, match=message):
        read_packed_scheme(minimal(tmp_path / "folder", {"a": torch.ones(1)}, **weights))


def test_refuses_other_quantization_and_plain_folders(exported: Path) -> None:
    edit_config(exported, lambda config: config["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(UserError, match="quant_method is 'gptq'"):
        read_packed_scheme(exported)
    edit_config(exported, lambda config: config.pop("quantization_config"))
    with pytest.raises(UserError, match="plain weights; run 'decoct export'"):
        read_packed_scheme(exported)
    (exported / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_packed_scheme(exported)


def test_refuses_a_truncated_file(exported: Path) -> None:
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated"):
        PackedFolder(exported)


def test_index_must_stay_in_the_folder_and_match_its_files(exported: Path) -> None:
    index = exported / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(UserError, match="has both"):
        PackedFolder(exported)
    (exported / "model.safetensors").rename(exported / "one.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(UserError, match="places it in None"):
        PackedFolder(exported)
    names = list(load_file(exported / "one.safetensors"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors") | {"lost": "one.safetensors"}}))
    with pytest.raises(UserError, match="lost is in none of the files"):
        PackedFolder(exported)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../one.safetensors")}))
    with pytest.raises(UserError, match=r"'\.\./one\.safetensors' is not a file name inside the folder"):
        PackedFolder(exported)
    index.write_text("[]")
    with pytest.raises(UserError, match="not a readable index"):
        PackedFolder(exported)
