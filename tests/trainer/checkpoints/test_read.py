import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from decoct.models.common.errors import UserError
from decoct.trainer.checkpoints.read import (
    TrainingState,
    find_newest_verified,
    open_checkpoint,
    prepare_folder,
    set_aside,
)
from decoct.trainer.checkpoints.write import save_checkpoint
from decoct.trainer.loop.checkpoint_tensors import load_optimizer, load_student, optimizer_tensors, student_tensors
from decoct.trainer.processes.sharding import ParameterViews, local
from decoct.trainer.processes.world import World

from ...support.warm_python import WarmPython


class _Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, width)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("passing", torch.zeros(2), persistent=False)


def _trained(seed: int = 0) -> tuple[_Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = _Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net.head(net.inner(net.embed(torch.arange(6)))).square().sum().backward()
    optimizer.step()
    return net, optimizer


def _state(step: int) -> TrainingState:
    return TrainingState(step=step, sample_index=8 * step, tokens=100 * step, seconds=1.25, world=1, plan={"seed": 3, "betas": [0.9, 0.95]})


def _save(folder: Path, step: int) -> Path:
    net, optimizer = _trained(step)
    groups = {
        "student": student_tensors(net),
        "optimizer": optimizer_tensors(ParameterViews(net), optimizer),
        "hooks": {"magnitude/inner": torch.tensor([[True, False]]), "magnitude/half": torch.tensor([1.5], dtype=torch.bfloat16)},
    }
    return save_checkpoint(folder, _state(step), groups, b"rank zero", World())


def test_everything_comes_back_bit_by_bit(tmp_path: Path) -> None:
    _save(tmp_path, 7)
    found, damaged = find_newest_verified(tmp_path)
    assert found is not None
    assert damaged == []
    assert found.state == _state(7)
    net, optimizer = _trained(7)
    other, other_optimizer = _trained(99)
    load_student(other, found)
    load_optimizer(ParameterViews(other), other_optimizer, found)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.head.weight is other.embed.weight
    before, after = (
        optimizer_tensors(ParameterViews(net), optimizer),
        optimizer_tensors(ParameterViews(other), other_optimizer),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(local(before[name]), local(after[name])) for name in before)
    assert all(local(before[name]).dtype == local(after[name]).dtype for name in before)
    assert torch.equal(found.tensors("hooks")["magnitude/inner"], torch.tensor([[True, False]]))
    assert [found.generators(rank) for rank in range(2)] == [b"rank zero", None]


def test_tied_tensors_are_stored_once_and_passing_buffers_not_at_all(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    assert set(open_checkpoint(tmp_path, 1).tensors("student")) == {"embed.weight", "inner.weight", "inner.bias", "kept"}


def test_two_are_kept_each_in_its_own_folder(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


FILES = [
    "student-0.safetensors",
    "optimizer-0.safetensors",
    "hooks-0.safetensors",
    "rng-0.safetensors",
    "pieces.json",
    "state.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    _save(tmp_path, 5)
    newest = _save(tmp_path, 10)
    data = bytearray((newest / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        (newest / name).write_bytes(data)
    elif damage == "truncate":
        (newest / name).write_bytes(data[:-1])
    else:
        (newest / name).unlink()
    found, damaged = find_newest_verified(tmp_path)
    assert found is not None
    assert found.state.step == 5
    assert [path for path, _ in damaged] == [newest]
    assert name in damaged[0][1]


def test_no_flipped_bit_of_the_manifest_is_believed(tmp_path: Path) -> None:
    path = _save(tmp_path, 5)
    original = (path / "manifest.json").read_bytes()
    good = find_newest_verified(tmp_path)[0]
    for position in range(0, len(original), 3):
        for bit in (0, 4):
            data = bytearray(original)
            data[position] ^= 1 << bit
            (path / "manifest.json").write_bytes(data)
            found, damaged = find_newest_verified(tmp_path)
            assert (found is None and len(damaged) == 1) or found == good, bytes(data[position - 20 : position + 20])


_NAMES = st.sampled_from(["files", "format", "bytes", "sha256", "x"])
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_json)
@example([])
@example({"format": 2, "files": []})
@example({"format": 2, "files": {"state.json": 3}})
@example({"format": 2, "files": {"\0": {}}})
def test_whatever_a_manifest_says_the_checkpoint_is_damaged_and_nothing_worse(tmp_path: Path, content: object) -> None:
    path = tmp_path / "step-00000005" if (tmp_path / "step-00000005").exists() else _save(tmp_path, 5)
    for text in (json.dumps(content), "[" * 100_000, "\udcff"):
        (path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        found, damaged = find_newest_verified(tmp_path)
        assert found is None
        assert len(damaged) == 1


def test_nothing_whole_means_none(tmp_path: Path) -> None:
    assert find_newest_verified(tmp_path / "absent") == (None, [])
    (_save(tmp_path, 5) / "manifest.json").unlink()
    found, damaged = find_newest_verified(tmp_path)
    assert found is None
    assert len(damaged) == 1


def test_a_name_in_the_manifest_cannot_leave_the_folder(tmp_path: Path) -> None:
    path = _save(tmp_path, 5)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../outside"] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "outside").write_bytes((path / "state.json").read_bytes())
    assert "not a file name" in find_newest_verified(tmp_path)[1][0][1]


def test_a_damaged_step_can_be_saved_again_and_its_remains_go(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    path = _save(tmp_path, 10)
    (path / "state.json").write_text("{}")
    set_aside(path)
    assert (tmp_path / "damaged-step-00000010").is_dir()
    _save(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_remains_of_a_killed_save_are_neither_read_nor_kept(tmp_path: Path) -> None:
    path = _save(tmp_path, 5)
    # what a process of this host that is gone had begun to write
    gone = subprocess.run(
        [sys.executable, "-c", "import os, socket; print(f'{socket.gethostname()}-{os.getpid()}')"], capture_output=True, text=True
    )
    leftover = tmp_path / f".step-00000010.{gone.stdout.strip()}-0123abcd.tmp"
    shutil.copytree(path, leftover)
    found, _ = find_newest_verified(tmp_path)
    assert found is not None
    assert found.state.step == 5
    prepare_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def _with_last_in_bf16(student: nn.Module) -> nn.Module:
    last = list(student.parameters())[-1]
    last.data = last.data.to(torch.bfloat16)
    return student


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: _Net(8), "embed.weight is (6, 4)"),
        (lambda: _Net().to(torch.bfloat16), "bfloat16"),
        (lambda: _with_last_in_bf16(_Net()), "bfloat16"),
        (lambda: nn.Linear(2, 2), "names differ"),
    ],
)
def test_another_model_is_refused_before_it_is_touched(tmp_path: Path, other: type, named: str) -> None:
    _save(tmp_path, 5)
    student = other()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(UserError, match="holds another model") as caught:
        load_student(student, open_checkpoint(tmp_path, 5))
    assert named in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


_FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from safetensors import SafetensorError
from decoct.models.common.errors import UserError
from decoct.trainer.checkpoints.write import save_checkpoint
from decoct.trainer.checkpoints.read import TrainingState, find_newest_verified
from decoct.trainer.processes.world import World

folder = Path(sys.argv[1])
def save(step, size):
    state = TrainingState(step=step, sample_index=0, tokens=0, seconds=0.0, world=1, plan={})
    save_checkpoint(folder, state, {"student": {"w": torch.full((size,), float(step))}}, b"x", World())
save(1, 4000)
save(2, 4000)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(3, 1_000_000)
except (OSError, SafetensorError, UserError) as error:
    print("refused:", type(error).__name__)
found, damaged = find_newest_verified(folder)
print(found.state.step, damaged, sorted(p.name for p in folder.iterdir()), found.tensors("student")["w"].unique().tolist())
"""


def test_a_disk_that_fills_up_during_a_save_costs_nothing(
    warm: WarmPython, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = tmp_path_factory.mktemp("script") / "full_disk.py"
    script.write_text(_FULL_DISK)
    done = warm.run([str(script), str(tmp_path)])
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("refused:")
    assert second == "2 [] ['step-00000001', 'step-00000002'] [2.0]"
