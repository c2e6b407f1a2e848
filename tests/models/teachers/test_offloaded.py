"""An offloaded teacher computes what a plain one does, and its layers are on the device only while they run."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.models.common.errors import UserError
from decoct.models.families import decoder_layers
from decoct.models.teachers import open_teacher

SavedModel = Callable[..., Path]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("load_in", ["fp32", "bf16"])
def test_hidden_states_are_those_of_the_plain_teacher(saved_model: SavedModel, batch: dict[str, Tensor], family: str, load_in: Any) -> None:
    folder = saved_model(family, tie_word_embeddings=family == "qwen2")
    plain = open_teacher(folder, load_in=load_in, v_eff=100)
    offloaded = open_teacher(folder, load_in=load_in, placement="offloaded", v_eff=100)
    for _ in range(2):
        for ours, theirs in zip(offloaded.hidden_and_head(batch)[:2], plain.hidden_and_head(batch)[:2]):
            assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
            assert torch.equal(ours, theirs)
    assert offloaded.describe() == plain.describe().replace("replicated", "layers offloaded to the host")


def test_a_layer_has_its_copy_only_while_it_runs(saved_model: SavedModel, batch: dict[str, Tensor]) -> None:
    model: Any = open_teacher(saved_model(), load_in="fp32", placement="offloaded", v_eff=128).model
    layers = decoder_layers(model)
    at_rest = [next(layer.parameters()).data_ptr() for layer in layers]
    visiting: list[list[int]] = []

    def note(*_: Any) -> None:
        visiting.append([i for i, layer in enumerate(layers) if next(layer.parameters()).data_ptr() != at_rest[i]])

    for layer in layers:
        layer.get_submodule("mlp").register_forward_hook(note)
    with torch.no_grad():
        model(**batch)
    assert visiting == [[0], [1], [2], [3]]
    assert [next(layer.parameters()).data_ptr() for layer in layers] == at_rest


def test_a_forward_pass_that_fails_leaves_nothing_behind(saved_model: SavedModel, batch: dict[str, Tensor]) -> None:
    teacher = open_teacher(saved_model(), load_in="fp32", placement="offloaded", v_eff=128)
    expected = teacher.hidden_and_head(batch)[0]
    layer = decoder_layers(teacher.model)[2]
    at_rest = next(layer.parameters()).data_ptr()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = layer.get_submodule("mlp").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        teacher.hidden_and_head(batch)
    handle.remove()
    assert next(layer.parameters()).data_ptr() == at_rest
    assert torch.equal(teacher.hidden_and_head(batch)[0], expected)


def test_a_rounded_teacher_is_not_offloaded(saved_model: SavedModel) -> None:
    for placement in ("offloaded", "sharded"):
        with pytest.raises(UserError, match=rf"teacher\.placement: {placement} needs teacher\.load_in: bf16 or fp32"):
            open_teacher(saved_model(), load_in="nf4", placement=placement, v_eff=128)


@pytest.mark.gpu
def test_on_a_gpu_two_layers_are_the_most_that_is_there(saved_model: SavedModel, batch: dict[str, Tensor]) -> None:
    folder = saved_model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    plain = open_teacher(folder, load_in="bf16", v_eff=128, device="cuda")
    expected = plain.hidden_and_head(batch)[0]
    layer = sum(p.numel() * 2 for p in decoder_layers(plain.model)[0].parameters())
    del plain
    gc.collect()
    before = torch.cuda.memory_allocated()
    teacher = open_teacher(folder, load_in="bf16", placement="offloaded", v_eff=128, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        torch.testing.assert_close(teacher.hidden_and_head(batch)[0], expected, rtol=1e-2, atol=1e-2)
    assert torch.cuda.max_memory_allocated() - before < 3 * layer
    assert torch.cuda.memory_allocated() - before < layer
