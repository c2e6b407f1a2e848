"""A sharded teacher on two ranks (gloo): the plain one's numbers, half its bytes, and only its own rows read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from decoct.models.common.errors import UserError
from decoct.models.families import decoder_layers
from decoct.models.folder.loading import load_model
from decoct.models.teachers import open_teacher
from decoct.models.teachers.sharded import sharded_model

from ...support.warm_python import WarmPython

SavedModel = Callable[..., Path]

_RANK = """
import json, os, sys
import torch
from torch import nn
from torch.distributed import barrier, get_rank, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from decoct.models.families import decoder_layers
from decoct.models.folder.streaming import WeightFiles
from decoct.models.teachers import open_teacher

folder, out = sys.argv[1:]
init_process_group("gloo")
rank = get_rank()
plain = open_teacher(folder, load_in="fp32", v_eff=100)
read, whole_read = 0, WeightFiles.read
def counted(self, name, rows=None):
    global read
    tensor = whole_read(self, name, rows)
    read += tensor.numel() if ".layers." in name else 0
    return tensor
WeightFiles.read = counted
teacher = open_teacher(folder, load_in="fp32", placement="sharded", v_eff=100)
differences = []
for step in range(3):
    ids = torch.randint(0, 128, (2 + rank, 9 + 4 * rank), generator=torch.Generator().manual_seed(10 * step + rank))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for ours, theirs in zip(teacher.hidden_and_head(batch)[:2], plain.hidden_and_head(batch)[:2]):
        differences.append((ours - theirs).abs().max().item())

class Student(nn.Module):
    # sharded itself, and asking the teacher in the middle of its own forward pass
    def __init__(self, asked):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.asked = lambda: asked

    def forward(self, batch):
        hidden = self.asked().hidden_and_head(batch)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (self.second(self.first(hidden)) - hidden).float().square().mean()

losses = []
for asked in (plain, teacher):
    student = Student(asked)
    for part in (student.first, student.second, student):
        fully_shard(part)
    for _ in range(2):
        loss = student(batch)
        loss.backward()
        losses.append(loss.item() + sum(p.grad.full_tensor().norm().item() for p in student.parameters()))

held = [p for layer in decoder_layers(teacher.model) for p in layer.parameters()]
facts = {
    "differences": differences,
    "losses": losses,
    "sharded": all(isinstance(p, DTensor) and not p.requires_grad for p in held),
    "held": sum(p.to_local().numel() for p in held),
    "read": read,
    "describe": teacher.describe(),
    "stays": teacher.to("cpu") is teacher,
}
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(facts, file)
barrier()
os._exit(0)  # gloo's threads may abort a process that tears them down
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_ranks_hold_half_each_and_compute_the_whole(saved_model: SavedModel, warm: WarmPython, tmp_path: Path, family: str) -> None:
    # 97 channels do not divide by two, and the ranks see batches of different shapes
    folder = saved_model(family, intermediate_size=97, tie_word_embeddings=family == "qwen2")
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    done = warm.run_ranks(2, [str(script), str(folder), str(tmp_path)])
    assert [rank.returncode for rank in done] == [0, 0], "".join(rank.stdout + rank.stderr for rank in done)
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    model = load_model(folder, dtype=open_teacher(folder, load_in="fp32", v_eff=100).model.dtype)
    whole = sum(p.numel() for layer in decoder_layers(model) for p in layer.parameters())
    for fact in facts:
        assert max(fact["differences"]) < 1e-6
        assert fact["losses"][:2] == pytest.approx(fact["losses"][2:], rel=1e-5)
        assert fact["sharded"]
        assert fact["stays"]
        assert fact["read"] == fact["held"]
        assert fact["held"] < 0.52 * whole
        assert "float32, sharded over 2 processes" in fact["describe"]
    assert sum(fact["held"] for fact in facts) == whole


def test_one_process_holds_it_whole(saved_model: SavedModel) -> None:
    assert "float32, replicated" in open_teacher(saved_model(), load_in="fp32", placement="sharded", v_eff=100).describe()


def test_without_processes_it_says_how_to_start_them(saved_model: SavedModel) -> None:
    import torch

    with pytest.raises(UserError, match=r"teacher\.placement: sharded needs several processes; start with torchrun"):
        sharded_model(saved_model(), dtype=torch.float32, device="cpu")
