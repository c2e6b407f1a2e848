"""Models on one text: against the first, with errors of differences, and without KL where vocabularies differ."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from decoct.launch.compare.measuring import compare_models, indistinct
from decoct.models.common.errors import UserError
from decoct.qat.footprint import folder_bytes
from decoct.trainer.settings import DataSettings

from ..answers.conftest import TEXT, make_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models ``one`` and ``two`` (other weights), ``again`` (as one), ``other`` (another vocabulary), and ``text.txt``."""
    place = tmp_path_factory.mktemp("compare")
    make_model(place / "one")
    make_model(place / "two", seed=1)
    make_model(place / "again")
    make_model(place / "other", vocabulary=280)
    (place / "text.txt").write_text(TEXT * 12)
    return place


def compared(place: Path, *names: str, **options: Any) -> dict[str, Any]:
    text = DataSettings(files=(str(place / "text.txt"),), seq_length=32, eval_tokens="all")
    return compare_models([str(place / name) for name in names], text, **options)


def test_rows_are_against_the_first_and_chance_is_told(place: Path) -> None:
    found = compared(place, "one", "two", "again")
    one, two, again = found["models"]
    assert [row["name"] for row in found["models"]] == ["one", "two", "again"]
    assert one["eval"]["kl"] is None
    assert two["eval"]["kl"] > 0.1
    assert two["eval"]["kl_se"] > 0
    assert again["eval"]["kl"] == pytest.approx(0, abs=1e-6)
    assert again["eval"]["top1"] == 1
    assert one["bytes"] == folder_bytes(place / "one")
    assert one["bits_per_weight"] == pytest.approx(32, rel=0.1)
    assert all(row["tokens_per_second"] > 0 for row in found["models"])
    assert "one and again have the same perplexity on this text" in found["notes"]
    assert found["protocol"]["tokens"] == one["eval_tokens"] + found["protocol"]["blocks"], "the first token of a window is not predicted"
    assert "bits_per_byte" not in one
    json.dumps(found)


def test_another_vocabulary_has_no_kl_and_bits_per_byte_instead(place: Path) -> None:
    found = compared(place, "one", "other")
    one, other = found["models"]
    assert other["eval"]["kl"] is None
    assert other["eval"]["top1"] is None
    assert "its vocabulary (284 tokens) is not that of one (301)" in other["kl_left_out"]
    assert any(note.startswith("other: no KL and no top-1 agreement, because") for note in found["notes"])
    assert any("compare bits per byte" in note for note in found["notes"])
    # by hand: nats per token, tokens per byte of the text
    size = len((TEXT * 12).strip().encode())
    assert one["bits_per_byte"] == pytest.approx(math.log2(one["eval"]["perplexity"]) * found["protocol"]["tokens"] / size, rel=0.02)


def test_tasks_have_their_place(place: Path) -> None:
    seen: list[str] = []

    def score(opened: Any, data: Any) -> dict[str, Any]:
        seen.append(opened.name)
        return {"cloze": {"score": len(data.evaluation)}}

    found = compared(place, "one", "two", score=score)
    assert seen == ["one", "two"]
    assert found["models"][0]["tasks"] == {"cloze": {"score": found["protocol"]["blocks"]}}


def test_names_stay_apart(place: Path) -> None:
    names = [row["name"] for row in compared(place, "one", "one")["models"]]
    assert names == [f"{place / 'one'} (1)", f"{place / 'one'} (2)"]


def test_a_window_that_no_context_holds_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match=r"has a context of 96 tokens, fewer than a window of 128; lower --seq-length"):
        compare_models([str(place / "one")], DataSettings(files=(str(place / "text.txt"),), seq_length=128, eval_tokens="all"))


def row(name: str, nll: list[float], kl: list[float] | None = None) -> dict[str, Any]:
    mean = sum(nll) / (10 * len(nll))
    blocks = {"tokens": [10.0] * len(nll), "nll": nll, "kl": kl}
    return {"name": name, "blocks": blocks, "eval": {"perplexity": math.exp(mean), "kl": None if kl is None else sum(kl) / (10 * len(kl))}}


def test_a_difference_within_two_errors_is_no_difference() -> None:
    base = [10.0, 20.0, 30.0, 40.0]
    clear = row("b", [x + d for x, d in zip(base, (1.0, 1.1, 0.9, 1.0))])
    assert indistinct([row("a", base), clear]) == []
    unclear = row("b", [x + d for x, d in zip(base, (1.0, -1.0, 1.0, -0.9))])
    (said,) = indistinct([row("a", base), unclear])
    assert said.startswith("a and b cannot be told apart on this text by their perplexity (+0.")
    both = [row("a", base, [1.0, 2.0, 3.0, 4.0]), row("b", base, [1.0, 2.0, 3.0, 4.0])]
    assert indistinct(both) == ["a and b have the same perplexity and KL on this text"]
    assert indistinct([row("a", [1.0])]) == ["the text fills one block, so nothing is known about errors; give more text"]
