"""Fills a cache: the teacher predicts each window once, and the chosen part of its distributions goes to disk."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...losses.linear_divergence.inputs import LogitTransform
from ...losses.logits import in_full_precision
from ...losses.shift import MASKED, shift_for_next_token
from ...losses.sparse import SparseTargets
from ...models.teachers import Teacher
from .cached import SparseTeacher
from .choosing import choose_rows, packed_rows
from .hidden_rows import HiddenFormat, divergence_of_states
from .keys import noise_of, sequence_keys
from .packed_rows import RowFormat
from .store import Store

if TYPE_CHECKING:
    from ..data.windows import Windows

BATCH_TOKENS = 4096
# log-probabilities in memory at once: 128 MiB in fp32, and as much again for each intermediate of the same shape
_BLOCK_ELEMENTS = 2**25
# large enough that a cache has few files, small enough to be held in memory until it is written
SHARD_BYTES = 64_000_000
SHARD_SECONDS = 60.0
"""Longest time between two shards: a killed capture loses at most this much work."""


def missing_windows(store: Store, windows: "Windows", indices: Iterable[int]) -> list[int]:
    """The ``indices`` of windows that are not in the cache; of windows with the same content only the first."""
    wanted = list(indices)
    # by key: windows with the same content need the teacher once
    missing: dict[bytes, int] = {}
    for first in range(0, len(wanted), 256):
        part = wanted[first : first + 256]
        keys = sequence_keys(stack(windows, part))
        lacking = store.find(keys)[:, 0] < 0
        for index, key, lacks in zip(part, keys, lacking.tolist()):
            if lacks:
                missing.setdefault(key, index)
    return list(missing.values())


def stack(windows: "Windows", indices: Sequence[int]) -> dict[str, Tensor]:
    """Stacks windows to a batch."""
    rows = [windows[index] for index in indices]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def capture(
    teacher: Teacher | SparseTeacher, windows: "Windows", indices: Sequence[int], store: Store, form: RowFormat | HiddenFormat
) -> Iterator[int]:
    """Adds the teacher's predictions of windows to ``store``; yields the tokens of each batch, for progress bars.

    The same window gives the same bytes in every batch, order and process, as far as the teacher's own arithmetic does.
    """
    keys: list[bytes] = []
    rows: list[Tensor] = []
    kl = tokens = worst = 0.0
    began = time.monotonic()
    size = max(1, BATCH_TOKENS // windows.seq_length)
    for first in range(0, len(indices), size):
        batch = stack(windows, indices[first : first + size])
        if isinstance(form, HiddenFormat):
            assert isinstance(teacher, Teacher), "a server gives no hidden states, and recipes that ask for them are refused"
            made = encoded_states(teacher, batch, form)
        else:
            made = ((data, error, 0.0) for data, error in encoded(teacher, batch, form))
        for key, (data, error, most) in zip(sequence_keys(batch), made):
            keys.append(key)
            rows.append(data)
            kl, tokens, worst = kl + error, tokens + len(data), max(worst, most)
        # by time as well as by size: with a slow teacher a shard may take hours to fill
        full = sum(len(part) for part in rows) * form.bytes >= SHARD_BYTES or time.monotonic() - began > SHARD_SECONDS
        if full or first + size >= len(indices):
            figures = {"kl": kl, "tokens": tokens}
            store.add(keys, rows, {**figures, "worst_kl": worst} if isinstance(form, HiddenFormat) else figures)
            keys, rows, kl, tokens, worst, began = [], [], 0.0, 0.0, 0.0, time.monotonic()
        yield int(batch["attention_mask"].sum())


@torch.no_grad()
def encoded(teacher: Teacher | SparseTeacher, batch: Mapping[str, Tensor], form: RowFormat) -> Iterator[tuple[Tensor, float]]:
    """Yields (rows [n, bytes] uint8 in host memory, summed KL(cache || teacher)) for each sequence of a batch."""
    if isinstance(teacher, SparseTeacher):
        yield from _encoded_again(teacher, batch, form)
        return
    hidden, head, bias, transform = teacher.hidden_and_head(batch)
    # hidden [B, S, H] -> flat [B * (S - 1), H], labels [B * (S - 1)]
    flat, labels = shift_for_next_token(hidden, batch["labels"].to(hidden.device))
    # once per batch; logits and softmax are fp32, over the real vocabulary (law 2, docs/architecture.md)
    weight = in_full_precision(head[: form.v_eff])
    block = max(1, _BLOCK_ELEMENTS // form.v_eff)
    for sequence, own, key in zip(flat.view(len(hidden), -1, flat.shape[1]), labels.view(len(hidden), -1), sequence_keys(batch)):
        # [n, H]: masked positions are neither computed nor stored
        states = sequence[own != MASKED]
        # from the window's key, so that its draws do not depend on batch, order or process
        noise = noise_of(key, len(states), 1 + form.top + form.others).to(states.device)
        parts: list[Tensor] = []
        error = 0.0
        for first in range(0, len(states), block):
            part = slice(first, first + block)
            log_p = _log_probabilities(states[part], weight, bias, transform, form)
            chosen = choose_rows(log_p, form, noise[part, 0])
            data = form.encode(chosen, None if form.tail else noise[part, 1:])
            # measured on what a reader will decode, so it contains the rounding of the row too
            error += float(kl_to_full(form.decode(data), log_p).sum())
            # rows are about a hundred bytes; log_p [block, V] is dropped here
            parts.append(data.cpu())
        yield (torch.cat(parts) if parts else torch.empty(0, form.bytes, dtype=torch.uint8)), error


@torch.no_grad()
def encoded_states(teacher: Teacher, batch: Mapping[str, Tensor], form: HiddenFormat) -> Iterator[tuple[Tensor, float, float]]:
    """Yields (rows [n, bytes] uint8 in host memory, summed KL(cache || teacher), largest KL of a token) for each sequence of a batch."""
    hidden, head, bias, transform = teacher.hidden_and_head(batch)
    flat, labels = shift_for_next_token(hidden, batch["labels"].to(hidden.device))
    weight: Tensor | None = None
    block = max(1, _BLOCK_ELEMENTS // form.v_eff)
    for sequence, own in zip(flat.view(len(hidden), -1, flat.shape[1]), labels.view(len(hidden), -1)):
        states = sequence[own != MASKED]
        data = form.encode(states)
        stored = form.decode(data)
        error = worst = 0.0
        # what is stored as it is has a KL of exactly 0, without a product with the head
        if not torch.equal(stored.to(torch.float32), states.to(torch.float32)):
            weight = in_full_precision(head[: form.v_eff]) if weight is None else weight
            for first in range(0, len(states), block):
                part = slice(first, first + block)
                kl = divergence_of_states(stored[part], states[part], weight, None if bias is None else bias[: form.v_eff], transform)
                error, worst = error + float(kl.sum()), max(worst, float(kl.max()))
        yield data.cpu(), error, worst


def _encoded_again(teacher: SparseTeacher, batch: Mapping[str, Tensor], form: RowFormat) -> Iterator[tuple[Tensor, float]]:
    """``encoded`` for a teacher that gives only a few tokens itself; tokens that are left out of a row count as its tail."""
    targets = teacher.sparse_targets(batch)
    if form.top + form.others > targets.ids.shape[1]:
        have, wanted = targets.ids.shape[1], form.top + form.others
        # a server may know fewer tokens than a row holds: the rest becomes unused slots of weight 0
        targets = replace(
            targets,
            ids=torch.nn.functional.pad(targets.ids, (0, wanted - have)),
            log_weights=torch.nn.functional.pad(targets.log_weights, (0, wanted - have), value=-torch.inf),
        )
    labels = batch["labels"][:, 1:].to(targets.ids.device)
    for sequence, own in enumerate(labels):
        known = targets[torch.arange(own.numel(), device=own.device)[own != MASKED] + sequence * own.numel()]
        data = form.encode(packed_rows(known, form))
        yield data.cpu(), float(_kl_between(form.decode(data), known, form.v_eff).sum())


def _kl_between(kept: SparseTargets, known: SparseTargets, v_eff: int) -> Tensor:
    """KL of two bucket forms per position [n]; tokens that only ``known`` holds belong to the tail of ``kept``."""
    # the tail of ``known`` as one more token, in the column behind the vocabulary
    dense = known.log_weights.new_full((len(known.ids), v_eff + 1), -torch.inf)
    used = known.log_weights > -torch.inf
    dense.scatter_(1, torch.where(used, known.ids, v_eff), known.log_weights)
    dense[:, v_eff] = -torch.inf if known.log_tail is None else known.log_tail
    return kl_to_full(kept, dense)


def _log_probabilities(states: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, form: RowFormat) -> Tensor:
    # [n, H] -> [n, V], in the order of the model's own head: scale, soft cap, then the temperature
    with torch.autocast(states.device.type, enabled=False):
        logits = in_full_precision(states) @ weight.T
        if bias is not None:
            logits = logits + in_full_precision(bias[: form.v_eff])
        logits = logits * transform.logit_scale
        if transform.softcap is not None:
            logits = transform.softcap * torch.tanh(logits / transform.softcap)
        return torch.log_softmax(logits / form.temperature, -1)


def kl_to_full(known: SparseTargets, log_p: Tensor) -> Tensor:
    """KL(cache || teacher) per position [n] in nats: weights against probabilities, and the tail, if there is one, against the other mass.

    For a sampled cache it is the KL of the one draw that is kept; over draws the weights average to the probabilities.
    """
    ids, weights = known.filled()
    whole = weights.sum(1)
    # the teacher's mass of all tokens that the row does not hold
    log_outside = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    tail = torch.zeros_like(whole) if known.log_tail is None else known.log_tail.exp()
    # clamped, because a probability of 0 may have been stored as the smallest weight of a row
    parts = torch.where(weights > 0, weights * (known.log_weights - log_p.gather(1, ids).clamp(min=-100)), 0.0).sum(1)
    if known.log_tail is None:
        # the weights of a sample do not sum to 1: KL of the normalised weights
        return parts / whole - whole.log()
    return parts + torch.where(tail > 0, tail * (known.log_tail - log_outside), 0.0)
