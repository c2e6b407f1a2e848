"""One target for every reader of files that people hand us: a damaged file loads, or is a ``UserError``; never a traceback, never a hang.

A few damages each in every run, many in the slow tests.
"""

import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from decoct.models.common.errors import DecoctError
from decoct.models.common.seal import sealed
from decoct.models.folder.codes_file import CODES
from decoct.models.folder.folder_checks import check_model_folder
from decoct.models.folder.loading import load_config, load_model, load_tokenizer
from decoct.models.folder.model_folder import content_hash, read_record, save_model_folder
from decoct.models.folder.safetensors_read import read_header
from decoct.qat.codes.state import load_quant_state
from decoct.qat.export.export import export_folder
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.readers.open import open_export
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder
from decoct.trainer.checkpoints.read import FORMAT, GROUPS, PIECES, STATE, find_newest_verified
from decoct.trainer.data.documents import read_documents
from decoct.trainer.data.prepared_data import open_prepared
from decoct.trainer.settings import DataSettings
from decoct.trainer.soft_targets.store import Store, open_store

from ...support import mutations

SECONDS = 5.0
"""Most processor time for one damaged file; a sound one takes some milliseconds."""


@dataclass(frozen=True)
class Target:
    """A file in a folder and who reads it."""

    base: str
    file: str
    read: Callable[[Path], Any]
    kind: str = "json"
    """json (values and bytes), header (of safetensors), or bytes (of the first ``head``)."""
    record: bool = False
    """Whether decoct.json stays: without it the file's own reader has to see the damage, as in folders by others."""
    head: int = 10**9


def _verify(folder: Path) -> list[str]:
    return verify_folder(folder, runtimes=False).problems


def _read_all(folder: Path) -> None:
    opened = open_export(folder)
    for name in opened.shapes():
        opened.tensor(name)


def _load(folder: Path) -> None:
    load_model(folder, dtype=torch.float32)


def _tokenize(folder: Path) -> None:
    load_tokenizer(folder).encode("hello world")


def _documents(**settings: Any) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        files = [str(file) for file in folder.iterdir() if file.name.startswith("text")]
        documents = read_documents(DataSettings(files=tuple(files), **settings))
        for _ in documents.chats() if documents.chats is not None else documents:
            pass

    return read


def _checkpoint(folder: Path) -> list[Any]:
    return find_newest_verified(folder)[1]


def _store(folder: Path) -> list[str]:
    header = json.loads((folder.parent / "header.json").read_text())
    return Store.refresh(open_store(folder, header), thorough=True)


FORGIVING = ("generation_config.json", "chats")
"""transformers takes its defaults in place of damaged settings; bad conversations are counted and left out."""
TARGETS: dict[str, Target] = {
    "config.json of a model": Target("model", "config.json", _load),
    "config.json for load_config": Target("model", "config.json", load_config),
    "config.json of a hashed folder": Target("model", "config.json", content_hash),
    "generation_config.json": Target("model", "generation_config.json", _load),
    "tokenizer.json": Target("model", "tokenizer.json", _tokenize),
    "tokenizer_config.json": Target("model", "tokenizer_config.json", _tokenize),
    "index": Target("sharded", "model.safetensors.index.json", check_model_folder),
    "index of an export": Target("sharded-export", "model.safetensors.index.json", _verify),
    "safetensors header": Target("model", "model.safetensors", lambda folder: read_header(folder / "model.safetensors"), "header"),
    "safetensors of a model": Target("model", "model.safetensors", _load, "header"),
    "codes": Target("quantized", CODES, load_quant_state, "header", record=True),
    "decoct.json of an export": Target("compressed-tensors", "decoct.json", _verify, record=True),
    "decoct.json of a gguf": Target("gguf", "decoct.json", _verify, record=True),
    "decoct.json of a quantized folder": Target("quantized", "decoct.json", load_quant_state, record=True),
    "decoct.json that is read": Target("model", "decoct.json", read_record, record=True),
    **{f"config.json of {form}": Target(form, "config.json", _verify) for form in ("compressed-tensors", "gptq", "awq", "gguf")},
    **{f"safetensors of {form}": Target(form, "model.safetensors", _verify, "header") for form in ("compressed-tensors", "gptq", "awq")},
    "gguf": Target("gguf", "model.gguf", _read_all, "bytes"),
    "gguf header": Target("gguf", "model.gguf", _verify, "bytes", head=4000),
    "checkpoint manifest": Target("checkpoints", "step-00000002/manifest.json", _checkpoint),
    "checkpoint state": Target("checkpoints", f"step-00000002/{STATE}", _checkpoint),
    "token cache": Target("tokens", "manifest.json", open_prepared),
    "teacher cache": Target("teacher-cache", "header.json", _store),
    "shard of a teacher cache": Target("teacher-cache", "shards/a.json", _store),
    "parquet": Target("parquet", "text.parquet", _documents(), "bytes"),
    "jsonl": Target("jsonl", "text.jsonl", _documents(), "bytes"),
    "chats": Target("chats", "text.jsonl", _documents(kind="chat"), "bytes"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Sound folders of every kind."""
    root = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=258, head_dim=8, max_position_embeddings=64, eos_token_id=0, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_model_folder(root / "model", model, tokenizer, {"kind": "student"}, dtype=torch.float32)
    state = quantize_model(model, QuantSpec(bits=4, group_size=32), ())
    fold(model, state)
    codes = {CODES: state.tensors()}
    save_model_folder(root / "quantized", model, tokenizer, {"quant": state.record()}, dtype=torch.float32, extra_tensors=codes)
    for form in ("compressed-tensors", "gptq", "awq", "gguf"):
        export_folder(root / "quantized", root / form, form, runtimes=False)
    _shard(root / "model", root / "sharded")
    _shard(root / "compressed-tensors", root / "sharded-export")
    _checkpoints(root / "checkpoints/step-00000002")
    _caches(root)
    texts = [{"text": f"what a line says, {number}"} for number in range(40)]
    turns = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"yes {n}"}]} for n in range(20)]
    for name, rows in (("jsonl", texts), ("chats", turns)):
        (root / name).mkdir()
        (root / name / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": [row["text"] for row in texts]}), root / "parquet/text.parquet")
    return root


def _shard(source: Path, target: Path) -> None:
    """One file and an index that names it."""
    shutil.copytree(source, target)
    (target / "decoct.json").unlink()
    names = read_header(target / "model.safetensors").tensors
    (target / "model.safetensors").rename(target / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def _facts(folder: Path) -> dict[str, Any]:
    from decoct.models.common.files import sha256_file

    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in sorted(folder.iterdir())}


def _checkpoints(folder: Path) -> None:
    """The files that a checkpoint must have; what is in the tensors is not looked at here."""
    folder.mkdir(parents=True)
    for group in (*GROUPS, "rng"):
        (folder / f"{group}-0.safetensors").write_bytes(b"x" * 16)
    (folder / PIECES).write_text("{}")
    (folder / STATE).write_text(json.dumps({"world": 1, "step": 2}))
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": 2, "files": _facts(folder)}))


def _caches(root: Path) -> None:
    header = {"format": 2, "teacher": "t", "bytes_per_token": 4}
    (root / "header.json").write_text(json.dumps(header))
    store = open_store(root / "teacher-cache", header)
    store.add([b"k" * 16], [torch.zeros(3, 4, dtype=torch.uint8)], {"mass": 1.0})
    for file in (root / "teacher-cache/shards").iterdir():
        file.rename(file.with_name(f"a{file.suffix}"))
    tokens = root / "tokens"
    tokens.mkdir()
    for side in ("train", "evaluation"):
        np.arange(64, dtype="<u2").tofile(tokens / f"{side}.tokens")
    manifest = {"format": 2, "fingerprint": "tokens", "text": "t", "seq_length": 8, "description": "d", "files": _facts(tokens)}
    (tokens / "manifest.json").write_text(json.dumps(sealed(manifest)))


def _damaged(target: Target, raw: bytes, chosen: random.Random) -> bytes:
    if target.kind == "bytes":
        cut = min(len(raw), target.head, chosen.choice((64, 400, 4000, len(raw))))
        return mutations.mutated_bytes(chosen, raw[:cut]) + raw[cut:]
    if target.kind == "json":
        return (
            json.dumps(mutations.mutated_json(chosen, json.loads(raw))).encode()
            if chosen.random() < 0.7
            else mutations.mutated_bytes(chosen, raw)
        )
    length = struct.unpack("<Q", raw[:8])[0]
    text, data = raw[8 : 8 + length], raw[8 + length :]
    if chosen.random() < 0.2:
        return struct.pack("<Q", chosen.choice((0, 1, length - 1, length + 1, 2**40, 2**64 - 1))) + text + data
    text = (
        json.dumps(mutations.mutated_json(chosen, json.loads(text))).encode()
        if chosen.random() < 0.6
        else mutations.mutated_bytes(chosen, text)
    )
    return struct.pack("<Q", len(text)) + text + data


def _prepared(bases: Path, name: str, place: Path) -> tuple[Target, Path]:
    target = TARGETS[name]
    folder = place / target.base  # the token cache's folder is named after its content
    shutil.copytree(bases / target.base, folder)
    shutil.copy(bases / "header.json", place / "header.json")
    if not target.record:
        (folder / "decoct.json").unlink(missing_ok=True)
    target.read(folder)
    return target, folder


@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_or_refused(bases: Path, tmp_path: Path, name: str, count: int) -> None:
    target, folder = _prepared(bases, name, tmp_path)
    chosen, file = random.Random(f"{name} {count}"), folder / target.file
    raw = file.read_bytes()
    noticed = 0
    for number in range(count):
        data = _damaged(target, raw, chosen)
        file.write_bytes(data)
        started = time.process_time()
        try:
            found = target.read(folder)
            noticed += isinstance(found, list) and bool(found)
        except DecoctError:
            noticed += 1
        except BaseException as error:
            raise AssertionError(f"{name}, damage {number} of {count}: {type(error).__name__}: {error!s:.300}; {data[:2000]!r}") from error
        spent = time.process_time() - started
        assert spent < SECONDS, f"{name}, damage {number} of {count} took {spent:.1f} seconds: {data[:2000]!r}"
        if not folder.exists() or not file.parent.exists():  # a store removes what is damaged
            pytest.fail(f"{folder} is gone")
        for other in (bases / target.base).rglob("*"):  # ... and its companions, which are put back
            back = folder / other.relative_to(bases / target.base)
            if other.is_file() and not back.exists() and (target.record or other.name != "decoct.json"):
                shutil.copy(other, back)
    assert noticed or count < 100 or name in FORGIVING, "no damage was ever noticed"
