"""What share of the decoder's weights a stage works on: said by the stage, kept in its facts, and too little of it refused."""

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
    """The decoder's weights of the stage's input, by its config."""
    config: Any = load_config(context.input, revision=context.input_revision)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return decoder_weights(meta_model(config))


def check_coverage(context: StageContext, *, allow_partial: bool, skip: Iterable[str] = ()) -> None:
    """Refuse a stage that works on the decoder's linears and would leave more than a little untouched, before it begins.

    Args:
        allow_partial: The user has agreed to less.
        skip: Patterns of linears that the user has named to be left.

    Raises:
        UserError: nothing would be touched, or less than 95 % without ``allow_partial``.
    """
    weights, patterns = input_weights(context), tuple(skip)
    named = [name for name in weights.linears if any(fnmatchcase(name, pattern) for pattern in patterns)]
    reached = [name for name in weights.linears if name not in set(named)]
    if reached and allow_partial:
        return
    if reason := coverage_refusal(weights, reached, named):
        allowed = f"; or allow it by name: allow_partial=true in stage {context.kind}" if reached else ""
        raise UserError(f"{context.name}: {reason}. Use a model of another family (docs/families.md has the table){allowed}")


def coverage_facts(context: StageContext, verb: str, names: Iterable[str]) -> dict[str, Any]:
    """Say what share of the weights was worked on; the same for the stage's facts: ``coverage`` (share, and what is left, in words).

    Args:
        verb: 'quantized', 'pruned'.
        names: The modules that were, by full name.

    Raises:
        UserError: none of the decoder's weights was.
    """
    weights = input_weights(context)
    share = weights.share(names)
    if not share:
        raise UserError(f"{context.name} touched none of the decoder's weights ({weights.left() or 'it has none'}); leave the stage out")
    left = f"; left as they are: {weights.left()}" if weights.left() else ""
    context.say(f"  {verb} {percent(share)} of the decoder's weights{left}")
    return {"coverage": {"share": share, "left": dict(weights.others)}}
