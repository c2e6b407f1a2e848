"""Exports and checks open a folder alike, and read its codes once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from decoct.qat.codes.state import load_quant_state
from decoct.qat.export.export import EXPORTERS
from decoct.qat.source import openers
from decoct.qat.source.openers import OPENERS, SourceFolder


def test_every_opener_is_of_a_format() -> None:
    assert set(OPENERS) <= set(EXPORTERS)


def test_codes_are_read_and_proven_once_for_all_formats(quantized_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def load(folder: Path) -> object:
        read.append(folder)
        return load_quant_state(folder)

    monkeypatch.setattr(openers, "load_quant_state", load)
    source = SourceFolder(quantized_folder())
    opened = [source.open(form) for form in ("compressed-tensors", "gguf", "safetensors", "safetensors-f32", "gguf-f32", None)]
    assert read == [source.path]
    assert [bool(one.state.modules) for one in opened] == [True, True, False, False, False, True]
