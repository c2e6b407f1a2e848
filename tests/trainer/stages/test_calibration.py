"""Which windows are calibrated on: by the seed, as many as asked for, prompts as text, padding masked."""

from typing import Any

import numpy as np
import torch

from decoct.trainer.data.windows import Windows
from decoct.trainer.stages.calibration import BATCH_TOKENS, calibration_text


def numbered(count: int = 50, length: int = 16, **more: Any) -> Windows:
    """Windows that can be told by their tokens."""
    return Windows(np.arange(count * length, dtype=np.int32).reshape(count, length), **more)


def rows(windows: Windows, tokens: int, seed: int = 0) -> list[int]:
    text = calibration_text(windows, tokens, seed)
    return [int(row[0]) // windows.seq_length for batch in text.batches for row in batch["input_ids"]]


def test_the_seed_chooses_and_more_tokens_take_further_windows() -> None:
    some, more, other = rows(numbered(), 160), rows(numbered(), 320), rows(numbered(), 160, seed=1)
    assert len(set(some)) == 10
    assert more[:10] == some != list(range(10))
    assert other != some
    assert sorted(rows(numbered(), 10**6)) == list(range(50))


def test_the_last_window_is_taken_whole() -> None:
    assert calibration_text(numbered(), 17, 0).tokens == 32


def test_the_fingerprint_changes_with_text_and_seed_and_not_with_time() -> None:
    one, again = (calibration_text(numbered(), 160, 0).fingerprint() for _ in range(2))
    changed = Windows(numbered().rows + 1)
    assert one == again
    assert len({one, calibration_text(changed, 160, 0).fingerprint(), calibration_text(numbered(), 160, 1).fingerprint()}) == 3


def test_padding_is_masked_and_does_not_count() -> None:
    lengths = np.full(50, 4, dtype=np.int32)
    text = calibration_text(numbered(lengths=lengths), 160, 0)
    assert text.tokens == 160
    assert sum(len(batch["input_ids"]) for batch in text.batches) == 40
    assert all(bool((batch["attention_mask"].sum(1) == 4).all()) for batch in text.batches)


def test_prompts_are_text() -> None:
    plain = numbered()
    masked = plain.rows.copy()
    masked[:, :9] = -1 - masked[:, :9]
    text = calibration_text(Windows(masked), 160, 0)
    assert text.fingerprint() == calibration_text(plain, 160, 0).fingerprint()
    assert all("labels" not in batch for batch in text.batches)


def test_packed_windows_keep_their_positions_and_batches_their_size() -> None:
    windows = numbered(count=600, starts=np.arange(0, 9600, 8, dtype=np.int64))
    text = calibration_text(windows, 9600, 0)
    assert [len(batch["input_ids"]) for batch in text.batches] == [BATCH_TOKENS // 16, BATCH_TOKENS // 16, 600 - 2 * (BATCH_TOKENS // 16)]
    assert torch.equal(text.batches[0]["position_ids"][0], torch.arange(16) % 8)
