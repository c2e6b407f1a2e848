"""Keys and values on their way into the cache: every family, every attention, with a cache and without one, with gradients and without."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from decoct.models.batches import backbone_inputs
from decoct.models.common.errors import UserError
from decoct.qat.fake_quant import fake_quant_activation, static_scale
from decoct.qat.layers.kv_cache_hooks import cached_attentions, round_cache, round_cache_as_stored
from decoct.qat.spec import ActivationSpec

INT8 = ActivationSpec()
FP8 = ActivationSpec(kind="fp8_e4m3")
STATIC = ActivationSpec(kind="fp8_e4m3", scaling="static")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt2")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 61, "max_position_embeddings": 64, "initializer_range": 0.4,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61, "initializer_range": 0.4} | {
    f"{name}_token_id": 0 for name in ("pad", "bos", "eos")
}


def make(kind: str = "llama", attention: str = "sdpa", **config: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        **(GPT2 if kind == "gpt2" else SIZES),
        **({"sliding_window": 5} if kind in ("mistral", "gemma2") else {}),
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32, attn_implementation=attention)
    return model.eval()


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), use_cache=False, **more).logits


def eager_by_hand(model: PreTrainedModel, spec: ActivationSpec, x: Tensor) -> Tensor:
    """Logits of a small Llama whose attention is written out, keys and values rounded by ``fake_quant_activation``."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    body: Any = model.base_model
    hidden = body.embed_tokens(x)
    rotary = body.rotary_emb(hidden, position_ids=torch.arange(x.shape[1])[None])
    blind = torch.triu(torch.full((x.shape[1], x.shape[1]), -torch.inf), diagonal=1)
    for layer in body.layers:
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            projection(normed).view(*x.shape, -1, 8).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        k, v = (fake_quant_activation(part, spec).repeat_interleave(2, dim=1) for part in (k, v))
        weights = (q @ k.transpose(2, 3) / 8**0.5 + blind).softmax(-1)
        hidden = hidden + attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    head: Any = model.get_output_embeddings()
    return head(body.norm(hidden))


@pytest.mark.parametrize("spec", [INT8, FP8, ActivationSpec(symmetric=False)], ids=["int8", "fp8", "asymmetric"])
def test_it_is_the_attention_written_out_with_rounded_keys_and_values(spec: ActivationSpec) -> None:
    model = make(attention="eager")
    plain = logits(model)
    cache = round_cache(model, spec)
    with torch.no_grad():
        expected = eager_by_hand(make(), spec, ids())
    assert torch.allclose(logits(model), expected, atol=2e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)
    cache.enable(False)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_attention_of_every_family_reads_the_same_rounded_values(kind: str) -> None:
    eager, sdpa = make(kind, "eager"), make(kind, "sdpa")
    plain = logits(eager)
    for model in (eager, sdpa):
        assert len(round_cache(model, FP8).rounders) == 4
    assert torch.allclose(logits(eager), logits(sdpa), atol=1e-4)
    assert not torch.allclose(logits(eager), plain, atol=1e-3)


@pytest.mark.parametrize(("kind", "attention"), [*itertools.product(FAMILIES, ("eager", "sdpa")), ("gemma2", "eager")])
def test_with_a_cache_each_value_is_rounded_once(kind: str, attention: str) -> None:
    """Token by token out of the cache is the whole text at once; what the cache holds is on the lattice."""
    model = make(kind, attention)
    whole = None
    seen: list[Tensor] = []
    cache = round_cache(model, INT8)
    for rounder in cache.rounders.values():
        rounder.round = lambda x, its=rounder.round: seen.append(x) or its(x)  # pyright: ignore[reportAttributeAccessIssue]
    whole = logits(model)
    assert len(seen) == 4
    seen.clear()
    store, pieces = DynamicCache(config=model.config), ids().split([5, 1, 1, 5], dim=1)
    with torch.no_grad():
        parts = [model(input_ids=piece, past_key_values=store, use_cache=True).logits for piece in pieces]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)
    assert sum(x.shape[2] for x in seen) == 4 * 12, "what is in the cache is not rounded again"
    layer: Any = store.layers[0]
    assert torch.allclose(fake_quant_activation(layer.keys, INT8), layer.keys, atol=1e-6)


def test_generating_goes_through_it() -> None:
    model, plain = make(), make()
    round_cache(model, ActivationSpec(kind="fp8_e4m3"))
    chosen = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found: Any = model.generate(input_ids=ids(), **chosen)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        expected = model(input_ids=found[:, :-1], use_cache=False).logits[:, 11:].argmax(-1)
    assert torch.equal(found[:, 12:], expected)
    assert not torch.equal(found, plain.generate(input_ids=ids(), **chosen))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_scales_are_those_of_the_text_without_padding(kind: str, symmetric: bool) -> None:
    spec = ActivationSpec(scaling="static", symmetric=symmetric)
    model, mask = make(kind), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    plain = logits(model, attention_mask=mask)
    states: dict[str, list[Tensor]] = {}
    cache = round_cache(model, spec)
    for name, rounder in cache.rounders.items():
        rounder.round = lambda x, name=name: states.setdefault(name, []).append(x) or x  # pyright: ignore[reportAttributeAccessIssue]
    logits(model, attention_mask=mask)
    for rounder in cache.rounders.values():
        del rounder.round  # the class's own again
    cache.observe()
    assert torch.equal(logits(model, attention_mask=mask), plain), "without a range everything passes"
    cache.set_ranges(cache.extremes())
    for name, (x,) in states.items():
        text = x.transpose(1, 2)[mask.bool()]
        scale, zero = static_scale(text.min(), text.max(), spec)
        assert torch.equal(cache.scales()[name], scale.bfloat16().float())
        assert (zero is None) == symmetric and cache.zeros().get(name) == zero
        assert float(x.abs().max()) > 0
    again = make(kind)
    round_cache_as_stored(again, cache.state())
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(make(kind)))


def test_scales_of_another_model_are_refused() -> None:
    stored = round_cache(make(), INT8).state()
    with pytest.raises(UserError, match=r"kv_cache: the stored scales are not those of this model's attention modules \(.*attn"):
        round_cache_as_stored(make(num_hidden_layers=3), stored)


def test_padding_behind_the_text_changes_no_range() -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    model, found = make(), []
    cache = round_cache(model, STATIC)
    for filler in (3, 60):
        x = ids().masked_fill(mask == 0, filler)
        cache.observe()
        with torch.no_grad():
            model(input_ids=x, attention_mask=mask, use_cache=False)
        found.append(cache.extremes())
    assert torch.equal(*found)


def test_packed_documents_stay_apart() -> None:
    model = make()
    round_cache(model, INT8)
    x, positions = ids(1), torch.tensor([[*range(7), *range(5)]])
    with torch.no_grad():
        packed, alone = (
            model.base_model(**backbone_inputs(batch)).last_hidden_state
            for batch in ({"input_ids": x, "position_ids": positions}, {"input_ids": x[:, 7:]})
        )
    assert torch.allclose(packed[:, 7:], alone, atol=1e-5)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.train()
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spec", [INT8, STATIC], ids=["dynamic", "static"])
def test_gradients_reach_the_projections_and_checkpointing_changes_nothing(spec: ActivationSpec) -> None:
    def made(checkpointed: bool) -> PreTrainedModel:
        model = make()
        cache = round_cache(model, spec)
        if spec.scaling == "static":
            cache.observe()
            logits(model)
            cache.set_ranges(cache.extremes())
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    found, again, plain = gradients(made(False)), gradients(made(True)), gradients(make())
    for name, gradient in found.items():
        assert torch.equal(gradient, again[name]), name
    for part in ("k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        assert found[name].any() and not torch.equal(found[name], plain[name])


@pytest.mark.parametrize("spec", [INT8, STATIC], ids=["dynamic", "static"])
def test_compiled_layers_compute_the_same(spec: ActivationSpec) -> None:
    model = make()
    cache = round_cache(model, spec)
    cache.observe()
    logits(model)
    if spec.scaling == "static":
        cache.set_ranges(cache.extremes())
    expected = logits(model)
    cache.observe()
    torch._dynamo.reset()
    for layer in model.base_model.layers:  # pyright: ignore[reportGeneralTypeIssues]
        layer.compile(backend="eager")
    assert torch.allclose(logits(model), expected, atol=1e-6)
    noted = cache.extremes()
    cache.observe()
    logits(model)
    assert torch.equal(cache.extremes(), noted)


def test_a_copy_rounds_by_its_own_rounders() -> None:
    model = make()
    cache = round_cache(model, INT8)
    other, rounded = copy.deepcopy(model), logits(model)
    cache.enable(False)
    assert torch.equal(logits(other), rounded)
    assert not torch.equal(logits(model), rounded)


def test_half_precision_under_autocast() -> None:
    model = make()
    round_cache(model, FP8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(logits(model)).all()


def test_who_is_rounded() -> None:
    assert list(cached_attentions(make())) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert list(cached_attentions(make("gpt2"))) == ["transformer.h.0.attn", "transformer.h.1.attn"]


def test_what_cannot_be_rounded_is_said() -> None:
    latent = AutoConfig.for_model("deepseek_v3", num_hidden_layers=1)
    with torch.device("meta"):
        deepseek = AutoModelForCausalLM.from_config(latent)
    with pytest.raises(UserError, match=r"kv_cache: the cache of model type 'deepseek_v3' .*compressed form.*leave kv_cache out"):
        round_cache(deepseek, INT8)
    state_space = AutoConfig.for_model("mamba", hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=31)
    with pytest.raises(
        UserError, match=r"kv_cache: backbone\.layers\.0 \(MambaBlock\) has no attention whose forward takes past_key_values"
    ):
        round_cache(AutoModelForCausalLM.from_config(state_space), INT8)


def test_an_attention_that_uses_no_cache_is_named() -> None:
    model = make()
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    usual: Callable[..., Any] = attention.forward

    def forward(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return usual(*args, past_key_values=None, **kwargs)

    attention.forward = forward
    round_cache(model, INT8)
    with pytest.raises(UserError, match=r"kv_cache: model\.layers\.1\.self_attn \(LlamaAttention\) puts no keys and values"):
        logits(model)


def test_a_range_that_nobody_saw_is_named() -> None:
    model = make()
    cache = round_cache(model, STATIC)
    cache.observe()
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.k: .* leave kv_cache out"):
        cache.extremes()


class _Toy(nn.Module):
    """Only to show that positional caches are replaced too."""

    def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
        return past_key_values.update(x, x, 0)[0]


def test_a_cache_given_by_position_is_replaced_too() -> None:
    from decoct.qat.layers.kv_cache_hooks import round_attention
    from decoct.qat.layers.rounders import Padding

    toy, x = _Toy(), torch.randn(1, 2, 3, 8)
    round_attention("toy", toy, INT8, Padding())
    store = DynamicCache()
    assert torch.equal(toy(x, store), fake_quant_activation(x, INT8))
    assert torch.equal(toy(x, store)[:, :, :3], fake_quant_activation(x, INT8))
