"""Estimates of the loss that a cut costs, to first order: which one chooses best, as KL after the cut.

    python benchmarks/pruning_taylor.py [--quick] [--json FILE]                        the quickstart's teacher
    python benchmarks/pruning_taylor.py --model FOLDER --text FILES ... [--windows 4] [--calibration 8] [--axes ffn]

With g_n the gradient of the loss of window n, and sums over the weights w that are cut together, an estimate is one of

    slope                  |sum_w sum_n w g_n|
    sizes                  sum_w |sum_n w g_n|
    window slopes          sum_n |sum_w w g_n|
    window slopes squared  sum_n (sum_w w g_n)^2      (Molchanov et al., arXiv 1906.10771, with windows as samples)
    window sizes           sum_n sum_w |w g_n|
    window squares         sum_n sum_w (w g_n)^2      (the diagonal of the empirical Fisher matrix)

Rows: KL(whole || cut) in nats per token of held-out windows, without repair or training.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from outliers import Case, case_of, divergence, log_probabilities, scratch_case
from rows import Row, report

from decoct.models.axis_map import Axis
from decoct.models.family_map import family_of
from decoct.models.folder.loading import load_model
from decoct.models.pruning.choose import kept_by
from decoct.models.pruning.reductions import reduced
from decoct.models.pruning.scores import Scores, scored
from decoct.models.pruning.structured import cut
from decoct.models.pruning.text_loss import add_gradients
from decoct.models.sizes import ChannelScore, Sizes, sizes_of, target_sizes

AXES: tuple[Axis, ...] = ("ffn", "heads", "hidden")
SHARES = (0.75, 0.5)
OTHERS: tuple[ChannelScore, ...] = ("weight_activation", "activation", "magnitude")
"""Scores that are measured beside the estimates."""

Parts = dict[Axis, list[Tensor]]
"""Axis -> numbers of each layer, [size of the axis]; of ``hidden`` one tensor, for all places together."""


def estimates(model: Any, windows: Tensor, axes: Sequence[Axis]) -> dict[str, Parts]:
    """Estimate -> its numbers, in one pass over ``windows`` int64 [N, S]."""
    family = family_of(model)
    sizes = sizes_of(model.config, family)
    # of the parameters on the axes alone, the sum over windows
    total: dict[str, Tensor] = {}

    def parts(elements: Callable[[Tensor], Tensor]) -> Parts:
        found: Parts = {axis: reduced(model, family, sizes, axis, elements) for axis in axes}
        return {axis: [torch.stack(part).sum(0)] if axis == "hidden" else part for axis, part in found.items()}

    def product(parameter: Tensor) -> Tensor:
        return parameter.detach() * parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)

    found: dict[str, Parts] = {}

    def add(name: str, more: Mapping[Axis, list[Tensor]], finish: Callable[[Tensor], Tensor] = torch.clone) -> None:
        mine = found.setdefault(name, {axis: [torch.zeros_like(part) for part in each] for axis, each in more.items()})
        for axis, each in more.items():
            for known, part in zip(mine[axis], each, strict=True):
                known += finish(part)

    for window in windows:
        model.zero_grad(set_to_none=True)
        add_gradients(model, {"input_ids": window[None]})
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = parameter.grad.clone() if name not in total else total[name].add_(parameter.grad)
        slopes = parts(product)
        add("window slopes", slopes, torch.abs)
        add("window slopes squared", slopes, torch.square)
        add("window sizes", parts(lambda parameter: product(parameter).abs()))
        add("window squares", parts(lambda parameter: product(parameter).square()))
    for name, parameter in model.named_parameters():
        parameter.grad = total.get(name)
    add("slope", parts(product), torch.abs)
    add("sizes", parts(lambda parameter: product(parameter).abs()))
    model.zero_grad(set_to_none=True)
    return found


def scores_of(numbers: Parts, layers: int) -> Scores:
    """The numbers as scores of a cut that keeps all layers."""
    hidden = [torch.zeros_like(part) for part in numbers.get("hidden", []) for _ in range(layers)]
    return Scores(axes={axis: part for axis, part in numbers.items() if axis != "hidden"}, hidden=[*hidden, *numbers.get("hidden", [])])


def shapes(model: Any, axes: Sequence[Axis]) -> list[tuple[str, Axis, Sizes]]:
    """(case, axis, sizes) of each axis at each share; of heads as many of every group, which the groups may not allow."""
    family, found = family_of(model), []
    before = sizes_of(model.config, family)
    for axis in axes:
        for share in SHARES:
            number = round(before.group * share) * before.kv_heads if axis == "heads" else round(before.of(axis) * share)
            case = f"{axis} {number} of {before.of(axis)}"
            if number < before.of(axis) and case not in [other for other, *_ in found]:
                found.append((case, axis, target_sizes(model.config, family, {axis: number})))
    return found


def measure(case: Case, axes: Sequence[Axis], batch: int = 4) -> list[Row]:
    """The rows of one model."""
    model = load_model(case.folder, dtype=torch.float32).eval()
    before = sizes_of(model.config, family_of(model))
    needed: list[Axis] = [*axes, *(["kv_heads"] if "heads" in axes else [])]
    began = time.perf_counter()
    found = {name: scores_of(parts, before.layers) for name, parts in estimates(model, case.calibration, needed).items()}
    print(f"estimates: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    text = [{"input_ids": rows} for rows in case.calibration.split(batch)]
    found |= {score: scored(model, text, needed, score=score) for score in OTHERS}
    reference = list(log_probabilities(model, case.held_out))
    rows = []
    for name, _, after in shapes(model, axes):
        for system, scores in found.items():
            kept = kept_by(scores, list(range(before.layers)), before, after)
            kl = divergence(reference, cut(model, kept), case.held_out)
            rows.append(Row(name, system, "kl", kl, "nats"))
            print(f"{name} {system}: {kl:.4f}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--model", default=None, help="a model folder, with --text; default: the quickstart's teacher")
    parser.add_argument("--text", nargs="+", default=[], help="its first windows to calibrate on, its last to measure on")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--calibration", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window, with --model")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    if given.model is not None and not given.text:
        parser.error("--model needs --text, files to calibrate and to measure on")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="taylor-") as place:
        if given.model is None:
            case = scratch_case(Path(place), given.size, given.windows, given.calibration)
        else:
            case = case_of(given.model, given.text, given.windows, given.calibration, given.length)
        rows = measure(case, given.axes)
    report(rows, "KL after a cut, by estimates of its loss", given.json)


if __name__ == "__main__":
    main()
