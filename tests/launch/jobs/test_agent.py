"""What the agent says when its workers cannot speak for themselves, or when it fails itself."""

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from decoct.launch.jobs import agent
from decoct.launch.run.processes import tell_killed

ARGUMENTS = ["--nproc-per-node", "1", "--rdzv-id", "x", "-m", "nothing"]


def test_a_worker_that_was_killed_is_named_with_the_likely_reason(capsys: pytest.CaptureFixture[str]) -> None:
    failure: Any = SimpleNamespace(failures={3: SimpleNamespace(exitcode=-9), 1: SimpleNamespace(exitcode=1)})
    tell_killed(failure)
    assert capsys.readouterr().err == (
        "decoct: rank 3 was ended by SIGKILL: the kernel does this when memory runs out: lower trainer.micro_batch or data.seq_length, or "
        "use fewer processes\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "decoct: error: the disk is full"),
        (MemoryError(), 1, "decoct: error: this machine is out of memory"),
        (KeyError("x"), 1, "Traceback"),
    ],
)
def test_the_agents_own_errors_pass_the_same_boundary(
    error: Exception, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("torch.distributed.run.run", fail)
    assert agent.main(ARGUMENTS) == code
    assert capsys.readouterr().err.startswith(told)
