"""The record of zeros is read as any iterable of names."""

from collections.abc import Callable
from typing import Any

import torch

from decoct.models.families import decoder_linears
from decoct.models.pruning.zeros_record import check_sparse, unlisted_zeros


def test_names_are_read_once(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    linears = decoder_linears(model)
    listed = list(linears)[:-1]
    with torch.no_grad():
        for linear in linears.values():
            linear.weight.zero_()
            linear.weight[0] = 1
        linears[list(linears)[-1]].weight.fill_(1)
    # an iterator is empty after its first pass
    assert unlisted_zeros(model, iter(listed)) == unlisted_zeros(model, listed) == 0.0
    assert unlisted_zeros(model, iter(listed[1:])) > 0.3
    check_sparse(iter(listed), model)
