"""The comparison as cells, as a table of any width, and as a page."""

from typing import Any

import pytest
from rich.console import Console

from decoct.launch.compare.table import cells, headings, page, terminal_table


def model(name: str, **changes: Any) -> dict[str, Any]:
    figures = {"perplexity": 12.5, "perplexity_se": 0.25, "kl": 0.125, "kl_se": 0.0125, "top1": 0.75}
    return {
        "name": name, "parameters": 1_000_000, "bytes": 4_000_000, "packed_bytes": 600_000, "bits_per_weight": 32.0,
        "packed_bits_per_weight": 4.8, "eval": {**figures, **changes.pop("eval", {})}, "tokens_per_second": 33.333, **changes,
    }  # fmt: skip


@pytest.fixture
def comparison() -> dict[str, Any]:
    score = {"score": 0.5, "stderr": 0.05, "higher_is_better": True}
    first = model("big", eval={"kl": None, "kl_se": None, "top1": None}, tasks={"cloze": score})
    protocol = {"text": "a <b>.txt", "text_hash": "0" * 64, "tokens": 4096, "context": 512, "blocks": 8}
    return {"models": [first, model("small <i>", bits_per_byte=1.25)], "notes": ["a & b are alike"], "protocol": protocol}


def test_every_figure_has_its_error_and_its_place(comparison: dict[str, Any]) -> None:
    first, second = (dict(zip(headings(comparison), row, strict=True)) for row in cells(comparison))
    assert first["KL"] == first["top-1"] == first["bits/byte"] == "-"
    assert first["cloze"] == "50.0% ±5.0%"
    assert second["cloze"] == "-"
    assert (second["perplexity"], second["KL"]) == ("12.500 ±0.250", "0.1250 ±0.0125")
    assert (second["size"], second["disk"], second["bits/weight"]) == ("600.00 kB", "4.00 MB", "4.80")
    assert (second["bits/byte"], second["tokens/s"]) == ("1.250", "33.3")


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_table_fits(width: int, comparison: dict[str, Any]) -> None:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(terminal_table(comparison, width))
    assert max(map(len, captured.get().splitlines())) <= width
    assert "12.500" in captured.get()


def test_the_page_is_self_contained_and_escaped(comparison: dict[str, Any]) -> None:
    html = page(comparison)
    assert "<svg" in html
    assert "small &lt;i&gt;" in html
    assert "a &amp; b are alike." in html
    assert "<i>" not in html.replace("</i>", "")
    assert "src=" not in html
    assert "4,096 tokens" in html
