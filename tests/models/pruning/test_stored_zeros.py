"""The zeros of written files are compared with what was claimed; every difference is found, and nobody else's fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from decoct.models.common.errors import DecoctError
from decoct.models.families import decoder_linears
from decoct.models.pruning.pattern import Pattern
from decoct.models.pruning.selection import pattern_mask
from decoct.models.pruning.stored_zeros import check_stored

TinyModel = Callable[..., Any]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def pruned(tiny_model: TinyModel) -> Any:
    """A model whose linears follow 2:4."""
    model = tiny_model("llama", num_hidden_layers=2)
    for linear in decoder_linears(model).values():
        linear.weight.data.mul_(pattern_mask(linear.weight.data.abs(), Pattern(2, 4)))
    return model


def write(folder: Path, model: Any, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()} | changes
    # two files, as large models have
    names = list(tensors)
    for part in (0, 1):
        save_file({name: tensors[name].to(torch.bfloat16) for name in names[part::2]}, folder / f"model-{part}.safetensors")
    return tensors


def test_zeros_are_measured_in_all_files(pruned: Any, tmp_path: Path) -> None:
    linears = decoder_linears(pruned)
    total = sum(linear.weight.numel() for linear in linears.values())
    # a number that is too small for bf16 is a zero there, and no fault
    linears["model.layers.0.mlp.up_proj"].weight.data[0][linears["model.layers.0.mlp.up_proj"].weight.data[0] != 0] = 1e-42
    write(tmp_path, pruned)
    assert check_stored(tmp_path, linears, total // 2, Pattern(2, 4)) == pytest.approx(0.5 + 16 / total)


def test_a_tied_weight_counts_once(pruned: Any, tmp_path: Path) -> None:
    layers = pruned.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    # named_parameters has it once
    write(tmp_path, pruned)
    total = sum(tensor.numel() for name, tensor in pruned.named_parameters() if "proj" in name)
    assert check_stored(tmp_path, decoder_linears(pruned), total // 2) == 0.5


def test_every_difference_is_found(pruned: Any, tmp_path: Path) -> None:
    linears = decoder_linears(pruned)
    half = sum(linear.weight.numel() for linear in linears.values()) // 2
    (tmp_path / "fewer").mkdir()
    weight = pruned.get_parameter(UP).detach().clone()
    weight[weight == 0] = 1.0
    write(tmp_path / "fewer", pruned, **{UP: weight})
    with pytest.raises(DecoctError, match=r"layers\.1\.mlp\.up_proj\.weight was written with other zeros than it has; this is a fault"):
        check_stored(tmp_path / "fewer", linears, half)
    write(tmp_path, pruned)
    with pytest.raises(DecoctError, match=r"weights were written where 10 of [\d,]+ stay"):
        check_stored(tmp_path, linears, 10)
    with pytest.raises(DecoctError, match=r"was written with groups that do not follow 1:4"):
        check_stored(tmp_path, linears, half, Pattern(1, 4))
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(DecoctError, match="was not written"):
        check_stored(tmp_path, linears, half)


@pytest.mark.gpu
def test_a_pattern_2_4_is_one_that_torch_can_pack(tiny_model: TinyModel) -> None:
    """``to_sparse_semi_structured`` takes the weight as it is, and its product is that of the dense matrix."""
    from torch.sparse import to_sparse_semi_structured

    model = tiny_model("llama", num_hidden_layers=1, hidden_size=128, intermediate_size=256, head_dim=32)
    for name, linear in decoder_linears(model).items():
        dense = linear.weight.detach().clone().cuda().bfloat16()
        dense *= pattern_mask(dense.abs(), Pattern(2, 4))
        x = torch.randn(64, dense.shape[1], device="cuda", dtype=torch.bfloat16)
        packed: Any = to_sparse_semi_structured(dense)
        assert packed.to_dense().equal(dense), name
        product = torch.nn.functional.linear(x, packed)
        torch.testing.assert_close(product, torch.nn.functional.linear(x, dense), rtol=2e-2, atol=2e-2)
