"""AdamW in 32 and 8 bits: the same groups, a checkpoint form that forgets nothing, and moments that stay zero where weights do."""

import sys
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from decoct.models import low_bit
from decoct.models.common.errors import UserError
from decoct.models.low_bit import load_bitsandbytes
from decoct.qat.layers.quant_linear import Extras, QuantLinear
from decoct.qat.spec import QuantSpec
from decoct.trainer.checkpoints.optimizer_moments import decode_moments, encode_moments, load_state_tensors, parameter_state, zero_moments
from decoct.trainer.loop.optimizer import build_optimizer
from decoct.trainer.plan import BatchPlan, TrainingPlan

LOW_BIT = "adamw-8bit"


def state_tensors(optimizer: torch.optim.Optimizer, name_of: Mapping[Tensor, str]) -> dict[str, Tensor]:
    return {
        f"{name_of[parameter]}.{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in parameter_state(optimizer, parameter).items()
    }


def _plan(optimizer: str = "adamw") -> TrainingPlan:
    return TrainingPlan(
        total_steps=10,
        batch=BatchPlan(global_windows=1, micro_batch=1, accumulation=1),
        learning_rate=1e-2,
        weight_decay=0.1,
        optimizer=cast(Any, optimizer),
    )


def _student() -> Any:
    """An embedding, a matrix of 21.3 blocks (moments in 8 bits), a small matrix and biases (fp32)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(90, 64), nn.Linear(64, 85), nn.Linear(85, 4))


def _steps(student: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(step % 3)
        optimizer.step()


def _names(student: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit", "paged-adamw-8bit"])
def test_matrices_decay_and_nothing_else(kind: str) -> None:
    student = _student()
    optimizer = build_optimizer(student, _plan(kind))
    decay = {_names(student)[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {"0.weight": 0.0, "1.weight": 0.1, "1.bias": 0.0, "2.weight": 0.1, "2.bias": 0.0}


def test_views_take_the_place_of_their_parameters_and_their_groups() -> None:
    student = _student()
    views = {name: nn.Parameter(p.detach()[:3]) for name, p in student.named_parameters()}
    decaying, others = build_optimizer(student, _plan(), views).param_groups
    assert [id(p) for p in decaying["params"]] == [id(views["1.weight"]), id(views["2.weight"])]
    assert [id(p) for p in others["params"]] == [id(views["0.weight"]), id(views["1.bias"]), id(views["2.bias"])]


def test_8_bit_adamw_follows_adamw_with_a_byte_a_moment() -> None:
    start, plain, low = _student(), _student(), _student()
    optimizers = build_optimizer(plain, _plan()), build_optimizer(low, _plan(LOW_BIT))
    for student, optimizer in zip((plain, low), optimizers):
        _steps(student, optimizer, 0, 8)
    for before, exact, rounded in zip(start.parameters(), plain.parameters(), low.parameters()):
        moved = (exact - before).norm()
        assert (rounded - exact).norm() < 0.05 * moved
    state = optimizers[1].state[low[1].weight]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert optimizers[1].state[low[1].bias]["state1"].dtype == torch.float32


def test_learned_scales_have_fp32_moments_however_many_they_are() -> None:
    student = nn.Sequential(QuantLinear(nn.Linear(64, 1200), QuantSpec(bits=4, group_size=16), Extras(scale=True)))
    optimizer = build_optimizer(student, _plan(LOW_BIT))
    _steps(student, optimizer, 0, 1)
    scale, weight = student[0].get_parameter("scale"), student[0].get_parameter("weight")
    assert scale.numel() > 4096, "bitsandbytes would take 8 bits"
    assert {optimizer.state[scale][part].dtype for part in ("state1", "state2")} == {torch.float32}
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    saved = {name: tensor.clone() for name, tensor in state_tensors(optimizer, _names(student)).items()}
    again = build_optimizer(student, _plan(LOW_BIT))
    load_state_tensors(again, dict(student.named_parameters()), saved)
    assert again.state[scale]["state1"].dtype == torch.float32
    assert torch.equal(again.state[scale]["state1"], optimizer.state[scale]["state1"])


@pytest.mark.parametrize("kind", ["adamw", LOW_BIT])
def test_a_saved_and_loaded_optimizer_takes_the_same_steps_to_the_bit(kind: str) -> None:
    student = _student()
    optimizer = build_optimizer(student, _plan(kind))
    _steps(student, optimizer, 0, 4)
    saved = {name: tensor.clone() for name, tensor in state_tensors(optimizer, _names(student)).items()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert saved["1.weight.exp_avg"].shape == saved["1.weight.exp_avg_sq"].shape == (85, 64)
    assert saved["2.bias.step"].item() == 4
    resumed = _student()
    resumed.load_state_dict(student.state_dict())
    again = build_optimizer(resumed, _plan(kind))
    load_state_tensors(again, dict(resumed.named_parameters()), saved)
    for name, tensor in state_tensors(again, _names(resumed)).items():
        assert torch.equal(tensor, saved[name]), name
    _steps(student, optimizer, 4, 9)
    _steps(resumed, again, 4, 9)
    for one, other in zip(student.parameters(), resumed.parameters()):
        assert torch.equal(one, other)


def test_codes_and_scales_come_back_as_they_were() -> None:
    student = _student()
    optimizer = build_optimizer(student, _plan(LOW_BIT))
    _steps(student, optimizer, 0, 3)
    state = optimizer.state[student[1].weight]
    for codes, table, scales in (("state1", "qmap1", "absmax1"), ("state2", "qmap2", "absmax2")):
        found, scale = torch.empty_like(state[codes]), torch.empty_like(state[scales])
        encode_moments(decode_moments(state[codes], state[table], state[scales]), state[table], codes=found, scales=scale)
        assert torch.equal(found, state[codes])
        # two neighbouring scales may give the same 256 numbers
        torch.testing.assert_close(scale, state[scales], rtol=2.5e-7, atol=0)


def test_decoding_is_that_of_bitsandbytes_and_encoding_rounds_to_nearest() -> None:
    functional = load_bitsandbytes("the test").functional
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, 200, generator=generator)
    table = functional.create_dynamic_map(signed=True)
    theirs, state = functional.quantize_blockwise(numbers, code=table, blocksize=256)
    expected = functional.dequantize_blockwise(theirs, state)
    assert torch.equal(decode_moments(theirs, table, state.absmax), expected)
    codes, scales = torch.empty(5, 200, dtype=torch.uint8), torch.empty(4)
    encode_moments(numbers, table, codes=codes, scales=scales)
    assert torch.equal(scales, state.absmax)
    ours = decode_moments(codes, table, scales)
    assert ((ours - numbers).abs() <= (expected - numbers).abs() + 1e-7).all()


def test_moments_cross_between_kinds() -> None:
    student, other = _student(), _student()
    optimizer = build_optimizer(student, _plan())
    _steps(student, optimizer, 0, 4)
    exact = state_tensors(optimizer, _names(student))
    low = build_optimizer(other, _plan(LOW_BIT))
    load_state_tensors(low, dict(other.named_parameters()), exact)
    rounded = state_tensors(low, _names(other))
    for name, tensor in exact.items():
        assert (rounded[name] - tensor).norm() <= 0.02 * tensor.norm(), name
    load_state_tensors(optimizer, dict(student.named_parameters()), rounded)
    assert torch.equal(optimizer.state[student[1].weight]["exp_avg"], rounded["1.weight.exp_avg"])


@pytest.mark.parametrize("kind", ["adamw", LOW_BIT])
def test_moments_of_removed_weights_are_zero_and_the_others_as_before(kind: str) -> None:
    student = _student()
    optimizer = build_optimizer(student, _plan(kind))
    weight, small = student[1].weight, student[2].weight
    zero_moments(optimizer, weight, torch.ones_like(weight, dtype=torch.bool))  # no state yet
    _steps(student, optimizer, 0, 3)
    before = {name: tensor.clone() for name, tensor in state_tensors(optimizer, _names(student)).items()}
    for name, parameter in (("1.weight", weight), ("2.weight", small)):
        mask = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        zero_moments(optimizer, parameter, mask)
        after = state_tensors(optimizer, _names(student))
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(after[f"{name}.{moment}"], before[f"{name}.{moment}"] * mask)
        with torch.no_grad():
            parameter.mul_(mask)
            assert parameter.grad is not None
            parameter.grad.mul_(mask)
    optimizer.step()
    assert not weight[~(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5)].any()


def test_a_rank_without_rows_of_a_tensor_has_no_state_of_it() -> None:
    student = _student()
    views = {name: nn.Parameter(p.detach()[:0] if name == "2.bias" else p.detach()) for name, p in student.named_parameters()}
    optimizer = build_optimizer(student, _plan(LOW_BIT), views)
    for view in views.values():
        view.grad = torch.ones_like(view)
    optimizer.step()
    saved = state_tensors(optimizer, {view: name for name, view in views.items()})
    assert not any(name.startswith("2.bias") for name in saved)
    load_state_tensors(optimizer, views, {**saved, "2.bias.step": torch.tensor(1.0)})


def test_a_machine_without_bitsandbytes_is_told_which_key_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    low_bit.load_bitsandbytes.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(UserError, match=r"trainer\.optimizer: adamw-8bit needs bitsandbytes, which is not installed"):
            build_optimizer(_student(), _plan(LOW_BIT))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no native library\nmore")

    with monkeypatch.context() as patched:
        patched.setattr(load_bitsandbytes("the test").functional, "quantize_blockwise", broken)
        with pytest.raises(UserError, match=r"trainer\.optimizer: adamw-8bit .* does not work here: no native library\. "):
            build_optimizer(_student(), _plan(LOW_BIT))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adamw-8bit", "paged-adamw-8bit"])
def test_on_a_gpu_a_loaded_optimizer_takes_the_same_steps_to_the_bit(kind: str) -> None:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Linear(512, 400).cuda()  # large enough to be paged

    student, resumed = make(), make()
    optimizer, again = build_optimizer(student, _plan(kind)), build_optimizer(resumed, _plan(kind))

    def steps(module: nn.Module, stepped: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            for parameter in module.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)).cuda()
            stepped.step()

    steps(student, optimizer, 0, 4)
    resumed.load_state_dict(student.state_dict())
    load_state_tensors(again, dict(resumed.named_parameters()), state_tensors(optimizer, _names(student)))
    steps(student, optimizer, 4, 9)
    steps(resumed, again, 4, 9)
    for one, other in zip(student.parameters(), resumed.parameters()):
        assert torch.equal(one, other)
    mask = torch.rand(400, 512, generator=torch.Generator().manual_seed(1)).cuda() < 0.5
    weight = next(student.parameters())
    zero_moments(optimizer, weight, mask)
    torch.cuda.synchronize()
    assert not state_tensors(optimizer, _names(student))["weight.exp_avg"][~mask.cpu()].any()
