"""What is loaded is what the files say; everything else is refused with one readable message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from decoct.models.common.errors import UserError
from decoct.models.folder.folder_checks import check_model_folder
from decoct.models.folder.load_report import check_report
from decoct.models.folder.loading import load_config, load_model, load_tokenizer, meta_model
from decoct.models.folder.name_checks import check_weight_names
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

Edit = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def folder(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """An untied fp32 Llama in one safetensors file, with a tokenizer."""
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    train_tokenizer(["hello world"], 257).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


def _load(path: str | Path) -> Any:
    return load_model(path, dtype=torch.float32)


def _edit_weights(folder: Path, edit: Edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rename_shard(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = sorted(weight_map.values())[0]
    _edit_json(index, weight_map={tensor: name if file == first else file for tensor, file in weight_map.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_folder_loads_in_the_dtype_asked_for_and_in_eval_mode(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(folder, dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name].to(dtype)), name


def test_shards_and_strings_load(sharded: Path) -> None:
    assert len(check_model_folder(sharded)) == len(list(sharded.glob("*.safetensors")))
    assert sum(p.numel() for p in _load(str(sharded)).parameters()) > 0


def test_loading_is_quiet_and_gives_the_settings_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    _load(folder)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("present", [False, True])
def test_a_tied_head_may_be_missing(tiny_model: Callable[..., Any], tmp_path: Path, present: bool) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    if present:
        _edit_weights(tmp_path / "tied", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    model = _load(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_that_is_reported_as_missing_is_excused_only_with_its_embedding(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    report = {"missing_keys": {"lm_head.weight"}, "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    check_report("folder", model, report)  # transformers versions differ in whether they report it
    with pytest.raises(UserError, match=r"2 weights are missing .*lm_head\.weight, model\.embed_tokens\.weight"):
        check_report("folder", model, {**report, "missing_keys": {"lm_head.weight", "model.embed_tokens.weight"}})


def test_an_untied_head_may_not_be_missing(folder: Path) -> None:
    _edit_weights(folder, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"1 weights are missing \(they would be random\): lm_head.weight"):
        _load(folder)


def test_a_tied_head_without_its_embedding_is_missing(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    _edit_weights(tmp_path / "tied", lambda w: w.pop("model.embed_tokens.weight"))
    with pytest.raises(UserError, match=r"missing .*model.embed_tokens.weight"):
        _load(tmp_path / "tied")


def test_missing_unexpected_and_misshapen_weights_are_refused_by_name(folder: Path) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            del weights[f"model.layers.{layer}.self_attn.q_proj.weight"]
            del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
        weights["model.layers.0.extra.weight"] = torch.zeros(2)
        weights["model.norm.weight"] = torch.zeros(31)

    _edit_weights(folder, edit)
    with pytest.raises(UserError) as raised:
        _load(folder)
    message = str(raised.value)
    assert "8 weights are missing" in message
    assert "model.layers.0.self_attn.q_proj.weight" in message
    assert ", ..." in message
    assert "1 weights are unexpected: model.layers.0.extra.weight" in message
    assert "model.norm.weight (31,) vs (32,)" in message
    assert "\n" not in message
    with pytest.raises(UserError) as early:
        check_weight_names(folder, folder)
    assert str(early.value) == message, "the same without loading"


def _prefixed(prefix: str) -> Edit:
    return lambda weights: [weights.update({prefix + name: weights.pop(name)}) for name in list(weights)]


REMEDIES: dict[str, tuple[Edit, dict[str, Any], str]] = {
    "torch.compile": (_prefixed("_orig_mod."), {}, r"begins with '_orig_mod\.', which torch\.compile adds; save model\._orig_mod \("),
    "DDP": (_prefixed("module."), {}, r"begins with 'module\.', which DistributedDataParallel adds; save model\.module \("),
    "a classifier": (
        lambda weights: weights.update({"score.weight": weights.pop("lm_head.weight")[:2].clone()}),
        {"architectures": ["LlamaForSequenceClassification"]},
        "It is a LlamaForSequenceClassification, which predicts no tokens; give a causal language model",
    ),
    "no head": (lambda weights: weights.pop("lm_head.weight"), {}, "set tie_word_embeddings to true in config.json; else the head is lost"),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_usual_causes_are_named_with_their_remedy(folder: Path, case: str) -> None:
    edit, config, message = REMEDIES[case]
    check_weight_names(folder, folder)
    _edit_weights(folder, edit)
    _edit_json(folder / "config.json", **config)
    with pytest.raises(UserError, match=message):
        _load(folder)
    with pytest.raises(UserError, match=message):
        check_weight_names("model", folder)


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        ("checkpoint-9/config.json checkpoint-10/config.json", r"give one of the checkpoints in it, such as .*checkpoint-10$"),
        ("model.gguf", "model.gguf.*is cut off: 0 bytes"),
        ("model.gguf model.safetensors", r"give its GGUF file model.gguf itself, or make a model folder of it: decoct import"),
        ("consolidated.00.pth", r"an original release \(\.pth\)"),
        ("01-qat/model/config.json 02-qat.71fddf59/model/config.json", r"give a model folder in it, such as .*01-qat.model$"),
        ("model/config.json", r"give a model folder in it, such as .*model$"),
        ("notes.txt", "give a folder that from_pretrained can read"),
    ],
)
def test_a_folder_that_is_no_model_says_what_to_give(tmp_path: Path, holds: str, message: str) -> None:
    for name in holds.split():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    for read in (load_config, load_tokenizer):
        with pytest.raises(UserError, match=message):
            read(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_by_name(folder: Path, value: float) -> None:
    _edit_weights(folder, lambda w: w["model.layers.2.mlp.down_proj.weight"][3, 4].fill_(value))
    with pytest.raises(UserError, match=r"weight model\.layers\.2\.mlp\.down_proj\.weight .*NaN or infinite"):
        _load(folder)


def test_a_truncated_or_foreign_weight_file_is_refused_by_name(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated"):
        _load(folder)
    file.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        _load(folder)
    file.write_bytes(data)
    (folder / "quant").mkdir()
    (folder / "quant/codes.safetensors").write_bytes(data[:100])
    with pytest.raises(UserError, match=r"codes\.safetensors: truncated"):
        _load(folder)


def test_duplicate_header_keys_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    again = header[:-1] + b',"model.norm.weight":' + json.dumps(json.loads(header)["model.norm.weight"]).encode() + b"}"
    file.write_bytes(len(again).to_bytes(8, "little") + again + data[8 + size :])
    with pytest.raises(UserError, match=r"key 'model\.norm\.weight' twice"):
        _load(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "sub/../../outside.safetensors", "ABSOLUTE", "sub/inside.safetensors", "..", ""]
)
def test_names_that_leave_the_folder_are_refused(sharded: Path, tmp_path: Path, name: str) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    (sharded / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", sharded / "sub" / "inside.safetensors"):
        shutil.copy(first, place)
    first.unlink()
    _rename_shard(sharded, str(tmp_path / "outside.safetensors") if name == "ABSOLUTE" else name)
    with pytest.raises(UserError, match="only plain file names inside the folder are allowed"):
        _load(sharded)


def test_a_link_out_of_the_folder_is_refused(sharded: Path, folder: Path, tmp_path: Path) -> None:
    for file in (sorted(sharded.glob("*.safetensors"))[0], folder / "model.safetensors"):
        shutil.move(file, tmp_path / "outside.safetensors")
        file.symlink_to(tmp_path / "outside.safetensors")
        with pytest.raises(UserError, match=r"a link to .*outside\.safetensors"):
            _load(file.parent)


def test_an_index_that_does_not_fit_its_shards_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    _rename_shard(sharded, "model-00099-of-00099.safetensors")
    with pytest.raises(UserError, match=r"'model-00099-of-00099\.safetensors', which is missing"):
        _load(sharded)
    index.write_text(whole)
    _rename_shard(sharded, sorted(file.name for file in sharded.glob("*.safetensors"))[-1])
    with pytest.raises(UserError, match="which does not hold it"):
        _load(sharded)
    index.write_text('{"weight_map": []}')
    with pytest.raises(UserError, match="has no weight_map"):
        _load(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    one, two = sorted(sharded.glob("*.safetensors"))[:2]
    save_file({**load_file(two), next(iter(load_file(one))): torch.zeros(1)}, two)
    with pytest.raises(UserError, match=r"is in both model-00001-.* and model-00002-"):
        _load(sharded)


def test_pickled_weights_are_refused_with_the_remedy(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"only as pytorch_model\.bin: pickled files can run code.*decoct import .* --out MODEL.*save_pretrained"
    ):
        _load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no weights: neither model\.safetensors nor model\.safetensors\.index\.json"):
        _load(folder)


def test_what_is_no_plain_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="it is unclear which one to use"):
        _load(folder)
    (folder / "adapter_config.json").unlink()
    _edit_json(folder / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(UserError, match="packed quantized weights"):
        _load(folder)
    _edit_json(folder / "config.json", quantization_config=None, transformers_weights="../other.safetensors")
    with pytest.raises(UserError, match="only plain file names"):
        _load(folder)
    _edit_json(folder / "config.json", transformers_weights=None)
    _load(folder)
    (folder / "shard-00001-model-00001-of-00001.safetensors").touch()
    with pytest.raises(UserError, match="distributed training checkpoint"):
        _load(folder)


def test_a_broken_or_unknown_config_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    whole = config.read_text()
    for text, message in [("{", "not readable JSON"), ("[]", "must hold a JSON object")]:
        config.write_text(text)
        with pytest.raises(UserError, match=message):
            _load(folder)
        with pytest.raises(UserError, match=message):
            load_config(folder)
    for change, message in [({"model_type": "nonesuch"}, "nonesuch"), ({"model_type": "t5"}, "causal language model")]:
        config.write_text(whole)
        _edit_json(config, **change)
        with pytest.raises(UserError, match=f"cannot be loaded as a causal language model: .*{message}|{message}"):
            _load(folder)
    config.unlink()
    for load in (_load, load_config):
        with pytest.raises(UserError, match=r"is not a model folder: it has no config\.json"):
            load(folder)


def test_code_in_a_folder_is_not_run_unasked(folder: Path, tmp_path: Path) -> None:
    _edit_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be loaded"):
        _load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(UserError, match="is a file; give a model folder"):
        _load(folder / "model.safetensors")
    with pytest.raises(UserError, match="a folder has no revision"):
        load_model(folder, dtype=torch.float32, revision="main")


def test_a_tokenizer_is_never_made_up(folder: Path) -> None:
    assert load_tokenizer(folder)("hello")["input_ids"] == train_tokenizer(["hello world"], 257)("hello")["input_ids"]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not readable JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    _edit_json(folder / "config.json", model_type="qwen2")
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(folder)


def test_config_and_meta_model_take_no_memory(folder: Path) -> None:
    model = meta_model(load_config(folder))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()
    }
