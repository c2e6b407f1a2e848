"""Share of the decoder's weights that a stage works on: printed, recorded in the facts of the stage, and refused when it is too small."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ...models.capabilities import coverage_refusal, decoder_weights, percent
from ...models.common.errors import UserError
from ...models.folder.loading import load_config, meta_model
from .context import StageContext

if TYPE_CHECKING:
    from ...models.capabilities import DecoderWeights


def input_weights(context: StageContext) -> "DecoderWeights":
    """The decoder weights of the stage's input, derived from its config alone."""
    config: Any = load_config(context.input, revision=context.input_revision)
    if hasattr(config, "quantization_config"):
        # count the weights of the unpacked model
        del config.quantization_config
    return decoder_weights(meta_model(config))


def check_coverage(context: StageContext, *, allow_partial: bool, skip: Iterable[str] = ()) -> None:
    """Refuse, before it begins, a stage that would leave a large part of the decoder's weights unchanged.

    Args:
        allow_partial: The user accepts a smaller share.
        skip: Patterns (fnmatch) of linears that the user excludes.

    Raises:
        UserError: no weight would be changed, or less than 95 % of them without ``allow_partial``.
    """
    weights, patterns = input_weights(context), tuple(skip)
    named = [name for name in weights.linears if any(fnmatchcase(name, pattern) for pattern in patterns)]
    excluded = set(named)
    # what is left after the user's own exclusions; the refusal words these two apart
    reached = [name for name in weights.linears if name not in excluded]
    # a stage that reaches no linear at all is refused even with allow_partial
    if reached and allow_partial:
        return
    if reason := coverage_refusal(weights, reached, named):
        allowed = f"; or allow it by name: allow_partial=true in stage {context.kind}" if reached else ""
        raise UserError(f"{context.name}: {reason}. Use a model of another family (docs/families.md has the table){allowed}")


def coverage_facts(context: StageContext, verb: str, names: Iterable[str]) -> dict[str, Any]:
    """Print the share of the weights that was changed, and return ``coverage`` for the stage's facts: ``share``, and ``left`` by kind.

    Args:
        verb: 'quantized', 'pruned'.
        names: Full names of the changed modules.

    Raises:
        UserError: none of the decoder's weights was changed.
    """
    weights = input_weights(context)
    share = weights.share(names)
    if not share:
        raise UserError(f"{context.name} touched none of the decoder's weights ({weights.left() or 'it has none'}); leave the stage out")
    left = f"; left as they are: {weights.left()}" if weights.left() else ""
    context.say(f"  {verb} {percent(share)} of the decoder's weights{left}")
    return {"coverage": {"share": share, "left": dict(weights.others)}}
