"""Streaming gives what loading gives, bit for bit, and refuses what loading refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoct.models.common.errors import UserError
from decoct.models.folder import streaming
from decoct.models.folder.loading import load_model
from decoct.models.folder.streaming import WeightFiles, can_stream, empty_model, materialize_buffers, streamed_model

TinyModel = Callable[..., Any]


@pytest.fixture
def saved(tiny_model: TinyModel, tmp_path: Path) -> Callable[..., Path]:
    def save(family: str = "llama", *, shards: bool = False, name: str = "model", **config: Any) -> Path:
        tiny_model(family, **config).save_pretrained(tmp_path / name, max_shard_size="20KB" if shards else "5GB")
        return tmp_path / name

    return save


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("fell back to load_model")

    monkeypatch.setattr(streaming, "load_model", refuse)


def _edit(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _assert_same(streamed: Any, loaded: Any) -> None:
    ours, theirs = dict(streamed.named_parameters()), dict(loaded.named_parameters())
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        assert ours[name].requires_grad == expected.requires_grad
        assert torch.equal(ours[name], expected), name
    buffers = dict(streamed.named_buffers())
    assert list(buffers) == [name for name, _ in loaded.named_buffers()]
    assert all(buffers[name].dtype == value.dtype and torch.equal(buffers[name], value) for name, value in loaded.named_buffers())
    assert {module.training for module in streamed.modules()} == {False}
    assert streamed.config.to_dict() == loaded.config.to_dict()
    assert streamed.generation_config.to_dict() == loaded.generation_config.to_dict()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(streamed(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_model_is_the_loaded_one(saved: Callable[..., Path], family: str, tied: bool) -> None:
    for name, stored in (("full", torch.float32), ("half", torch.bfloat16)):
        folder = saved(family, name=name, shards=True, dtype=stored, tie_word_embeddings=tied)
        assert can_stream(folder)
        for dtype in (torch.float32, torch.bfloat16):
            model = streamed_model(folder, dtype=dtype)
            _assert_same(model, load_model(folder, dtype=dtype))
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
def test_scaled_rotary_frequencies_are_those_of_loading(saved: Callable[..., Path], rope: dict[str, Any]) -> None:
    folder = saved("llama", rope_parameters={"rope_theta": 500.0, **rope})
    _assert_same(streamed_model(folder, dtype=torch.float32), load_model(folder, dtype=torch.float32))


def test_only_the_rows_asked_for_come(saved: Callable[..., Path]) -> None:
    folder = saved(shards=True)
    name = "model.layers.1.mlp.gate_proj.weight"
    with WeightFiles(folder) as files:
        whole = files.read(name)
        assert files.shape(name) == tuple(whole.shape) == (48, 32)
        assert files.dtype(name) == whole.dtype == torch.float32
        assert torch.equal(files.read(name, slice(7, 20)), whole[7:20])
        assert files.read(name, slice(48, 48)).shape == (0, 32)
        assert sorted(files.names()) == sorted(load_model(folder, dtype=torch.float32).state_dict())
        with pytest.raises(UserError, match=r"no weight model\.nothing"):
            files.read("model.nothing")


def test_rows_that_are_not_finite_are_refused_when_read(saved: Callable[..., Path]) -> None:
    folder, name = saved(), "model.layers.2.mlp.down_proj.weight"
    _edit(folder, lambda w: w[name][3, 4].fill_(float("nan")))
    with WeightFiles(folder) as files:
        files.read(name, slice(4, 32))
        with pytest.raises(UserError, match=r"down_proj\.weight .*NaN or infinite"):
            files.read(name, slice(0, 4))
    with pytest.raises(UserError, match=r"down_proj\.weight .*NaN or infinite"):
        streamed_model(folder, dtype=torch.float32)


def test_a_number_too_large_for_the_dtype_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved()
    _edit(folder, lambda w: w["model.norm.weight"][0].fill_(1e6))
    with pytest.raises(UserError, match=r"norm\.weight .*loaded as torch\.float16"):
        streamed_model(folder, dtype=torch.float16)


def test_refusals_are_those_of_loading(saved: Callable[..., Path]) -> None:
    def break_names(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.0.extra.weight"] = torch.zeros(2)

    for name, edit in (
        ("names", break_names),
        ("shape", lambda w: w.update({"model.norm.weight": torch.zeros(31)})),
    ):
        folder = saved(name=name)
        _edit(folder, edit)
        with pytest.raises(UserError) as expected:
            load_model(folder, dtype=torch.float32)
        for load in (lambda f=folder: streamed_model(f, dtype=torch.float32), lambda f=folder: empty_model(f)):
            with pytest.raises(UserError) as raised:
                load()
            assert str(raised.value) == str(expected.value)
    with pytest.raises(UserError, match="is not a model folder"):
        can_stream(saved().parent)


def test_a_second_copy_of_a_tied_head_is_used_only_when_it_is_equal(saved: Callable[..., Path]) -> None:
    folder = saved(tie_word_embeddings=True)
    _edit(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert can_stream(folder)
    _assert_same(streamed_model(folder, dtype=torch.float32), load_model(folder, dtype=torch.float32))
    _edit(folder, lambda w: w["lm_head.weight"].add_(1))
    assert not can_stream(folder)
    _assert_same(streamed_model(folder, dtype=torch.float32), load_model(folder, dtype=torch.float32))


def test_old_rotary_buffers_in_the_files_are_ignored_as_in_loading(saved: Callable[..., Path]) -> None:
    folder = saved()
    _edit(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert can_stream(folder)
    _assert_same(streamed_model(folder, dtype=torch.float32), load_model(folder, dtype=torch.float32))


def test_a_model_that_was_saved_without_its_head_is_streamed(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    _edit(tmp_path / "gpt2", lambda w: [w.update({k.removeprefix("transformer."): w.pop(k)}) for k in list(w)])
    assert can_stream(tmp_path / "gpt2")
    _assert_same(streamed_model(tmp_path / "gpt2", dtype=torch.float32), load_model(tmp_path / "gpt2", dtype=torch.float32))


def test_what_cannot_be_streamed_is_loaded(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_local_experts": 2,
        "num_key_value_heads": 2,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, vocab_size=64)).eval()
    model.save_pretrained(tmp_path)
    assert not can_stream(tmp_path), "experts lie in the files one by one"
    _assert_same(streamed_model(tmp_path, dtype=torch.float32), load_model(tmp_path, dtype=torch.float32))


def test_an_empty_model_has_no_weights_and_real_buffers(saved: Callable[..., Path]) -> None:
    folder = saved("qwen3", dtype=torch.bfloat16, tie_word_embeddings=True)
    model, files = empty_model(folder)
    reference = load_model(folder, dtype=torch.float32)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    for name, buffer in reference.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    assert set(files.names()) == {name for name, _ in reference.named_parameters()}
    materialize_buffers(model, "meta")
    assert {b.device.type for b in model.buffers()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_filling_lists_the_names_no_more_often_for_more_parameters(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of all names per parameter would take time that grows with their square."""
    asked: list[int] = []
    names = WeightFiles.names
    monkeypatch.setattr(WeightFiles, "names", lambda files: asked.append(1) or names(files))
    counts = []
    for layers in (1, 4):
        asked.clear()
        streamed_model(saved(name=f"of {layers}", num_hidden_layers=layers), dtype=torch.float32)
        counts.append(len(asked))
    assert counts[0] == counts[1]
