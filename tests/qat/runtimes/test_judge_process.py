"""How far a check came decides what its end says; its words are passed on and never judged."""

import os
import sys
from pathlib import Path

import pytest

from decoct.qat.runtimes.judge_process import Ended, run_check, unfinished_outcome

WRITE = "import json, os, sys; from pathlib import Path; tell = lambda **facts: Path(sys.argv[1]).write_text(json.dumps(facts))\n"


def ended(tmp_path: Path, script: str, seconds: float = 60) -> Ended:
    file = tmp_path / "result.json"
    return run_check([sys.executable, "-c", WRITE + script, str(file)], file, os.environ, seconds)


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        ("raise ImportError('libgomp')", "skipped", "its check did not start: exit code 1: ImportError: libgomp"),
        ("tell(phase='loading'); raise MemoryError('much')", "skipped", "it does not load the export: exit code 1: MemoryError: much"),
        ("tell(phase='loading'); os.kill(os.getpid(), 9)", "skipped", "ended by SIGKILL, as the system does when memory runs out"),
        ("tell(phase='loading', words='No kernel'); sys.exit(0)", "skipped", "it does not load the export: No kernel"),
        ("tell(phase='predicting'); os.abort()", "failed", "it loaded the export and ended while it predicted: ended by SIGABRT"),
        ("tell(phase='predicting'); raise ValueError('one\\n  two')", "failed", "exit code 1: ValueError: one two"),
        ("tell(phase='loading'); sys.exit(3)", "skipped", "exit code 3: no message"),
    ],
)
def test_the_phase_decides_and_the_words_are_its_own(tmp_path: Path, script: str, status: str, reason: str) -> None:
    found = ended(tmp_path, script)
    assert not found.done
    seen = unfinished_outcome(found)
    assert seen["status"] == status
    assert reason in seen["reason"]


def test_an_answer_is_an_answer_and_half_a_file_is_none(tmp_path: Path) -> None:
    found = ended(tmp_path, "tell(phase='done', version='a 1')")
    assert (found.done, found.result["version"]) == (True, "a 1")
    assert ended(tmp_path, 'Path(sys.argv[1]).write_text(\'{"phase": "do\')').phase == "starting"


def test_time_and_a_missing_interpreter_are_said(tmp_path: Path) -> None:
    assert (
        "no answer within 0.2 seconds"
        in unfinished_outcome(ended(tmp_path, "tell(phase='done'); import time; time.sleep(30)", 0.2))["reason"]
    )
    seen = unfinished_outcome(run_check(["/nowhere/python"], tmp_path / "none.json", os.environ))
    assert seen["status"] == "skipped" and "/nowhere/python" in seen["reason"]
