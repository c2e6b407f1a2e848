"""Every kind of teacher in the place of every other: the same model on the same batches gives the same loss, gradient and figures."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from decoct.losses.settings import LossSettings
from decoct.models.families import HeadTransform
from decoct.models.settings import CacheSettings
from decoct.models.teachers import AdapterBaseTeacher, LocalTeacher, open_teacher
from decoct.trainer.loop.objective import Objective
from decoct.trainer.soft_targets.cached import CachedStates, CachedTeacher, row_format
from decoct.trainer.soft_targets.capture import capture, stack
from decoct.trainer.soft_targets.hidden_rows import HiddenFormat, write_head
from decoct.trainer.soft_targets.served import ServedTeacher
from decoct.trainer.soft_targets.store import open_store

INDICES = [0, 3, 5, 4]
"""Windows of the batch: two of them padded, with masked labels."""

KINDS = {
    "fp32": 1e-6,
    "bf16": 0.02,
    "int8": 0.05,
    "nf4": 0.3,
    "offloaded": 1e-6,
    "adapter base": 1e-6,
    "served": 1e-4,
    "cache top_k": 0.05,
    "cache sampled": 0.8,
    "cache hybrid": 0.1,
    "cache hidden": 1e-6,
}
"""How far the gradient may be from that of the fp32 teacher here, as a share of its length: what rounding, or one draw, costs."""


@pytest.fixture
def folder(training: ModuleType, tmp_path: Path) -> Path:
    """The teacher as a model folder; it says something, and its 64 channels suit bitsandbytes."""
    model = training.tiny_model(2, dropout=0.0, tied=False, hidden=64)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def make(
    folder: Path, training: ModuleType, tmp_path: Path, serve: Callable[..., Any], as_vllm: Callable[..., Any]
) -> Callable[[str], Any]:
    """The teacher, by its kind."""
    vocab = training.VOCAB

    def plain() -> LocalTeacher:
        return open_teacher(folder, load_in="fp32", v_eff=vocab)

    def of_kind(kind: str) -> Any:
        if kind == "offloaded":
            return open_teacher(folder, load_in="fp32", placement="offloaded", v_eff=vocab)
        if kind == "adapter base":
            adapted: Any = get_peft_model(plain().model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(0.5)
            return AdapterBaseTeacher(adapted, v_eff=vocab)
        if kind == "served":
            return ServedTeacher(serve(as_vllm(plain().model)).settings(tokens=vocab - 1), vocab)
        if kind == "cache hidden":
            states = HiddenFormat(vocab, 64, "fp32")
            store = open_store(tmp_path / kind, {"bytes_per_token": states.bytes})
            list(capture(plain(), training.RandomWindows(8), INDICES, store, states))
            store.refresh()
            write_head(store.folder, plain().model.lm_head.weight[:vocab], None)
            return CachedStates(store, states, HeadTransform(), "t")
        if kind.startswith("cache"):
            settings = CacheSettings(mode=kind.split()[1])  # pyright: ignore[reportArgumentType]
            form = row_format(settings, vocab, 1.0)
            store = open_store(tmp_path / kind, {"bytes_per_token": form.bytes})
            list(capture(plain(), training.RandomWindows(8), INDICES, store, form))
            store.refresh()
            return CachedTeacher(store, form, "t")
        return open_teacher(folder, load_in=kind, v_eff=vocab)  # pyright: ignore[reportArgumentType]

    return of_kind


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_teachers_are_drop_in_for_one_another(kind: str, hard_weight: float, make: Callable[[str], Any], training: ModuleType) -> None:
    batch = stack(training.RandomWindows(8), INDICES)
    student = training.tiny_model(2, dropout=0.0, tied=False, hidden=64)
    seen = []
    for teacher in (make(kind), make("fp32")):
        sums = Objective(teacher, LossSettings(hard_weight=hard_weight), v_eff=training.VOCAB)(student, batch)
        gradients = torch.autograd.grad(sums.loss, list(student.parameters()))
        seen.append((sums, torch.cat([gradient.flatten() for gradient in gradients])))
    (ours, own), (theirs, wanted) = seen
    most = KINDS[kind]
    assert int(ours.tokens) == int(theirs.tokens) == int((batch["labels"][:, 1:] != -100).sum())
    assert float(theirs.kl) > 0.05 * int(theirs.tokens), "the student has something to learn"
    assert float((own - wanted).norm()) <= most * float(wanted.norm())
    assert float(ours.kl) == pytest.approx(float(theirs.kl), rel=most)
    assert float(ours.cross_entropy) == pytest.approx(float(theirs.cross_entropy), rel=1e-6)
    assert float(ours.teacher_entropy) == pytest.approx(float(theirs.teacher_entropy), rel=max(most, 2e-3))
    rounded = kind in ("bf16", "int8", "nf4")
    assert abs(int(ours.top1_matches) - int(theirs.top1_matches)) <= (0.2 * int(ours.tokens) if rounded else 0)
