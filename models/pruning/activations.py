"""What matrices read on calibration text: sums of activations by channel, and how far each layer turns the hidden states."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..axis_map import Axis, Family
from ..sizes import Sizes
from .ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Place:
    """One place that matrices read, with sums over the text."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self.matrices = matrices
        """The weights that read here, each with the channels of the place along its last dimension."""
        channels, device = matrices[0].shape[-1], matrices[0].device
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        """sum_t |a_tc|."""
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)
        """sum_s (mean_{t in s} |a_tc|)^2."""
        self.tokens = 0

    def add(self, values: Tensor, mask: Tensor) -> None:
        """Adds values [B, S, C], or [B * S, C] as in OPT's FFN, where ``mask`` [B, S] is True."""
        values = values.detach().reshape(*mask.shape, -1)
        # fp64 sums: independent of how the text is cut into batches
        # filled and not multiplied: what a model computes for padding may be NaN
        windows = values.abs().masked_fill(~mask[..., None], 0).sum(1, dtype=torch.float64)
        counts = mask.sum(1)
        self.total += windows.sum(0)
        self.squares += (windows / counts.clamp(min=1)[:, None]).square().sum(0)
        self.tokens += int(counts.sum())

    def add_up(self, ranks: Ranks) -> None:
        """Adds the sums of all processes."""
        ranks.sum(self.total)
        ranks.sum(self.squares)
        self.tokens = round(ranks.number(self.tokens))

    def numbers(self, score: str) -> Tensor:
        """[C] fp64: the score of each channel by itself."""
        if score == "activation":
            return self.squares.sqrt()
        # the norm of column c: how far one unit of channel c moves what reads it
        norm = torch.stack([matrix.double().square().sum(0) for matrix in self.matrices]).sum(0).sqrt()
        return norm * self.total / self.tokens


class Readers:
    """Hooks on a model that sum what its matrices read; a context manager that takes them off again."""

    def __init__(self, model: "PreTrainedModel", family: Family, axes: Sequence[Axis], *, influence: bool) -> None:
        """Prepares the sums; the hooks are set on entering.

        Args:
            model: The model.
            family: Its axis map.
            axes: Axes whose channels are summed.
            influence: Whether layers are compared with their inputs.
        """
        self.mask: Tensor = torch.empty(0)
        """[B, S] bool: the tokens of the current batch that count."""
        self._axes = axes
        self._layers = list(family.layers(model)) if influence or axes else []
        self._influence = influence
        self._cosines = torch.zeros(len(self._layers), dtype=torch.float64)
        self._tokens = 0
        self._hooks = ExitStack()
        self._ffn = [self._place(family, layer, [family.ffn_out]) for layer in self._layers] if "ffn" in axes else []
        heads = {"heads", "kv_heads"} & set(axes)
        self._heads = [self._place(family, layer, [family.attention_out]) for layer in self._layers] if heads else []
        places = family.readers().values() if "hidden" in axes else ()
        self._hidden = [[self._place(family, layer, names) for names in places] for layer in self._layers]
        # the head reads the final norm; it is not run, so the output of the backbone is handed to ``add_final``
        head: Any = model.get_output_embeddings()
        self._final = _Place([head.weight]) if "hidden" in axes else None
        self._modules: list[tuple[nn.Module, _Place]] = []
        for index, layer in enumerate(self._layers):
            named = [(family.ffn_out, self._ffn), (family.attention_out, self._heads)]
            self._modules += [(layer.get_submodule(name), sums[index]) for name, sums in named if sums]
            # the first of those that read the same place
            self._modules += [(layer.get_submodule(names[0]), place) for names, place in zip(places, self._hidden[index])]

    @staticmethod
    def _place(family: Family, layer: nn.Module, names: Sequence[str]) -> _Place:
        matrices = []
        for name in names:
            weight: Any = layer.get_submodule(name).weight
            # Conv1D keeps [in, out]
            out, _ = family.matrices[name]
            matrices.append(weight if family.layer[f"{name}.weight"][0] == out else weight.T)
        return _Place(matrices)

    def rows(self, values: Tensor) -> Tensor:
        """The unmasked tokens of [B, S, C] or [B * S, C] of the current batch as [tokens, C]."""
        return values.detach().reshape(*self.mask.shape, -1)[self.mask]

    def add_up(self, ranks: Ranks) -> None:
        """Adds the sums of all processes, each of which has read batches of its own."""
        inside = [place for places in (self._ffn, self._heads, *self._hidden) for place in places]
        for place in (*inside, *([self._final] if self._final is not None else [])):
            place.add_up(ranks)
        ranks.sum(self._cosines)
        self._tokens = round(ranks.number(self._tokens))

    @property
    def wanted(self) -> bool:
        """Whether there is anything to read on text."""
        return bool(self._layers)

    @property
    def influence(self) -> Tensor | None:
        """[layers] fp32: 1 - mean cosine between a layer's input and output; None if it was not asked for."""
        return (1 - self._cosines / self._tokens).float() if self._influence else None

    def __enter__(self) -> Self:
        """Sets the hooks."""
        for module, place in self._modules:
            self._hooks.callback(module.register_forward_pre_hook(self._adder(place)).remove)
        if self._influence:
            for index, layer in enumerate(self._layers):
                handle = layer.register_forward_hook(
                    lambda _module, args, kwargs, output, index=index: self._compare(index, args, kwargs, output), with_kwargs=True
                )
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_error: object) -> None:
        """Takes the hooks off."""
        self._hooks.close()

    def add_final(self, hidden: Tensor) -> None:
        """Adds the output of the backbone [B, S, hidden], and counts the batch."""
        if self._final is not None:
            self._final.add(hidden, self.mask)
        self._tokens += int(self.mask.sum())

    def _adder(self, place: _Place) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: place.add(inputs[0], self.mask)

    def _compare(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).detach()
        after = (output[0] if isinstance(output, tuple) else output).detach()
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self._cosines[index] += cosine[self.mask].sum(dtype=torch.float64).cpu()

    @torch.no_grad()
    def raw(self, score: str, sizes: Sizes) -> dict[Axis, list[Tensor]]:
        """Axis -> per layer the squares of the scores; for ``hidden`` the scores themselves, with those outside the layers last."""
        found: dict[Axis, list[Tensor]] = {}
        if self._ffn:
            found["ffn"] = [place.numbers(score).square() for place in self._ffn]
        if self._heads:
            heads = [place.numbers(score).square().view(sizes.heads, sizes.head_dim).sum(1) for place in self._heads]
            found["heads"] = heads
            found["kv_heads"] = [part.view(sizes.kv_heads, sizes.group).sum(1) for part in heads]
        if self._final is not None:
            layers = [torch.stack([place.numbers(score) for place in places]).sum(0) for places in self._hidden]
            found["hidden"] = [*layers, self._final.numbers(score)]
        return found
