"""torchrun's agent, two processes: rank 0's result reaches the other, and so does its failure, with the same exit code."""

import json
import subprocess
import textwrap
from pathlib import Path

import pytest

from decoct.launch.run.session import Session
from decoct.trainer.processes.world import World

from ...support.warm_python import WarmPython

SCRIPT = """
import json, os, sys, time
from pathlib import Path
from decoct.launch.run.session import Session
from decoct.launch.run.processes import leave
from decoct.models.common.errors import UserError
from decoct.trainer.processes.world import current_world

world, out = current_world(), Path(sys.argv[1])
session = Session(world, out)

def work():
    time.sleep(0.5)
    return {"rank": world.rank}

def fail():
    raise UserError("no")

told = [session.on_first(work), session.on_first(work)]
(out / f"told-{world.rank}.json").write_text(json.dumps(told))
if sys.argv[2] == "fail":
    try:
        session.on_first(fail)
    except UserError as error:
        sys.exit(error.exit_code)
session.close(3 if sys.argv[2] == "gate" else 0)
if sys.argv[2] == "abort" and world.rank == 1:
    os.abort()
leave(3 if sys.argv[2] == "gate" else 0)
raise AssertionError("a rank that has left goes on")
"""


def start(warm: WarmPython, tmp_path: Path, how: str, agent: str = "torch.distributed.run") -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return warm.run(["-m", agent, "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path), how], timeout=120)


@pytest.mark.slow
def test_every_rank_gets_what_rank_0_made(warm: WarmPython, tmp_path: Path) -> None:
    done = start(warm, tmp_path, "well")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"told-{rank}.json").read_text()) == [{"rank": 0}, {"rank": 0}]
    assert not (tmp_path / ".session").exists()


@pytest.mark.slow
def test_failure_of_rank_0_ends_the_other_with_its_code(warm: WarmPython, tmp_path: Path) -> None:
    done = start(warm, tmp_path, "fail")
    assert done.returncode == 1
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("well", 0), ("gate", 3), ("abort", 0)])
def test_a_run_that_is_over_ends_with_its_code_whatever_becomes_of_its_processes(
    warm: WarmPython, tmp_path: Path, how: str, code: int
) -> None:
    done = start(warm, tmp_path, how, "decoct.launch.jobs.agent")
    assert done.returncode == code, done.stderr


def test_one_process_just_runs_the_work(tmp_path: Path) -> None:
    session = Session(World(), tmp_path)
    assert session.on_first(lambda: [1, 2]) == [1, 2]
    session.close()
    assert not list(tmp_path.iterdir())
