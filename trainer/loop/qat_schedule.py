"""The hook that schedules weight rounding in a stage: first scales, delay, annealed bits, frozen scales. It resumes exactly.

Everything follows from the step number, except the trained scales, which are parameters of the student, and ranges of static scales.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...qat.layers.quant_linear import Mode, RoundedWeight
from ...qat.layers.rounders import Rounders
from ...qat.ptq.methods import METHODS, RoundingMethod, Stack
from ...qat.spec import QuantSpec
from ..plan import derive_seed
from ..processes.sharding import local, own_rows, parameter_of, whole
from ..settings_quantization import QatSettings
from .static_ranges import FollowedRanges

FirstGrid = tuple[Tensor, Tensor | None]
"""(scales fp32, zero points int8 or None) of a module, both of ``spec.scale_shape``."""


@dataclass(frozen=True)
class Phase:
    """How linears round their weights in a step."""

    mode: Mode
    bits: int


class QatSchedule:
    """Sets the mode and bits of every ``RoundedWeight`` before each step, and the first values of scales and adapters.

    Args:
        settings: Settings of the stage.
        total_steps: Optimizer steps of the stage.
        seed: Seed of the adapters' first values.
        given: First scales and zero points by module name; None = from the weights, by ``settings.first``.
        inputs: Rounders of the linears' inputs; static ones as in ``FollowedRanges``.
        cache: Rounders of keys and values.
    """

    name = "quantizers"

    def __init__(
        self,
        settings: QatSettings,
        total_steps: int,
        seed: int,
        given: Mapping[str, FirstGrid] | None = None,
        inputs: Rounders | None = None,
        cache: Rounders | None = None,
    ) -> None:
        self._settings, self._total, self._seed, self._given = settings, total_steps, seed, given
        followed = {"ranges": inputs, "cache_ranges": cache}
        self._followed = [FollowedRanges(rounders, key) for key, rounders in followed.items() if rounders is not None]
        self._modules: dict[str, RoundedWeight] = {}
        self._stepped: list[Tensor] = []
        self._phase = self.phase_of(1)
        self._step = 0

    def phase_of(self, step: int) -> Phase:
        """The phase of optimizer step ``step`` (the first is 1)."""
        settings = self._settings
        target = settings.weights.bits
        # shares of the whole stage, so that the phase of a step does not depend on where training was resumed
        # steps of rounding before this one; negative during the delay
        done = step - 1 - round(settings.delay * self._total)
        if done < 0:
            return Phase("off", settings.anneal_from or target)
        bits = target
        # the last step always trains with the bits of the result
        if settings.anneal_from is not None and step < self._total:
            span = max(1.0, settings.anneal * self._total)
            # after the delay, falls by one bit at a time, evenly over ``anneal`` of the stage
            bits = max(target, settings.anneal_from - math.floor(done * (settings.anneal_from - target) / span))
        if step > self._total - round(settings.freeze_scales * self._total):
            # the end: scales stand still and the weights settle on their grid; always in the bits of the result
            return Phase("fixed", target)
        return Phase("learned" if settings.scales == "learned" else "absmax", bits)

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Finds the linears and sets the first values of scales and adapters, on each rank for its own rows."""
        self._modules = {name: module for name, module in student.named_modules() if isinstance(module, RoundedWeight)}
        scales = [parameter_of(optimizer, module.scale) for module in self._modules.values() if module.scale is not None]
        self._stepped = [scale for scale in scales if scale is not None]
        self._phase = self.phase_of(1)
        self._apply()
        for name, module in self._modules.items():
            self._start_adapter(name, module)
            if self._phase.mode != "off":
                self._take_scales(name, module)
        for ranges in self._followed:
            # observing from the first micro-batch on; static ranges need one step before they can round
            ranges.start()

    def before_step(self, step: int) -> None:
        """Drops the gradients of scales that do not train in this phase."""
        # without a gradient the optimizer neither decays their moments nor counts a step
        if self._phase.mode != "learned":
            for parameter in self._stepped:
                parameter.grad = None

    def after_step(self, step: int) -> None:
        """Changes to the phase of the next step."""
        self._step = step
        # with fixed scales of weights the ranges of inputs, keys and values are fixed too
        if self._phase.mode != "fixed":
            for ranges in self._followed:
                ranges.follow()
        # after the last step the phase stays that of the last step: the result is saved in it
        before, after = self._phase, self.phase_of(min(step + 1, self._total))
        if after == before:
            return
        self._phase = after
        self._apply()
        for name, module in self._modules.items():
            # scales that trained are kept; those that had no values yet (off, absmax) are taken from the weights
            if before.mode == "off" or (after.mode == "fixed" and before.mode == "absmax"):
                self._take_scales(name, module)
            elif after.bits != before.bits:
                _change_bits(module, self._bits(module, before), self._bits(module, after))

    def reached(self, step: int) -> bool:
        """Whether the student after ``step`` rounds to the bits of the result."""
        phase = self.phase_of(min(step + 1, self._total))
        return phase.mode != "off" and phase.bits == self._settings.weights.bits

    def forget_seen(self) -> None:
        """Drops ranges seen since the last step: they come from held-out text."""
        for ranges in self._followed:
            ranges.forget_seen()

    def state(self) -> dict[str, Tensor]:
        """The steps taken, and ranges of inputs, keys and values. Scales and adapters are saved with the student."""
        # the step, so that a resumed run enters the phase without running through those before it
        state = {"step": torch.tensor(self._step)}
        for ranges in self._followed:
            state |= ranges.state()
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores the phase that follows these steps, and the ranges."""
        self._step = int(state["step"])
        # scales are not taken from the weights here: the checkpoint's own were loaded with the student
        self._phase = self.phase_of(min(self._step + 1, self._total))
        self._apply()
        for ranges in self._followed:
            ranges.load(state)

    def _apply(self) -> None:
        for module in self._modules.values():
            module.mode, module.bits = self._phase.mode, self._bits(module, self._phase)
        for ranges in self._followed:
            ranges.enable(self._phase.mode != "off")

    def _bits(self, module: RoundedWeight, phase: Phase) -> int:
        """Bits in use. A module with more bits of its own takes part in annealing until these are reached."""
        annealed = self._settings.anneal_from is not None and module.spec.kind == "int"
        return max(module.spec.bits, phase.bits) if annealed else module.spec.bits

    @torch.no_grad()
    def _take_scales(self, name: str, module: RoundedWeight) -> None:
        """Sets scales and zero points for the current weights and the spec in use."""
        if module.scale is None:
            return
        if self._given is not None:
            scales, zeros = self._given[name]
            first = (own_rows(scales, module.scale), None if zeros is None else own_rows(zeros, module.scale))
        elif module.spec.group_size == "tensor":
            # one scale covers the rows of all ranks, so it needs the gathered weight
            scales, zeros = first_scales(_merged(module), module.current_spec, self._settings.first)
            first = (own_rows(scales, module.scale), None if zeros is None else own_rows(zeros, module.scale))
        else:
            # a group is part of one row, so a rank needs only its own rows for its own scales
            first = first_scales(_merged_rows(module), module.current_spec, self._settings.first)
        for parameter, values in zip((module.scale, module.zero), first, strict=True):
            # zero points exist for asymmetric specs alone; a rank may hold no row
            if parameter is not None and values is not None and local(parameter).numel():
                local(parameter).copy_(values)

    @torch.no_grad()
    def _start_adapter(self, name: str, module: RoundedWeight) -> None:
        """Starts an adapter: the inner matrix is uniform in +-1 / sqrt(in), the outer one zero, and so is their product."""
        if module.adapter_in is None or module.adapter_out is None:
            return
        # drawn whole from a generator of its own, so that it is the same for every sharding and changes no other random number
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "adapter", name))
        # [rank, in]; the outer matrix is [out, rank]
        drawn = (2 * torch.rand(module.adapter_in.shape, generator=generator) - 1) / math.sqrt(module.weight.shape[1])
        local(module.adapter_in).copy_(own_rows(drawn, module.adapter_in))
        local(module.adapter_out).zero_()


def first_scales(weight: Tensor, spec: QuantSpec, start: str) -> FirstGrid:
    """(scales fp32, zero points int8 or None): from the range of each group, or searched (start mse)."""
    # a rank may hold no row of a small weight
    if not weight.numel():
        return weight.new_zeros(0), None
    # without training text: the search weighs every weight alike
    rounded = METHODS["mse" if start == "mse" else "rtn"].round(
        Stack(weight=weight.float(), mask=None, moments=None), spec, RoundingMethod()
    )
    return rounded.scales, rounded.zeros


@torch.no_grad()
def _change_bits(module: RoundedWeight, before: int, after: int) -> None:
    """Changes scales and zero points so that each group keeps its range with the new number of codes."""
    if module.scale is None or before == after:
        return
    old, new = module.spec.with_bits(before), module.spec.with_bits(after)
    scale = local(module.scale)
    # read before the scale changes: the value of the lowest code, which the new zero point must keep
    lowest = None if module.zero is None else (old.qmin - local(module.zero)) * scale
    # scale = range / divisor: the range stays
    scale.mul_(old.divisor_value / new.divisor_value)
    if module.zero is not None and lowest is not None:
        # lowest value = (qmin - zero) * scale, solved for zero
        local(module.zero).copy_((new.qmin - lowest / scale).round_().clamp_(new.qmin, new.qmax))


def _merged_rows(module: RoundedWeight) -> Tensor:
    """This rank's rows of the weight to round, adapter included."""
    weight = local(module.weight)
    if module.adapter_in is None or module.adapter_out is None:
        return weight
    # own rows of the product: [own rows, rank] @ [rank, in]. Pruned weights stay zero in the sum (law 4, docs/architecture.md)
    return weight + (local(module.adapter_out) @ whole(module.adapter_in)) * (weight != 0)


def _merged(module: RoundedWeight) -> Tensor:
    """All rows of the weight to round, adapter included (a collective operation if it is sharded)."""
    weight = whole(module.weight)
    if module.adapter_in is None or module.adapter_out is None:
        return weight
    return weight + (whole(module.adapter_out) @ whole(module.adapter_in)) * (weight != 0)
