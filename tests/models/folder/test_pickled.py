"""Pickled weights become safetensors through torch's restricted loader, and a pickle that asks for more is not run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decoct.models.common.errors import UserError
from decoct.models.folder.import_model import import_model
from decoct.models.folder.loading import load_model
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

from ...support.gguf_files import tiny


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A folder of a tied model whose weights are only in pytorch_model.bin, the tied head and old constants among them."""
    folder = tmp_path / "old"
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(folder)
    train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, 260).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    constants = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    torch.save(model.state_dict() | constants, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_the_weights_are_the_same(pickled: Path, tmp_path: Path, zipped: bool) -> None:
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    torch.save(state, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    what = import_model(str(pickled), tmp_path / "new")
    assert what.startswith("weights were stored as pickled tensors in pytorch_model.bin, sha256 ")
    found = load_model(tmp_path / "new", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    stored = load_file(tmp_path / "new/model.safetensors")
    assert "lm_head.weight" not in stored and not any("inv_freq" in name for name in stored)


def test_several_files_with_an_index(pickled: Path, tmp_path: Path) -> None:
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    places = {}
    for number, part in enumerate((0, 1), 1):
        own = {name: tensor for index, (name, tensor) in enumerate(state.items()) if index % 2 == part}
        torch.save(own, pickled / f"pytorch_model-0000{number}-of-00002.bin")
        places |= dict.fromkeys(own, f"pytorch_model-0000{number}-of-00002.bin")
    (pickled / "pytorch_model.bin").unlink()
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert "2 files, sha256" in import_model(str(pickled), tmp_path / "new", dtype="bf16")
    found = load_model(tmp_path / "new", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, state[name].to(torch.bfloat16)) for name, tensor in found.items())
    places["model.norm.weight"] = "../elsewhere.bin"
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match="only plain file names inside the folder are allowed"):
        import_model(str(pickled), tmp_path / "again")


class Evil:
    """Unpickled without restrictions, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_asks_for_more_is_refused_and_not_run(pickled: Path, tmp_path: Path) -> None:
    torch.save({"model.norm.weight": Evil(tmp_path / "ran")}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not a file of tensors alone, and nothing of it was run"):
        import_model(str(pickled), tmp_path / "new")
    assert sorted(one.name for one in tmp_path.iterdir() if "cache" not in one.name) == ["old"]


def test_other_content_is_refused(pickled: Path, tmp_path: Path) -> None:
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    for content, message in (
        ([torch.ones(2)], "holds no state dict"),
        ({**state, "extra.weight": torch.ones(2)}, "1 weights are unexpected: extra.weight"),
        ({name: tensor for name, tensor in state.items() if "layers.1.mlp" not in name}, "3 weights are missing"),
        ({**state, "model.norm.weight": torch.ones(3)}, r"of another shape than config.json gives: model.norm.weight \(3,\)"),
        ({**state, "model.norm.weight": torch.full((64,), float("nan"))}, "model.norm.weight of .* holds NaN"),
        ({**state, "model.norm.weight": torch.ones(64, dtype=torch.int8)}, "stored as torch.int8, not in plain floats"),
    ):
        torch.save(content, pickled / "pytorch_model.bin")
        with pytest.raises(UserError, match=message):
            import_model(str(pickled), tmp_path / "new")
        assert not (tmp_path / "new").exists()
    (pickled / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="is not a file of tensors alone"):
        import_model(str(pickled), tmp_path / "new")


def test_there_must_be_something_to_import(pickled: Path, tmp_path: Path) -> None:
    import_model(str(pickled), tmp_path / "new")
    with pytest.raises(UserError, match="there is nothing to import; a model folder or hub id is used as it is"):
        import_model(str(tmp_path / "new"), tmp_path / "again")
    with pytest.raises(UserError, match="fp32, bf16, fp16"):
        import_model(str(pickled), tmp_path / "again", dtype="int4")
    with pytest.raises(UserError, match="--tokenizer goes with a GGUF file alone"):
        import_model(str(pickled), tmp_path / "again", tokenizer=str(tmp_path / "new"))
    with pytest.raises(UserError, match="exists already and is never overwritten"):
        import_model(str(pickled), tmp_path / "new")
