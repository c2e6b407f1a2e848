"""Rotary positions out of a GGUF file: the frequencies that transformers computes from them are those of the model it was made of."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.folder.gguf_folder import import_gguf
from decoct.models.folder.loading import load_model
from decoct.models.gguf.fields import shortest
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

from ...support.gguf_files import metadata_of, tensors_of, tiny, tokenizer_keys, write_gguf

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def divisors(theta: float, width: int, rope: dict[str, float]) -> list[float]:
    """llama.cpp's converter, written out: one number per pair of channels."""
    found = []
    for pair in range(width // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / width)
        smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        short, long = smooth >= 1, smooth <= 0
        found.append(1.0 if short else rope["factor"] if long else 1 / ((1 - smooth) / rope["factor"] + smooth))
    return found


def imported(tmp_path: Path, model: Any, keys: dict[str, Any], tensors: dict[str, Any]) -> Any:
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, 260)
    kind = model.config.model_type
    given = {**metadata_of(model), **tokenizer_keys(tokenizer), **keys}
    file = write_gguf(tmp_path / "model.gguf", kind, given, {**tensors_of(model), **tensors})
    import_gguf(file, tmp_path / "out")
    return load_model(tmp_path / "out", dtype=torch.float32)


@torch.no_grad()
def same_logits(one: Any, other: Any) -> bool:
    ids = torch.arange(120)[None] * 7 % 250
    return torch.allclose(one(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [LLAMA3, {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0}, {**LLAMA3, "high_freq_factor": 2.0}],
)
def test_llama3_is_found_from_its_divisors(rope: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama", head_dim=32, rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, **rope})
    freqs = np.array(divisors(10000.0, 32, rope), np.float32)
    keys = {"attention.key_length": 32, "attention.value_length": 32}
    again = imported(tmp_path, model, keys, {"rope_freqs.weight": freqs})
    assert {name: again.config.rope_parameters[name] for name in rope} == rope
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_divisors_of_no_known_rule_are_refused(tmp_path: Path) -> None:
    for values, message in (
        (np.linspace(1, 8, 8, dtype=np.float32), "not Llama 3's scaling with a usual context"),
        (np.ones(5, np.float32), r"is F32 of shape \(5,\); expected F32 of shape \(8,\)"),
        (np.full(8, np.nan, np.float32), "numbers that are not above 0"),
    ):
        with pytest.raises(UserError, match=message):
            imported(tmp_path, tiny("llama"), {}, {"rope_freqs.weight": values})
    assert (
        imported(tmp_path, tiny("llama"), {}, {"rope_freqs.weight": np.ones(8, np.float32)}).config.rope_parameters["rope_type"]
        == "default"
    )


SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "older linear": ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    ),
    "no scaling": ({"rope_type": "default"}, {"rope.scaling.type": "none"}),
}


@pytest.mark.parametrize("case", list(SCALED))
def test_scaling_by_metadata(case: str, tmp_path: Path) -> None:
    rope, keys = SCALED[case]
    model = tiny("llama", rope_parameters={"rope_theta": 5000.0, **rope})
    again = imported(tmp_path, model, keys, {})
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert same_logits(again, model)


def test_longrope_has_its_factors_in_tensors(tmp_path: Path) -> None:
    long, short = [1.5 + 0.1 * index for index in range(8)], [1.0 + 0.01 * index for index in range(8)]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": 32,
    }
    model = tiny("phi3", original_max_position_embeddings=32, rope_parameters=rope)
    tensors = {f"rope_factors_{name}.weight": np.array(values, np.float32) for name, values in (("long", long), ("short", short))}
    again = imported(tmp_path, model, {"rope.scaling.original_context_length": 32}, tensors)
    assert same_logits(again, model)
    assert again.config.rope_parameters["long_factor"] == pytest.approx(long)


def test_part_of_a_head_is_turned(tmp_path: Path) -> None:
    model = tiny("phi3", rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75})
    again = imported(tmp_path, model, {}, {})
    assert again.config.rope_parameters["partial_rotary_factor"] == 0.75
    assert same_logits(again, model)


def test_local_layers_of_gemma3_have_frequencies_of_their_own(tmp_path: Path) -> None:
    whole = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 10000.0}
    model = tiny("gemma3_text", rope_parameters={"full_attention": whole, "sliding_attention": local})
    model.config.model_type = "gemma3"  # the name of its architecture
    keys = {**metadata_of(model), "rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.key_length": 16}
    model.config.model_type = "gemma3_text"
    tensors = tensors_of(model)
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, 260)
    keys |= {"attention.sliding_window": 32, "attention.value_length": 16, **tokenizer_keys(tokenizer)}
    import_gguf(write_gguf(tmp_path / "model.gguf", "gemma3", keys, tensors), tmp_path / "out")
    assert same_logits(load_model(tmp_path / "out", dtype=torch.float32), model)


def test_fp32_numbers_have_their_shortest_decimal() -> None:
    assert shortest(float(np.float32(1e-6))) == 1e-6
    assert shortest(0.1) == 0.1
    assert shortest(10000.0) == 10000.0
