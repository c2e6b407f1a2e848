"""Runs a judge (a runtime's check in a fresh process) and records its last phase, which separates a refusal from a wrong answer.

The scripts (``transformers_process.py``, ``llama_cpp_process.py``, ``vllm_process.py``) rewrite their result file at the start of each
phase. The last phase shows what happened, whatever the process printed. A process that ended before or while loading the export has refused
it (no kernel, no memory, a missing package, a crash), which proves nothing about its numbers. Only one that answered can disagree.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .outcome import outcome

TIMEOUT_SECONDS = 3600
STARTING, LOADING, PREDICTING, DONE = "starting", "loading", "predicting", "done"
"""Phases in order; a process that has written nothing is starting."""
_ENDINGS = {
    STARTING: "its check did not start",
    LOADING: "it does not load the export",
    PREDICTING: "it loaded the export and ended while it predicted",
}
_ERROR = re.compile(r"[\w.]*[A-Z]\w*(Error|Exception|Exit|Interrupt)\b")
_LONGEST = 500


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A finished check."""

    phase: str
    """The last phase it entered."""
    result: dict[str, Any]
    """Its last result file; {} if it wrote none."""
    words: str = ""
    """Its last message, if it did not answer."""

    @property
    def done(self) -> bool:
        """Return whether it answered."""
        return self.phase == DONE


def run_judge(
    python: str, script: Sequence[str], export: Path, tokens: Tensor, environment: Mapping[str, str], **options: object
) -> tuple[dict[str, Any], dict[str, NDArray[Any]] | None]:
    """Ask a runtime about every token of a text.

    Args:
        python: The interpreter that has the runtime.
        script: Arguments that start the judge: a file, or ``-m`` and a module.
        export: The export to load.
        tokens: int64 [B, S].
        environment: Variables to add to those of this process.
        options: Further options of the script.

    Returns:
        (result of the script, such as version, speed and memory; its arrays), or (an outcome, None) if it did not answer.
    """
    with tempfile.TemporaryDirectory(prefix="decoct-verify-") as scratch:
        places = {"tokens": Path(scratch, "tokens.npy"), "seen": Path(scratch, "seen.npz"), "result": Path(scratch, "result.json")}
        np.save(places["tokens"], tokens.numpy())
        # everything goes through files and the exit: what a runtime prints is not part of its answer
        given = {"threads": torch.get_num_threads(), **options, **places}
        # -P: modules of the current folder or the script's folder must not shadow installed ones
        command = [python, "-P", *script, str(export.resolve())]
        command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
        ended = run_check(command, places["result"], {**os.environ, "HF_HUB_OFFLINE": "1", **environment})
        if "not_installed" in ended.result:
            return outcome("not installed", reason=ended.result["not_installed"]), None
        if not ended.done:
            return unfinished_outcome(ended), None
        # arrays of another process: no code of theirs may run here
        with np.load(places["seen"], allow_pickle=False) as arrays:
            return {key: value for key, value in ended.result.items() if key != "phase"}, dict(arrays)


def run_check(command: Sequence[str], result: Path, environment: Mapping[str, str], seconds: float = TIMEOUT_SECONDS) -> Ended:
    """Run a check that writes ``result`` (JSON with ``phase``, and with ``words`` if it can report why it ends early)."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=dict(environment), timeout=seconds, check=False
        )
        words = _last_words(done.returncode, done.stderr)
    # the result file still shows how far it came
    except subprocess.TimeoutExpired:
        words = f"no answer within {seconds:g} seconds"
    except OSError as error:
        words = f"{command[0]}: {error}"
    found = _read(result)
    return Ended(phase=str(found.get("phase", STARTING)), result=found, words=str(found.get("words") or words))


def unfinished_outcome(ended: Ended) -> dict[str, Any]:
    """Return the outcome of a check that did not answer: skipped if the runtime refused the export, failed if it had loaded it.

    Neither is evidence against the export.
    """
    status = "failed" if ended.phase == PREDICTING else "skipped"
    reason = f"{_ENDINGS.get(ended.phase, ended.phase)}: {ended.words}"
    return outcome(status, version=ended.result.get("version"), reason=reason)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    # a file cut off or of another kind counts as none: then the check has not started
    return found if isinstance(found, dict) else {}


def _last_words(code: int, stderr: str) -> str:
    """Return why a process ended: its signal, or the last error that it printed with the following lines."""
    # the negative number of the signal, as subprocess reports it
    if code < 0:
        name = signal.Signals(-code).name if -code in {number.value for number in signal.Signals} else str(-code)
        return f"ended by {name}" + (", as the system does when memory runs out" if -code == signal.SIGKILL else "")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = next((index for index in range(len(lines) - 1, -1, -1) if _ERROR.match(lines[index])), len(lines) - 1)
    said = " ".join(lines[last : last + 3])[:_LONGEST] if lines else "no message"
    return f"exit code {code}: {said}"
