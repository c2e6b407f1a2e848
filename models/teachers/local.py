"""A teacher that runs in this process.

It is deliberately not a module. A teacher that is a submodule of the trained model ends up in its checkpoints, its optimizer, its EMA copy
and its DDP buckets. This one is invisible to ``nn.Module``, is shared by copies and cannot be pickled.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ..batches import backbone_inputs
from ..causality import check_causal
from ..common.errors import UserError
from ..dimensions import dimensions
from ..families import HeadTransform, backbone_and_head, check_head, head_transform, text_config
from ..tokenizer.vocabulary import check_head_rows, effective_vocab, embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Hidden = tuple[Tensor, Tensor, Tensor | None, HeadTransform]
"""(hidden [B, S, H], head weight [V_eff, H], head bias [V_eff] or None, transform of the logits)."""


@runtime_checkable
class Teacher(Protocol):
    """The part of a teacher that a loss needs: the two factors of its logits, never their [B, S, V] product."""

    @property
    def v_eff(self) -> int:
        """Rows of the head that belong to real tokens."""
        ...

    def hidden_and_head(self, batch: Mapping[str, Tensor]) -> Hidden:
        """Last hidden states of ``batch`` and the head that turns them into logits."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Moves to a device, in place."""
        ...

    def describe(self) -> str:
        """One line of text for messages."""
        ...


class LocalTeacher:
    """A causal language model of transformers as a teacher: frozen, in eval mode, in the dtype it was loaded in.

    Args:
        model: The model, which from now on belongs to the teacher: its parameters stop requiring gradients.
        v_eff: Size of the real vocabulary; rows of the head beyond it are padding and never used.
        name: Name in ``describe``; default: the path from which the model was loaded.
        held: Format of its weights in ``describe``; default: the model's dtype.

    Raises:
        UserError: the head has fewer than ``v_eff`` rows, the model's logits are not the product with its head (``check_head``), or it sees
            later tokens (``check_causal``).
    """

    def __init__(self, model: "PreTrainedModel", *, v_eff: int, name: str | None = None, held: str | None = None) -> None:
        # cheap checks first; those that run the model after them
        check_head_rows(model, v_eff)
        check_head(model)
        check_causal(model, f"the teacher {name}" if name else "the teacher")
        # eval: dropout would make its targets random
        self._model = model.eval().requires_grad_(False)
        self._v_eff = v_eff
        self._name = name or model.config.name_or_path or model.config.model_type
        self._held = held or str(model.dtype).removeprefix("torch.")
        self._parameters = _count(model)

    @property
    def v_eff(self) -> int:
        """Rows of the head that belong to real tokens."""
        return self._v_eff

    @property
    def model(self) -> "PreTrainedModel":
        """The model itself, for evaluation; do not make it an attribute of a module."""
        return self._model

    def to(self, device: torch.device | str) -> Self:
        """Moves to a device, in place."""
        self._model.to(device)  # pyright: ignore[reportArgumentType] - transformers' wrapper hides the signature of nn.Module.to
        return self

    @torch.no_grad()
    def hidden_and_head(self, batch: Mapping[str, Tensor]) -> Hidden:
        """Runs the backbone, outside autograd and autocast.

        It uses ``no_grad`` and not ``inference_mode``, because the results are constants in the student's autograd graph.

        Args:
            batch: ``input_ids`` and optionally ``attention_mask`` or, for packed windows, ``position_ids``; [B, S] int64, on any device.

        Returns:
            (hidden [B, S, H], head weight [V_eff, H], head bias [V_eff] or None, transform), all in the teacher's dtype; weight and
            bias are views of the teacher's own.
        """
        backbone, weight, bias = backbone_and_head(self._model)
        device = weight.device
        # the teacher computes in its own dtype, not in that of the student's training
        with torch.autocast(device.type, enabled=False):
            output: Any = backbone(**backbone_inputs(batch, device))
        # slices are views: padding rows are left out without a copy (law 2, docs/architecture.md)
        head_bias = None if bias is None else bias[: self._v_eff]
        # Mamba's hidden states are fp32 for every dtype of its weights
        hidden = output.last_hidden_state.to(weight.dtype)
        return hidden, weight[: self._v_eff], head_bias, head_transform(self._model.config)

    def describe(self) -> str:
        """Name, family, depth, width, parameters, dtype and place of its weights, and vocabulary in one line."""
        sizes, kind = dimensions(self._model), text_config(self._model.config).model_type
        return (
            f"{self._name} ({kind}, {sizes.layers} layers, hidden {sizes.hidden}, "
            f"{self._parameters:,} parameters, {self._held}, {self._v_eff:,} tokens)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # shared by copies: what copies its holder must not copy the weights
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a LocalTeacher is never saved or sent to another process: leave it out of hyperparameters and checkpoints")


class PinnedTeacher(LocalTeacher):
    """A teacher whose weights were placed for one device, that of its head, and cannot move."""

    def to(self, device: torch.device | str) -> Self:
        """Accepts its own device, and moves nothing.

        Raises:
            UserError: the device is another one.
        """
        wanted, own = torch.device(device), backbone_and_head(self._model)[1].device
        # 'cuda' without a number is any card, so also its own
        if wanted.type != own.type or wanted.index not in (None, own.index):
            raise UserError(f"the teacher {self.describe()} was opened for {own} and cannot move to {wanted}; open it there")
        return self


def _count(model: "PreTrainedModel") -> int:
    """Number of weights: the two nf4 weights in one stored element count as two, tied parameters count once."""
    # quant_state has the shape from before the packing
    shapes = (getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape) for parameter in model.parameters())
    return sum(math.prod(shape) for shape in shapes)


def load_teacher(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    v_eff: int | None = None,
    name: str | None = None,
) -> LocalTeacher:
    """Loads a model folder or hub id as a teacher.

    Args:
        path: Model folder or hub id.
        dtype: Dtype of its weights and hidden states; the losses compute logits in fp32.
        device: Its device.
        revision: Hub revision.
        v_eff: Size of the real vocabulary; None = that of the teacher's own tokenizer.
        name: Name in ``describe``; default: ``path``.

    Raises:
        UserError: see ``load_model``, ``load_tokenizer`` and ``LocalTeacher``.
    """
    from ..folder.loading import load_config, load_model, load_tokenizer

    if v_eff is None:
        v_eff = effective_vocab(load_tokenizer(path, revision=revision), embedding_rows(load_config(path, revision=revision)))
    model = load_model(path, dtype=dtype, revision=revision, device=device)
    return LocalTeacher(model, v_eff=v_eff, name=name or str(path))
