"""One table of what reads what: complete, shown in the docs and told on model cards."""

from pathlib import Path

import pytest

from decoct.qat.export.export import EXPORTERS
from decoct.qat.export.format_readers import READERS, RUNTIMES, card_lines, formats_for, known_as, readers_markdown, reading

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("form", EXPORTERS)
def test_every_format_is_read_by_something(form: str) -> None:
    assert any(reading(form, runtime) for runtime in RUNTIMES)
    assert known_as(form) in READERS


def test_the_table_speaks_of_known_formats_and_runtimes_alone() -> None:
    assert set(READERS) <= set(EXPORTERS)
    assert {runtime for readers in READERS.values() for runtime in readers} == set(RUNTIMES)
    assert formats_for("llama.cpp") == ["gguf", "gguf-q2_0", "gguf-tq1_0"]
    assert "gptq_v2" not in formats_for("ONNX Runtime")
    assert reading("awq", "llama.cpp") is None


def test_the_docs_show_the_table() -> None:
    assert readers_markdown() in (ROOT / "docs" / "serving.md").read_text()


def test_a_card_names_what_must_be_told() -> None:
    assert [line for line in card_lines("gptq") if "accuracy_level=1" in line]
    assert card_lines("gptq_v2")[0].startswith("- ONNX Runtime must not be used with it: ")
    assert card_lines("compressed-tensors") == []
