"""What a plan says of widths that the stage will choose (``weights.bits: auto``): the sizes, and widths that stand in for the choice.

Sensitivity is not known before the run. The stand-in takes every weight to be equally sensitive, with an error that falls by four per
bit. It meets the budget as the choice will, so sizes of folders and exports are right up to the size of a matrix.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...qat.auto_weights import LEFT_ALONE
from ...qat.bit_assignment import DRAWS, Problem, problem_of, scheme_fields
from ...qat.stored_bytes import packed_matrix_bytes
from .shapes import ModelShape
from .units import amount, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...qat.auto_weights import WeightSettings
    from ...qat.spec import QuantSpec


def stand_in(settings: Any, shape: ModelShape) -> tuple[Any, str]:
    """Return the settings of a quantizing stage with widths in place of a choice, and what the plan says of it ('' without a choice).

    Raises:
        BudgetError: the budget cannot be met, or holds the model as it is; the message begins with ``budget=``.
        ValueError: a pattern of the scheme changes nothing.
    """
    auto: WeightSettings | None = settings.auto
    if auto is None:
        return settings, ""
    problem = problem_of(auto, settings.scheme_with(auto.base), shape.linears, _rest(settings, auto, shape))
    losses = [[sum(_error(name, spec, shape) for name, spec in one.items()) for one in choice.specs] for choice in problem.free]
    specs = problem.specs(problem.solve(losses))
    ordered = {name: specs[name] for name in shape.linears if name in specs}
    weights, overrides, left = scheme_fields(ordered, shape.linears)
    planned = replace(settings, weights=weights, overrides=overrides, skip=(*settings.skip, *left))
    return planned, _words(auto, problem, shape)


def _error(name: str, spec: "QuantSpec | None", shape: ModelShape) -> float:
    """Return the squared error of a matrix, up to a factor: that of its rounding steps."""
    rows, columns = shape.linears[name]
    return 0.0 if spec is None else rows * columns * 0.25**spec.bits


def _rest(settings: Any, auto: "WeightSettings", shape: ModelShape) -> int:
    """Return the bytes of everything but the linears to quantize, as served."""
    scheme = settings.scheme_with(auto.base)
    chosen = scheme.of_linears(shape.linears)
    ends: Mapping[str, QuantSpec] = {
        name: change.applied(auto.base)
        for change, name in ((scheme.embedding, shape.embedding), (scheme.head, shape.head))
        if change and name
    }
    modules = {name.removesuffix(".weight"): sizes for name, sizes in shape.tensors.items()}
    return sum(packed_matrix_bytes(sizes, ends.get(name)) for name, sizes in modules.items() if name not in chosen)


def _words(auto: "WeightSettings", problem: Problem, shape: ModelShape) -> str:
    """Return the sizes between which the stage chooses, in one sentence."""
    widths = auto.given_widths
    named = f"{', '.join(map(str, widths[:-1]))} and {widths[-1]}"
    linears = sum(len(choice.modules) for choice in problem.choices)
    tokens = auto.sensitivity_tokens or 0
    exact = ", and from each group on at each width" if auto.sensitivity == "exact" else ""
    budget = f"the budget, {auto.limit.words()}, is {_both(problem, problem.room)}"
    served = f"as served with everything else {size(problem.rest + problem.room)}"
    return (
        f"chooses among {named} bits for {len(problem.free)} groups of {linears} linears: from {_both(problem, problem.least)} to "
        f"{_both(problem, problem.most)}; {budget}, {served}; sensitivity ({auto.sensitivity}) on at most {amount(tokens)} tokens of "
        f"training text, with the whole model in fp32 ({size(4 * shape.parameters)}), in the time of about {_passes(auto)} forward "
        f"passes{exact}"
    )


def _both(problem: Problem, count: int) -> str:
    return f"{size(count)} ({problem.bits(count):.4g} bits per weight)"


def _passes(auto: "WeightSettings") -> int:
    """Return the forward passes that take as long as the cheaper estimates and the assignments that are tried."""
    rounded = sum(width != LEFT_ALONE for width in auto.given_widths)
    # forward, and forward again layer by layer; back once per direction; a product per width; two optima, and each width alone
    return 2 + DRAWS + rounded + 2 + rounded
