"""A model folder reads back exactly, anywhere; it is there whole or not at all; every changed byte is noticed."""

import itertools
import json
import logging
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from decoct.models.common.errors import DecoctError, NonFiniteError, UserError
from decoct.models.folder.loading import load_model, load_tokenizer
from decoct.models.folder.model_folder import content_hash, read_record, save_model_folder, verify_folder_files
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

from ...support.warm_python import WarmPython

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def f(x):\n    return  x\n"], 270)


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama", vocab_size=270)


def _copy(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_fresh_process_gets_exactly_what_was_saved(
    tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for tied, dtype in itertools.product((True, False), (FP32, BF16)):
        model = tiny_model("llama", vocab_size=270, tie_word_embeddings=tied)
        name = f"{tied}-{dtype}"
        folder = save_model_folder(tmp_path / name, model, tokenizer, {}, dtype=dtype)
        save_file({key: tensor.to(dtype).clone() for key, tensor in model.state_dict().items()}, tmp_path / f"{name}.safetensors")
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    code = """
        import sys, torch
        from pathlib import Path
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
            found = AutoModelForCausalLM.from_pretrained(file.with_suffix("")).state_dict()  # in the dtype that the config names
            expected = load_file(file)
            assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
            print(all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == ["True"] * 4, result.stderr


def test_saving_bf16_does_not_touch_the_live_model(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    before, config = _copy(model), json.dumps(model.config.to_dict(), default=str)
    parameters = dict(model.named_parameters())
    model.train()
    save_model_folder(tmp_path / "model", model, tokenizer, {}, dtype=BF16)
    assert model.training
    assert dict(model.named_parameters()) == parameters, "the same parameter objects"
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == FP32
        assert torch.equal(tensor, before[name]), name
    assert json.dumps(model.config.to_dict(), default=str) == config
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {BF16}


def test_none_keeps_the_dtype_there_is(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    save_model_folder(tmp_path / "model", tiny_model("llama", dtype=BF16), None, {}, dtype=None)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {BF16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not list((tmp_path / "model").glob("tokenizer*"))


def test_a_given_state_dict_is_what_is_saved(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    other = {name: tensor * 2 for name, tensor in _copy(model).items()}  # the tied pair no longer shares its memory
    save_model_folder(tmp_path / "model", model, None, {}, state_dict=other, dtype=FP32)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == other.keys() - {"lm_head.weight"}
    assert all(torch.equal(stored[name], other[name]) for name in stored)
    without_head = {name: tensor for name, tensor in other.items() if name != "lm_head.weight"}
    save_model_folder(tmp_path / "second", model, None, {}, state_dict=without_head, dtype=FP32)
    assert content_hash(tmp_path / "second") == content_hash(tmp_path / "model")


def test_a_state_dict_that_does_not_fit_is_refused(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    weights = _copy(model)
    with pytest.raises(DecoctError, match=r"are tied in the config but differ"):
        save_model_folder(
            tmp_path / "a", model, None, {}, state_dict={**weights, "lm_head.weight": weights["lm_head.weight"] + 1}, dtype=None
        )
    del weights["model.norm.weight"]
    with pytest.raises(DecoctError, match=r"missing or unexpected: model\.norm\.weight, more"):
        save_model_folder(tmp_path / "a", model, None, {}, state_dict={**weights, "more": torch.zeros(1)}, dtype=None)
    assert list(tmp_path.iterdir()) == []


def test_non_finite_weights_are_not_saved(model: Any, tmp_path: Path) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e30
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*float16"):
        save_model_folder(tmp_path / "model", model, None, {}, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gpt_neox"])
def test_the_tokenizer_round_trips(
    tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_model_folder(tmp_path / "model", tiny_model(model_type, vocab_size=270), tokenizer, {}, dtype=FP32)
    text = "  def\n\n\tf(x) don 't , e\u0301 \u00e9 <|endoftext|> 漢字 "
    for again in (AutoTokenizer.from_pretrained(tmp_path / "model"), load_tokenizer(tmp_path / "model")):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text
        assert again.get_vocab() == tokenizer.get_vocab()
    assert caplog.records == []


def test_a_tokenizer_that_auto_tokenizer_would_change_is_said_so(
    tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        save_model_folder(tmp_path / "model", tiny_model("qwen2", vocab_size=270), tokenizer, {}, dtype=FP32)
    assert "as Qwen2Tokenizer, which splits text differently" in caplog.text


def test_no_code_and_no_local_path_gets_into_the_folder(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_model_folder(tmp_path / "first", model, tokenizer, {}, dtype=FP32)
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    (tmp_path / "first" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.C"}}))
    (tmp_path / "first" / "decoct.json").unlink()
    again, its_tokenizer = load_model(tmp_path / "first", dtype=FP32), load_tokenizer(tmp_path / "first")
    its_tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["code.T", None]}
    save_model_folder(tmp_path / "second", again, its_tokenizer, {}, dtype=FP32)
    for file in (tmp_path / "second").iterdir():
        if file.suffix == ".json":
            text = file.read_text()
            assert "auto_map" not in text, file
            assert str(tmp_path) not in text, file


def test_the_record_lists_every_file_and_extras(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def card(place: Path) -> None:
        (place / "README.md").write_text("card")

    codes = torch.arange(6, dtype=torch.int8).reshape(2, 3)
    folder = save_model_folder(
        tmp_path / "model",
        model,
        tokenizer,
        {"kind": "qat", "parent": {"key": 1}, "format": 99, "files": {}},
        dtype=FP32,
        extra_tensors={"quant/codes.safetensors": {"a.codes": codes.T}},
        write_extra=card,
    )
    record = read_record(folder)
    assert (record["format"], record["kind"], record["parent"]) == (1, "qat", {"key": 1})
    assert record["files"].keys() == {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {"decoct.json"}
    assert {"README.md", "quant/codes.safetensors", "config.json", "model.safetensors", "tokenizer.json"} <= record["files"].keys()
    assert torch.equal(load_file(folder / "quant/codes.safetensors")["a.codes"], codes.T)
    assert verify_folder_files(folder) == []
    assert not load_model(folder, dtype=FP32).training
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_every_change_of_a_file_is_found(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "model", model, tokenizer, {}, dtype=FP32)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    (folder / "generation_config.json").unlink()
    (folder / "more.safetensors").write_bytes(b"")
    (folder / "quant").mkdir()
    (folder / "quant/codes.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    problems = verify_folder_files(folder)
    assert len(problems) == 4
    assert "quant/codes.safetensors was added after the folder was written" in problems
    assert "generation_config.json is missing" in problems
    assert any(problem.startswith("model.safetensors has changed") for problem in problems)
    assert "more.safetensors was added after the folder was written" in problems


def test_records_that_are_missing_broken_or_newer(tmp_path: Path) -> None:
    assert read_record(tmp_path) == {}
    assert "nothing can be compared" in verify_folder_files(tmp_path)[0]
    for text, message in [
        ("{", "not readable JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "not a record that decoct wrote"),
        ('{"format": true}', "not a record that decoct wrote"),
        ('{"format": 1, "files": []}', "not a record that decoct wrote"),
        ('{"format": 2}', "has format 2, this version of decoct reads up to 1; upgrade"),
    ]:
        (tmp_path / "decoct.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_record(tmp_path)
    (tmp_path / "decoct.json").write_text('{"format": 1, "files": {"../a": "0"}}')
    assert verify_folder_files(tmp_path) == ["../a: the record names a file outside the folder"]


def test_content_hash_follows_the_bytes_that_count(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = save_model_folder(tmp_path / "first", model, tokenizer, {"kind": "a"}, dtype=FP32)
    second = save_model_folder(tmp_path / "second", model, tokenizer, {"kind": "b"}, dtype=FP32)
    expected = content_hash(first)
    assert content_hash(str(second)) == expected
    (second / "README.md").write_text("card")
    (second / "decoct.json").unlink()
    (second / "generation_config.json").unlink()
    assert content_hash(second) == expected
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        changed = tmp_path / f"changed-{name}"
        shutil.copytree(first, changed)
        (changed / name).write_bytes((changed / name).read_bytes() + b" ")
        assert content_hash(changed) != expected, name
    shutil.copytree(first, tmp_path / "moved")
    (tmp_path / "moved" / "model.safetensors").rename(tmp_path / "moved" / "other.safetensors")
    assert content_hash(tmp_path / "moved") != expected
    (tmp_path / "moved" / "config.json").unlink()
    with pytest.raises(UserError, match="is not a model folder"):
        content_hash(tmp_path / "moved")


def test_a_failure_leaves_nothing(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        save_model_folder(tmp_path / "model", model, tokenizer, {}, dtype=FP32, write_extra=fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already"):
        save_model_folder(tmp_path / "model", model, tokenizer, {}, dtype=FP32)


def test_a_full_disk_leaves_the_folder_before_it_whole(
    model: Any, tokenizer: PreTrainedTokenizerFast, warm: WarmPython, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    save_model_folder(tmp_path / "old", model, tokenizer, {}, dtype=FP32)
    code = """
        import resource, sys, torch
        from pathlib import Path
        from decoct.models.common.errors import UserError
        from decoct.models.folder.model_folder import save_model_folder
        from decoct.models.folder.loading import load_model, load_tokenizer
        folder = Path(sys.argv[1])
        model, tokenizer = load_model(folder / "old", dtype=torch.float32), load_tokenizer(folder / "old")
        for limit in (60_000, 10_000, 1_000, 100):  # the weights do not fit; nor the tokenizer; nor the config; nor anything
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                save_model_folder(folder / "new", model, tokenizer, {}, dtype=torch.float32)
            except UserError as error:
                print(error)
    """
    script = tmp_path_factory.mktemp("script") / "full_disk.py"
    script.write_text(textwrap.dedent(code))
    result = warm.run([str(script), str(tmp_path)])
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4, result.stdout
    assert all(line.startswith(f"cannot write {tmp_path / 'new'}: a file-size limit was reached") for line in lines)
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    assert verify_folder_files(tmp_path / "old") == []


def test_shards_are_written_and_read_back(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import decoct.models.folder.model_folder as folder_module

    monkeypatch.setattr(folder_module, "MAX_SHARD", "40KB")
    folder = save_model_folder(tmp_path / "model", model, None, {}, dtype=FP32)
    assert (folder / "model.safetensors.index.json").exists()
    assert verify_folder_files(folder) == []
    again = load_model(folder, dtype=FP32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_generation_settings_of_any_kind_can_be_saved(model: Any, tmp_path: Path) -> None:
    model.generation_config.temperature = 0.5  # some hub models carry it without do_sample, which transformers refuses to write
    model.generation_config.do_sample = False
    save_model_folder(tmp_path / "model", model, None, {}, dtype=FP32)
    assert model.generation_config.temperature == 0.5
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config
    assert (saved.eos_token_id, saved.do_sample, saved.temperature) == (0, False, None)


def test_a_head_of_its_own_under_a_tied_config_is_saved_as_what_it_is(
    tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", vocab_size=270, tie_word_embeddings=False)
    first = save_model_folder(tmp_path / "first", model, tokenizer, {}, dtype=FP32)
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (first / "decoct.json").unlink()
    with caplog.at_level(logging.WARNING):
        loaded = load_model(first, dtype=FP32)
    assert "has tie_word_embeddings: true, but also a head with values of its own" in caplog.text
    assert loaded.config.tie_word_embeddings is False
    saved = save_model_folder(tmp_path / "saved", loaded, tokenizer, {}, dtype=FP32)
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is False
    again = load_model(saved, dtype=FP32)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def test_the_flag_that_is_written_follows_the_weights_that_are_written(
    tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    untied = tiny_model("llama", vocab_size=270, tie_word_embeddings=False)
    untied.config.tie_word_embeddings = True
    folder = save_model_folder(tmp_path / "untied", untied, tokenizer, {}, dtype=FP32)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert untied.config.tie_word_embeddings is True, "the live model stays as it is"
    shared = tiny_model("llama", vocab_size=270, tie_word_embeddings=False)
    shared.lm_head.weight = shared.model.embed_tokens.weight
    folder = save_model_folder(tmp_path / "shared", shared, tokenizer, {}, dtype=FP32)
    again = load_model(folder, dtype=FP32)
    assert torch.equal(again.lm_head.weight, shared.model.embed_tokens.weight)
    assert torch.equal(again.model.embed_tokens.weight, shared.model.embed_tokens.weight)
