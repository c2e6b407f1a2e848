"""Tiny models of every family with an axis map, and an independent definition of what a cut leaves: the whole model with parts set to zero.

The names of modules stand here a second time, by hand, so that a wrong entry of the axis map is found.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

HIDDEN, FFN, HEADS, KEYS, LAYERS, WIDTH, VOCABULARY, POSITIONS = 24, 20, 6, 2, 4, 4, 48, 32
"""Sizes of every tiny model; GPT-2 and OPT have as many key/value heads as heads."""
_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": WIDTH,
    "max_position_embeddings": POSITIONS,
    # small enough that a mean over fewer channels meets it unchanged
    "rms_norm_eps": 1e-12,
}
_SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
_KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_COMMON, "sliding_window": 5, "tie_word_embeddings": True},
    "qwen2": {**_COMMON, "layer_types": _KINDS, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {**_COMMON, "tie_word_embeddings": True},
    "gemma2": {**_COMMON, "layer_types": _KINDS, "sliding_window": 5, "query_pre_attn_scalar": 6},
    "gemma3_text": {**_COMMON, "layer_types": _KINDS, "sliding_window": 5, "tie_word_embeddings": False},
    "phi3": {**_COMMON, "partial_rotary_factor": 0.5},
    "smollm3": {**_COMMON, "no_rope_layers": [1, 0, 1, 1]},
    "olmo2": _COMMON,
    "gpt2": {"n_embd": HIDDEN, "n_inner": FFN, "n_head": HEADS, "n_layer": LAYERS, "n_positions": POSITIONS},
    "opt": {
        "hidden_size": HIDDEN, "ffn_dim": FFN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "word_embed_proj_dim": HIDDEN,
        "max_position_embeddings": POSITIONS, "init_std": 0.2,
    },
}  # fmt: skip
LAYER_NORM = ("gpt2", "opt")
"""Families with LayerNorm, whose head_dim is hidden / heads."""
_NAMES = {
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj", ("transformer.wte", "transformer.wpe"), ("ln_1", "ln_2"), "transformer.ln_f"),
    "opt": (
        "model.decoder.layers", "self_attn.out_proj", "fc2", ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        ("self_attn_layer_norm", "final_layer_norm"), "model.decoder.final_layer_norm",
    ),
}  # fmt: skip
_LLAMA = ("model.layers", "self_attn.o_proj", "mlp.down_proj", ("model.embed_tokens",), (), "")


def tiny(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights, biases and norms, in eval mode."""
    config = AutoConfig.for_model(kind, **{**CONFIGS[kind], **_SPECIAL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # norms that differ by channel, so that a wrong channel is seen
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
    return model.eval()


def ids() -> Tensor:
    """[2, 12] tokens, more than the sliding windows are long."""
    return torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    """Logits of ``ids()``."""
    with torch.no_grad():
        return model(input_ids=ids()).logits


def masked_logits(model: Any, kept: Any) -> Tensor:
    """Logits of the whole model with everything that ``kept`` does not name set to zero: the definition of the cut model."""
    with _masked(model, kept):
        return logits(model)


@contextmanager
def _masked(model: Any, kept: Any) -> Iterator[None]:
    kind: str = model.config.model_type
    path, attention, ffn, tables, norms, final = _NAMES.get(kind, _LLAMA)
    with ExitStack() as hooks:
        layers = list(model.get_submodule(path))
        for index, layer in enumerate(layers):
            if index not in kept.layers:
                layer.forward = lambda hidden_states, *_a, **_k: hidden_states
                hooks.callback(layer.__dict__.pop, "forward")
                continue
            at = kept.layers.index(index)
            if kept.ffn is not None:
                _zero_inputs(hooks, layer.get_submodule(ffn), _mask(FFN, kept.ffn[at]))
            if kept.heads is not None:
                heads = _mask(HEADS, kept.heads[at]).repeat_interleave(WIDTH)
                _zero_inputs(hooks, layer.get_submodule(attention), heads)
                if kind == "olmo2":
                    # its norms are over all heads together: a head that is gone is not in their mean
                    _zero_output(hooks, layer.self_attn.q_proj, heads)
            if kept.kv_heads is not None and kind == "olmo2":
                _zero_output(hooks, layer.self_attn.k_proj, _mask(KEYS, kept.kv_heads[at]).repeat_interleave(WIDTH))
            if kept.hidden is not None:
                for name in (attention, ffn):
                    _zero_output(hooks, layer.get_submodule(name), _mask(HIDDEN, kept.hidden))
                for name in norms:
                    _norm_of_kept(hooks, layer.get_submodule(name), kept.hidden)
        if kept.hidden is not None:
            for table in tables:
                _zero_output(hooks, model.get_submodule(table), _mask(HIDDEN, kept.hidden))
            if final:
                _norm_of_kept(hooks, model.get_submodule(final), kept.hidden)
        yield


def _mask(size: int, kept: Sequence[int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.float64)
    mask[list(kept)] = 1
    return mask


def _zero_inputs(hooks: ExitStack, module: Any, mask: Tensor) -> None:
    hooks.callback(module.register_forward_pre_hook(lambda _m, given: (given[0] * mask.to(given[0].dtype), *given[1:])).remove)


def _zero_output(hooks: ExitStack, module: Any, mask: Tensor) -> None:
    hooks.callback(module.register_forward_hook(lambda _m, _i, output: output * mask.to(output.dtype)).remove)


def _norm_of_kept(hooks: ExitStack, norm: Any, kept: Sequence[int]) -> None:
    """LayerNorm over the kept channels alone, with zeros elsewhere: what a cut leaves of it, which no mask of its inputs gives."""

    def forward(_module: Any, given: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        rows = torch.tensor(list(kept))
        inner = nn.functional.layer_norm(given[0][..., rows], [len(rows)], norm.weight[rows], norm.bias[rows], norm.eps)
        return torch.zeros_like(given[0]).index_copy(-1, rows, inner)

    hooks.callback(norm.register_forward_hook(forward).remove)


def parameters_of(config: Any) -> int:
    """Number of parameters by formula, from the sizes in a config."""
    kind: str = config.model_type
    if kind in LAYER_NORM:
        hidden, layers = config.hidden_size, config.num_hidden_layers
        ffn = config.n_inner if kind == "gpt2" else config.ffn_dim
        inner = 4 * hidden * hidden + 4 * hidden + 2 * hidden * ffn + ffn + hidden + 4 * hidden
        # OPT's positions begin at 2; the head is tied
        return VOCABULARY * hidden + (POSITIONS + (2 if kind == "opt" else 0)) * hidden + layers * inner + 2 * hidden
    hidden, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    inner = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * ffn
    inner += hidden * {"gemma2": 4, "gemma3_text": 4}.get(kind, 2)
    if kind in ("qwen3", "gemma3_text"):
        inner += 2 * config.head_dim
    if kind == "olmo2":
        inner += queries + keys
    if kind == "llama":
        inner += queries + 2 * keys + hidden + 2 * ffn + hidden
    if kind == "qwen2":
        inner += queries + 2 * keys
    return VOCABULARY * hidden * (1 if config.tie_word_embeddings else 2) + layers * inner + hidden
