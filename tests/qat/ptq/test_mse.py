"""Searched scales against brute force, and what they do at the edges."""

import pytest
import torch
from torch import Tensor

from decoct.qat.ptq import mse
from decoct.qat.ptq.mse import FACTORS, searched_grid
from decoct.qat.spec import SCALE_GRIDS, QuantSpec


def some_weights(rows: int = 6, columns: int = 96) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * 0.05
    weight[1] = 0
    weight[2, :32] = 0
    return weight


def brute_force(values: list[float], shares: list[float], spec: QuantSpec) -> float:
    """Smallest weighted squared error of one group over the same candidates, in Python numbers."""
    absmax = torch.tensor(max(abs(v) for v in values))
    grid = SCALE_GRIDS[spec.scale_grid]
    found = float("inf")
    for factor in (1.0, *FACTORS):
        scale = float((absmax * factor / spec.divisor_value).to(torch.bfloat16).float().clamp(grid.smallest, grid.largest))
        codes = [max(spec.qmin, min(spec.qmax, round(v / scale))) for v in values]
        found = min(found, sum(h * (v - scale * q) ** 2 for v, q, h in zip(values, codes, shares)))
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 48), (4, "channel"), (8, 16)])
def test_the_search_finds_the_smallest_error(bits: int, group: int, weighted: bool) -> None:
    spec = QuantSpec(bits=bits, group_size=group)  # pyright: ignore[reportArgumentType]
    weight = some_weights()
    importance = torch.rand(96, generator=torch.Generator().manual_seed(0)) ** 4 if weighted else None
    scales = searched_grid(weight, spec, None, importance).scales
    width = spec.group_width(96)
    shares = torch.ones(96) if importance is None else importance
    for row in range(len(weight)):
        for index in range(scales.shape[1]):
            at = slice(index * width, (index + 1) * width)
            values, weights, scale = weight[row, at].double(), shares[at].double(), float(scales[row, index])
            if not values.any():
                assert scale == 1.0
                continue
            error = (weights * (values - scale * (values / scale).round().clamp(spec.qmin, spec.qmax)) ** 2).sum()
            assert float(error) <= brute_force(values.tolist(), weights.tolist(), spec) * (1 + 1e-5)


@pytest.mark.parametrize("grid", ["bf16_fp16", "fp16", "bf16", "fp32"])
def test_scales_lie_on_their_grid(grid: str) -> None:
    spec = QuantSpec(bits=3, group_size=32, scale_grid=grid)  # pyright: ignore[reportArgumentType]
    dtype = {"bf16_fp16": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[grid]
    scales = searched_grid(some_weights(), spec).scales
    assert torch.equal(scales, scales.to(dtype).float())
    assert (scales >= spec.grid.smallest).all() and scales.dtype == torch.float32


def test_weights_that_fit_exactly_keep_their_scale() -> None:
    spec = QuantSpec(bits=4, group_size=16, divisor="full_range")
    weight = torch.arange(-8, 8).float().repeat(2, 1) * 0.25
    assert torch.equal(searched_grid(weight, spec).scales, torch.full((2, 1), 0.25))


def test_pruned_and_unimportant_weights_have_no_say() -> None:
    weight = some_weights(3, 32)[:2]
    weight[0] = torch.linspace(-0.1, 0.1, 32)
    loud = weight.clone()
    loud[:, 5] = 9.0
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[:, 5] = False
    quiet = weight.clone()
    quiet[:, 5] = 0.0
    spec = QuantSpec(bits=3, group_size=32)
    assert torch.equal(searched_grid(loud, spec, mask).scales, searched_grid(quiet, spec).scales)
    importance = torch.ones(32)
    importance[5] = 0.0
    # the outlier still bounds the grid that is searched; inside it, the scale goes as far down as it can
    assert (searched_grid(loud, spec, None, importance).scales[0] < searched_grid(loud, spec).scales[0]).all()


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = some_weights(), QuantSpec(bits=3, group_size=32)
    whole = searched_grid(weight, spec).scales
    monkeypatch.setattr(mse, "_PIECE", 200)
    assert torch.equal(searched_grid(weight, spec).scales, whole)


def test_bad_weights_show_in_their_group_alone_and_groups_must_divide() -> None:
    weight, spec = some_weights(), QuantSpec(bits=4, group_size=32)
    weight[4, 40] = float("nan")
    assert torch.isnan(searched_grid(weight, spec).scales).nonzero().tolist() == [[4, 1]]
    with pytest.raises(ValueError, match="group_size=64 does not divide in_features=96"):
        searched_grid(weight, QuantSpec(bits=4, group_size=64))
