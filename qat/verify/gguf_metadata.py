"""Compares a GGUF file's metadata with the model's config, tokenizer and record, independently of the exporter's code.

A wrong number of heads or a wrong rope base changes every token while each weight is right, so the metadata is checked like weights.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ...models.common.errors import UserError
from ...models.folder.folder_checks import read_json
from ...models.folder.loading import load_tokenizer
from ...models.folder.structure import model_structure, plain_config
from ..readers.gguf_model import GgufModel
from ..readers.tensors import Decoded
from ..spec import QuantSpec

_FIELDS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
"""Metadata key -> possible names of the config's field."""
_SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
"""Key after ``general.sampling.`` -> name in generation_config.json."""


def gguf_problems(model: GgufModel, record: dict[str, Any], *, codes: bool = True) -> list[str]:
    """Return what disagrees, one sentence each; [] if nothing does.

    Args:
        model: The opened file, with config and tokenizer in its folder.
        record: Content of ``decoct.json``; {} if there is none.
        codes: Also decode every module and check that its codes are in the recorded range (as ``exactness.prove`` does).

    Raises:
        UserError: the folder's config or tokenizer cannot be read.
    """
    folder, name = model.path.parent, model.path.name
    problems = [f"{name}: {problem}" for problem in model_structure(folder, model.shapes()).differences(model.shapes())]
    config: Any = plain_config(folder)
    problems += [f"{name}: {problem}" for problem in [*_number_problems(model, config), *_rope_problems(model, config)]]
    problems += [f"{name}: {problem}" for problem in _token_problems(model, folder)]
    return problems + _record_problems(model, record, codes)


def _number_problems(model: GgufModel, config: Any) -> list[str]:
    problems = []
    for key, fields in _FIELDS.items():
        wanted = next((value for field in fields if (value := getattr(config, field, None)) is not None), None)
        if key == "feed_forward_length" and wanted is None:
            # GPT-2's default when n_inner is None
            wanted = 4 * config.n_embd
        problems += _differing(key, model.number(key), wanted)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if model.architecture != "gpt2":
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            problems += _differing(key, model.number(key), width)
    # llama.cpp's other architectures have no window, or a config with one is refused
    if model.architecture in ("gemma2", "gemma3"):
        problems += _differing("attention.sliding_window", model.number("attention.sliding_window"), config.sliding_window)
    context = model.number("context_length")
    # less is sound: an exporter may limit the context to a window
    if not isinstance(context, int) or not 0 < context <= config.max_position_embeddings:
        problems.append(f"{model.architecture}.context_length is {context!r}, config.json has {config.max_position_embeddings} positions")
    return problems


def _differing(key: str, found: Any, wanted: Any) -> list[str]:
    with np.errstate(over="ignore"):  # 1e308 in a config overflows to infinity in fp32, which equals no number of a file
        same = (
            found is None
            if wanted is None
            else found is not None and found == (np.float32(wanted) if isinstance(wanted, float) else wanted)
        )
    return [] if same else [f"{key} is {found!r}, config.json has {wanted!r}"]


def _rope_problems(model: GgufModel, config: Any) -> list[str]:
    if model.architecture == "gpt2":
        return []
    rope = config.rope_parameters
    # Gemma 3 has parameters per kind of layer
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    scaled = kind in ("linear", "yarn")
    trained = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    problems = _differing("rope.freq_base", model.number("rope.freq_base"), float(rope["rope_theta"]))
    problems += _differing("rope.scaling.type", model.number("rope.scaling.type"), kind if scaled else None)
    problems += _differing("rope.scaling.factor", model.number("rope.scaling.factor"), float(rope["factor"]) if scaled else None)
    problems += _differing("rope.scaling.original_context_length", model.number("rope.scaling.original_context_length"), trained)
    stored = model.file.tensors.get("rope_freqs.weight")
    if kind != "llama3" or stored is None:
        return problems + ([] if (kind == "llama3") == (stored is not None) else [f"rope_freqs.weight does not fit rope_type {kind!r}"])
    found = model.file.read("rope_freqs.weight")
    wanted = np.array([_llama3_factor(rope, pair, 2 * found.size) for pair in range(found.size)], np.float32)
    right = found.shape == (config.head_dim // 2,) and np.array_equal(found, wanted)
    return problems + ([] if right else ["rope_freqs.weight does not match rope_parameters of config.json"])


def _llama3_factor(rope: dict[str, Any], pair: int, width: int) -> float:
    """Return the divisor of a channel pair's frequency (Llama 3.1: long wavelengths fully scaled, short ones not at all)."""
    turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (2 * pair / width))
    if turns > rope["high_freq_factor"]:
        return 1.0
    if turns < rope["low_freq_factor"]:
        return rope["factor"]
    share = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    return 1.0 / ((1 - share) / rope["factor"] + share)


def _token_problems(model: GgufModel, folder: Path) -> list[str]:
    tokens = model.file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return ["the tokenizer is missing (tokenizer.ggml.tokens)"]
    rows = next((shape[0] for name, shape in model.shapes().items() if name.endswith(("embed_tokens.weight", "wte.weight"))), 0)
    # the checks below look up tokens by row
    if len(tokens) != rows:
        return [f"{len(tokens):,} tokens for {rows:,} rows of the embedding"]
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        return [str(error)]
    wrong = [(token, index) for token, index in tokenizer.get_vocab().items() if index >= rows or tokens[index] != token]
    problems = [f"token {wrong[0][1]} differs from that in tokenizer.json ({len(wrong):,} differ)"] if wrong else []
    for key, index in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        found = model.file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        # the model may have an end of text that the tokenizer lacks
        problems += [] if key == "eos" and index is None else _differing(f"{key}_token_id", found, index)
    return problems + _generation_problems(model, folder)


def _generation_problems(model: GgufModel, folder: Path) -> list[str]:
    """Return differences of sampling and end tokens from generation_config.json. Missing entries are accepted: older files lack them."""
    file = folder / "generation_config.json"
    given, config = (read_json(file) if file.is_file() else {}), plain_config(folder)
    problems = []
    for key, name in _SAMPLING.items():
        found, wanted = model.file.metadata.get(f"general.sampling.{key}"), given.get(name)
        # both in fp32, which is what the file holds
        if found is not None and (wanted is None or np.float32(found) != np.float32(wanted)):
            problems.append(f"general.sampling.{key} is {found!r}, {file.name} has {wanted!r}")
    ends = given.get("eos_token_id", getattr(config, "eos_token_id", None))
    ends = ends if isinstance(ends, list) else [ends]
    for key in ("eot", "eom"):
        found = model.file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if found is not None and found not in ends:
            problems.append(f"{key}_token_id is {found!r}, which is no end of text in {file.name}")
    return problems


def _record_problems(model: GgufModel, record: dict[str, Any], codes: bool) -> list[str]:
    quant = record.get("quant")
    if quant is None:
        # a file of another tool has no record to compare with
        return [f"{name} is packed, but decoct.json records no quantization" for name in model.modules[:1]] if record else []
    try:
        spec, modules = QuantSpec.from_json(quant["spec"]), set(quant["modules"])
    except (TypeError, KeyError, ValueError) as error:
        return [f"decoct.json: the entry 'quant' cannot be read ({error})"]
    if modules != set(model.modules):
        return ["the packed modules are not those that decoct.json lists"]
    # modules with their own scheme are skipped: ``spec`` is the range of the others
    usual = (name for name in model.modules if name not in (quant.get("own_specs") or {})) if codes else ()
    # one sentence is enough
    return [problem for name in usual for problem in code_problems(name, model.decode(name), spec)][:1]


def code_problems(name: str, module: Decoded, spec: QuantSpec) -> list[str]:
    """Return a sentence if a module's codes are outside the range of its scheme; else []."""
    # the fields of a super-block, and of MXFP4, are as wide as their codes, so they cannot be out of range
    if spec.super_block or spec.kind == "mxfp4":
        return []
    blocks = module.codes.reshape(module.scales.size, -1).astype(np.int16)
    if spec.symmetric:
        # Q2_0 stores codes and scales with flipped signs
        blocks = np.where(module.scales.reshape(-1, 1) < 0, -blocks, blocks)
        inside = spec.qmin <= int(blocks.min()) <= int(blocks.max()) <= spec.qmax
    else:
        # the exporter may shift the codes of a block, so only their spread is fixed by the scheme
        inside = int((blocks.max(1) - blocks.min(1)).max()) <= spec.qmax - spec.qmin
    return [] if inside else [f"{name} has codes outside {spec.qmin}..{spec.qmax}"]
