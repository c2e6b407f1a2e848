"""Rows of a cache that hold a teacher's last hidden states, and its output head beside them.

The two are the factors of every logit, so any divergence at any temperature can be computed from them, exactly as far as the states are
stored exactly. A row is a state in fp32 or bf16, or in int8: codes of groups of 64 channels, then one bf16 scale per group. Numbers are
stored as the machine has them (little-endian on all that torch runs on).

    head.safetensors          weight [V, H] and, if there is one, bias [V], in the teacher's dtype
    head.json                 size and sha256 of it; written last
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from ...losses.linear_divergence.inputs import LogitTransform
from ...losses.logits import in_full_precision
from ...models.common.errors import UserError
from ...models.common.files import check_free_space, sha256_file, write_bytes_atomic, write_json_atomic
from ...models.common.hash_cache import cached_sha256
from ...models.common.seal import seal_is_broken, sealed
from .row_layout import GROUP, HiddenLayout

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HEAD, _MANIFEST = "head.safetensors", "head.json"


class HiddenFormat(HiddenLayout):
    """Layout of a row; encodes and decodes rows."""

    def encode(self, states: Tensor) -> Tensor:
        """Packs states [n, H], any floating dtype, into bytes [n, bytes] uint8, on the same device.

        Raises:
            UserError: a state is NaN or infinite.
        """
        if not bool(states.isfinite().all()):
            raise UserError("the teacher computes hidden states that are NaN or infinite, which a cache cannot keep; load it in fp32")
        if self.states != "int8":
            return states.to(_DTYPES[self.states]).contiguous().view(torch.uint8)
        # [n, groups, GROUP]; zeros fill up the last group, which change no scale
        groups = torch.nn.functional.pad(states.float(), (0, -self.hidden % GROUP)).unflatten(1, (-1, GROUP))
        # to the nearest bf16: where that is smaller by up to 2^-9, the largest number is 127.25 steps at most, and its code 127
        scale = (groups.abs().amax(2) / 127).to(torch.bfloat16)
        codes = (groups / torch.where(scale > 0, scale, 1).float()[:, :, None]).round().clamp(-127, 127).to(torch.int8)
        data = codes.flatten(1)[:, : self.hidden].contiguous().view(torch.uint8)
        return torch.cat([data, scale.contiguous().view(torch.uint8)], 1)

    def decode(self, data: Tensor) -> Tensor:
        """Unpacks bytes [n, bytes] uint8, on any device, into states [n, H]: bf16 if they are stored so, else fp32."""
        if self.states != "int8":
            return data.contiguous().view(_DTYPES[self.states])
        codes = data[:, : self.hidden].contiguous().view(torch.int8).float()
        scale = data[:, self.hidden :].contiguous().view(torch.bfloat16).float()
        return codes * scale.repeat_interleave(GROUP, 1)[:, : self.hidden]


def divergence_of_states(stored: Tensor, states: Tensor, head: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """KL(cache || teacher) per position [n] at temperature 1, of stored states [n, H] and the teacher's own [n, H].

    Args:
        stored: What a reader decodes.
        states: The teacher's.
        head: [V, H] of the real vocabulary, fp32; bias: [V] or None; transform: of the logits.
    """

    def log_probabilities(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = in_full_precision(hidden) @ head.T
            logits = logits if bias is None else logits + in_full_precision(bias)
            logits = logits * transform.logit_scale
            if transform.softcap is not None:
                logits = transform.softcap * torch.tanh(logits / transform.softcap)
            return torch.log_softmax(logits, -1)

    log_q, log_p = log_probabilities(stored), log_probabilities(states)
    # a token that a bias of -inf excludes is excluded in both
    return torch.where(log_q == log_p, 0.0, log_q.exp() * (log_q - log_p)).sum(1)


def head_is_there(folder: Path, *, thorough: bool) -> bool:
    """Whether a cache has its head; ``thorough`` also compares the hash."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        right = not seal_is_broken(manifest) and (folder / _HEAD).stat().st_size == manifest["bytes"]
        return bool(right and (not thorough or cached_sha256(folder / _HEAD) == manifest["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def drop_head(folder: Path) -> None:
    """Makes a head that is damaged one that is not there."""
    (folder / _MANIFEST).unlink(missing_ok=True)


def write_head(folder: Path, weight: Tensor, bias: Tensor | None) -> None:
    """Writes the head of a cache in one step.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    from safetensors.torch import save

    tensors = {"weight": weight.detach().cpu().contiguous()} | ({} if bias is None else {"bias": bias.detach().cpu().contiguous()})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    check_free_space(folder, size, "the teacher's cache (teacher.cache.path, or DECOCT_CACHE)")
    drop_head(folder)
    write_bytes_atomic(folder / _HEAD, save(tensors))
    # last: without it the head does not count
    write_json_atomic(folder / _MANIFEST, sealed({"bytes": (folder / _HEAD).stat().st_size, "sha256": sha256_file(folder / _HEAD)}))


def read_head(folder: Path) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], bias [V] or None) of a cache, on the CPU in the teacher's dtype."""
    from safetensors.torch import load_file

    found = load_file(folder / _HEAD)
    return found["weight"], found.get("bias")
