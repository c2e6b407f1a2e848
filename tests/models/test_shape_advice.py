"""What kernels and vLLM take of a shape, with remedies that they take."""

import re
from dataclasses import replace

import pytest

from decoct.models.axis_map import Axis
from decoct.models.family_map import FAMILIES
from decoct.models.shape_advice import alignment_advice, server_advice
from decoct.models.sizes import Sizes

WIDE = Sizes(ffn=6144, heads=24, kv_heads=8, hidden=3072, layers=28, head_dim=128)


@pytest.mark.parametrize(
    ("axis", "number", "head_dim", "words"),
    [
        ("ffn", 6100, 128, "structured.ffn=6100 is not a multiple of 128: .* down projection, .*; use 6016 or 6144"),
        ("ffn", 200, 128, "use 128 or 256"),
        ("hidden", 3000, 128, "structured.hidden=3000 is not a multiple of 128: .* read the hidden states, .*; use 2944 or 3072"),
        ("heads", 23, 64, r"structured.heads=23 \(1,472 channels\) is not a multiple of 2: .* output projection, .*; use 22 or 24"),
        ("heads", 23, 96, "use 20 or 24"),
    ],
)
def test_a_width_that_is_padded_is_told_with_the_widths_next_to_it(axis: Axis, number: int, head_dim: int, words: str) -> None:
    sizes = replace(WIDE, **{axis: number, "head_dim": head_dim})
    (told,) = alignment_advice(sizes, {axis: number})
    assert re.search(words, told)
    for near in re.findall(r"\d+", told.partition("use ")[2]):
        assert list(alignment_advice(replace(sizes, **{axis: int(near)}), {axis: int(near)})) == []


def test_nothing_is_told_of_what_was_not_cut_of_toys_and_of_multiples() -> None:
    assert list(alignment_advice(replace(WIDE, ffn=6100), {"layers": 28})) == []
    assert list(alignment_advice(WIDE, {"ffn": 6144, "heads": 24, "hidden": 3072})) == []
    assert list(alignment_advice(replace(WIDE, ffn=100), {"ffn": 100})) == []
    # fewer groups have fewer query heads
    assert len(list(alignment_advice(replace(WIDE, heads=21, kv_heads=7, head_dim=64), {"kv_heads": 7}))) == 1


def test_vllm_computes_the_head_dim_of_some_families() -> None:
    odd = replace(WIDE, hidden=2048)
    assert list(server_advice(FAMILIES["qwen2"], WIDE)) == []
    (told,) = server_advice(FAMILIES["qwen2"], odd)
    assert "keep hidden = heads x 128, or serve with --model-impl transformers" in told
    assert list(server_advice(FAMILIES["olmo2"], odd)) != []
    assert list(server_advice(FAMILIES["llama"], odd)) == []
    assert list(server_advice(FAMILIES["gpt2"], odd)) == []
