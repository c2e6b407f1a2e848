"""A cached teacher beside the teacher itself, on the same batches."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from decoct.losses.settings import LossSettings
from decoct.models.common.errors import UserError
from decoct.models.settings import CacheSettings
from decoct.models.teachers import LocalTeacher
from decoct.trainer.loop.objective import Objective
from decoct.trainer.soft_targets.cached import CachedTeacher, SparseTeacher, row_format
from decoct.trainer.soft_targets.capture import capture, missing_windows, stack
from decoct.trainer.soft_targets.store import Store, open_store


@pytest.fixture
def case(training: ModuleType, tmp_path: Path) -> dict[str, Any]:
    windows = training.RandomWindows(12)
    teacher = LocalTeacher(training.tiny_model(2, dropout=0.0), v_eff=training.VOCAB)
    form = row_format(CacheSettings(mode="top_k", tokens=training.VOCAB - 1), training.VOCAB, 1.0)
    store = open_store(tmp_path / "cache", {"bytes_per_token": form.bytes, "teacher": "a"})
    return {"windows": windows, "teacher": teacher, "form": form, "store": store, "vocab": training.VOCAB}


def fill(case: dict[str, Any], indices: list[int]) -> int:
    tokens = sum(capture(case["teacher"], case["windows"], indices, case["store"], case["form"]))
    case["store"].refresh()
    return tokens


def test_the_loss_is_that_of_the_teacher_itself(case: dict[str, Any], training: ModuleType) -> None:
    fill(case, list(range(12)))
    cached = CachedTeacher(case["store"], case["form"], "t")
    assert isinstance(cached, SparseTeacher)
    student, batch = training.tiny_model(1), stack(case["windows"], [7, 2, 2, 5])
    gradients = []
    for teacher in (cached, case["teacher"]):
        sums = Objective(teacher, LossSettings(), v_eff=case["vocab"])(student, batch)
        gradients.append((torch.autograd.grad(sums.loss, list(student.parameters())), sums))
    (ours, cached_sums), (theirs, sums) = gradients
    assert int(cached_sums.tokens) == int(sums.tokens) > 0
    assert float(cached_sums.kl) == pytest.approx(float(sums.kl), rel=0.02)
    assert float(cached_sums.teacher_entropy) == pytest.approx(float(sums.teacher_entropy), rel=1e-3)
    assert int(cached_sums.top1_matches) == int(sums.top1_matches)
    assert float(sums.covered_mass) == int(sums.tokens)
    assert 0.9 * int(sums.tokens) < float(cached_sums.covered_mass) <= int(sums.tokens)
    whole = torch.cat([g.flatten() for g in theirs])
    assert (torch.cat([g.flatten() for g in ours]) - whole).norm() < 0.05 * whole.norm()


def test_order_batches_and_processes_do_not_matter(case: dict[str, Any], tmp_path: Path) -> None:
    fill(case, list(range(12)))
    other = {**case, "store": open_store(tmp_path / "other", {"bytes_per_token": case["form"].bytes, "teacher": "a"})}
    fill(other, [11, 3, 5])
    fill(other, [0, 10, 8, 6, 4, 2, 1, 7, 9])
    from decoct.trainer.soft_targets.keys import sequence_keys

    for chosen in ([3], [8, 1, 11], [0, 0, 5]):
        keys = sequence_keys(stack(case["windows"], chosen))
        assert torch.equal(case["store"].read(keys), other["store"].read(keys))


def test_what_is_there_is_not_captured_again(case: dict[str, Any]) -> None:
    assert missing_windows(case["store"], case["windows"], [4, 1, 1, 9]) == [4, 1, 9]
    fill(case, [1, 4])
    again = Store(case["store"].folder, case["form"].bytes)
    assert again.refresh(thorough=True) == []
    assert missing_windows(again, case["windows"], [4, 1, 9]) == [9]
    with pytest.raises(UserError, match="lacks 1 of 2 windows"):
        CachedTeacher(again, case["form"], "t").sparse_targets(stack(case["windows"], [1, 9]))


def test_a_batch_without_labels_gives_no_loss(case: dict[str, Any], training: ModuleType) -> None:
    batch = {**stack(case["windows"], [1]), "labels": torch.full((1, case["windows"].seq_length), -100)}
    windows = type(
        "One", (), {"seq_length": case["windows"].seq_length, "__getitem__": lambda self, i: {k: v[0] for k, v in batch.items()}}
    )()
    fill({**case, "windows": windows}, [0])
    sums = Objective(CachedTeacher(case["store"], case["form"], "t"), LossSettings(), v_eff=case["vocab"])(training.tiny_model(), batch)
    sums.loss.backward()
    assert float(sums.loss.detach()) == 0.0 == float(sums.covered_mass)


@pytest.mark.parametrize("damage", ["bytes", "size", "manifest", "figures"])
def test_a_damaged_shard_is_found_and_removed(case: dict[str, Any], damage: str) -> None:
    fill(case, [0, 1])
    fill(case, [2])
    shard = min((case["store"].folder / "shards").glob("*.json"))
    rows = shard.with_suffix(".rows")
    if damage == "manifest":
        shard.write_text("{")
    elif damage == "figures":
        shard.write_text(shard.read_text().replace('"figures": {', '"figures": {"more": 1, '))
    else:
        data = bytearray(rows.read_bytes())
        data[3] ^= 1
        rows.write_bytes(bytes(data) if damage == "bytes" else bytes(data[:-1]))
    fresh = Store(case["store"].folder, case["form"].bytes)
    (problem,) = fresh.refresh(thorough=True)
    assert shard.stem in problem
    assert 1 <= len(missing_windows(fresh, case["windows"], [0, 1, 2])) <= 2
    assert fresh.refresh(thorough=True) == []


def test_a_cache_of_something_else_is_refused_with_the_reason(case: dict[str, Any]) -> None:
    folder = case["store"].folder
    with pytest.raises(UserError, match=r"teacher is 'a' there and 'b' here.*temperature is None there and 2\.0 here"):
        open_store(folder, {"bytes_per_token": case["form"].bytes, "teacher": "b", "temperature": 2.0})
    header = folder / "header.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 0}))
    with pytest.raises(UserError, match="format is 0 there and 2 here"):
        open_store(folder, {"bytes_per_token": case["form"].bytes, "teacher": "a"})


def test_a_disk_that_is_full_leaves_no_shard(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("decoct.trainer.soft_targets.store.os.fsync", full)
        with pytest.raises(UserError, match="write the teacher's cache"):
            fill(case, [0])
    assert not list((case["store"].folder / "shards").iterdir())
    # full at the last file alone, which is written by another rule
    monkeypatch.setattr("decoct.models.common.files.os.replace", full)
    with pytest.raises(UserError, match="disk is full"):
        fill(case, [0])
    assert not list((case["store"].folder / "shards").iterdir())
