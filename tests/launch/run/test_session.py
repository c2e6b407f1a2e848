"""torchrun's agent, two processes: rank 0's result reaches the other, and so does its failure, with the same exit code."""

import json
import os
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.launch.run.session import Session
from decoct.models.folder.loading import load_tokenizer
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.trainer.data.prepared_data import prepare_data
from decoct.trainer.processes.world import World
from decoct.trainer.settings import DataSettings

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


SHARING = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from decoct.launch.run import starting_point
from decoct.launch.run.processes import leave
from decoct.launch.run.session import Session
from decoct.trainer.data import shared_text, units
from decoct.trainer.processes.world import current_world
from decoct.trainer.settings import DataSettings

units.UNIT_BYTES = 200
world, out, corpus, model = current_world(), Path(sys.argv[1]), sys.argv[2], sys.argv[3]
mine, real = [], shared_text.SharedText._encode

def encode(self, number):
    mine.append(number)
    # a rank that starts late would find nothing left to do
    begun = out / "begun"
    begun.touch() if world.rank else None
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    real(self, number)

shared_text.SharedText._encode = encode
recipe = SimpleNamespace(
    data=DataSettings(files=(corpus,), seq_length=16, eval_tokens=64),
    student=SimpleNamespace(path=model, revision=None), teacher=None, stages=(), seed=0, trainer=None,
)
starting_point._learns = lambda recipe: True
session = Session(world, out)
data = starting_point.open_origin(recipe, session).data
(out / f"rank-{world.rank}").write_text(f"{data.path} {len(data.train)} {sorted(mine)}")
session.close()
leave(0)
"""


@pytest.mark.slow
def test_every_rank_tokenizes_its_part_of_the_text(warm: WarmPython, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(["a few words of text, and a few more of them"] * 20), 280)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    save_model_folder(tmp_path / "model", AutoModelForCausalLM.from_config(config), tokenizer, {}, dtype=torch.float32)
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number:02d}.txt").write_text(f"text {number} of words. " * (4 + number % 3))
    (tmp_path / "script.py").write_text(SHARING)
    given = [str(tmp_path / "script.py"), str(tmp_path), str(tmp_path / "corpus"), str(tmp_path / "model")]
    done = warm.run_ranks(2, given, env={**os.environ, "DECOCT_CACHE": str(tmp_path / "cache")})
    assert [rank.returncode for rank in done] == [0, 0], "".join(rank.stderr for rank in done)
    first, second = ((tmp_path / f"rank-{rank}").read_text().split(" ", 2) for rank in (0, 1))
    assert first[:2] == second[:2]
    own = [json.loads(rank[2]) for rank in (first, second)]
    assert all(own), "both ranks have encoded some"
    assert sorted(own[0] + own[1]) == list(range(len(own[0]) + len(own[1])))
    recipe = DataSettings(files=(str(tmp_path / "corpus"),), seq_length=16, eval_tokens=64)
    alone = prepare_data(recipe, load_tokenizer(str(tmp_path / "model")), tmp_path / "alone")
    assert alone.fingerprint == Path(first[0]).name
    assert {path.name: path.read_bytes() for path in alone.path.iterdir()} == {
        path.name: path.read_bytes() for path in Path(first[0]).iterdir()
    }


def test_one_process_just_runs_the_work(tmp_path: Path) -> None:
    session = Session(World(), tmp_path)
    assert session.on_first(lambda: [1, 2]) == [1, 2]
    session.close()
    assert not list(tmp_path.iterdir())
