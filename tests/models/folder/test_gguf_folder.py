"""GGUF files as models: the weights, logits and tokens that other readers of the same file get, and one message for every bad file."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from decoct.models.common.errors import UserError
from decoct.models.folder import gguf_folder
from decoct.models.folder.gguf_folder import cached_folder, import_gguf
from decoct.models.folder.gguf_place import gguf_file
from decoct.models.folder.loading import find_model_folder, load_config, load_model, load_tokenizer
from decoct.models.folder.model_folder import content_hash
from decoct.models.folder.record import read_record, verify_folder_files
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

from ...support.gguf_files import FAMILIES, gguf_of, metadata_of, tensors_of, tiny, tokenizer_keys, write_gguf

AS_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 128}, "phi3": {}, "starcoder2": {}, "stablelm": {}, "nemotron": {},
    "gpt2": {"n_inner": 256, "n_positions": 1024},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256}, "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}, "qwen3_moe": {"moe_intermediate_size": 768},
}  # fmt: skip
"""Families that transformers' own reader of GGUF knows -> fields that it takes from its defaults and not from the file."""
IDS = torch.arange(120)[None] * 7 % 250


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["def f(x):\n    return x + 1\n", "Hello, hello 123 worlds"] * 4, 260)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_every_family_comes_back_with_its_weights_and_logits(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    """The config is not compared field by field: that the logits are the same bits is what its fields are for."""
    model = tiny(model_type)
    import_gguf(gguf_of(tmp_path / "model.gguf", model, tokenizer), tmp_path / "out")
    again = load_model(tmp_path / "out", dtype=torch.float32)
    assert type(again) is type(model)
    shifted = model_type.startswith("gemma") or model_type == "nemotron"
    for name, tensor in model.state_dict().items():
        if shifted and "norm" in name and name.endswith("weight"):
            # 1 + w is stored in fp32
            tensor = (tensor + 1) - 1
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.allclose(logits(again), logits(model), rtol=0, atol=1e-5 if shifted else 0)
    assert not verify_folder_files(tmp_path / "out")


@pytest.mark.parametrize("model_type", list(AS_TRANSFORMERS))
def test_transformers_reads_the_same_model_from_the_file(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    def type_of(name: str, values: np.ndarray) -> Type:
        return Type.Q8_0 if "attn" in name and values.shape[-1] % 32 == 0 else Type.Q5_1 if "ffn" in name else Type.F16

    import_gguf(gguf_of(tmp_path / "model.gguf", tiny(model_type, **AS_TRANSFORMERS[model_type]), tokenizer, type_of), tmp_path / "out")
    again = load_model(tmp_path / "out", dtype=torch.float32)
    load: Any = AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path, gguf_file="model.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)).eval()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(logits(again), logits(theirs))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_record_says_where_the_weights_come_from(tokenizer: Any, tmp_path: Path, dtype: Any) -> None:
    types = {"blk.0.attn_q.weight": Type.Q4_0, "blk.0.ffn_up.weight": Type.F16, "blk.1.ffn_up.weight": Type.BF16}
    file = gguf_of(
        tmp_path / "model.gguf",
        tiny("llama"),
        tokenizer,
        lambda name, _: types.get(name, Type.F32),
        general__name="Tiny",
        general__license="MIT",
    )
    import_gguf(file, tmp_path / "out", dtype)
    facts = read_record(tmp_path / "out")["imported"]
    assert facts["types"] == {"F32": 18, "Q4_0": 1, "F16": 1, "BF16": 1}
    assert (facts["file"], facts["name"], facts["architecture"]) == ("model.gguf", "Tiny", "llama")
    card = (tmp_path / "out/README.md").read_text()
    assert "license: mit" in card and facts["sha256"] in card and "Q4_0" in card and str(tmp_path) not in card
    assert ("rounded to bfloat16" in card) is (dtype is not None)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == ("float32" if dtype is None else "bfloat16")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out/model.safetensors")
    own = {"model.layers.0.mlp.up_proj.weight": torch.float16, "model.layers.1.mlp.up_proj.weight": torch.bfloat16}
    for name, tensor in stored.items():
        assert tensor.dtype == (dtype or own.get(name, torch.float32)), name


def test_a_file_is_a_model_wherever_a_folder_is(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    file = gguf_of(tmp_path / "model.gguf", model, tokenizer)
    # the config comes from the header alone: no weight is read
    monkeypatch.setattr("decoct.models.gguf.container.GgufFile.row_blocks", lambda *_: pytest.fail("a weight was read"))
    assert load_config(file).hidden_size == load_config(tmp_path).hidden_size == 64
    assert load_tokenizer(file).encode("Hello") == tokenizer.encode("Hello")
    monkeypatch.undo()
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "cache"))
    assert torch.equal(logits(load_model(file, dtype=torch.float32)), logits(model))
    # once: the second time nothing is imported
    monkeypatch.setattr(gguf_folder, "import_gguf", lambda *_: pytest.fail("imported twice"))
    assert find_model_folder(tmp_path, None, weights=True) == cached_folder(file, "weights")
    moved = file.rename(tmp_path / "other.gguf")
    assert content_hash(moved) == content_hash(tmp_path)
    assert load_model(moved, dtype=torch.float32).config.model_type == "llama"
    with pytest.raises(UserError, match="has no revision"):
        load_config(moved, revision="main")


def test_a_folder_with_several_files_is_asked_about(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        gguf_of(tmp_path / name, tiny("llama"), tokenizer)
    with pytest.raises(UserError, match=r"has 2 GGUF files \(a.gguf, b.gguf, ...\); name the one that is meant"):
        load_config(tmp_path)
    assert gguf_file(tmp_path / "b.gguf") == tmp_path / "b.gguf"
    (tmp_path / "model.safetensors").touch()
    assert gguf_file(tmp_path) is None


def split(folder: Path, model: Any, tokenizer: Any, count: int = 3) -> list[Path]:
    """The model in parts, as llama-gguf-split writes them: metadata in the first, tensors in all."""
    tensors = list(tensors_of(model).items())
    keys = {**metadata_of(model), **tokenizer_keys(tokenizer)}
    files = []
    for number in range(count):
        own = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors), **(keys if number == 0 else {})}
        place = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
        files.append(write_gguf(place, "llama", own, dict(tensors[len(tensors) * number // count : len(tensors) * (number + 1) // count])))
    return files


def test_a_model_in_parts_is_found_by_the_first(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "cache"))
    model = tiny("llama")
    (tmp_path / "m").mkdir()
    files = split(tmp_path / "m", model, tokenizer)
    assert gguf_file(tmp_path / "m") == files[0]
    assert load_config(tmp_path / "m").hidden_size == 64
    assert torch.equal(logits(load_model(files[0], dtype=torch.float32)), logits(model))
    facts = import_gguf(files[0], tmp_path / "out")
    assert facts["parts"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert facts["bytes"] == sum(file.stat().st_size for file in files)
    assert sum(facts["types"].values()) == len(tensors_of(model))
    before = content_hash(files[0])
    files[2].write_bytes(files[2].read_bytes()[:-1] + bytes([files[2].read_bytes()[-1] ^ 1]))
    assert content_hash(files[0]) != before, "every part counts"


def test_parts_that_are_no_whole_model_are_named(tokenizer: Any, tmp_path: Path) -> None:
    files = split(tmp_path, tiny("llama"), tokenizer)
    with pytest.raises(UserError, match=r"m-00002-of-00003.gguf is part 2 of 3 of a model; give the first one, .*m-00001-of-00003.gguf"):
        import_gguf(files[1], tmp_path / "out")
    aside = files[1].rename(tmp_path / "aside")
    with pytest.raises(
        UserError, match=r"one of 3 parts of a model, of which m-00002-of-00003.gguf is missing; fetch the missing files into"
    ):
        load_config(files[0])
    with pytest.raises(UserError, match=r"of which m-00002-of-00003.gguf is missing"):
        content_hash(files[0])
    shutil.copy(files[2], files[1])
    with pytest.raises(UserError, match=r"m-00002-of-00003.gguf is not part 2 of 3 of this model, as its name says"):
        import_gguf(files[0], tmp_path / "out")
    aside.rename(files[1])
    write_gguf(files[2], "llama", {"split.no": 2, "split.count": 3}, {})
    with pytest.raises(UserError, match=r"its 3 parts have 14 different tensors in 14, where the model has 21"):
        import_gguf(files[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general__architecture": "mamba9"}, "cannot import the architecture 'mamba9'; it knows llama, smollm3"),
    "parts": ({"split__count": 3}, "is one of 3 parts of a model, which its name does not say; name the parts NAME-00001-of-00003.gguf"),
    "layers": ({"block_count": 3}, "are not those of the llama it describes; 9 are missing: model.layers.2"),
    "fewer layers": ({"block_count": 1}, "9 are unexpected: model.layers.1"),
    "width": ({"embedding_length": 128}, "have another shape"),
    "no layers": ({"block_count": None}, "the metadata key llama.block_count is missing"),
    "heads": ({"attention__head_count": 3}, "head_count_kv is 2; expected a divisor of the 3 query heads"),
    "huge": ({"block_count": 3_000_000}, "num_hidden_layers is 3000000; a whole number up to 1,000"),
    "text": ({"context_length": "many"}, "llama.context_length is 'many'; expected a whole number"),
    "nan": ({"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan; expected a number above 0"),
    "rope": (
        {"rope__scaling__type": "magic", "rope__scaling__factor": 4.0},
        "rope.scaling.type is 'magic'; expected none, linear, or yarn",
    ),
    "values": ({"attention__value_length": 8}, "value_length is 8; expected the width of keys, 16"),
    "tokenizer": ({"tokenizer__ggml__model": "bert"}, "cannot rebuild a tokenizer of kind 'bert'.*--tokenizer FOLDER"),
    "no tokenizer": ({"tokenizer__ggml__tokens": None}, "has no tokenizer; .*--tokenizer FOLDER"),
    "split": ({"tokenizer__ggml__pre": "viking"}, "splits text by llama.cpp's 'viking', which decoct does not know .it knows gpt-2"),
    "merges": ({"tokenizer__ggml__merges": ["zz yy"]}, "cannot be rebuilt: .*zz"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_bad_file_is_refused_and_nothing_is_left(case: str, tokenizer: Any, tmp_path: Path) -> None:
    changes, message = BROKEN[case]
    model = tiny("llama")
    keys = {**metadata_of(model), **tokenizer_keys(tokenizer)} | {name.replace("__", "."): value for name, value in changes.items()}
    architecture = keys.pop("general.architecture", "llama")
    file = write_gguf(tmp_path / "model.gguf", architecture, keys, tensors_of(model))
    with pytest.raises(UserError, match=message):
        import_gguf(file, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir() if "cache" not in one.name] == ["model.gguf"]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen2_moe", "phi3", "starcoder2", "stablelm"])
def test_a_width_of_heads_that_a_model_type_derives_otherwise_is_named(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(model_type)
    width = model.config.hidden_size // model.config.num_attention_heads
    changes = {"attention__key_length": width // 2, "attention__value_length": width // 2, "rope__dimension_count": None}
    file = gguf_of(tmp_path / "model.gguf", model, tokenizer, **changes)
    with pytest.raises(
        UserError, match=rf"attention.key_length is {width // 2}; expected hidden size / heads: {model_type} has no other width"
    ):
        import_gguf(file, tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("inf")
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight holds NaN or infinite numbers"):
        import_gguf(gguf_of(tmp_path / "model.gguf", model, tokenizer), tmp_path / "out")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = 1e5
    file = gguf_of(tmp_path / "again.gguf", model, tokenizer)
    with pytest.raises(UserError, match=r"up_proj.weight of .* has values beyond the range of float16; import it in another dtype"):
        import_gguf(file, tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_model_has_not_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    keys = {**metadata_of(model), **tokenizer_keys(tokenizer)}
    for name, shape, message in (
        ("blk.0.ssm_a", (4,), "belongs to no llama"),
        ("blk.0.attn_q_norm.weight", (16,), "1 are unexpected: model.layers.0.self_attn.q_norm.weight"),
    ):
        file = write_gguf(tmp_path / f"{name}.gguf", "llama", keys, {**tensors_of(model), name: np.ones(shape, np.float32)})
        with pytest.raises(UserError, match=message):
            import_gguf(file, tmp_path / "out")


def test_memory_and_disk_are_checked_before_a_weight_is_read(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf_of(tmp_path / "model.gguf", tiny("llama"), tokenizer)
    monkeypatch.setattr("decoct.models.gguf.container.GgufFile.row_blocks", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr("decoct.models.folder.imported.available_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"needs about [\d,]+ bytes of memory for its largest tensor; 1,000 are free"):
        import_gguf(file, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"the model of .* needs [\d,]+ bytes, but .* has 1,000 bytes free"):
        import_gguf(file, tmp_path / "out")


def test_generation_settings_and_templates_come_along(tokenizer: Any, tmp_path: Path) -> None:
    file = gguf_of(
        tmp_path / "model.gguf", tiny("llama"), tokenizer, general__sampling__temp=0.5, general__sampling__top_k=20,
        tokenizer__ggml__eot_token_id=7, tokenizer__chat_template="{{ messages[0]['content'] }}",
        tokenizer__chat_templates=["tools"], tokenizer__chat_template__tools="T{{ messages[0]['content'] }}",
    )  # fmt: skip
    import_gguf(file, tmp_path / "out")
    given = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (given["eos_token_id"], given["temperature"], given["top_k"], given["do_sample"]) == ([0, 7], 0.5, 20, True)
    again = load_tokenizer(tmp_path / "out")
    chat = [{"role": "user", "content": "Hello"}]
    assert again.apply_chat_template(chat, tokenize=False) == "Hello"
    assert again.apply_chat_template(chat, tokenize=False, chat_template="tools") == "THello"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"top_k": 40}, {"top_k": 40, "do_sample": True}),
        ({"top_k": -1, "temp": 0.5}, {"top_k": 0, "temperature": 0.5, "do_sample": True}),
        ({"top_p": 1.5, "min_p": -0.5}, {"top_p": 1.0, "min_p": 0.0, "do_sample": True}),
        ({"temp": 0.0, "top_k": 40, "penalty_repeat": 1.5}, {"repetition_penalty": 1.5, "do_sample": False}),
        ({"temp": -1.0}, {"do_sample": False}),
        ({}, {}),
    ],
    ids=str,
)
def test_transformers_generates_with_the_sampling_settings(
    given: dict[str, Any], expected: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    keys = {f"general__sampling__{key}": value for key, value in given.items()}
    import_gguf(gguf_of(tmp_path / "model.gguf", tiny("llama"), tokenizer, **keys), tmp_path / "out")
    stored = json.loads((tmp_path / "out/generation_config.json").read_text())
    names = {"top_k", "top_p", "min_p", "temperature", "repetition_penalty", "do_sample"}
    found = {name: value for name, value in stored.items() if name in names}
    # 20.0 == 20, and transformers takes no float for top_k
    assert {name: (type(value), value) for name, value in found.items()} == {name: (type(value), value) for name, value in expected.items()}
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.generate(IDS, max_new_tokens=2, min_new_tokens=2).shape == (1, 122)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("top_k", 2.5, "general.sampling.top_k is 2.5; expected a whole number"),
        ("penalty_repeat", 0.0, "penalty_repeat is 0.0; expected a number above 0"),
    ],
)
def test_a_sampling_setting_without_a_meaning_is_refused(key: str, value: float, message: str, tokenizer: Any, tmp_path: Path) -> None:
    file = gguf_of(tmp_path / "model.gguf", tiny("llama"), tokenizer, **{f"general__sampling__{key}": value})
    with pytest.raises(UserError, match=message):
        import_gguf(file, tmp_path / "out")


def test_waiting_for_another_import_is_told_on_stderr(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stdout may be the JSON of a verb."""
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "cache"))

    @contextmanager
    def waiting(file: Path, doing: str, say: Callable[[str], None]) -> Iterator[None]:
        say(f"process 7 {doing}; waiting for it")
        yield

    monkeypatch.setattr(gguf_folder, "waiting_for", waiting)
    file = gguf_of(tmp_path / "model.gguf", tiny("llama"), tokenizer)
    cached_folder(file, "config")
    told = capsys.readouterr()
    assert told.out == ""
    assert f"decoct: process 7 imports {file}; waiting for it\n" in told.err


def test_transformers_reads_the_same_tokens(tokenizer: Any, tmp_path: Path) -> None:
    gguf_of(tmp_path / "model.gguf", tiny("llama"), tokenizer)
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    again, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("Hello, hello 123 worlds\n\n  and <|endoftext|> more", "", " x", "naïve 日本 🙂"):
        assert again.encode(text) == theirs.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.special_tokens_map == tokenizer.special_tokens_map
