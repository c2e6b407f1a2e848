"""A hub id: served by a small hub of our own, from the cache, or refused in seconds with both readings of the name."""

import http.server
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.folder.hub import local_folder, snapshot_root
from decoct.models.folder.loading import load_model, load_tokenizer
from decoct.models.folder.model_folder import content_hash, save_model_folder
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that a download needs; notes every path asked for."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/gated/"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/tiny/revision/nope"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/org/tiny/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": name.encode().hex()[:40]} for name, data in self.files.items()]
            self._send(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            self._send(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif (name := path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")) in self.files:
            self._send(200, self.files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{name.encode().hex()[:40]}"'}, body=body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: pytest shows what matters."""


@pytest.fixture
def source(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["hello world"], 257)
    return save_model_folder(tmp_path / "source", tiny_model("llama", vocab_size=257), tokenizer, {}, dtype=torch.float32)


@pytest.fixture
def hub(source: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that has org/tiny, and the list of what was asked of it."""
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"again", "code.py": b"1/0"}
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"files": files, "asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def _run(code: str, *arguments: object, **environment: str) -> tuple[list[str], float]:
    """Lines printed by ``code`` in a fresh process (the hub client reads its settings once, at import) and the seconds it took."""
    start = "import sys, time, torch, transformers\nfrom decoct.models.common.errors import UserError\n"
    start += "from decoct.models.folder.model_folder import content_hash\n"
    start += "from decoct.models.folder.loading import load_config, load_model, load_tokenizer\nstarted = time.monotonic()\n"
    end = "\nprint(time.monotonic() - started)"
    command = [sys.executable, "-W", "error::UserWarning", "-c", start + textwrap.dedent(code) + end, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    *lines, seconds = result.stdout.splitlines()
    return lines, float(seconds)


@pytest.mark.slow
def test_a_hub_model_is_downloaded_checked_and_then_served_from_the_cache(hub: tuple[str, list[str]], source: Path, tmp_path: Path) -> None:
    address, asked = hub
    code = """
        from safetensors.torch import load_file
        model = load_model("org/tiny", dtype=torch.float32)
        expected = load_file(sys.argv[1] + "/model.safetensors")
        print(all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items()))
        print(load_tokenizer("org/tiny")("hello")["input_ids"] == load_tokenizer(sys.argv[1])("hello")["input_ids"])
        print(load_config("org/tiny").hidden_size)
        print(content_hash("org/tiny"))
    """
    cache = str(tmp_path / "hub-cache")
    online, _ = _run(code, source, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HUB_CACHE=cache, HF_HUB_DISABLE_XET="1")
    assert online[:3] == ["True", "True", "32"]
    fetched = {path.rsplit("/", 1)[-1] for path in asked if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "code.py"}
    offline, seconds = _run(code, source, HF_HUB_OFFLINE="1", HF_HUB_CACHE=cache)
    assert offline == online, "the same commit, so the same hash"
    assert seconds < 20


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_plainly(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    code = """
        for name, revision in (("org/other", None), ("gated/model", None), ("org/tiny", "nope")):
            try:
                load_model(name, dtype=torch.float32, revision=revision)
            except UserError as error:
                print(error)
    """
    lines, _ = _run(code, HF_ENDPOINT=hub[0], HF_HUB_OFFLINE="0", HF_HUB_CACHE=str(tmp_path / "hub-cache"))
    assert len(lines) == 3
    assert "neither a folder here nor a model that the hub shows you" in lines[0]
    assert "is gated" in lines[1]
    assert "has no revision 'nope'" in lines[2]


@pytest.mark.slow
@pytest.mark.parametrize("silent", [False, True])
def test_an_unreachable_hub_is_an_answer_within_seconds(tmp_path: Path, silent: bool) -> None:
    with socket.socket() as server:  # silent: takes the connection and never answers; else nobody listens
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        code = """
            for action in (lambda name: load_model(name, dtype=torch.float32), content_hash):
                try:
                    action("org/model")
                except UserError as error:
                    print(error)
        """
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        lines, seconds = _run(code, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HUB_CACHE=str(tmp_path))
    assert len(lines) == 2
    for line in lines:
        assert "no such folder here" in line
        assert "the hub cannot be reached" in line
    assert seconds < 30


def test_offline_mode_is_an_answer_at_once() -> None:
    started = time.monotonic()
    for action in (lambda name: load_model(name, dtype=torch.float32), load_tokenizer, content_hash):
        with pytest.raises(
            UserError, match=r"'nobody/nothing': there is no such folder here, .* the hub cannot be reached .*HF_HUB_OFFLINE"
        ):
            action("nobody/nothing")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["./model", "/nowhere/model", "runs/a/model", "~/nowhere/model", "..", "a b", "a--b/c", ""])
def test_a_name_that_only_a_folder_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name in ("..", ""):  # "" and ".." are folders to the operating system
        assert local_folder(name) == Path(name)
    else:
        with pytest.raises(UserError, match="no such folder"):
            local_folder(name)


@pytest.mark.parametrize("name", ["model.gguf", "me/Model-Q4_K_M.GGUF", "pytorch_model.bin"])
def test_a_file_that_is_not_there_is_no_hub_id(name: str) -> None:
    with pytest.raises(UserError, match=rf"no such file: {name}; give a model folder, a .gguf file or a hub id"):
        local_folder(name)


def test_code_from_the_hub_needs_a_pinned_revision() -> None:
    with pytest.raises(UserError, match="needs a pinned revision"):
        load_model("nobody/nothing", dtype=torch.float32, trust_remote_code=True)


def test_links_of_the_hub_cache_are_inside_and_others_are_not(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        blob = repository / "blobs" / file.name.encode().hex()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    assert snapshot_root(snapshot) == repository.resolve()
    assert snapshot_root(source) == source.resolve()
    assert load_model(snapshot, dtype=torch.float32).config.hidden_size == 32
    assert content_hash(snapshot) == content_hash(source)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(UserError, match="outside the model folder"):
        load_model(snapshot, dtype=torch.float32)
