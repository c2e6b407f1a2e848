"""Whatever is done to a header or a config, the readers answer with a reading or a UserError: no traceback, hang or memory spike."""

import copy
import json
import random
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from decoct.models.common.errors import UserError
from decoct.models.folder.safetensors_read import read_header
from decoct.qat.fake_quant.float_reference import NF4
from decoct.qat.readers.compressed_tensors import PackedFolder
from decoct.qat.readers.open import open_folder

from ...support.mutations import mutated_bytes, mutated_json, raw_header

SECONDS, BYTES = 2.0, 64_000_000
"""Most processor time of reading a file of a few kilobytes, and most memory that it may take."""


@contextmanager
def bounded() -> Iterator[None]:
    """Takes a UserError for an answer; fails when the answer takes too long or too much memory."""
    started = time.process_time()
    with little_memory():
        try:
            yield
        except UserError as error:
            behind: BaseException | None = error
            while behind is not None:
                assert not isinstance(behind, MemoryError), "the refusal is of a reading that ran out of memory"
                behind = behind.__cause__ or behind.__context__
    assert time.process_time() - started < SECONDS


@contextmanager
def little_memory() -> Iterator[None]:
    """No more than ``BYTES`` on top of what the process has: Linux refuses them, which costs nothing; elsewhere they are counted."""
    if sys.platform != "linux":
        tracemalloc.start(1)
        try:
            yield
            assert tracemalloc.get_traced_memory()[1] < BYTES
        finally:
            tracemalloc.stop()
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def take() -> list[np.ndarray]:
    """More than the bound, whatever freed memory the process still has."""
    return [np.empty(BYTES, np.uint8) for _ in range(200)]


def takes_much() -> None:
    try:
        take()
    except MemoryError:
        raise UserError("it is too large") from None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the memory of a refused reading is counted as well")
def test_memory_beyond_the_bound_is_found() -> None:
    with pytest.raises(MemoryError), bounded():
        take()
    with pytest.raises(AssertionError, match="ran out of memory"), bounded():
        takes_much()
    with bounded():
        bytearray(BYTES // 2)


def a_file(folder: Path) -> Path:
    tensors = {
        "model.layers.0.weight": torch.ones(2, 3, dtype=torch.bfloat16),
        "bias": torch.ones(3),
        "codes": torch.ones(2, 4, dtype=torch.int8),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    return folder / "a.safetensors"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_20000_mutated_headers_are_read_or_refused(tmp_path: Path, seed: int) -> None:
    chosen, file = random.Random(seed), a_file(tmp_path)
    raw, data = raw_header(file)
    content = json.loads(raw)
    read = 0
    for number in range(5000):
        changed = mutated_bytes(chosen, raw) if number % 2 else json.dumps(mutated_json(chosen, content)).encode()
        size = len(changed)
        length = size if chosen.random() < 0.9 else chosen.choice((0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1))
        more = data if chosen.random() < 0.8 else data[: chosen.randrange(len(data) + 1)] + b"x" * chosen.randrange(3)
        file.write_bytes(struct.pack("<Q", length) + changed + more)
        with bounded():
            header = read_header(file)
            read += 1
            covered = 0
            for info in header.tensors.values():
                assert info.begin == covered
                covered = info.end
            assert header.data_start + covered == file.stat().st_size
    assert read < 2500


def words(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0x12345678, dtype=torch.int32)


def compressed_tensors_folder() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8, "dynamic": False}
    bytewise = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    inputs = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    groups = {
        "group_0": {"targets": ["re:.*a$"], "weights": weights, "format": "pack-quantized"},
        "group_1": {"targets": ["b"], "weights": bytewise, "input_activations": inputs, "format": "int-quantized"},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*router.*"],
        "config_groups": groups,
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
    }
    tensors = {
        "a.weight_packed": words(8, 2),
        "a.weight_scale": torch.ones(8, 2),
        "a.weight_zero_point": words(1, 2),
        "a.weight_shape": torch.tensor([8, 16]),
        "b.weight": torch.ones(4, 16, dtype=torch.int8),
        "b.weight_scale": torch.ones(4, 1, dtype=torch.float16),
        "b.input_scale": torch.ones(1),
        "b.input_zero_point": torch.ones(1, dtype=torch.int8),
        "attn.k_scale": torch.ones(1),
        "attn.v_scale": torch.ones(1, dtype=torch.bfloat16),
    }
    return config, tensors


def gptq_folder() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32", "lm_head": False, "dynamic": {"-:^c$": {}, r"+:^model\.b$": {"bits": 8, "group_size": -1}},
    }  # fmt: skip
    tensors = {"a.qweight": words(2, 8), "a.qzeros": words(2, 1), "a.scales": torch.ones(2, 8, dtype=torch.float16)}
    tensors["a.g_idx"] = torch.arange(16, dtype=torch.int32) // 8
    more = {"model.b.qweight": words(2, 4), "model.b.qzeros": words(1, 1), "model.b.scales": torch.ones(1, 4)}
    return config, tensors | more


def awq_folder() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["c"]}
    return config, {"a.qweight": words(16, 1), "a.qzeros": words(2, 1), "a.scales": torch.ones(2, 8, dtype=torch.float16)}


def int8_folder() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
    codes = torch.arange(64, dtype=torch.int8).view(4, 16)
    tensors = {"a.weight": codes, "a.SCB": torch.ones(4), "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {**config, "llm_int8_skip_modules": ["c"]}, tensors


def nf4_folder() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    told = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}).encode()
    tensors = {
        "a.weight": torch.arange(64, dtype=torch.uint8)[:, None],
        "a.weight.absmax": torch.ones(2),
        "a.weight.quant_map": torch.tensor(NF4),
    }
    return config, {**tensors, "a.weight.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(told), dtype=torch.uint8)}


FOLDERS: dict[str, Callable[[], tuple[dict[str, Any], dict[str, torch.Tensor]]]] = {
    "compressed-tensors": compressed_tensors_folder,
    "gptq": gptq_folder,
    "awq": awq_folder,
    "bitsandbytes int8": int8_folder,
    "bitsandbytes nf4": nf4_folder,
}


def read_all(folder: Path) -> None:
    """Everything that verify asks a reader."""
    opened = open_folder(folder)
    opened.unlisted(("a", "b", "c", "lm_head", "model.b"))
    if isinstance(opened, PackedFolder):
        opened.cache()
    for name in opened.shapes():
        opened.tensor(name)
    for module in opened.modules:
        opened.decode(module)
        opened.scheme_of(module)


def written(folder: Path, kind: str) -> tuple[dict[str, Any], Path]:
    quantization, tensors = FOLDERS[kind]()
    config = {"model_type": "llama", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**tensors, "c.weight": torch.ones(3)}, folder / "model.safetensors")
    read_all(folder)
    return config, folder / "model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_4000_mutated_configs_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    config, _ = written(tmp_path, kind)
    chosen, file, read = random.Random(kind), tmp_path / "config.json", 0
    raw = file.read_bytes()
    for number in range(4000):
        file.write_bytes(mutated_bytes(chosen, raw) if number % 3 == 0 else json.dumps(mutated_json(chosen, config)).encode())
        with bounded():
            read_all(tmp_path)
            read += 1
    assert 0 < read < 3000


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_4000_mutated_tensor_headers_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Headers that are sound in themselves and disagree with the config: dtypes, shapes, names, and where tensors begin."""
    _, file = written(tmp_path, kind)
    chosen, (raw, data) = random.Random(kind), raw_header(file)
    content = json.loads(raw)
    for number in range(4000):
        changed = copy.deepcopy(content)
        entry = chosen.choice([entry for name, entry in changed.items() if name != "__metadata__"])
        if number % 3 == 0:
            changed = mutated_json(chosen, changed)
        elif number % 3 == 1:
            size, width = entry["data_offsets"][1] - entry["data_offsets"][0], chosen.choice((1, 2, 4, 8))
            entry["dtype"] = {1: "I8", 2: chosen.choice(("F16", "BF16")), 4: chosen.choice(("I32", "F32")), 8: "I64"}[width]
            count = size // width
            entry["shape"] = chosen.choice(([count], [1, count], [count, 1], [2, count // 2], [count // 2, 2], [1, 1, count]))
        else:
            other = chosen.choice(list(changed))
            changed[chosen.choice(("a.weight", "a.qweight", "a.weight_g_idx", "d.scales", "../a", "b.weight_packed", other))] = entry
        text = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        with bounded():
            read_all(tmp_path)


@pytest.mark.parametrize("kind", FOLDERS)
def test_random_data_under_a_sound_header_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    _, file = written(tmp_path, kind)
    chosen, (raw, data) = random.Random(kind), raw_header(file)
    for _ in range(500):
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + chosen.randbytes(len(data)))
        with bounded():
            read_all(tmp_path)
