"""Opens every kind of teacher: whole, quantized, sharded over processes or offloaded to host memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..common.errors import UserError
from ..settings import CacheSettings, LoadIn, Placement, ServedSettings
from ..tokenizer.vocabulary import effective_vocab, embedding_rows
from .local import LocalTeacher, PinnedTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# formats without quantization; their teachers may be sharded or offloaded
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TeacherRef:
    """A teacher that every stage and rank of a run can open again."""

    path: str
    """Model folder or hub id."""
    load_in: LoadIn
    """Format of its weights during training."""
    placement: Placement
    """Place of its weights during training."""
    revision: str | None
    name: str
    """Name in reports and cards, never a local path."""
    content: str
    """Content hash of its folder."""
    cache: CacheSettings | None = None
    """Settings of its cache, if training reads its predictions from disk; None = it runs during training."""
    served: ServedSettings | None = None
    """Server that predicts instead of it."""

    def open(self, *, device: torch.device | str, v_eff: int) -> LocalTeacher:
        """Opens the teacher as training needs it; arguments and errors as for ``open_teacher``."""
        return open_teacher(
            self.path,
            load_in=self.load_in,
            placement=self.placement,
            device=device,
            revision=self.revision,
            v_eff=v_eff,
            name=self.name,
        )


def open_teacher(
    path: str | Path,
    *,
    load_in: LoadIn = "bf16",
    placement: Placement = "replicated",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    v_eff: int | None = None,
    name: str | None = None,
) -> LocalTeacher:
    """Opens a model folder or hub id as a teacher; no weight is in host memory twice.

    Args:
        path: Model folder or hub id.
        load_in: fp32, bf16, or the decoder's linears in nf4 or int8 (only replicated).
        placement: replicated; sharded over all processes (all must call this; a single process holds it whole); or offloaded.
        device: This process's device. Only a replicated fp32 or bf16 teacher can move to another device.
        revision: Hub revision.
        v_eff: Size of the real vocabulary; None = that of the teacher's own tokenizer.
        name: Name in ``describe``; default: ``path``.

    Raises:
        UserError: see ``load_model``, ``LocalTeacher``, ``quantized_model``, ``offloaded_model`` and ``sharded_model``.
    """
    if load_in not in _DTYPES and placement != "replicated":
        raise UserError(
            f"teacher.placement: {placement} needs teacher.load_in: bf16 or fp32; a teacher in {load_in} is always replicated (it has "
            "only a half or a quarter of the size)"
        )
    if v_eff is None:
        # imported late: a folder's loader needs transformers
        from ..folder.loading import load_config, load_tokenizer

        v_eff = effective_vocab(load_tokenizer(path, revision=revision), embedding_rows(load_config(path, revision=revision)))
    name = name or str(path)
    # a single process has nothing to shard, and usually no process group
    if placement == "sharded" and _processes() == 1:
        placement = "replicated"
    model, held = _model(path, load_in, placement, device, revision)
    if load_in in _DTYPES and placement == "replicated":
        return LocalTeacher(model, v_eff=v_eff, name=name, held=held)
    # quantized, sharded and offloaded weights are bound to their device
    return PinnedTeacher(model, v_eff=v_eff, name=name, held=held)


def _model(
    path: str | Path, load_in: LoadIn, placement: Placement, device: torch.device | str, revision: str | None
) -> "tuple[PreTrainedModel, str]":
    """The model, and the format and place of its weights in words."""
    # compared one by one, so that type checkers know which of the kinds is left
    if load_in == "nf4" or load_in == "int8":
        from .quantized import quantized_model

        return quantized_model(path, kind=load_in, device=device, revision=revision), f"{load_in}, replicated"
    dtype = _DTYPES[load_in]
    word = str(dtype).removeprefix("torch.")
    if placement == "offloaded":
        from .offloaded import offloaded_model

        return offloaded_model(path, dtype=dtype, device=device, revision=revision), f"{word}, layers offloaded to the host"
    if placement == "sharded":
        from .sharded import sharded_model

        return sharded_model(path, dtype=dtype, device=device, revision=revision), f"{word}, sharded over {_processes()} processes"
    from ..folder.streaming import streamed_model

    return streamed_model(path, dtype=dtype, device=device, revision=revision), f"{word}, replicated"


def _processes() -> int:
    from torch.distributed import get_world_size, is_available, is_initialized

    return get_world_size() if is_available() and is_initialized() else 1
