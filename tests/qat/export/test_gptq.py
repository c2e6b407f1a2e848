"""GPTQ files: words as other tools have them, every weight exact, and refusals that name the module."""

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
from decoct.models.common.files import sha256_file
from decoct.models.folder.record import seal_record
from decoct.qat.export.export import EXPORTERS
from decoct.qat.fake_quant import dequantize
from decoct.qat.readers.open import open_export, open_folder
from decoct.qat.source.quantized_source import ExportSource
from decoct.qat.spec import PACKED_BITS, ActivationSpec, QuantSpec
from decoct.qat.verify.exactness import prove
from decoct.qat.verify.verify import verify_folder

Make = Callable[..., ExportSource]
Export = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def textbook(stored: dict[str, Tensor], module: str, bits: int, version: int) -> Tensor:
    """w = (u - z) * s by loops over single fields, as the format's description has it; written for this test alone."""
    words, zeros, scales = (stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    groups, per, mask = stored[f"{module}.g_idx"], 32 // bits, (1 << bits) - 1
    columns, rows = words.shape[0] * per, words.shape[1]
    weight = torch.empty(rows, columns)
    for column in range(columns):
        group = int(groups[column])
        for row in range(rows):
            u = (int(words[column // per, row]) & 0xFFFFFFFF) >> (bits * (column % per)) & mask
            z = ((int(zeros[group, row // per]) & 0xFFFFFFFF) >> (bits * (row % per)) & mask) + (1 if version == 1 else 0)
            weight[row, column] = (u - z) * float(scales[group, row])
    return weight


@pytest.mark.parametrize(("bits", "zero_word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
@pytest.mark.parametrize("group_size", [16, "channel"])
def test_symmetric_weights_in_version_1(spec_source: Make, export_source: Export, bits: int, zero_word: int, group_size: Any) -> None:
    source = spec_source(QuantSpec(bits=bits, group_size=group_size))
    target = export_source(source, "gptq")
    stored = load_file(target / "model.safetensors")
    parts = {name.removeprefix(f"{Q_PROJ}."): (t.dtype, tuple(t.shape)) for name, t in stored.items() if name.startswith(Q_PROJ)}
    groups = 2 if group_size == 16 else 1
    assert parts == {
        "qweight": (torch.int32, (bits, 32)),
        "qzeros": (torch.int32, (groups, bits)),
        "scales": (torch.float16, (groups, 32)),
        "g_idx": (torch.int32, (32,)),
    }
    assert (stored[f"{Q_PROJ}.qzeros"] == zero_word).all()
    expected = dequantize(source.state.codes[Q_PROJ], source.state.scales[Q_PROJ])
    assert torch.equal(textbook(stored, Q_PROJ, bits, 1), expected)
    report = verify_folder(target, runtimes=False)
    assert report.ok, report.problems
    written = json.loads((target / "quantize_config.json").read_text())
    assert written == json.loads((target / "config.json").read_text())["quantization_config"]
    assert (written["bits"], written["group_size"], written["sym"], written["checkpoint_format"]) == (
        bits,
        16 if group_size == 16 else -1,
        True,
        "gptq",
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_weights_in_version_2_with_zero_points_at_both_ends(spec_source: Make, export_source: Export, bits: int) -> None:
    source = spec_source(QuantSpec(bits=bits, group_size=16, symmetric=False))
    zeros = source.state.zero_points[Q_PROJ]
    half = 2 ** (bits - 1)
    assert int(zeros.min()) == -half
    assert int(zeros.max()) == half - 1
    target = export_source(source, "gptq_v2")
    stored = load_file(target / "model.safetensors")
    expected = dequantize(source.state.codes[Q_PROJ], source.state.scales[Q_PROJ], zeros)
    assert torch.equal(textbook(stored, Q_PROJ, bits, 2), expected)
    assert np.array_equal(open_export(target).tensor(f"{Q_PROJ}.weight"), expected.numpy())
    assert json.loads((target / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert verify_folder(target, runtimes=False).ok


def test_symmetric_words_of_version_2_are_true_zero_points(spec_source: Make, export_source: Export) -> None:
    for bits, word in ((2, 0xAAAAAAAA), (4, 0x88888888), (8, 0x80808080)):
        target = export_source(spec_source(QuantSpec(bits=bits, group_size=16)), "gptq_v2")
        assert ((load_file(target / "model.safetensors")[f"{Q_PROJ}.qzeros"].to(torch.int64) & 0xFFFFFFFF) == word).all()


def test_the_words_are_those_of_compressed_tensors_turned(spec_source: Make, export_source: Export) -> None:
    source = spec_source(QuantSpec(bits=4, group_size=16))
    one = load_file(export_source(source, "gptq") / "model.safetensors")
    other = load_file(export_source(source, "compressed-tensors") / "model.safetensors")
    assert torch.equal(one[f"{Q_PROJ}.qweight"], other[f"{Q_PROJ}.weight_packed"].T)
    assert torch.equal(one[f"{Q_PROJ}.scales"].float(), other[f"{Q_PROJ}.weight_scale"].T.float())


def test_a_label_of_the_other_version_is_found(spec_source: Make, export_source: Export) -> None:
    target = export_source(spec_source(QuantSpec(bits=4, group_size=16)), "gptq")
    (target / "decoct.json").unlink()
    assert verify_folder(target, runtimes=False).ok
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (target / "config.json").write_text(json.dumps(config))
    assert "other checkpoint_format" in " ".join(verify_folder(target, runtimes=False).problems)


def test_mixed_lattices_and_skipped_modules_are_patterns(spec_source: Make, export_source: Export) -> None:
    own = {"0.mlp.down_proj": QuantSpec(bits=8, group_size="channel"), "1.self_attn.o_proj": QuantSpec(bits=8, group_size=16)}
    source = spec_source(QuantSpec(bits=4, group_size=16), own, skip=("*.gate_proj", "*.up_proj"))
    target = export_source(source, "gptq")
    dynamic = json.loads((target / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic[r"+:^model\.layers\.0\.mlp\.down_proj$"] == {"bits": 8, "group_size": -1, "sym": True}
    assert dynamic[r"-:^model\.layers\.1\.mlp\.gate_up_proj$"] == {}
    opened = open_folder(target)
    assert (opened.scheme_of("model.layers.0.mlp.down_proj").bits, opened.scheme_of("model.layers.1.mlp.down_proj").bits) == (8, 4)
    assert verify_folder(target, runtimes=False).ok
    assert prove(target, source).problems == []


def test_modules_skipped_in_every_layer_are_named_for_readers_without_patterns(spec_source: Make, export_source: Export) -> None:
    source = spec_source(QuantSpec(bits=4, group_size=16), skip=("*.down_proj",))
    config = json.loads((export_source(source, "gptq") / "config.json").read_text())["quantization_config"]
    named = [name for [name] in config["modules_in_block_to_quantize"]]
    assert set(named) == {f"self_attn.{x}_proj" for x in "qkvo"} | {"mlp.gate_proj", "mlp.up_proj"}


@pytest.mark.parametrize(("value", "dtype"), [(2.0**-14, torch.float16), (2.0**-30, torch.bfloat16), (2.0**17, torch.bfloat16)])
def test_other_tensors_are_fp16_where_exact_else_bf16_never_rounded(
    spec_source: Make, export_source: Export, value: float, dtype: torch.dtype
) -> None:
    def change(model: Any) -> None:
        for parameter in model.parameters():
            parameter.data = (parameter.data * 64).round() / 64
        model.get_parameter("model.norm.weight").data[3] = value

    for form in ("gptq", "awq"):
        source = spec_source(QuantSpec(bits=4, group_size=16), change=change)
        target = export_source(source, form)
        stored = load_file(target / "model.safetensors")
        assert json.loads((target / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        for name in source.plain:
            assert stored[name].dtype == dtype
            assert torch.equal(stored[name].float(), source.tensor(name).float())
        assert stored[f"{Q_PROJ}.scales"].dtype == torch.float16


def test_what_cannot_be_held_is_refused_with_the_module_and_the_remedy(spec_source: Make, export_source: Export) -> None:
    cases = [
        (
            "gptq",
            QuantSpec(bits=4, group_size=16, symmetric=False),
            {},
            {},
            r"stores only symmetric weights \(.*q_proj and 13 more\); export to gptq_v2",
        ),
        ("gptq", QuantSpec(bits=3, group_size=16), {}, {}, r"bits, not 3 \(.*q_proj and 13 more\); quantize with bits=4"),
        ("gptq", QuantSpec(bits=6, group_size=16), {}, {}, "quantize with bits=8"),
        ("gptq", QuantSpec(bits=4, group_size=4, scale_grid="fp32"), {}, {}, "does not hold those of .* exactly"),
        (
            "gptq",
            QuantSpec(bits=4, group_size=16),
            {"k_proj": QuantSpec(bits=8, group_size=16)},
            {},
            r"one matrix of q_proj, k_proj, v_proj, and q_proj 4 bits .* and k_proj 8 bits .* differ",
        ),
        ("gptq_v2", QuantSpec(bits=4, group_size=2), {}, {"intermediate_size": 46}, "has 46 outputs, no multiple"),
        ("gptq_v2", QuantSpec(kind="nf4", group_size=16), {}, {}, "not kind=nf4"),
    ]
    with pytest.raises(UserError, match="cannot record that inputs are rounded"):
        export_source(spec_source(QuantSpec(bits=4, group_size=16), activations=ActivationSpec()), "gptq")
    for form, spec, own, folder, message in cases:
        made = spec_source(spec, own, **folder)
        with pytest.raises(UserError, match=message):
            export_source(made, form)


def test_planned_bytes_are_those_written(spec_source: Make, export_source: Export) -> None:
    source = spec_source(QuantSpec(bits=4, group_size=16))
    for form in ("gptq", "gptq_v2", "awq", "compressed-tensors"):
        stored = load_file(export_source(source, form) / "model.safetensors")
        assert EXPORTERS[form].planned_bytes(source) == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq"])
def test_any_single_flipped_nibble_of_packed_tensors_is_found(spec_source: Make, export_source: Export, form: str) -> None:
    import random

    from decoct.models.folder.safetensors_read import read_header

    target = export_source(spec_source(QuantSpec(bits=4, group_size=16, symmetric=form == "gptq")), form)
    file, record = target / "model.safetensors", target / "decoct.json"
    header, whole, recorded = read_header(file), file.read_bytes(), json.loads(record.read_text())
    chosen = random.Random(form)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    for number in range(80):
        places = [info for name, info in header.tensors.items() if name.endswith(parts[number % 4])]
        if not places:
            continue
        info = chosen.choice(places)
        data = bytearray(whole)
        offset = header.data_start + chosen.randrange(info.begin, info.end)
        data[offset] ^= chosen.randrange(1, 16) << chosen.choice((0, 4))
        file.write_bytes(data)
        recorded["files"]["model.safetensors"] = sha256_file(file)
        recorded.pop("sizes", None)
        seal_record(target, recorded)
        problems = verify_folder(target, runtimes=False).problems
        assert problems, f"byte {offset} of {parts[number % 4]}"
        assert "sha256 differs" not in " ".join(problems)
    assert PACKED_BITS == (2, 4, 8)
