"""How much of the model's output each group of modules costs at each width: KL per token against the unrounded model, one group at a time.

With dW the change by rounding, x_t the input of a linear at token t, and g_t the gradient at its output in a random direction of the logits
(``models/calibration/output_gradients.py``), the KL of a small change is 1/2 E[(sum_t g_t . dW x_t)^2].

    cheap         1/2 E[sum_t (g_t . dW x_t)^2]: tokens count as independent, which has little noise
    second_order  1/2 E[(sum_t g_t . dW x_t)^2] over a window: with what tokens have in common; no bias, and more noise
    exact         the model runs from the layer of the group on, with the group rounded

The first two come from the same passes: one forward, one backward per draw through recomputed layers, and one product per width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...models.calibration.calibration_text import CalibrationText
from ...models.calibration.output_gradients import OutputGradients, Seen
from ...models.calibration.replay import Advance, Replay
from ...models.common.errors import NonFiniteError
from ...models.families import decoder_layers
from ..bit_assignment import DRAWS
from ..fake_quant import quantize_with
from ..rounding_method import MethodName, RoundingMethod
from ..spec import QuantSpec
from .methods import Rounded, Stack, round_to_nearest
from .mse import FACTORS, FITTED_FACTORS, searched_grid
from .walk import REMEDIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Group = tuple[str, ...]
"""Full names of modules that get one width together."""
Divergence = Callable[[Tensor, Tensor], Tensor]
"""(student logits [N, V], teacher logits [N, V]) -> nats per token [N]."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """KL in nats per token for each group and candidate: [groups][candidates]."""

    cheap: list[list[float]]
    second_order: list[list[float]]
    exact: list[list[float]] = field(default_factory=list)
    """[] unless asked for."""


def rounded_values(weight: Tensor, spec: QuantSpec, method: MethodName, kept: Tensor | None = None) -> Tensor:
    """fp32 [out, in]: the weight as rounded for an estimate: to nearest for method rtn, else with searched scales.

    Searched scales stand in for GPTQ, whose codes depend on those of the linears before it.
    """
    stack = Stack(weight=weight, mask=kept, moments=None)
    if method == "rtn" or spec.kind != "int":
        return round_to_nearest(stack, spec, RoundingMethod()).values(spec)
    scales, zeros = searched_grid(weight, spec, kept, None, FACTORS if method == "mse" else FITTED_FACTORS)
    codes, scales = quantize_with(weight, scales, spec, zeros=zeros, mask=kept)
    return Rounded(codes=codes, scales=scales, zeros=zeros).values(spec)


def amount_of_work(layers: int, tokens: int, exact_runs: int) -> int:
    """The total of all calls of ``advance``: tokens through layers, forward and backward, and tokens of exact runs."""
    return tokens * (2 * layers + exact_runs)


class Sensitivity:
    """Measures what groups of modules cost at each width.

    Args:
        model: fp32, whole, on ``device``; as it was when this ends.
        groups: Groups of modules; all of a group are in one decoder layer.
        candidates: Per module its specs, in the same order for all; None = left alone, which loses nothing.
        text: Calibration text.
        method: How weights will be rounded.
        vocabulary: Logits that count.
        seed: Seed of the random directions.
        sparse: Modules whose exact zeros are a pruning mask.
    """

    def __init__(
        self, model: "PreTrainedModel", groups: Sequence[Group], candidates: Mapping[str, Sequence[QuantSpec | None]],
        text: CalibrationText, *, method: MethodName, vocabulary: int, seed: int, device: torch.device | str = "cpu",
        sparse: Iterable[str] = (), advance: Advance = lambda done: None,
    ) -> None:  # fmt: skip
        self._model, self._groups, self._candidates = model, list(groups), candidates
        self._method: MethodName = method
        self._sparse, self._advance, self._text = frozenset(sparse), advance, text
        self._device = device = torch.device(device)
        self._layers: list[nn.Module] = decoder_layers(model)
        self._replay = Replay(model, self._layers, text.batches, device, REMEDIES)
        self._gradients = OutputGradients(model, self._layers, self._replay, vocabulary=vocabulary, seed=seed, device=device)
        inside = [{id(module) for module in layer.modules()} for layer in self._layers]
        self._places = [next(at for at, own in enumerate(inside) if id(model.get_submodule(group[0])) in own) for group in self._groups]

    def measure(self, exact: Divergence | None = None, rows: MutableMapping[str, list[float]] | None = None) -> Losses:
        """The estimates, and with a divergence also the exact figures.

        Args:
            exact: Divergence of the exact figures; None = estimates only.
            rows: First module of a group -> its exact figures. Those of an earlier start are taken, and new ones are put in.

        Raises:
            NonFiniteError: a figure is NaN or infinite.
        """
        training = self._model.training
        self._model.eval()
        try:
            self._gradients.forward(self._advance)
            cheap, second = self._estimates()
            found = Losses(cheap=cheap, second_order=second, exact=self._exact(exact, {} if rows is None else rows) if exact else [])
        finally:
            self._model.train(training)
        for group, *losses in zip(self._groups, found.cheap, found.second_order, found.exact or found.cheap):
            if not torch.tensor(losses).isfinite().all():
                raise NonFiniteError(f"the sensitivity of {group[0]} is NaN or infinite on the calibration text. {REMEDIES.overflow}")
        return found

    def _weight(self, name: str) -> Tensor:
        return self._model.get_submodule(name).weight.data  # pyright: ignore[reportReturnType, reportAttributeAccessIssue] - a linear's

    def _rounded(self, name: str, spec: QuantSpec) -> Tensor:
        weight = self._weight(name)
        return rounded_values(weight, spec, self._method, (weight != 0) if name in self._sparse else None)

    def _estimates(self) -> tuple[list[list[float]], list[list[float]]]:
        count = len(next(iter(self._candidates.values())))
        sums = torch.zeros(2, len(self._groups), count, dtype=torch.float64)
        changes: dict[str, list[Tensor | None]] = {}

        def visit(index: int, seen: dict[str, list[Seen]]) -> None:
            # the layer is done: the changes of its weights are not needed any more
            if not seen:
                changes.clear()
            for place, group in enumerate(self._groups) if seen else ():
                if self._places[place] != index:
                    continue
                for name in group:
                    if name not in changes:
                        changes[name] = [spec and self._rounded(name, spec) - self._weight(name) for spec in self._candidates[name]]
                for candidate in range(count):
                    own = [(change, seen.get(name, [])) for name in group if (change := changes[name][candidate]) is not None]
                    cheap, second = _squares(own)
                    sums[0, place, candidate] += cheap
                    sums[1, place, candidate] += second

        named: dict[int, list[str]] = {}
        for place, group in zip(self._places, self._groups):
            named.setdefault(place, []).extend(group)
        self._gradients.backward(named, DRAWS, visit, self._advance)
        # KL ~ 1/2 E[(u . dz)^2]
        cheap, second = (sums / (2 * DRAWS * self._text.tokens)).tolist()
        return cheap, second

    @torch.no_grad()
    def rounded_together(
        self, specs: Mapping[str, QuantSpec | None], divergence: Divergence, advance: Advance = lambda done: None
    ) -> float:
        """KL in nats per token with all modules rounded at once, after ``measure``: one forward pass, one layer rounded at a time.

        Losses of single groups add up only while they are small, and they are not at 2 bits. This is the figure that counts.
        """
        training = self._model.training
        self._model.eval()
        numbers = [number for number, _ in self._replay.batches()]
        hidden = [self._gradients.state(0, number).cpu() for number in numbers]
        inside = [{id(module) for module in layer.modules()} for layer in self._layers]
        layers = [[name for name in specs if id(self._model.get_submodule(name)) in own] for own in inside]
        try:
            for index, names in enumerate(layers):
                with self._as_rounded({name: specs[name] for name in names}):
                    for number in numbers:
                        hidden[number] = self._gradients.through(index, number, hidden[number].to(self._device)).cpu()
                        advance(self._replay.tokens(number))
        finally:
            self._model.train(training)
        return sum(self._loss(number, hidden[number].to(self._device), divergence) for number in numbers) / self._text.tokens

    def _loss(self, number: int, hidden: Tensor, divergence: Divergence) -> float:
        """The sum over tokens of the KL for other outputs of the last layer."""
        whole = self._gradients.rows(number, self._gradients.state(len(self._layers), number))
        # logits of both in parts: all logits of a text with a large vocabulary do not fit
        pairs = zip(self._gradients.logits(self._gradients.rows(number, hidden)), self._gradients.logits(whole))
        return sum(float(divergence(ours, theirs).sum(dtype=torch.float64)) for ours, theirs in pairs)

    @contextmanager
    def _as_rounded(self, specs: Mapping[str, QuantSpec | None]) -> Iterator[None]:
        """With modules rounded; their weights are put back at the end."""
        before = {name: self._weight(name).clone() for name, spec in specs.items() if spec is not None}
        try:
            for name, spec in specs.items():
                if spec is not None:
                    self._weight(name).copy_(self._rounded(name, spec))
            yield
        finally:
            for name, weight in before.items():
                self._weight(name).copy_(weight)

    @torch.no_grad()
    def _exact(self, divergence: Divergence, rows: MutableMapping[str, list[float]]) -> list[list[float]]:
        for group, place in zip(self._groups, self._places):
            if group[0] in rows:
                self._advance(sum(spec is not None for spec in self._candidates[group[0]]) * self._text.tokens)
            else:
                specs = [{name: self._candidates[name][at] for name in group} for at in range(len(self._candidates[group[0]]))]
                rows[group[0]] = [self._with(one, place, divergence) if any(one.values()) else 0.0 for one in specs]
        return [rows[group[0]] for group in self._groups]

    def _with(self, specs: Mapping[str, QuantSpec | None], place: int, divergence: Divergence) -> float:
        """KL in nats per token with the modules of a group rounded; the model runs from their layer on."""
        total = 0.0
        with self._as_rounded(specs):
            for number, _ in self._replay.batches():
                hidden = self._gradients.state(place, number)
                for index in range(place, len(self._layers)):
                    hidden = self._gradients.through(index, number, hidden)
                total += self._loss(number, hidden, divergence)
                self._advance(self._replay.tokens(number))
        return total / self._text.tokens


def _squares(modules: Sequence[tuple[Tensor, list[Seen]]]) -> tuple[float, float]:
    """(sum of squares over tokens and draws, sum of squared sums over windows and draws) of g . dW x for one batch of a group."""
    parts: list[Tensor] = []
    for change, calls in modules:
        if not calls:
            continue
        own = [_products(given @ change.T, slopes) for given, slopes in calls]
        # one call per module is the rule: its first axis is that of the windows
        parts.append(own[0] if len(own) == 1 else torch.cat([one.flatten(1) for one in own], 1).unsqueeze(1))
    if not parts:
        return 0.0, 0.0
    alike = len({part.shape for part in parts}) == 1
    joined = [torch.stack(parts).sum(0)] if alike else parts
    cheap = sum(float(part.double().square().sum()) for part in joined)
    # rows of windows where the shape tells them; else all tokens of the batch, whose windows have independent signs
    second = sum(
        float(part.double().flatten(2).sum(-1).square().sum()) if part.ndim > 2 else float(part.double().sum(-1).square().sum())
        for part in joined
    )
    return cheap, second


def _products(moved: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """[draws, tokens...]: g . dW x for the change dW x [tokens..., out] of an output."""
    return torch.stack([(slope * moved).sum(-1) for slope in slopes])
