"""The card says what is there, and claims no check that was not made."""

import dataclasses
from pathlib import Path

import pytest

from decoct.qat.export.card import CardFacts, FormatCard, card_text, shown_name
from decoct.qat.export.format_cards import BITSANDBYTES_CARD
from decoct.qat.export.gguf.card import GGUF_CARD
from decoct.qat.spec import QuantSpec

FACTS = CardFacts(
    name="student-int4",
    base_model="org/model",
    model_type="llama",
    spec=QuantSpec(bits=4, group_size=128),
    quantized=7,
    unquantized=["lm_head"],
    parameters=1000,
    weight_bytes=625,
)
AGREES = {"status": "agrees", "version": "transformers 5", "top1": 1.0, "positions": 128, "max_logprob_diff": 2e-7, "reason": None}
ABSENT = {"status": "not installed", "version": None, "reason": "pip install compressed-tensors"}


def test_card_has_sizes_and_scheme() -> None:
    card = card_text(FACTS)
    for part in (
        "625 bytes, 5.00 bits per weight",
        "2,000 bytes in bf16",
        "group of 128 inputs",
        "in bf16: lm_head",
        "base_model: org/model",
    ):
        assert part in card
    assert "## Evaluation" not in card


@pytest.mark.parametrize(
    ("spec", "form", "codes", "tag"),
    [
        (
            QuantSpec(kind="q4_k"),
            GGUF_CARD,
            "Q4_K: super-blocks of 256 inputs, with integer scales of their blocks under fp16 numbers (gguf)",
            "q4_k",
        ),
        (QuantSpec(kind="mxfp4", group_size=32), GGUF_CARD, "mxfp4, one power of two per group of 32 inputs (gguf)", "mxfp4"),
        (QuantSpec(kind="mxfp4", group_size=32), FormatCard(), "(compressed-tensors, mxfp4-pack-quantized)", "mxfp4"),
        (
            QuantSpec(ternary=True, bits=2, group_size=256),
            GGUF_CARD,
            "ternary (-1, 0, 1), one fp16 scale per group of 256 inputs",
            "ternary",
        ),
        (QuantSpec(kind="nf4", group_size=64), BITSANDBYTES_CARD, "nf4, one fp32 scale per group of 64 inputs (bitsandbytes)", "nf4"),
        (
            QuantSpec(bits=8, group_size="channel"),
            BITSANDBYTES_CARD,
            "int8, symmetric, one fp32 scale per output row (bitsandbytes)",
            "int8",
        ),
    ],
)
def test_codes_and_scales_are_those_of_kind_and_format(spec: QuantSpec, form: FormatCard, codes: str, tag: str) -> None:
    card = card_text(dataclasses.replace(FACTS, spec=spec), form)
    assert codes in card
    assert f"\n- {tag}\n" in card


def test_card_claims_only_what_was_checked() -> None:
    assert "decoct verify` does that" in card_text(FACTS)
    agreed = card_text(dataclasses.replace(FACTS, runtimes={"transformers": AGREES}))
    assert "(transformers 5) loads them in a fresh process" in agreed
    assert "Not checked in vLLM here." in agreed
    assert "tokens per second" not in agreed
    fast = {"llama.cpp": {**AGREES, "tokens_per_second": 1234.5}}
    card = card_text(dataclasses.replace(FACTS, runtimes=fast), GGUF_CARD)
    assert "in its own arithmetic: same token at 100.00%" in card
    assert "1,234 tokens per second on the machine it was checked on." in card
    assert "vLLM" not in card
    measured = {"tokens_per_second": 1234.5, "peak_bytes": 2_100_000_000}
    served = {"transformers": {**AGREES, **measured}, "vLLM": {**AGREES, **measured, "version": "vllm 1", "arithmetic": "float16"}}
    card = card_text(dataclasses.replace(FACTS, runtimes=served))
    assert card.count("1,234 tokens per second on the machine it was checked on, with a peak memory of 2,100 MB.") == 2
    assert "vLLM (vllm 1) loads them in a fresh process; in fp16: same token" in card
    assert "transformers (transformers 5) loads them in a fresh process; in fp32 its logits agree" in card
    assert "Not checked in vLLM" not in card
    absent = card_text(dataclasses.replace(FACTS, runtimes={"transformers": ABSENT}))
    assert "Not checked in transformers: not installed" in absent
    assert "fresh process" not in absent


def test_card_shows_flat_and_named_metrics() -> None:
    assert "| this model | 8.125 |" in card_text(dataclasses.replace(FACTS, metrics={"perplexity": 8.125}))
    named = card_text(dataclasses.replace(FACTS, metrics={"a": {"kl": 0.5}, "b": {"tokens": 2000}}))
    assert "| | kl | tokens |" in named
    assert "| b |  | 2,000 |" in named


def test_card_of_two_bits_warns_about_readers() -> None:
    assert "vLLM reads 4 and 8 bits" in card_text(dataclasses.replace(FACTS, spec=QuantSpec(bits=2)))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("org/model", "org/model"),
        ("a scratch teacher", "a scratch teacher"),
        ("/home/me/model", "model"),
        ("../x/model", "model"),
        (None, None),
    ],
)
def test_paths_are_never_shown(given: str | None, shown: str | None) -> None:
    assert shown_name(given) == shown


def test_relative_folders_are_paths_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shown_name("runs/model") == "model"
