"""Builds students from some layers of a teacher, or with random weights from a config; and drops vocabulary rows without a token."""

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .common.errors import UserError
from .folder.config_checks import check_numbers, refused_config, unknown_kind
from .kept_layers import kept_config
from .kept_layers import kept_layers as kept_layers
from .pruning.kept import Kept
from .pruning.structured import cut
from .tokenizer.vocabulary import check_head_rows, effective_vocab

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of a published config.json that transformers accepts under another name, or that say nothing about the architecture.
_FOREIGN_FIELDS = {"rope_theta", "rope_scaling", "rope_interleaved", "torch_dtype", "_name_or_path", "model_type"}


@torch.no_grad()
def student_by_keeping(teacher_model: "PreTrainedModel", layers: int | Sequence[int]) -> tuple["PreTrainedModel", list[int]]:
    """A student made of decoder layers of the teacher, embeddings, final norm and head.

    Args:
        teacher_model: A model of a family with an axis map; not changed. If it is on the meta device, the student is too.
        layers: Number of decoder layers kept, evenly spread, or their indices, ascending; see ``kept_layers``.

    Returns:
        (student, kept): fp32 copy on the teacher's device in eval mode with its own config; ascending indices of the teacher's layers.

    Raises:
        UserError: the family is unknown, the number of layers impossible or a layer not there, or layers have different shapes.
    """
    # its refusals, before anything is built
    _, kept = kept_config(teacher_model.config, layers)
    # fp32 whatever the teacher has: these are the student's master weights
    return cut(teacher_model, Kept(layers=kept), dtype=torch.float32), kept


def student_from_config(config: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", seed: int) -> "PreTrainedModel":
    """A student with random weights, fp32, on the current default device, in eval mode as from ``from_pretrained``.

    Args:
        config: ``model_type`` and fields of its transformers config. ``vocab_size`` and the special tokens come from the tokenizer.
        tokenizer: The embedding gets one row per id of it, without padding rows.
        seed: Seed of the initial weights; the global generators are not changed.

    Raises:
        UserError: ``model_type`` or a field is unknown (the message has the nearest valid one), or transformers refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    check_numbers(config, "student.config")
    fields = _checked_fields(config, effective_vocab(tokenizer))
    # setdefault: special tokens that the user names stay
    for name in _SPECIAL_TOKENS:
        fields.setdefault(name, getattr(tokenizer, name))
    # weights are drawn from the global generators, which must be afterwards as before
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            built = AutoConfig.for_model(config["model_type"], **fields)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(built, dtype=torch.float32)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise UserError(refused_config(error)) from error
    return model.eval()


def _checked_fields(config: dict[str, Any], v_eff: int) -> dict[str, Any]:
    """Checks the names of the config's fields, as transformers would silently ignore a mistyped one, and sets ``vocab_size``."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.get("model_type")
    # the class has to be known as a causal model: from_config would otherwise fail with a list of all classes
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(unknown_kind(kind))
    config_class: Any = CONFIG_MAPPING[kind]
    # attribute_map has further names of the same fields, such as hidden_size for GPT-2's n_embd
    known = {*config_class().to_dict(), *config_class.attribute_map, *_FOREIGN_FIELDS}
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"student.config.{name} is not a field of {config_class.__name__}{hint}")
    # rows that no token uses would be trained for nothing
    if config.get("vocab_size", v_eff) != v_eff:
        raise UserError(
            f"student.config.vocab_size={config['vocab_size']} differs from the tokenizer's {v_eff} tokens; leave it out, "
            "the student gets one row per token"
        )
    return {**{name: value for name, value in config.items() if name != "model_type"}, "vocab_size": v_eff}


@torch.no_grad()
def trim_vocabulary(model: "PreTrainedModel", v_eff: int) -> int:
    """Drops the rows of embedding and head beyond ``v_eff``, in place; tied tensors stay tied.

    Returns:
        The number of dropped rows (0 without padding).

    Raises:
        UserError: the model has fewer than ``v_eff`` rows.
    """
    check_head_rows(model, v_eff)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    rows = embedding.weight.shape[0]
    # asked before the embedding gets a new parameter
    tied = head.weight is embedding.weight
    embedding.weight = _first_rows(embedding.weight, v_eff)
    embedding.num_embeddings = v_eff
    # only a hint for gradients; torch refuses an index beyond the table
    if embedding.padding_idx is not None and embedding.padding_idx >= v_eff:
        embedding.padding_idx = None
    # one parameter again, or training would untie them
    head.weight = embedding.weight if tied else _first_rows(head.weight, v_eff)
    head.out_features = v_eff
    if getattr(head, "bias", None) is not None:
        head.bias = _first_rows(head.bias, v_eff)
    _set_vocabulary(model, v_eff)
    return rows - v_eff


def _first_rows(parameter: nn.Parameter, rows: int) -> nn.Parameter:
    # nothing to drop: the parameter itself stays, and with it the tie
    if parameter.shape[0] == rows:
        return parameter
    return nn.Parameter(parameter[:rows].clone(), requires_grad=parameter.requires_grad)


def _set_vocabulary(model: "PreTrainedModel", v_eff: int) -> None:
    """Sets ``v_eff`` in configs and cached attributes, and special tokens on dropped rows to None."""
    text: Any = model.config.get_text_config()
    text.vocab_size = v_eff
    for module in model.modules():
        if isinstance(getattr(module, "vocab_size", None), int):
            module.vocab_size = v_eff  # pyright: ignore[reportArgumentType] - a plain int, not a tensor
    # an id of a dropped row would index beyond the table
    for holder in (text, model.generation_config):
        for name in _SPECIAL_TOKENS:
            token = getattr(holder, name, None)
            if isinstance(token, int) and token >= v_eff:
                setattr(holder, name, None)
