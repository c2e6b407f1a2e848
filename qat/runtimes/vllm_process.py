"""Serves an export with ``vllm serve`` and requests its prediction for every token of a text: ``python vllm_process.py FOLDER ...``.

The interpreter that has vLLM runs it, often in a venv of its own: this file is the only part of decoct that runs here, and vLLM answers
over HTTP like for any other client. ``vllm_check.py`` starts this process and compares.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIKELIEST = 20
"""Number of tokens whose log-probabilities are requested at each position: vLLM's default maximum (``--max-logprobs``)."""
GENERATED = 64
START_SECONDS = 900
_NOTICE = re.compile(r"\b(WARNING|INFO) \d\d-\d\d ")
_ERROR = re.compile(r"[\w.]*[A-Z]\w*(Error|Exception): ")
_PREFIX = re.compile(r"^(\(.*?pid=\d+\) ?)?(ERROR .*?\] ?)?")
"""Prefix of vLLM's log lines."""
CACHE_BYTES = 64 * 1024**2
"""Size of the KV cache: room for a few short texts, so that the peak of memory is the model's, not the cache's."""


class Server:
    """``vllm serve`` with one model, in processes of its own."""

    def __init__(self, folder: str, context: int, threads: int, scratch: Path, dtype: str = "auto") -> None:
        self.log = scratch / "vllm.log"
        with socket.socket() as probe:
            # 0 takes a free port; vLLM opens it after the probe has closed it
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--served-model-name", "model", "--max-model-len", str(context), "--kv-cache-memory-bytes", str(CACHE_BYTES)]
        # eager: nothing is compiled for the few requests that follow
        command += ["--dtype", dtype, "--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs", "8"]
        with self.log.open("wb") as log:
            # a session of its own, so that close() and peak_bytes() find all of its processes
            environment = _environment(threads, scratch)
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        self._wait()

    def _wait(self) -> None:
        """Return when the server answers; RuntimeError with its last error if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with code {self._process.returncode}: {self._last_error()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return
            time.sleep(0.25)
        self.close()
        raise RuntimeError(f"vllm serve did not answer within {START_SECONDS} seconds: {self._last_error()}")

    def _last_error(self) -> str:
        """Return the first error in the log; later ones only report that a process ended."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [_PREFIX.sub("", line).strip() for line in text.splitlines() if line.strip() and not _NOTICE.search(line)]
        first = next((index for index, line in enumerate(lines) if _ERROR.match(line)), len(lines) - 1)
        # the reason is often in the following lines
        return " ".join(lines[first : first + 3])[:500] or "no message"

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/completions."""
        data = json.dumps({"model": "model", "temperature": 0, **body}).encode()
        request = urllib.request.Request(f"{self.address}/v1/completions", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"vLLM answered {error.code}: {error.read().decode(errors='replace')[:500]}") from error

    def speed(self, prompt: list[int], context: int) -> float:
        """Return tokens per second of generating for one request, after a warm-up request."""
        body = {"prompt": prompt, "max_tokens": min(GENERATED, context - len(prompt)), "ignore_eos": True}
        self.ask(body)
        started = time.perf_counter()
        made = self.ask(body)["usage"]["completion_tokens"]
        return made / (time.perf_counter() - started)

    def peak_bytes(self) -> int:
        """Return the sum of its processes' peak memory (Linux; shared pages count in each process)."""
        return sum(_peak(process) for process in _session(self._process.pid))

    def close(self) -> None:
        """End the server and every process it started."""
        # the whole group: the engine runs in child processes
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)


def _environment(threads: int, scratch: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_named(scratch)), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # On CPUs with AMX vLLM would otherwise round the inputs of int4 weights to 8 bits.
        "VLLM_CPU_INT4_W4A8": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def _named(scratch: Path) -> Path:
    """Create a folder for PYTHONPATH with a distribution called vllm: the command line of vllm-cpu 0.32 looks up its version by that
    name."""
    folder = scratch / "named"
    folder.mkdir(exist_ok=True)
    # where the distribution has that name already, the folder stays empty
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
        return folder
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    record = folder / f"vllm-{version}.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    return folder


def _session(leader: int) -> Iterator[int]:
    """Yield the processes of the session that ``leader`` started."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            # the name in brackets may contain anything; after it come state, parent, group, session
            if int((place / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[3]) == leader:
                yield int(place.name)


def _peak(process: int) -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return 0


def teacher_forced(server: Server, tokens: NDArray[np.int64], vocabulary: int) -> dict[str, NDArray[Any]]:
    """Return what is predicted after every prefix of each row.

    Returns:
        ``ids`` int64 and ``logprobs`` fp32 [B, S, K], likeliest first, K = min(20, vocabulary); ``next`` fp32 [B, S - 1], the
        log-probability of the following token.
    """
    count = min(LIKELIEST, vocabulary)
    rows, length = tokens.shape
    ids, logprobs = np.zeros((rows, length, count), np.int64), np.zeros((rows, length, count), np.float32)
    following = np.zeros((rows, length - 1), np.float32)
    wanted = {"max_tokens": 1, "prompt_logprobs": count, "logprobs": count, "return_tokens_as_token_ids": True}
    for row, text in enumerate(tokens.tolist()):
        choice = server.ask({"prompt": text, **wanted})["choices"][0]
        last = choice["logprobs"]["top_logprobs"][0]
        seen = [
            {int(token): entry["logprob"] for token, entry in sorted(entries.items(), key=lambda item: item[1]["rank"])}
            # the first entry is empty: nothing precedes the first token
            for entries in choice["prompt_logprobs"][1:]
        ]
        # prompt_logprobs covers positions 1 to S - 1; the prediction after the last token is that of the generated one
        seen.append({int(name.removeprefix("token_id:")): value for name, value in sorted(last.items(), key=lambda item: -item[1])})
        for position, entries in enumerate(seen):
            # vLLM adds the token of the text if it is not among the likeliest ones
            ids[row, position], logprobs[row, position] = list(entries)[:count], list(entries.values())[:count]
            if position + 1 < length:
                following[row, position] = entries[text[position + 1]]
    return {"ids": ids, "logprobs": logprobs, "next": following}


def main(arguments: list[str] | None = None) -> None:
    """Read ``--tokens`` (npy, int64 [B, S]), write ``--seen`` (npz, as ``teacher_forced``) and ``--result`` (JSON)."""
    parser = argparse.ArgumentParser(description="What vLLM predicts along a text.")
    parser.add_argument("folder", help="export folder")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, required=True, help="rows of the output head")
    parser.add_argument("--context", type=int, help="positions of the model; without it, as many as the text needs")
    parser.add_argument("--seen", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="dtype of vLLM's computation; auto = the dtype of config.json")
    options = parser.parse_args(arguments)
    tokens: NDArray[np.int64] = np.load(options.tokens)
    with tempfile.TemporaryDirectory(prefix="decoct-vllm-") as scratch:
        started = time.perf_counter()
        _tell(options.result, phase="loading", version=_version())
        # one more than the text: a token is generated behind it. vLLM refuses to start with more than the model's own context
        context = min(max(tokens.shape[1], GENERATED) + 1, options.context or sys.maxsize)
        try:
            server = Server(options.folder, context, options.threads, Path(scratch), options.dtype)
        except RuntimeError as error:
            _tell(options.result, phase="loading", version=_version(), words=str(error))
            return
        try:
            _tell(options.result, phase="predicting", version=_version())
            ready = time.perf_counter() - started
            seen = teacher_forced(server, tokens, options.vocabulary)
            result = {"version": _version(), "tokens_per_second": server.speed(tokens[0, :1].tolist(), context), "start_seconds": ready}
            result["peak_bytes"] = server.peak_bytes()
        finally:
            server.close()
    np.savez(options.seen, ids=seen["ids"], logprobs=seen["logprobs"], next=seen["next"])
    _tell(options.result, phase="done", **result)


def _tell(file: Path, **facts: Any) -> None:
    """Write the phase for ``judge_process.py``, which reads it even if this process crashes."""
    file.write_text(json.dumps(facts), encoding="utf-8")


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "unknown"


if __name__ == "__main__":
    main()
