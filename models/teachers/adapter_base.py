"""A teacher that is the model under a student's LoRA adapter: the same weights in the same memory, with the adapter switched off."""

from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from ..adapters import unwrapped
from ..batches import backbone_inputs
from ..common.errors import UserError
from ..eval_mode import eval_mode
from ..families import backbone_and_head, head_transform
from ..tokenizer.vocabulary import check_head_rows
from .local import Hidden


class AdapterBaseTeacher:
    """Predictions of a peft model without its adapter, in eval mode; the student's own modes (dropout) are restored afterwards.

    Args:
        student: A ``peft`` model; it is not copied, moved or changed.
        v_eff: Size of the real vocabulary.

    Raises:
        UserError: the model has no adapter that can be switched off, or a head with too few rows.
    """

    def __init__(self, student: Any, *, v_eff: int) -> None:
        if not hasattr(student, "disable_adapter"):
            raise UserError("only a model under an adapter (peft's get_peft_model) has a base to learn from; give a teacher")
        check_head_rows(unwrapped(student), v_eff)
        self._student: Any = student
        self._v_eff = v_eff

    @property
    def v_eff(self) -> int:
        """Rows of the head that belong to real tokens."""
        return self._v_eff

    def to(self, device: torch.device | str) -> Self:
        """Returns the teacher unchanged: the weights are the student's and move with it."""
        return self

    @torch.no_grad()
    def hidden_and_head(self, batch: Mapping[str, Tensor]) -> Hidden:
        """Last hidden states and head without the adapter, outside autograd and autocast; see ``LocalTeacher.hidden_and_head``."""
        # module by module: parts of the student may be frozen in eval mode
        with eval_mode(self._student), self._student.disable_adapter():
            # asked inside the block: the head is the base's only while the adapter is off
            backbone, weight, bias = backbone_and_head(self._student)
            # the teacher computes in its own dtype, as every other teacher does
            with torch.autocast(weight.device.type, enabled=False):
                output: Any = backbone(**backbone_inputs(batch, weight.device))
        head_bias = None if bias is None else bias[: self._v_eff]
        return output.last_hidden_state, weight[: self._v_eff], head_bias, head_transform(self._student.config)

    def describe(self) -> str:
        """One line of text for messages."""
        return "the student's own base, its adapter switched off"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterBaseTeacher is never saved or sent to another process: leave it out of checkpoints")
