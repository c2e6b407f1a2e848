"""A student spread over ranks and collected again: real torchruns, with the memory that each rank takes."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from decoct.models.folder.streaming import empty_model
from decoct.qat.layers.quant_linear import Extras, QuantLinear
from decoct.qat.spec import QuantSpec
from decoct.trainer.loop.placed_student import Placed
from decoct.trainer.plan import BatchPlan, TrainingPlan
from decoct.trainer.processes.world import World

_ROUND_TRIP = """
import json, os, re, sys, threading, time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from decoct.models.folder.streaming import empty_model
from decoct.trainer.plan import BatchPlan
from decoct.trainer.plan import TrainingPlan
from decoct.trainer.processes.sharding import local
from decoct.trainer.loop.placed_student import Placed
from decoct.trainer.processes.world import connect, current_world

folder, out = Path(sys.argv[1]), Path(sys.argv[2])

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.base = self.most = anonymous()
        self.start()
    def run(self):
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)
    def rise(self):
        return self.most - self.base

world = current_world()
connect(world)
plan = TrainingPlan(total_steps=1, batch=BatchPlan(global_windows=2, micro_batch=1, accumulation=1), learning_rate=1.0, strategy="fsdp2")
torch.ones(4, 4) @ torch.ones(4, 4)
empty_model(folder)[1].close()  # imports what is imported at first use, which is no part of what is measured
dist.barrier()
peak = Peak()
student, weights = empty_model(folder)
placed = Placed(student, weights, plan, world)
step = torch.nn.Sequential(student)
placed.prepare()(step, student, init_device_mesh("cpu", (world.size,)))
loading = peak.rise()
own = sum(local(p).numel() * 4 for p in student.parameters())
dist.barrier()
peak = Peak()
whole = placed.collect()
figures = {"own": own, "loading": loading, "collecting": peak.rise(), "meta": all(p.is_meta for p in whole.parameters())}
(out / f"{world.rank}.json").write_text(json.dumps(figures))
if world.is_first:
    save_file(dict(whole.named_parameters()), out / "whole.safetensors")
dist.barrier()
os._exit(0)  # gloo's threads may abort a process that tears them down
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 150 MB in fp32, with a tied head and rows that two ranks cannot share evenly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8001,
        hidden_size=512,
        intermediate_size=2049,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    place = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.mark.slow
def test_no_rank_ever_holds_two_copies(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_ROUND_TRIP)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(script), str(folder), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    stored = load_file(folder / "model.safetensors")
    whole = sum(tensor.numel() * 4 for tensor in stored.values())
    assert first["own"] + second["own"] == whole
    largest = 8001 * 512 * 4
    # loading: what the rank keeps (a layer is padded to even rows), and a tensor on its way
    assert max(first["loading"], second["loading"]) < 0.55 * whole + 2 * largest
    # collecting: the one whole copy on rank 0, a tensor on the others
    assert 0.9 * whole < first["collecting"] < whole + 4 * largest
    assert second["collecting"] < 4 * largest
    assert (first["meta"], second["meta"]) == (False, True)
    gathered = load_file(tmp_path / "whole.safetensors")
    assert gathered.keys() == stored.keys()
    assert all(torch.equal(gathered[name], stored[name]) for name in stored)


def test_one_process_fills_an_empty_student_whole(folder: Path, training: ModuleType) -> None:
    student, weights = empty_model(folder)
    placed = Placed(student, weights, training.Case(strategy="fsdp2").plan(), World())
    assert placed.prepare() is None, "one process shards nothing"
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(parameter, stored[name]) for name, parameter in placed.collect().named_parameters())
    assert student.lm_head.weight is student.get_input_embeddings().weight


def test_only_what_quantized_linears_have_added_is_left_to_a_stages_hooks() -> None:
    """A parameter called "scale" that belongs to the model is read like any other."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.empty(4, device="meta"))
            self.linear = QuantLinear(torch.nn.Linear(16, 4, bias=False, device="meta"), QuantSpec(group_size=16), Extras(scale=True))

    held = {"scale": torch.arange(4.0), "linear.weight": torch.randn(4, 16)}

    class Files:
        def names(self) -> list[str]:
            return list(held)

        def __contains__(self, name: str) -> bool:
            return name in held

        def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
            return held[name]

    plan = TrainingPlan(total_steps=1, batch=BatchPlan(global_windows=1, micro_batch=1, accumulation=1), learning_rate=1.0)
    made = Placed(Scaled(), Files(), plan, World()).whole()  # pyright: ignore[reportArgumentType]
    assert torch.equal(made.get_parameter("scale"), held["scale"])
    assert torch.equal(made.get_parameter("linear.weight"), held["linear.weight"])
    assert made.get_parameter("linear.scale").shape == (4, 1)
