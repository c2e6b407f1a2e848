"""AWQ files: the interleaved order, true zero points, every weight exact, and refusals that name the module."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from decoct.models.common.errors import UserError
from decoct.qat.export.awq import pack_columns
from decoct.qat.fake_quant import dequantize
from decoct.qat.readers.open import open_export
from decoct.qat.source.quantized_source import ExportSource
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

Make = Callable[..., ExportSource]
Export = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def textbook(stored: dict[str, Tensor], module: str, group: int) -> Tensor:
    """w = (u - z) * s by loops over single nibbles, as the format's description has it; written for this test alone."""
    words, zeros, scales = (stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    columns, rows = words.shape[0], words.shape[1] * 8
    weight = torch.empty(rows, columns)
    for column in range(columns):
        for word in range(rows // 8):
            for place, offset in enumerate(ORDER):
                u = (int(words[column, word]) & 0xFFFFFFFF) >> (4 * place) & 15
                z = (int(zeros[column // group, word]) & 0xFFFFFFFF) >> (4 * place) & 15
                weight[8 * word + offset, column] = (u - z) * float(scales[column // group, 8 * word + offset])
    return weight


def test_the_codes_0_to_7_make_the_known_word() -> None:
    codes = (torch.arange(8, dtype=torch.int8) - 8)[None]
    assert pack_columns(codes).tolist() == [[0x75316420]]
    assert pack_columns(torch.full((1, 8), 0, dtype=torch.int8)).view(torch.uint8).tolist() == [[0x88] * 4]


def test_what_would_spill_into_neighbours_is_refused() -> None:
    for value in (8, -9):
        with pytest.raises(ValueError, match="4 bits do not hold"):
            pack_columns(torch.full((1, 8), value, dtype=torch.int8))
    with pytest.raises(ValueError, match="no multiple of 8"):
        pack_columns(torch.zeros(1, 12, dtype=torch.int8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, "channel"])
def test_every_weight_is_rebuilt_exactly(spec_source: Make, export_source: Export, symmetric: bool, group_size: Any) -> None:
    source = spec_source(QuantSpec(bits=4, group_size=group_size, symmetric=symmetric), model_type="qwen2")
    target = export_source(source, "awq")
    stored = load_file(target / "model.safetensors")
    groups = 2 if group_size == 16 else 1
    parts = {name.removeprefix(f"{Q_PROJ}."): (t.dtype, tuple(t.shape)) for name, t in stored.items() if name.startswith(Q_PROJ)}
    plain = stored["model.norm.weight"].dtype
    assert parts == {
        "qweight": (torch.int32, (32, 4)),
        "qzeros": (torch.int32, (groups, 4)),
        "scales": (torch.float16, (groups, 32)),
        "bias": (plain, (32,)),
    }
    if symmetric:
        assert (stored[f"{Q_PROJ}.qzeros"].view(torch.uint8) == 0x88).all()
    state = source.state
    expected = dequantize(state.codes[Q_PROJ], state.scales[Q_PROJ], state.zero_points.get(Q_PROJ))
    assert torch.equal(textbook(stored, Q_PROJ, 32 // groups), expected)
    assert np.array_equal(open_export(target).tensor(f"{Q_PROJ}.weight"), expected.numpy())
    report = verify_folder(target, runtimes=False)
    assert report.ok, report.problems
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["version"], config["zero_point"]) == ("awq", 4, "gemm", True)
    assert config["group_size"] == (16 if group_size == 16 else -1)


def test_skipped_modules_are_named(spec_source: Make, export_source: Export) -> None:
    target = export_source(spec_source(QuantSpec(bits=4, group_size=16), skip=("*.down_proj",)), "awq")
    file = target / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    (target / "decoct.json").unlink()
    assert verify_folder(target, runtimes=False).ok
    config["quantization_config"]["modules_to_not_convert"] = None
    file.write_text(json.dumps(config))
    assert "0.mlp.down_proj is not packed, but" in " ".join(verify_folder(target, runtimes=False).problems)


def test_what_cannot_be_held_is_refused_with_the_module_and_the_remedy(spec_source: Make, export_source: Export) -> None:
    spec = QuantSpec(bits=4, group_size=16)
    cases: list[tuple[QuantSpec, dict[str, QuantSpec], dict[str, Any], str]] = [
        (QuantSpec(bits=8, group_size=16), {}, {}, r"packs 4 bits, not 8 \(.*q_proj and 13 more\); quantize with bits=4"),
        (spec, {"down_proj": QuantSpec(bits=4, group_size=8)}, {}, r"one group size, not 16 and 8 \(model\.layers\.0\.mlp\.down_proj\)"),
        (
            QuantSpec(bits=4, group_size=2),
            {},
            {"intermediate_size": 46},
            r"gate_proj has 46, no multiple \(.*\); prune with structured\.ffn=40",
        ),
    ]
    for base, own, folder, message in cases:
        made = spec_source(base, own, **folder)
        with pytest.raises(UserError, match=message):
            export_source(made, "awq")
