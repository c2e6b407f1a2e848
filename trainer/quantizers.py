"""The hook that leads quantized linears through a stage: first scales, delay, annealed bits, frozen scales; exact when resumed.

Everything follows from the step number but what training has made of the scales, and those are parameters of the student.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..qat.activations import RoundedInputs
from ..qat.fake_quant import quantize
from ..qat.linear import Mode, QuantLinear
from ..qat.ptq.mse import searched_scales
from ..qat.spec import QuantSpec
from .quantization_settings import QatSettings
from .rng import derive_seed
from .sharding import local, own_rows, parameter_of, row_range, whole
from .world import max_over_ranks

RANGE_SHARE = 0.1
"""Share of the newest step in the moving average of the inputs' ranges (static scaling)."""


@dataclass(frozen=True)
class Phase:
    """How linears round in a step."""

    mode: Mode
    bits: int


class Quantizers:
    """Sets the mode and bits of every ``QuantLinear`` before each step, and the first values of scales and adapters.

    Args:
        settings: Of the stage.
        total_steps: Optimizer steps of the stage.
        seed: Of the adapters' first values.
        scales: First scales by module name, fp32 [out, groups]; None = from the weights, as ``settings.first`` says.
        inputs: Rounders of the linears' inputs; static ones follow a moving average over steps of the range that all ranks have seen,
            so that it does not depend on micro-batches or ranks. They round from the second step on.
    """

    name = "quantizers"

    def __init__(
        self,
        settings: QatSettings,
        total_steps: int,
        seed: int,
        scales: Mapping[str, Tensor] | None = None,
        inputs: RoundedInputs | None = None,
    ) -> None:
        self._settings, self._total, self._seed, self._given, self._inputs = settings, total_steps, seed, scales, inputs
        self._ranges: Tensor | None = None
        self._linears: dict[str, QuantLinear] = {}
        self._stepped: list[Tensor] = []
        self._phase = self.phase_of(1)
        self._step = 0

    def phase_of(self, step: int) -> Phase:
        """The phase of optimizer step ``step`` (the first is 1)."""
        settings = self._settings
        target = settings.weights.bits
        done = step - 1 - round(settings.delay * self._total)
        if done < 0:
            return Phase("off", settings.anneal_from or target)
        bits = target
        if settings.anneal_from is not None and step < self._total:
            span = max(1.0, settings.anneal * self._total)
            bits = max(target, settings.anneal_from - math.floor(done * (settings.anneal_from - target) / span))
        if step > self._total - round(settings.freeze_scales * self._total):
            return Phase("fixed", target)
        return Phase("learned" if settings.scales == "learned" else "absmax", bits)

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Find the linears; give scales and adapters their first values, each rank those of its rows."""
        self._linears = {name: module for name, module in student.named_modules() if isinstance(module, QuantLinear)}
        scales = [parameter_of(optimizer, module.scale) for module in self._linears.values() if module.scale is not None]
        self._stepped = [scale for scale in scales if scale is not None]
        self._phase = self.phase_of(1)
        self._apply()
        for name, module in self._linears.items():
            self._start_adapter(name, module)
            if self._phase.mode != "off":
                self._take_scales(name, module)
        if self._inputs is not None and self._inputs.spec.scaling == "static":
            self._inputs.observe()

    def before_step(self, step: int) -> None:
        """Scales that do not train take no step, and the optimizer counts none."""
        if self._phase.mode != "learned":
            for parameter in self._stepped:
                parameter.grad = None

    def after_step(self, step: int) -> None:
        """Go over to the phase of the next step."""
        self._step = step
        self._follow_ranges()
        before, after = self._phase, self.phase_of(min(step + 1, self._total))
        if after == before:
            return
        self._phase = after
        self._apply()
        for name, module in self._linears.items():
            if before.mode == "off" or (after.mode == "fixed" and before.mode == "absmax"):
                self._take_scales(name, module)
            elif after.bits != before.bits and module.scale is not None:
                # the same range, cut into fewer steps
                finer = module.spec.with_bits(before.bits).divisor_value / module.spec.with_bits(after.bits).divisor_value
                local(module.scale).mul_(finer)

    def state(self) -> dict[str, Tensor]:
        """The steps taken, and ranges of inputs: scales and adapters are the student's."""
        ranges = {} if self._ranges is None else {"ranges": self._ranges}
        return {"step": torch.tensor(self._step), **ranges}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up the phase that these steps have led to."""
        self._step = int(state["step"])
        self._phase = self.phase_of(min(self._step + 1, self._total))
        self._apply()
        if "ranges" in state:
            self._set_ranges(state["ranges"])

    def _apply(self) -> None:
        for module in self._linears.values():
            module.mode, module.bits = self._phase.mode, self._phase.bits
        if self._inputs is not None:
            self._inputs.enable(self._phase.mode != "off")

    def _follow_ranges(self) -> None:
        """Take the step's range into the average, unless scales are frozen."""
        if self._inputs is None or self._inputs.spec.scaling != "static" or self._phase.mode == "fixed":
            return
        seen = max_over_ranks(self._inputs.extremes()).cpu()
        self._inputs.observe()
        self._set_ranges(seen if self._ranges is None else torch.lerp(self._ranges, seen, RANGE_SHARE))

    def _set_ranges(self, ranges: Tensor) -> None:
        assert self._inputs is not None
        self._ranges = ranges
        self._inputs.set_ranges(ranges)

    @torch.no_grad()
    def _take_scales(self, name: str, module: QuantLinear) -> None:
        """Scales for the weights as they are now, in the lattice in use."""
        if module.scale is None:
            return
        rows, weight = local(module.scale), _merged_rows(module)
        if self._given is not None:
            held = row_range(module.scale)
            given = self._given[name]
            rows.copy_(given if held is None else given[held[0] : held[1]])
        elif rows.numel():
            rows.copy_(first_scales(weight, module.lattice, self._settings.first))

    @torch.no_grad()
    def _start_adapter(self, name: str, module: QuantLinear) -> None:
        """The product begins as zero; the inner matrix is uniform in +-1 / sqrt(in), the same however it is spread."""
        if module.adapter_in is None or module.adapter_out is None:
            return
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "adapter", name))
        drawn = (2 * torch.rand(module.adapter_in.shape, generator=generator) - 1) / math.sqrt(module.in_features)
        local(module.adapter_in).copy_(own_rows(drawn, module.adapter_in))
        local(module.adapter_out).zero_()


def first_scales(weight: Tensor, spec: QuantSpec, start: str) -> Tensor:
    """fp32 [out, groups]: from the largest magnitude of each group, or searched (start mse)."""
    return searched_scales(weight, spec) if start == "mse" else quantize(weight, spec)[1]


def _merged_rows(module: QuantLinear) -> Tensor:
    """This rank's rows of the weight that is rounded."""
    weight = local(module.weight)
    if module.adapter_in is None or module.adapter_out is None:
        return weight
    return weight + (local(module.adapter_out) @ whole(module.adapter_in)) * (weight != 0)
