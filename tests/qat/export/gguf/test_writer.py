"""GGUF exports hold exactly what was trained, in llama.cpp's order, or say why they cannot."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.models.folder.import_model import import_model
from decoct.models.folder.loading import load_config, load_model, load_tokenizer
from decoct.models.folder.model_folder import read_record, save_model_folder
from decoct.models.folder.record import accept_changes, seal_record
from decoct.qat.export.export import export_folder
from decoct.qat.export.gguf.blocks import minimums, pack_q2_0, pack_q4_1, pack_q5_0
from decoct.qat.export.gguf.container import TensorType
from decoct.qat.export.gguf.generation import end_tokens
from decoct.qat.export.gguf.writer import FILE, block_type, planned_bytes, write
from decoct.qat.readers.gguf_file import read_gguf
from decoct.qat.readers.gguf_model import GgufModel
from decoct.qat.source.quantized_source import open_source
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

Build = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"
WIDE = {"intermediate_size": 64}
"""The fixtures' FFN of 48 is no multiple of a block."""


def export_to(source: Path, target: Path, form: str = "gguf") -> Path:
    result = export_folder(source, target, form, runtimes=False)
    assert result.exact
    assert result.bytes == (target / FILE).stat().st_size
    return target


def refused(source: Path, target: Path, message: str, form: str = "gguf") -> None:
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(UserError, match=message):
        export_folder(source, target, form, runtimes=False)
    assert sorted(target.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("model_type", "bits", "group_size", "skip", "stored"),
    [
        ("llama", 4, 32, (), "Q4_0"),
        ("llama", 8, "channel", (), "Q8_0"),
        ("llama", 2, 32, (), "Q4_0"),
        ("qwen2", 4, "channel", ("*.down_proj",), "Q4_0"),
        ("qwen3", 8, 32, ("*.q_proj", "*.k_proj", "*.v_proj"), "Q8_0"),
        ("mistral", 5, 32, (), "Q5_0"),
        ("llama", 6, 32, (), "Q8_0"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_rebuilt_exactly(
    quantized_folder: Build, tmp_path: Path, model_type: str, bits: int, group_size: Any, skip: tuple[str, ...], stored: str, tied: bool
) -> None:
    source = quantized_folder(model_type, bits=bits, group_size=group_size, skip=skip, tie_word_embeddings=tied, **WIDE)
    target = export_to(source, tmp_path / "export")
    expected, model = load_file(source / "model.safetensors"), GgufModel(target)
    assert model.shapes().keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(model.tensor(name), tensor.numpy()), name
    assert {model.scheme[f"{module}.weight"] for module in model.modules} == {stored}
    assert ("output.weight" in model.file.tensors) is not tied
    # pruned weights stay zero
    assert not model.tensor(f"{Q_PROJ}.weight")[3].any()
    assert not model.tensor(f"{Q_PROJ}.weight")[5, :16].any() or group_size != 16
    report = verify_folder(target, source=source, runtimes=False)
    assert not report.problems


def test_rows_of_queries_and_keys_are_pairs_for_llama_alone(quantized_folder: Build, tmp_path: Path) -> None:
    """Row 2i of a head is row i of its first half, row 2i + 1 row i of its second: worked out by hand for heads of 8."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    for model_type, wanted in (("llama", order), ("qwen2", list(range(8)))):
        source = quantized_folder(model_type, group_size=32, **({"attention_bias": True} if model_type == "llama" else {}), **WIDE)
        state, stored = load_file(source / "quant/codes.safetensors"), read_gguf(export_to(source, tmp_path / model_type) / FILE)
        weights = load_file(source / "model.safetensors")
        for part, heads in (("q", 4), ("k", 2)):
            rows = [8 * head + row for head in range(heads) for row in wanted]
            module = f"model.layers.0.self_attn.{part}_proj"
            _, codes, scales = stored.decode(f"blk.0.attn_{part}.weight")
            assert np.array_equal(codes, state[f"{module}.codes"].numpy()[rows])
            assert np.array_equal(scales, state[f"{module}.scale"].numpy()[rows])
            assert np.array_equal(stored.read(f"blk.0.attn_{part}.bias"), weights[f"{module}.bias"].numpy()[rows])


def test_bytes_are_ggml_blocks(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder("qwen2", group_size=32, **WIDE)
    file = export_to(source, tmp_path / "export") / FILE
    state, tensor = load_file(source / "quant/codes.safetensors"), read_gguf(file).tensors["blk.0.attn_q.weight"]
    block = file.read_bytes()[tensor.begin : tensor.begin + 18]
    codes, scale = state[f"{Q_PROJ}.codes"][0] + 8, state[f"{Q_PROJ}.scale"][0, 0]
    assert block[:2] == np.float16(scale.item()).tobytes()
    assert list(block[2:]) == [int(codes[j]) | int(codes[j + 16]) << 4 for j in range(16)]


def test_the_gguf_package_reads_the_same(quantized_folder: Build, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    for bits in (4, 8):
        file = export_to(quantized_folder(bits=bits, group_size=32, **WIDE), tmp_path / f"export-{bits}") / FILE
        ours, theirs = read_gguf(file), gguf.GGUFReader(file)
        assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            if tensor.tensor_type.name != "BF16":
                assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1), ours.read(tensor.name).reshape(-1))


def test_folder_has_card_record_and_tokenizer(quantized_folder: Build, tmp_path: Path) -> None:
    target = export_to(quantized_folder(group_size=32, **WIDE), tmp_path / "export")
    names = {file.name for file in target.iterdir()}
    assert {FILE, "README.md", "decoct.json", "config.json", "tokenizer.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    card = (target / "README.md").read_text()
    for part in ("library_name: gguf", "- gguf", "llama-server -m", "ollama create", "Q4_0", "independent reader"):
        assert part in card
    assert "vLLM" not in card
    record = read_record(target)
    assert record["export"]["format"] == "gguf"
    assert record["export"]["scales"].keys() == set(record["quant"]["modules"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 16, **WIDE}, r"one scale for a block of 32 weights, and groups of 16 .*; quantize with group_size=32"),
        ({"group_size": "channel"}, r"down_proj has 48, no multiple .*structured\.ffn=32, or quantize with skip: \['\*\.mlp\.down_proj'\]"),
        ({"spec": QuantSpec(group_size=32, scale_grid="fp32"), **WIDE}, "fp16, which does not hold all of them"),
        ({"model_type": "olmo2", "group_size": 32, **WIDE}, "cannot convert model_type 'olmo2' to GGUF; it converts llama, mistral"),
        ({"hidden_act": "gelu", "group_size": 32, **WIDE}, "llama.cpp computes silu"),
        ({"model_type": "qwen3", "attention_bias": True, "group_size": 32, **WIDE}, "q_proj.bias: llama.cpp's qwen3"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "group_size": 32, **WIDE},
            "default, linear, llama3 and plain yarn",
        ),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "use_sliding_window": True,
          "group_size": 32, **WIDE}, "has no sliding window"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused(quantized_folder: Build, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    refused(quantized_folder(**options), tmp_path / "export", message)


def test_a_folder_without_codes_is_refused_and_the_plain_formats_take_it(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder(group_size=32, **WIDE)
    (source / "quant/codes.safetensors").unlink()
    refused(source, tmp_path / "export", "'qat' or 'quantize'.*--format safetensors, safetensors-f32, gguf-f32, gguf-f16, gguf-bf16")
    export_to(source, tmp_path / "plain", "gguf-f32")


PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2")


@pytest.fixture
def plain_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, random_model: Callable[..., PreTrainedModel]) -> Build:
    """``plain_folder(model_type, dtype, **config)``: random weights, norms too."""

    def build(model_type: str, dtype: torch.dtype, **config: Any) -> Path:
        own = {"query_pre_attn_scalar": 8} if model_type.startswith("gemma") else {}
        if model_type == "gpt2":
            fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 258, "bos_token_id": 0, "eos_token_id": 0}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **fields, **config))
        else:
            model = random_model(model_type, **{**own, **WIDE, **config})
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return save_model_folder(tmp_path / f"plain-{len(list(tmp_path.iterdir()))}", model, tokenizer, {}, dtype=dtype)

    return build


@pytest.mark.parametrize("model_type", PLAIN)
@pytest.mark.parametrize(("form", "dtype"), [("gguf-f16", torch.float16), ("gguf-bf16", torch.bfloat16), ("gguf-f32", torch.float32)])
def test_plain_weights_are_rebuilt_exactly(plain_folder: Build, tmp_path: Path, model_type: str, form: str, dtype: torch.dtype) -> None:
    source = plain_folder(model_type, dtype, num_hidden_layers=6) if model_type == "gemma3_text" else plain_folder(model_type, dtype)
    target = export_to(source, tmp_path / "export", form)
    expected, model = load_file(source / "model.safetensors"), GgufModel(target)
    assert model.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        values = tensor.float().numpy()
        assert np.array_equal(model.tensor(name), model.as_stored(name, values)), name
        assert np.abs(model.tensor(name) - values).max() <= 2**-23, name
    matrices = {kind for name, kind in model.scheme.items() if len(model.shapes()[name]) > 1 and "wpe" not in name}
    assert matrices == {form.removeprefix("gguf-").upper()}
    report = verify_folder(target, source=source, runtimes=False)
    assert not report.problems
    assert "not quantized (gguf)" in (target / "README.md").read_text()


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    # as if the file had been written like this
    record = json.loads((folder / "decoct.json").read_text())
    seal_record(folder, record | {"files": {}})


def test_rounding_plain_weights_is_refused_or_measured(plain_folder: Build, tmp_path: Path) -> None:
    source = plain_folder("llama", torch.float32)
    edit(source, lambda tensors: tensors["lm_head.weight"].mul_(1.001))
    with pytest.raises(UserError, match=r"gguf-f16 does not hold [\d,]+ of the weights .*--format gguf-f32 .*--allow-inexact"):
        export_folder(source, tmp_path / "export", "gguf-f16", runtimes=False)
    weights = load_file(source / "model.safetensors")
    changes = [(tensor - tensor.half().float()).abs() for name, tensor in weights.items() if tensor.ndim > 1]
    result = export_folder(source, tmp_path / "export", "gguf-f16", runtimes=False, allow_inexact=True)
    assert not result.exact
    assert result.rounding is not None
    assert result.rounding.changed == sum(int((change > 0).sum()) for change in changes)
    assert result.rounding.largest == max(float(change.max()) for change in changes)
    assert read_record(tmp_path / "export")["export"]["rounding"] == dataclasses.asdict(result.rounding)
    assert not verify_folder(tmp_path / "export", runtimes=False).problems


def test_values_beyond_fp16_are_refused(plain_folder: Build, tmp_path: Path) -> None:
    source = plain_folder("llama", torch.float32)
    edit(source, lambda tensors: tensors["lm_head.weight"][0].fill_(1e6))
    with pytest.raises(UserError, match=r"beyond the range of torch\.float16"):
        export_folder(source, tmp_path / "export", "gguf-f16", runtimes=False, allow_inexact=True)


def test_padded_rows_are_unused_tokens(quantized_folder: Build, tmp_path: Path) -> None:
    target = export_to(quantized_folder(group_size=32, vocab_size=264, **WIDE), tmp_path / "export")
    metadata = read_gguf(target / FILE).metadata
    assert metadata["tokenizer.ggml.tokens"][257:] == [metadata["tokenizer.ggml.tokens"][257], *(f"[PAD{i}]" for i in range(258, 264))]
    assert metadata["tokenizer.ggml.token_type"].tolist() == [3, *[1] * 257, *[5] * 6]
    refused(quantized_folder(group_size=32, vocab_size=250, **WIDE), tmp_path / "small", "ids up to 257, the embedding 250 rows")


def test_metadata_tells_what_llama_cpp_needs(quantized_folder: Build, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    source = quantized_folder(group_size=32, rope_parameters=rope, **WIDE)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    file = read_gguf(export_to(source, tmp_path / "export") / FILE)
    wanted = {
        "general.architecture": "llama", "general.file_type": 2, "general.alignment": 32, "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 32, "llama.feed_forward_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8, "llama.rope.dimension_count": 8, "llama.rope.freq_base": 5e5, "llama.vocab_size": 258,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    assert {key: file.metadata.get(key) for key in wanted} == wanted
    # 2 pi theta^(2i/8) = 6.3, 167, 4443, 118144 against 32 / 4 and 32 / 1
    assert file.read("rope_freqs.weight").tolist() == [1.0, 8.0, 8.0, 8.0]
    assert not verify_folder(tmp_path / "export", source=source, runtimes=False).problems


def test_mistrals_window_bounds_the_context(quantized_folder: Build, tmp_path: Path) -> None:
    target = export_to(quantized_folder("mistral", group_size=32, sliding_window=16, **WIDE), tmp_path / "export")
    assert GgufModel(target).number("context_length") == 16


def _asymmetric(source: Path, scale: float) -> Any:
    """The opened source with zero points on one module, as a state that holds them gives it."""
    opened = open_source(source)
    zeros = torch.randint(-8, 8, opened.state.scales[Q_PROJ].shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scales = {**opened.state.scales, Q_PROJ: torch.full_like(opened.state.scales[Q_PROJ], scale)}
    own = {Q_PROJ: QuantSpec(bits=4, group_size=32, symmetric=False)}
    return dataclasses.replace(opened, state=dataclasses.replace(opened.state, scales=scales, zero_points={Q_PROJ: zeros}, own_specs=own))


def test_asymmetric_codes_are_q4_1_where_that_is_exact(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder("llama", group_size=32, **WIDE)
    opened = _asymmetric(source, 0.0078125)
    assert planned_bytes(opened)
    assert block_type(opened, Q_PROJ) == TensorType.Q4_1
    write(tmp_path, opened)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    codes, zeros = opened.state.codes[Q_PROJ].float(), opened.state.zero_points[Q_PROJ].float()
    assert np.array_equal(GgufModel(tmp_path / FILE).tensor(f"{Q_PROJ}.weight"), ((codes - zeros) * 0.0078125).numpy())
    # 8 bits of the scale times 4 of the zero point are more than fp16 holds; a bit more room lets the minimum be -16 scales
    assert block_type(_asymmetric(source, 255 / 256), Q_PROJ) == TensorType.Q5_1


@pytest.mark.parametrize(("bits", "stored"), [(2, {"Q4_1"}), (3, {"Q4_1"}), (4, {"Q4_1", "Q5_1"})])
def test_asymmetric_codes_of_up_to_4_bits_are_always_exact(quantized_folder: Build, tmp_path: Path, bits: int, stored: set[str]) -> None:
    source = quantized_folder("llama", spec=QuantSpec(bits=bits, group_size=32, symmetric=False), tie_word_embeddings=True, **WIDE)
    target = export_to(source, tmp_path / "export")
    expected, model = load_file(source / "model.safetensors"), GgufModel(target)
    for name, tensor in expected.items():
        assert np.array_equal(model.tensor(name), tensor.numpy()), name
    assert {model.scheme[f"{module}.weight"] for module in model.modules} == stored
    assert not verify_folder(target, source=source, runtimes=False).problems


def test_asymmetric_codes_of_5_bits_are_q5_1_where_that_is_exact(quantized_folder: Build) -> None:
    def opened(scale: float) -> Any:
        four = _asymmetric(quantized_folder("llama", group_size=32, **WIDE), scale)
        own = {Q_PROJ: QuantSpec(bits=5, group_size=32, symmetric=False)}
        return dataclasses.replace(four, state=dataclasses.replace(four.state, own_specs=own))

    assert block_type(opened(0.0078125), Q_PROJ) == TensorType.Q5_1
    with pytest.raises(UserError, match=r"Q5_1 stores zero point times scale in fp16.*weights\.symmetric=true or weights\.bits=4"):
        planned_bytes(opened(255 / 256))


TWO_BITS: dict[str, Any] = {"bits": 2, "hidden_size": 64, "head_dim": 16, **WIDE}


@pytest.mark.parametrize("group_size", [64, "channel"])
def test_symmetric_codes_of_2_bits_are_q2_0_where_the_reader_is_said_to_know_it(
    quantized_folder: Build, tmp_path: Path, group_size: Any
) -> None:
    source = quantized_folder("llama", group_size=group_size, tie_word_embeddings=True, **TWO_BITS)
    target, wider = export_to(source, tmp_path / "narrow", "gguf-q2_0"), export_to(source, tmp_path / "wide")
    expected, model = load_file(source / "model.safetensors"), GgufModel(target)
    for name, tensor in expected.items():
        assert np.array_equal(model.tensor(name), tensor.numpy()), name
    assert {model.scheme[f"{module}.weight"] for module in model.modules} == {"Q2_0"}
    assert {GgufModel(wider).scheme[f"{module}.weight"] for module in model.modules} == {"Q4_0"}
    assert model.file.metadata["general.file_type"] == 41
    weights = sum(expected[f"{module}.weight"].numel() for module in model.modules)
    assert (wider / FILE).stat().st_size - (target / FILE).stat().st_size == weights // 64 * (2 * 18 - 18)
    assert not verify_folder(target, source=source, runtimes=False).problems


def test_q2_0_takes_groups_of_64_alone_and_is_refused_where_there_are_none(quantized_folder: Build, tmp_path: Path) -> None:
    refused(
        quantized_folder("llama", group_size=32, **TWO_BITS), tmp_path / "a", "in groups of a multiple of 64.*export to gguf", "gguf-q2_0"
    )
    refused(quantized_folder("llama", group_size=32, **WIDE), tmp_path / "b", "symmetric weights of 2 bits", "gguf-q2_0")


def test_narrow_blocks_by_hand() -> None:
    codes = np.array([-2, -1, 0, 1], np.int8).repeat(16)[None]
    block = pack_q2_0(codes, np.array([[0.5]], np.float32))[0, 0]
    assert block[:2].view(np.float16).tolist() == [-0.5]
    # u = 1 - q: fields of 3, 2, 1, 0, four to a byte
    assert block[2:].tolist() == [0b11111111] * 4 + [0b10101010] * 4 + [0b01010101] * 4 + [0] * 4
    codes = np.arange(-16, 16, dtype=np.int8)[None]
    block = pack_q5_0(codes, np.array([[0.5]], np.float32))[0, 0]
    assert block[2:6].tolist() == [0, 0, 255, 255]
    assert block[6:].tolist() == [j | j << 4 for j in range(16)]
    with pytest.raises(ValueError, match=r"codes span -1\.\.16; the block holds 0\.\.31"):
        pack_q5_0(np.array([[-17] + [0] * 31], np.int8), np.array([[0.5]], np.float32))
    with pytest.raises(ValueError, match=r"holds -2\.\.1"):
        pack_q2_0(np.full((1, 64), 2, np.int8), np.array([[0.5]], np.float32))


def _with_generation(source: Path, **settings: Any) -> Path:
    content = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(content | settings))
    accept_changes(source, ["generation_config.json"])
    return source


def test_sampling_settings_are_in_the_file(quantized_folder: Build, tmp_path: Path) -> None:
    dials = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05}
    source = _with_generation(quantized_folder(group_size=32, **WIDE), **dials)
    target = export_to(source, tmp_path / "export")
    metadata = read_gguf(target / FILE).metadata
    found = {key.removeprefix("general.sampling."): value for key, value in metadata.items() if key.startswith("general.sampling.")}
    wanted = {"temp": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "penalty_repeat": 1.05, "penalty_last_n": 64}
    assert found == pytest.approx(wanted, rel=1e-6)
    assert not verify_folder(target, source=source, runtimes=False).problems
    _with_generation(target, temperature=0.6)
    assert any("general.sampling.temp is 0.69" in problem for problem in verify_folder(target, runtimes=False).problems)


def test_no_sampling_settings_leave_none_and_a_word_is_refused(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder(group_size=32, **WIDE)
    assert not [key for key in read_gguf(export_to(source, tmp_path / "none") / FILE).metadata if "sampling" in key]
    refused(_with_generation(source, temperature="hot"), tmp_path / "word", "temperature is 'hot', not a number")
    refused(_with_generation(source, temperature=None, top_k=1.5), tmp_path / "half", "top_k is 1.5, not a whole number")


def test_every_end_of_text_is_in_the_file(quantized_folder: Build, tmp_path: Path) -> None:
    source = _with_generation(quantized_folder(group_size=32, **WIDE), eos_token_id=[5, 0, 7])
    target = export_to(source, tmp_path / "export")
    metadata = read_gguf(target / FILE).metadata
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    assert ends == [0, 5, 7]
    assert not verify_folder(target, source=source, runtimes=False).problems
    one = read_gguf(export_to(_with_generation(source, eos_token_id=0), tmp_path / "one") / FILE).metadata
    assert "tokenizer.ggml.eot_token_id" not in one
    refused(_with_generation(source, eos_token_id=[5, 0, 7, 9]), tmp_path / "many", "ends a text at 4 tokens.*would be lost")
    refused(_with_generation(source, eos_token_id=[258]), tmp_path / "beyond", "eos_token_id 258 is not one of the 258 tokens")


def test_ends_that_llama_cpp_knows_by_their_text_need_no_key() -> None:
    tokenizer = {"tokenizer.ggml.tokens": ["<|im_end|>", "<|endoftext|>", "</done>", "a"], "tokenizer.ggml.eos_token_id": 0}
    config = AutoConfig.for_model("llama", eos_token_id=[0, 1, 2])
    assert end_tokens(Path("nowhere"), config, tokenizer) == {"tokenizer.ggml.eot_token_id": 2}
    bare = {key: value for key, value in tokenizer.items() if "eos" not in key}
    assert end_tokens(Path("nowhere"), config, bare) == {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2}


def test_q4_1_by_hand() -> None:
    codes, scales, zeros = np.arange(-8, 8, dtype=np.int8).repeat(2)[None], np.array([[0.5]], np.float32), np.array([[3]], np.int8)
    block = pack_q4_1(codes, scales, zeros)[0, 0]
    assert block[:4].view(np.float16).tolist() == [0.5, -5.5]
    assert block[4:].tolist() == [low | (low + 8) << 4 for low in range(8) for _ in range(2)]
    assert minimums(scales, zeros).tolist() == [[-5.5]]


def test_config_beside_the_file_has_no_path(quantized_folder: Build, tmp_path: Path) -> None:
    target = export_to(quantized_folder(group_size=32, **WIDE), tmp_path / "export")
    assert str(tmp_path) not in (target / "config.json").read_text()
    assert "quantization_config" not in json.loads((target / "config.json").read_text())


@pytest.mark.parametrize(
    ("model_type", "form", "options"),
    [
        ("llama", "gguf", {"bits": 4, "group_size": 32}),
        ("llama", "gguf", {"bits": 8, "group_size": "channel"}),
        ("llama", "gguf", {"spec": QuantSpec(bits=4, group_size=32, symmetric=False)}),
        ("llama", "gguf-q2_0", {"bits": 2, "group_size": 64, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}),
        ("mistral", "gguf", {"bits": 5, "group_size": 32}),
        ("qwen2", "gguf", {"bits": 4, "group_size": 32}),
        ("qwen3", "gguf", {"bits": 8, "group_size": 32}),
        ("gemma2", "gguf", {"bits": 4, "group_size": 32, "query_pre_attn_scalar": 8}),
        ("gemma3_text", "gguf", {"bits": 4, "group_size": 32, "query_pre_attn_scalar": 8}),
    ],
)
def test_an_export_that_is_imported_again_is_what_is_served(
    quantized_folder: Build, tmp_path: Path, model_type: str, form: str, options: dict[str, Any]
) -> None:
    """Three readers of the same file: the oracle of exports, the import, and (where it can) the package of llama.cpp."""
    source = quantized_folder(model_type, **{**WIDE, **options})
    target = export_to(source, tmp_path / "export", form)
    import_model(str(target / FILE), tmp_path / "again")
    served, found = GgufModel(target), load_model(tmp_path / "again", dtype=torch.float32)
    state = found.state_dict()
    assert served.shapes().keys() <= state.keys()
    for name in served.shapes():
        assert np.array_equal(served.tensor(name), state[name].numpy()), name
    before = load_model(source, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(found(input_ids=ids).logits, before(input_ids=ids).logits, atol=1e-5)
    assert load_tokenizer(tmp_path / "again").get_vocab() == load_tokenizer(source).get_vocab()
    # the folder of the export is a model too, and its record is still checked
    assert load_config(target).vocab_size == before.config.vocab_size
    (target / "README.md").unlink()
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json has changed since it was written"):
        load_config(target)


@pytest.mark.parametrize(("form", "dtype"), [("gguf-f16", torch.float16), ("gguf-bf16", torch.bfloat16), ("gguf-f32", torch.float32)])
def test_plain_exports_keep_their_width_when_they_are_imported(
    random_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    model = random_model("llama", tie_word_embeddings=False)
    save_model_folder(tmp_path / "plain", model, tokenizer, {"kind": "teacher"}, dtype=torch.float32)
    export_folder(tmp_path / "plain", tmp_path / "export", form, runtimes=False)
    import_model(str(tmp_path / "export" / FILE), tmp_path / "again")
    served, stored = GgufModel(tmp_path / "export"), load_file(tmp_path / "again/model.safetensors")
    assert served.shapes().keys() == stored.keys()
    for name, tensor in stored.items():
        assert np.array_equal(served.tensor(name), tensor.float().numpy()), name
        # llama.cpp needs vectors in fp32
        assert tensor.dtype == (dtype if tensor.ndim > 1 else torch.float32), name
