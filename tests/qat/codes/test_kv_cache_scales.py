"""What a quantized folder says of keys and values: written, read back, hashed, and every damage named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoct.models.common.errors import UserError
from decoct.models.folder.record import seal_record
from decoct.qat.codes.kv_cache_scales import CacheState
from decoct.qat.codes.state import QUANT_FILE, QuantState, load_quant_state
from decoct.qat.layers.kv_cache_hooks import round_cache
from decoct.qat.spec import ActivationSpec

QuantizedFolder = Callable[..., Path]
ATTENTIONS = ("model.layers.0.self_attn", "model.layers.1.self_attn")
STATIC = ActivationSpec(kind="fp8_e4m3", scaling="static")
ASYMMETRIC = ActivationSpec(scaling="static", symmetric=False)


def cache(spec: ActivationSpec) -> CacheState:
    state = CacheState(spec=spec, attentions=ATTENTIONS)
    if spec.scaling == "dynamic":
        return state
    scales = {name: torch.tensor(0.25 + number) for number, name in enumerate(state.names)}
    zeros = {} if spec.symmetric else {name: torch.tensor(number, dtype=torch.int8) for number, name in enumerate(state.names)}
    return replace(state, scales=scales, zeros=zeros)


def write(folder: Path, state: QuantState, **changes: Any) -> Path:
    """``state`` in the place of what the folder says of its codes."""
    save_file(state.tensors(), folder / QUANT_FILE)
    record = json.loads((folder / "decoct.json").read_text())
    seal_record(folder, {**record, "quant": state.record() | changes})
    return folder


@pytest.mark.parametrize("spec", [ActivationSpec(), STATIC, ASYMMETRIC], ids=["dynamic", "static", "asymmetric"])
def test_round_trip(quantized_folder: QuantizedFolder, spec: ActivationSpec) -> None:
    folder = quantized_folder()
    plain = load_quant_state(folder)
    state = replace(plain, cache=cache(spec))
    loaded = load_quant_state(write(folder, state))
    assert loaded.cache is not None
    assert loaded.cache.spec == spec and loaded.cache.attentions == ATTENTIONS
    assert loaded.hash() == state.hash() != plain.hash()
    assert loaded.cache.scales.keys() == cache(spec).scales.keys() and loaded.cache.zeros == cache(spec).zeros
    names = {name for name in load_file(folder / QUANT_FILE) if name.endswith(("k_scale", "v_scale", "k_zero", "v_zero"))}
    kinds = [] if spec.scaling == "dynamic" else ["scale"] if spec.symmetric else ["scale", "zero"]
    assert names == {f"{attention}.{part}_{kind}" for attention in ATTENTIONS for part in "kv" for kind in kinds}


def test_folders_without_it_keep_their_record_and_hash(quantized_folder: QuantizedFolder) -> None:
    state = load_quant_state(quantized_folder())
    assert state.cache is None
    assert set(state.record()) == {"spec", "modules", "hash"}
    assert not any(name.rpartition(".")[2].startswith(("k_", "v_")) for name in state.tensors())


def test_every_number_is_in_the_hash(quantized_folder: QuantizedFolder) -> None:
    plain = load_quant_state(quantized_folder())
    given = cache(ASYMMETRIC)
    states = [replace(plain, cache=given)]
    for name in given.names:
        states.append(replace(plain, cache=replace(given, scales={**given.scales, name: torch.tensor(9.0)})))
        states.append(replace(plain, cache=replace(given, zeros={**given.zeros, name: torch.tensor(9, dtype=torch.int8)})))
    states += [replace(plain, cache=cache(spec)) for spec in (ActivationSpec(), ActivationSpec(kind="fp8_e4m3"))]
    assert len({state.hash() for state in states}) == len(states)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{ATTENTIONS[1]}.v_scale"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"tensor model\.layers\.1\.self_attn\.v_scale is missing"),
        (lambda t: t.update({f"{ATTENTIONS[0]}.k_zero": torch.tensor(1, dtype=torch.int8)}), r"self_attn\.k_zero is unexpected"),
        (lambda t: t.update({f"{ATTENTIONS[0]}.k_scale": torch.ones(2)}), r"kv_cache: .*k_scale is torch\.float32 of shape \(2,\)"),
        (lambda t: t.update({f"{ATTENTIONS[0]}.k_scale": torch.tensor(0.0)}), r"kv_cache: .*k_scale is 0\.0, not a positive finite"),
        (lambda t: t.update({f"{ATTENTIONS[0]}.v_scale": torch.tensor(float("nan"))}), r"v_scale is nan, not a positive"),
        (lambda t: t.update({f"{ATTENTIONS[0]}.v_scale": torch.tensor(0.5)}), "differ from what decoct.json recorded"),
    ],
)  # fmt: skip
def test_damage_is_named(quantized_folder: QuantizedFolder, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    folder = quantized_folder()
    write(folder, replace(load_quant_state(folder), cache=cache(STATIC)))
    tensors = load_file(folder / QUANT_FILE)
    change(tensors)
    save_file(tensors, folder / QUANT_FILE)
    with pytest.raises(UserError, match=message):
        load_quant_state(folder)


@pytest.mark.parametrize("changes", [{"kv_cache": {"kind": "int3"}}, {"attentions": None}, {"kv_cache": {"width": 3}}])
def test_a_record_that_cannot_be_read_is_said(quantized_folder: QuantizedFolder, changes: dict[str, Any]) -> None:
    folder = quantized_folder()
    write(folder, replace(load_quant_state(folder), cache=cache(STATIC)), **changes)
    with pytest.raises(UserError, match=r"decoct\.json: the entry 'quant' cannot be read"):
        load_quant_state(folder)


def test_a_state_in_memory_is_checked_too(random_model: Callable[..., Any], quantized_folder: QuantizedFolder) -> None:
    unseen = round_cache(random_model("llama"), STATIC).state()
    with pytest.raises(UserError, match=r"memory: kv_cache: model\.layers\.0\.self_attn\.k_scale is missing"):
        replace(load_quant_state(quantized_folder()), cache=unseen).check("memory")


@pytest.mark.parametrize("quantized", [True, False], ids=["linears renamed", "linears of other names"])
def test_scales_go_by_the_names_of_files_as_the_linears_do(quantized_folder: QuantizedFolder, quantized: bool) -> None:
    state = replace(load_quant_state(quantized_folder()), cache=cache(ASYMMETRIC))
    names = {name: f"backbone.{name.removeprefix('model.')}" for name in state.modules}
    if not quantized:
        state = replace(state, modules=(), codes={}, scales={})
    renamed = state.renamed(names)
    attentions = ("backbone.layers.0.self_attn", "backbone.layers.1.self_attn")
    assert renamed.cache is not None and renamed.cache.attentions == attentions
    assert {name.rpartition(".")[0] for name in renamed.cache.tensors()} == set(attentions)
    assert renamed.cache.problem() is None
    assert all(name.startswith("backbone.") for name in renamed.tensors())
    back = renamed.renamed({new: name for name, new in names.items()})
    assert back.cache is not None and state.cache is not None
    assert back.cache.tensors().keys() == state.cache.tensors().keys()
    assert back.hash() == state.hash()


def test_attention_stays_where_only_parts_of_it_have_other_names() -> None:
    state, first = cache(STATIC), ATTENTIONS[0]
    inner = {f"{first}.gate.f_proj": f"{first}.f_proj", "lm_head": "embed_out", f"{first}_2.q_proj": "other.q_proj"}
    assert state.renamed(inner).tensors() == state.tensors()
    assert state.renamed({first: "attention"}).attentions == ("attention", ATTENTIONS[1])
