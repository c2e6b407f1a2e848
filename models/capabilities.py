"""Decides what decoct can do with a model, with reasons, from its modules and config on the meta device, before any weight is read.

It has two sources. The modules show what a stage reaches: linears of decoder layers, but not GPT-2's ``Conv1D`` or the experts that
transformers keeps in one three-dimensional parameter. Properties that only show when a model runs (documents that see each other, targets
that leak) were measured once per architecture of transformers in tiny form (``family_facts.json``, made by ``benchmarks/families.py``).
Models that are not in that list are checked when their weights are loaded.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from .common.errors import UserError
from .common.light_configs import transformers_version
from .families import FAMILIES, backbone_and_head, decoder_layers, decoder_linears, is_plain_linear, text_config
from .family_map import no_map

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

LEAST_COVERED = 0.95
"""Least share of the decoder's weights that a stage must reach, unless its setting ``allow_partial`` is true."""
ACTIONS = ("measure", "distil", "bf16 teacher", "packing", "keep layers", "prune channels", "prune weights", "rtn", "gptq", "qat", "export")
"""measure = perplexity and KL, which every run ends with; distil = training of any kind; bf16 teacher = held in bf16 while it teaches;
packing = several documents in one window; export = to any packed format."""
# actions that work on the weights of linears, so that their share counts
_WEIGHT_ACTIONS = ("prune weights", "rtn", "gptq", "qat")


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """The decoder's weights: every parameter of two or more dimensions except embeddings (of tokens, positions) and the output head."""

    total: int
    linears: Mapping[str, int]
    """Elements of the linears of the decoder layers by full name; pruning and quantization work on these."""
    others: Mapping[str, int]
    """All other weights: description -> elements, the largest first."""

    def share(self, names: Iterable[str] | None = None) -> float:
        """Share of the weights in these linears (by default in all linears); 0.0 for a model without decoder weights."""
        # dict.fromkeys: a name that is given twice counts once
        chosen = self.linears if names is None else [name for name in dict.fromkeys(names) if name in self.linears]
        return sum(self.linears[name] for name in chosen) / self.total if self.total else 0.0

    def left(self) -> str:
        """The other weights in words: '97.1% experts in 3-dimensional parameters (MixtralExperts)'; '' if there are none."""
        # three kinds are enough for a sentence
        return ", ".join(f"{percent(count / self.total)} {words}" for words, count in list(self.others.items())[:3])


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """The answers for one model."""

    model_type: str
    weights: DecoderWeights
    reasons: Mapping[str, str]
    """Action -> reason why it is not supported; actions without a reason are supported."""

    def refusal(self, action: str) -> str | None:
        """A sentence with the family and the reason; None if the action is supported."""
        reason = self.reasons.get(action)
        return None if reason is None else f"model type {self.model_type!r}: {reason}"

    def partial(self, action: str) -> str | None:
        """``refusal`` for a stage that may leave weights out: also None if it reaches some of them."""
        # a reason that is only about coverage does not hold where leaving weights out is agreed
        return None if self.weights.linears and self.reasons.get(action) == _uncovered(self.weights) else self.refusal(action)


def capabilities(model: "PreTrainedModel", measured: Mapping[str, str] | None = None) -> Capabilities:
    """The answers for ``model``, on any device, also meta; nothing is run.

    Args:
        model: The model.
        measured: Results of running its family: action -> reason why it is not supported; None = the recorded ones.
    """
    return answers(
        model.config,
        decoder_weights(model),
        # linears with a forward of their own, such as routers, compute something else than a product with their weight
        special={name.rpartition(".")[2]: type(linear).__name__ for name, linear in _special(model).items()},
        headless=_without_head(model),
        layered=bool(decoder_layers(model)),
        tensors=[name for name, _ in model.named_parameters()],
        measured=measured,
    )


def answers(
    config: "PreTrainedConfig",
    weights: DecoderWeights,
    *,
    special: Mapping[str, str],
    headless: str | None,
    layered: bool,
    tensors: Iterable[str] = (),
    measured: Mapping[str, str] | None = None,
) -> Capabilities:
    """The answers for a model of which these facts are known. It imports no torch.

    Args:
        config: Config of the model.
        weights: Its decoder's weights.
        special: Linears with a forward of their own: last part of the name -> class.
        headless: Why backbone and head cannot be separated; None if they can.
        layered: Whether its decoder layers are found.
        tensors: Names of its parameters, which the axis map of its family must have; () if they are known to be there.
        measured: As for ``capabilities``.
    """
    kind: str = text_config(config).model_type
    # a copy: what follows adds reasons of this one model
    reasons = dict(measured_reasons(kind) if measured is None else measured)
    if special:
        parts = ", ".join(f"{leaf} ({kind})" for leaf, kind in special.items())
        patterns = ", ".join(f"'*.{leaf}'" for leaf in special)
        reasons |= dict.fromkeys(("rtn", "gptq", "qat"), f"{parts} are linears with a forward of their own; add {patterns} to skip")
    future = future_setting(config)
    if reason := headless or (future and f"it sees later tokens: {future}"):
        # neither training nor a perplexity means anything for such a model
        reasons |= dict.fromkeys(("measure", "distil"), reason)
    family = FAMILIES.get(config.model_type)
    if family is None:
        reasons |= dict.fromkeys(("keep layers", "prune channels"), no_map(config))
    elif missing := family.missing(tensors):
        reasons |= dict.fromkeys(("keep layers", "prune channels"), f"its axis map does not have {', '.join(missing)}")
    if weights.share() < LEAST_COVERED:
        # replaces the reasons above: where little is covered, this is the first problem
        reasons |= dict.fromkeys(_WEIGHT_ACTIONS, _uncovered(weights))
    if not layered:
        # setdefault: a reason that is known already is closer to the cause
        reasons.setdefault("gptq", "its decoder layers are not found")
    return Capabilities(model_type=kind, weights=weights, reasons=reasons)


def decoder_weights(model: "PreTrainedModel") -> DecoderWeights:
    """The weights of a plain model that stages reach, and those that they do not. Shared weights count once."""
    from torch import nn

    linears = decoder_linears(model)
    # by identity: a shared weight is one tensor under several names
    reached = {id(linear.weight): name for name, linear in linears.items()}
    # tables of tokens and the head have settings of their own, and are no decoder weights
    outer = {id(getattr(module, "weight", None)) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    seen: set[int] = set()
    covered: dict[str, int] = {}
    others: Counter[str] = Counter()
    # by module, because the class of the owner shows what kind of weight it is
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            # vectors (norms, biases) are neither pruned nor rounded
            if id(parameter) in seen or parameter.ndim < 2 or id(parameter) in outer or isinstance(module, nn.Embedding):
                continue
            seen.add(id(parameter))
            if (name := reached.get(id(parameter))) is not None:
                covered[name] = parameter.numel()
            else:
                others[_words(module, key, parameter)] += parameter.numel()
    return DecoderWeights(total=sum(covered.values()) + others.total(), linears=covered, others=dict(others.most_common()))


def _words(module: "nn.Module", key: str, parameter: "Tensor") -> str:
    from torch import nn

    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return "linears outside its decoder layers"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolutions"
    if kind == "Conv1D":
        return "Conv1D layers, whose weights are [in, out]"
    if parameter.ndim == 3 and "expert" in kind.lower():
        return f"experts in 3-dimensional parameters ({kind})"
    return f"{kind}.{key}, of {parameter.ndim} dimensions and no nn.Linear"


def _uncovered(weights: DecoderWeights) -> str:
    if not weights.linears:
        return f"none of its decoder weights is in an nn.Linear: {weights.left() or 'its decoder layers are not found'}"
    return f"only {percent(weights.share())} of its decoder weights are in nn.Linear; {weights.left()}"


def percent(share: float) -> str:
    """A share as '96.4%'. Below 1 it is at most 99.9%, so that '100%' always means all."""
    return "100%" if share >= 1 else f"{min(share, 0.999):.1%}"


def coverage_refusal(weights: DecoderWeights, reached: Iterable[str], named: Iterable[str] = ()) -> str | None:
    """Why a stage that works on the linears ``reached`` leaves out too much; None if it reaches enough.

    Linears that the user has named to be left out (``named``) count as reached.
    """
    # what a user leaves out by name is agreed to
    if weights.total and weights.share([*reached, *named]) >= LEAST_COVERED:
        return None
    return f"{_uncovered(weights)}; less than {LEAST_COVERED:.0%} is refused"


def future_setting(config: "PreTrainedConfig") -> str | None:
    """The setting by which a model sees later tokens; None if its config has no such setting."""
    text = text_config(config)
    # true, or the word that some families have for it
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return f"config.json has use_bidirectional_attention={text.use_bidirectional_attention!r}"
    if getattr(text, "is_causal", True) is False:
        return "config.json has is_causal=false"
    # encoders that can also be decoders see later tokens unless is_decoder is set
    if getattr(text, "is_decoder", None) is False and text.model_type in _facts()["encoders"]:
        return "config.json has is_decoder=false"
    return None


def _special(model: "PreTrainedModel") -> "dict[str, nn.Linear]":
    return {name: linear for name, linear in decoder_linears(model).items() if not is_plain_linear(linear)}


def _without_head(model: "PreTrainedModel") -> str | None:
    try:
        backbone_and_head(model)
    except UserError as error:
        # the first half of the message of backbone_and_head: the reason without the advice
        return str(error).partition(", which losses")[0]
    except Exception as error:  # transformers' own code, of any family
        return f"its backbone and head cannot be separated ({type(error).__name__})"
    return None


def measured_reasons(model_type: str) -> Mapping[str, str]:
    """Results of running the family in tiny form: action -> reason why it is not supported.

    It is {} for families that were not run, or not with this version of transformers.
    """
    facts = _facts()
    # another release may have changed the family's code, so its results no longer count; such models are checked when they are loaded
    return facts["reasons"].get(model_type, {}) if facts["transformers"] == _minor_version() else {}


@cache
def _facts() -> dict[str, Any]:
    return json.loads(resources.files("decoct.models").joinpath("family_facts.json").read_text(encoding="utf-8"))


def _minor_version() -> str:
    return ".".join(transformers_version().split(".")[:2])
