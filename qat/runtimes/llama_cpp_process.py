"""Requests llama.cpp's prediction for every token of a text, in a process of its own: ``python -m decoct.qat.runtimes.llama_cpp_process``.

This file is the only part of decoct that runs here. The package xllamacpp contains llama.cpp's own server, which answers over HTTP like for
any other client. ``llama_cpp_check.py`` starts this process and compares.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIKELIEST = 64
"""Number of tokens whose log-probabilities are requested at each position."""
_GENERATED = 64


class Server:
    """llama.cpp with one model, on the CPU."""

    def __init__(self, model: str, context: int, threads: int) -> None:
        import xllamacpp  # pyright: ignore[reportMissingImports] - a judge, not among the dependencies

        parameters: Any = xllamacpp.CommonParams()
        parameters.model.path = model
        # one text at a time, which has the whole context
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        # no layer on a GPU, no warm-up, no prompt cache in RAM: the peak of memory is the model's
        parameters.warmup = False
        parameters.verbosity = 1
        parameters.cache_ram_mib = 0
        # a cache limited to the sliding window (Gemma) cannot be reused for a changed prompt
        parameters.swa_full = True
        parameters.port = 0  # a free one
        self._server: Any = xllamacpp.Server(parameters)
        self._letter: int = self.ask("/tokenize", {"content": "a"})["tokens"][-1]

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST JSON, get JSON."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._server.listening_address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def get(self, path: str) -> dict[str, Any]:
        """GET JSON."""
        with urllib.request.urlopen(self._server.listening_address + path) as answer:
            return json.load(answer)

    def next_token(self, tokens: list[int], count: int) -> dict[int, float]:
        """Return token -> log-probability of the ``count`` likeliest tokens after ``tokens``; the cache of a shorter prompt is reused."""
        # the server reports probabilities only with a token it sends, and it sends neither an end of text nor half a character; so a
        # bias, applied after the probabilities, forces a letter
        chosen = [[self._letter, 1e6]]
        body = {"prompt": tokens, "n_predict": 1, "n_probs": count, "temperature": -1.0, "cache_prompt": True, "logit_bias": chosen}
        answer = self.ask("/completion", body)
        return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}

    def speed(self, prompt: list[int]) -> float:
        """Return tokens per second of generating."""
        body = {"prompt": prompt, "n_predict": _GENERATED, "temperature": -1.0, "ignore_eos": True}
        return float(self.ask("/completion", body)["timings"]["predicted_per_second"])


def teacher_forced(server: Server, tokens: NDArray[np.int64], vocabulary: int) -> dict[str, NDArray[Any]]:
    """Return what is predicted after every prefix of each row.

    Returns:
        ``ids`` int64 and ``logprobs`` fp32 [B, S, K], likeliest first, K = min(64, vocabulary); ``next`` fp32 [B, S - 1], the
        log-probability of the following token.
    """
    count = min(LIKELIEST, vocabulary)
    rows, length = tokens.shape
    ids, logprobs = np.zeros((rows, length, count), np.int64), np.zeros((rows, length, count), np.float32)
    following = np.zeros((rows, length - 1), np.float32)
    for row, text in enumerate(tokens.tolist()):
        for position in range(length):
            seen = server.next_token(text[: position + 1], count)
            ids[row, position], logprobs[row, position] = list(seen), list(seen.values())
            if position + 1 < length:
                wanted = text[position + 1]
                if wanted not in seen:
                    # rare: the following token is not among the likeliest, so ask for all of them
                    seen = server.next_token(text[: position + 1], vocabulary)
                following[row, position] = seen[wanted]
    return {"ids": ids, "logprobs": logprobs, "next": following}


def _peak_bytes() -> int:
    """Return the peak memory of this process. On Linux ``ru_maxrss`` includes the parent's, VmHWM does not."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str] | None = None) -> None:
    """Read ``--tokens`` (npy, int64 [B, S]), write ``--seen`` (npz, as ``teacher_forced``) and ``--result`` (JSON)."""
    parser = argparse.ArgumentParser(description="What llama.cpp predicts along a text.")
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, required=True, help="rows of the output head")
    parser.add_argument("--seen", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    tokens: NDArray[np.int64] = np.load(options.tokens)
    _tell(options.result, phase="loading")
    # room for a row and one more token, and for the text of the speed measurement
    server = Server(options.model, max(512, tokens.shape[1] + _GENERATED + 1), options.threads)
    version = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    _tell(options.result, phase="predicting", version=version)
    seen = teacher_forced(server, tokens, options.vocabulary)
    np.savez(options.seen, ids=seen["ids"], logprobs=seen["logprobs"], next=seen["next"])
    result = {"version": version, "tokens_per_second": server.speed(tokens[0, :1].tolist()), "peak_bytes": _peak_bytes()}
    _tell(options.result, phase="done", **result)
    sys.stdout.flush()
    os._exit(0)  # skips waiting for the server's threads


def _tell(file: Path, **facts: Any) -> None:
    """Write the phase for ``judge_process.py``, which reads it even if this process crashes."""
    file.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
