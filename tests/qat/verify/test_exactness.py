"""Rebuilt weights are compared element by element, and hashed as numbers."""

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from decoct.models.folder.model_folder import read_record
from decoct.qat.export.export import export_folder
from decoct.qat.source.quantized_source import open_source
from decoct.qat.verify.exactness import check_recorded, prove, weight_hash

Build = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_hash_is_of_the_little_endian_fp32_bytes() -> None:
    values = np.array([[1.0, -2.5], [0.0, 3.0]], dtype=np.float32)
    assert weight_hash(values) == hashlib.sha256(struct.pack("<4f", 1.0, -2.5, 0.0, 3.0)).hexdigest()
    assert weight_hash(values.T) != weight_hash(values)


def test_a_proof_names_what_differs(quantized_folder: Build, tmp_path: Path) -> None:
    source, target = quantized_folder(), tmp_path / "export"
    export_folder(source, target, "compressed-tensors", runtimes=False)
    proof = prove(target, open_source(source))
    assert proof.problems == []
    assert proof.scales == read_record(target)["export"]["scales"]
    stored = load_file(source / "model.safetensors")
    assert (
        proof.weights == {name: weight_hash(tensor.numpy()) for name, tensor in stored.items()} == read_record(target)["export"]["weights"]
    )
    tensors = load_file(target / "model.safetensors")
    tensors[f"{Q_PROJ}.weight_packed"][0, 0] ^= 1 << 9
    del tensors["model.norm.weight"]
    tensors["extra.bias"] = torch.zeros(2)
    save_file(tensors, target / "model.safetensors")
    problems = prove(target, open_source(source)).problems
    assert problems == [
        "model.norm.weight is missing",
        "extra.bias is not in the source",
        f"{Q_PROJ}.weight is not the source's: 1 of 1024 elements differ",
    ]


def test_recorded_hashes_are_compared_for_every_tensor(exported: Path) -> None:
    record = read_record(exported)
    assert check_recorded(exported, record) == (len(record["export"]["weights"]), [])
    assert check_recorded(exported, {}) == (0, [])


def test_a_changed_scale_of_a_zero_group_is_found(exported: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    assert tensors[f"{Q_PROJ}.weight_scale"][3].tolist() == [1.0, 1.0]
    tensors[f"{Q_PROJ}.weight_scale"][3, 1] = 2.0
    save_file(tensors, exported / "model.safetensors")
    _, problems = check_recorded(exported, read_record(exported))
    assert problems == [f"{Q_PROJ}: its scales are not those that were exported"]
    older = read_record(exported)
    del older["export"]["scales"]
    _, problems = check_recorded(exported, older)
    assert problems == [f"{Q_PROJ}.weight_scale: a group of zeros has another scale than 1"]
