"""Unpacked blocks are the bits of two other readers: the package ``gguf`` and transformers."""

import builtins
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.integrations.gguf.dequant import GGML_BLOCK
from transformers.integrations.gguf.kernels import dequantize_blocks

from decoct.models.common.errors import UserError
from decoct.models.gguf.block_types import BLOCK_TYPES, CODEBOOKS, number_of
from decoct.models.gguf.unpack import check_installed, known_types, unpack
from decoct.qat.export.gguf.blocks import pack_q2_0

OWN = [name for name in known_types() if name not in CODEBOOKS]


def random_blocks(name: str, count: int = 999) -> np.ndarray:
    """Any bytes: every code, scale and sign occurs, infinite and subnormal scales too."""
    return np.random.default_rng(5).integers(0, 256, (count, BLOCK_TYPES[number_of(name)].nbytes), dtype=np.uint8)


@pytest.mark.parametrize("name", [name for name in known_types() if name != "Q2_0"])
def test_every_type_is_unpacked_to_the_bits_of_the_package(name: str) -> None:
    blocks = random_blocks(name)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(number_of(name))).astype(np.float32)
    found = unpack(name, blocks)
    assert (found.dtype, found.shape) == (np.float32, (len(blocks), BLOCK_TYPES[number_of(name)].elements))
    number = ~np.isnan(expected)
    assert np.array_equal(number, ~np.isnan(found)) and number.mean() > 0.9
    # as bits: -0 is another number than 0
    assert np.array_equal(found.view(np.uint32)[number], expected.view(np.uint32)[number])


@pytest.mark.parametrize("name", [name for name in OWN if number_of(name) in GGML_BLOCK])
def test_transformers_unpacks_the_same(name: str) -> None:
    blocks = random_blocks(name, 64)
    kind = BLOCK_TYPES[number_of(name)]
    theirs: Any = dequantize_blocks(torch.from_numpy(blocks), number_of(name), len(blocks), kind.elements, torch.float32)
    assert np.array_equal(unpack(name, blocks), theirs.numpy().reshape(len(blocks), -1), equal_nan=True)


def test_q2_0_is_what_the_exporter_packs() -> None:
    generator = np.random.default_rng(1)
    codes = generator.integers(-2, 2, (3, 128)).astype(np.int8)
    scales = generator.integers(1, 9, (3, 2)).astype(np.float32) / np.float32(16)
    blocks = pack_q2_0(codes, scales)
    assert np.array_equal(unpack("Q2_0", blocks.reshape(-1, 18)).reshape(3, 128), codes * np.repeat(scales, 64, axis=1))


def test_types_without_weights_are_refused() -> None:
    with pytest.raises(UserError, match="type I32 hold no weights that can be unpacked; known are F32"):
        unpack("I32", np.zeros((1, 4), np.uint8))


def test_code_books_need_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed("IQ2_XS")
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    check_installed("Q4_K")
    with pytest.raises(UserError, match="type IQ2_XS are unpacked with the package gguf; install it: pip install gguf"):
        check_installed("IQ2_XS")
