"""The hook that leads quantized linears through a stage: phases, first scales, what trains when."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from decoct.qat.fake_quant import quantize
from decoct.qat.layers.quant_linear import Extras, QuantLinear
from decoct.qat.layers.quantized_model import prepare, quantize_model
from decoct.qat.ptq.mse import searched_grid
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.trainer.loop.qat_schedule import Phase, QatSchedule
from decoct.trainer.settings_quantization import QatSettings

SPEC = QuantSpec(bits=4, group_size=16)


def settings(**changes: Any) -> QatSettings:
    return QatSettings(steps=20, weights=SPEC, **changes)


def phases(**changes: Any) -> list[Phase]:
    hook = QatSchedule(settings(**changes), 20, seed=0)
    return [hook.phase_of(step) for step in range(1, 21)]


def test_a_stage_without_a_schedule_has_one_phase() -> None:
    assert set(phases()) == {Phase("learned", 4)}
    assert set(phases(scales="absmax")) == {Phase("absmax", 4)}


def test_delay_annealing_and_frozen_scales_follow_each_other() -> None:
    found = phases(delay=0.2, anneal_from=8, anneal=0.4, freeze_scales=0.25)
    assert [phase.mode for phase in found] == ["off"] * 4 + ["learned"] * 11 + ["fixed"] * 5
    assert [phase.bits for phase in found] == [8] * 4 + [8, 8, 7, 7, 6, 6, 5, 5] + [4] * 8


def test_bits_reach_the_lattice_whatever_the_shares() -> None:
    for share in (0.05, 0.31, 0.77, 0.99):
        found = phases(anneal_from=7, anneal=share)
        assert found[-1] == Phase("learned", 4)
        assert [phase.bits for phase in found] == sorted((phase.bits for phase in found), reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": "absmax", "start": "gptq"}, "start has no effect with scales=absmax"),
        ({"scales": "absmax", "train": "scales"}, "it needs scales=learned"),
        ({"calibration_tokens": 1000, "lora": 4}, "has no effect unless start is gptq"),
        ({"anneal_from": 4}, "must be greater than bits=4"),
        ({"delay": 0.6, "freeze_scales": 0.5}, "take 110% of the steps"),
        ({"delay": 0.1, "start": "gptq"}, "delay does not go together with start=gptq"),
        ({"train": "scales", "lora": 4}, "lora has no effect with train=scales"),
        ({"lora": 4, "start": "gptq"}, "use start=mse with lora"),
    ],
)
def test_settings_that_do_nothing_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize("start", ["rtn", "mse"])
def test_first_scales_are_those_of_the_weights(training: ModuleType, start: str) -> None:
    student = training.tiny_model(1)
    names = prepare(student, SPEC, extras=Extras(scale=True))
    optimizer = torch.optim.AdamW(student.parameters())
    QatSchedule(settings(start=start), 20, seed=0).on_start(student, optimizer)
    for name in names:
        module = student.get_submodule(name)
        assert isinstance(module, QuantLinear) and module.scale is not None and module.mode == "learned"
        wanted = searched_grid(module.weight, SPEC).scales if start == "mse" else quantize(module.weight, SPEC)[1]
        assert torch.equal(module.scale, wanted)


def run(training: ModuleType, work: Path, hook: type[QatSchedule] = QatSchedule, **changes: Any) -> tuple[Any, Any]:
    case = training.Case(kind="learned", steps=20, every=7)
    return training.run_case(case, work, quantizing=settings(**changes), quantizers=hook)


def scales_of(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in student.named_parameters() if name.endswith(".scale")}


def test_learned_scales_move_stay_positive_and_are_what_is_stored(training: ModuleType, tmp_path: Path) -> None:
    _, student = run(training, tmp_path)
    state = quantize_model(student, SPEC)
    plain = {name: quantize(student.get_parameter(f"{name}.weight"), SPEC)[1] for name in state.modules}
    assert any(not torch.equal(state.scales[name], plain[name]) for name in state.modules)
    state.check("memory")
    for name in state.modules:
        assert torch.equal(state.dequantized(name), student.get_submodule(name).quantized_weight())  # pyright: ignore[reportCallIssue]


def test_delayed_scales_are_taken_when_rounding_begins(training: ModuleType, tmp_path: Path) -> None:
    seen: dict[str, torch.Tensor] = {}

    class Watch(QatSchedule):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == 10:
                linear = next(iter(self._modules.values()))
                assert linear.scale is not None
                seen["scale"] = linear.scale.detach().clone()
                seen["weight"] = linear.weight.detach().clone()

    run(training, tmp_path, Watch, delay=0.5, start="rtn")
    assert torch.equal(seen["scale"], quantize(seen["weight"], SPEC)[1])


@pytest.mark.parametrize("scales", ["learned", "absmax"])
def test_frozen_scales_do_not_move_while_weights_do(training: ModuleType, tmp_path: Path, scales: str) -> None:
    found: dict[int, tuple[dict[str, torch.Tensor], torch.Tensor]] = {}

    class Watch(QatSchedule):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            found[step] = (
                {name: m.scale.detach().clone() for name, m in self._modules.items() if m.scale is not None},
                next(iter(self._modules.values())).weight.detach().clone(),
            )

    run(training, tmp_path, Watch, scales=scales, freeze_scales=0.5)
    assert all(torch.equal(found[10][0][name], found[20][0][name]) for name in found[10][0])
    assert not torch.equal(found[10][1], found[20][1])


def test_an_adapter_trains_over_frozen_weights_and_its_sum_is_rounded(training: ModuleType, tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in training.tiny_model(1).named_parameters()}
    _, student = run(training, tmp_path, lora=4)
    after = dict(student.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    state = quantize_model(student, SPEC)
    changed = [name for name in state.modules if not torch.equal(state.codes[name], quantize(before[f"{name}.weight"], SPEC)[0])]
    assert changed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activations": ActivationSpec(scaling="static")},
        {"kv_cache": ActivationSpec(scaling="static", symmetric=False), "delay": 0.2},
        {"delay": 0.4, "anneal_from": 7, "anneal": 0.4},
        {"scales": "absmax", "freeze_scales": 0.3},
        {"lora": 2, "start": "mse"},
    ],
    ids=["learned", "inputs", "cache", "delayed", "frozen", "lora"],
)
def test_stopped_and_resumed_ends_in_the_same_bits(training: ModuleType, tmp_path: Path, changes: dict[str, Any]) -> None:
    _, straight = run(training, tmp_path / "straight", **changes)
    work = tmp_path / "stopped"
    run(training, work, **changes)
    (work / "stage/checkpoints/step-00000020/state.json").write_text("{}")
    result, resumed = run(training, work, **changes)
    assert result.resumed_from == 14
    for (name, one), (_, other) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
