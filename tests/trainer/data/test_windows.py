"""Windows as training sees them, and how they are cut from a token stream."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from decoct.trainer.data.windows import Windows, join_neighbours, write_labelled, write_packed, write_padded

STREAM = np.arange(100, 130, dtype=np.int32)


def test_packed_window_labels_every_token_but_the_first() -> None:
    window = Windows(np.array([[7, 8, 9]], dtype=np.int32))[0]
    assert {key: value.tolist() for key, value in window.items()} == {
        "input_ids": [7, 8, 9],
        "labels": [-100, 8, 9],
        "attention_mask": [1, 1, 1],
    }
    assert all(value.dtype == torch.int64 for value in window.values())


def test_padding_has_neither_label_nor_attention_even_with_the_id_of_a_real_token() -> None:
    windows = Windows(np.array([[7, 8, 7, 7]], dtype=np.int32), np.array([3], dtype=np.int32))
    assert windows[0]["labels"].tolist() == [-100, 8, 7, -100]
    assert windows[0]["attention_mask"].tolist() == [1, 1, 1, 0]
    assert windows.tokens == 3


def test_windows_end_as_sequences_do() -> None:
    windows = Windows(np.zeros((2, 3), dtype=np.int32))
    assert len([window["labels"] for window in (windows[i] for i in range(2))]) == 2
    with pytest.raises(IndexError):
        windows[2]


def test_packing_joins_segments_in_their_order_and_drops_the_rest(tmp_path: Path) -> None:
    segments = np.array([[20, 25], [0, 6]])
    assert write_packed(tmp_path / "w", STREAM, segments, 4) == 2
    assert Windows.open(tmp_path / "w", 4).rows.tolist() == [[120, 121, 122, 123], [124, 100, 101, 102]]
    assert write_packed(tmp_path / "w", STREAM, segments, 4, most=1) == 1
    assert Windows.open(tmp_path / "w", 4).rows.tolist() == [[120, 121, 122, 123]]


def test_packed_documents_start_again_at_position_0_and_their_first_token_is_not_predicted(tmp_path: Path) -> None:
    documents = np.array([[0, 5], [5, 6], [20, 23], [10, 13]])
    assert write_packed(tmp_path / "w", STREAM, documents, 6) == 2
    windows = Windows.open(tmp_path / "w", 6)
    assert windows[0]["input_ids"].tolist() == [100, 101, 102, 103, 104, 105]
    assert windows[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0]
    assert windows[0]["labels"].tolist() == [-100, 101, 102, 103, 104, -100]
    assert windows[1]["position_ids"].tolist() == [0, 1, 2, 0, 1, 2]
    assert windows[1]["labels"].tolist() == [-100, 121, 122, -100, 111, 112]
    assert windows[-1]["position_ids"].tolist() == windows[1]["position_ids"].tolist()
    # a document cut by a window's end begins anew in the next one, where it cannot see its beginning
    write_packed(tmp_path / "w", STREAM, documents, 4)
    windows = Windows.open(tmp_path / "w", 4)
    assert [windows[i]["position_ids"].tolist() for i in range(3)] == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 1, 2]]
    copied = pickle.loads(pickle.dumps(windows))
    assert copied[1]["position_ids"].tolist() == [0, 0, 0, 1]


def test_joining_neighbours_keeps_positions_and_order() -> None:
    segments = np.array([[0, 3], [3, 5], [7, 9], [5, 7], [7, 8]])
    assert join_neighbours(segments).tolist() == [[0, 5], [7, 9], [5, 8]]
    assert join_neighbours(segments[:0]).tolist() == []


def test_packing_copies_in_parts_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.trainer.data.windows._COPY_TOKENS", 3)
    assert write_packed(tmp_path / "w", STREAM, np.array([[1, 12], [12, 30]]), 7) == 4
    assert Windows.open(tmp_path / "w", 7).rows.ravel().tolist() == list(range(101, 129))


def test_without_packing_each_document_starts_a_window_and_long_ones_take_several(tmp_path: Path) -> None:
    segments = np.array([[0, 3], [3, 4], [5, 14], [20, 24]])
    assert write_padded(tmp_path / "w", STREAM, segments, 4, 0) == (4, 0)
    windows = Windows.open(tmp_path / "w", 4)
    assert windows.rows.tolist() == [[100, 101, 102, 0], [105, 106, 107, 108], [109, 110, 111, 112], [120, 121, 122, 123]]
    assert windows.lengths is not None
    assert windows.lengths.tolist() == [3, 4, 4, 4]


def test_padded_windows_stop_at_the_most_tokens(tmp_path: Path) -> None:
    assert write_padded(tmp_path / "w", STREAM, np.array([[0, 3], [4, 8], [8, 12]]), 4, 0, most_tokens=8) == (2, 0)
    assert Windows.open(tmp_path / "w", 4).tokens == 7


def test_mapped_windows_travel_by_name(tmp_path: Path) -> None:
    write_packed(tmp_path / "w", np.zeros(400_000, dtype=np.int32), np.array([[0, 400_000]]), 4)
    data = pickle.dumps(Windows.open(tmp_path / "w", 4))
    assert len(data) < 1000
    assert len(pickle.loads(data)) == 100_000
    own = pickle.loads(pickle.dumps(Windows(np.array([[1, 2]], dtype=np.int32))))
    assert own.rows.tolist() == [[1, 2]]


def test_windows_without_a_token_to_predict_are_left_out(tmp_path: Path) -> None:
    """Neither a window's first token nor a document's is predicted, whatever is stored there."""
    tokens = np.array([-1, -2, 3, -4, 5, -6, -7, -8, -9, -10, 11, -12, 13, 14], dtype=np.int32)
    documents = np.array([[0, 10], [10, 14]])
    assert write_labelled(tmp_path / "w", tokens, documents, 4) == (1, 2), "the second begins with 5, in the third 11 begins a document"
    windows = Windows.open(tmp_path / "w", 4)
    assert windows.rows.tolist() == [[-1, -2, 3, -4]]
    assert windows.starts is not None
    assert windows.starts.tolist() == [0]
    assert write_labelled(tmp_path / "w", tokens, documents, 4, padding=0) == (2, 2)
    windows = Windows.open(tmp_path / "w", 4)
    assert windows.rows.tolist() == [[-1, -2, 3, -4], [13, 14, 0, 0]]
    assert windows.lengths is not None
    assert windows.lengths.tolist() == [4, 2]
    assert windows[1]["labels"].tolist() == [-100, 14, -100, -100]
    assert write_labelled(tmp_path / "w", tokens, documents, 4, most=0) == (0, 0)
    assert len(Windows.open(tmp_path / "w", 4)) == 0


def test_padded_windows_without_a_token_to_predict_are_left_out(tmp_path: Path) -> None:
    tokens = np.array([-1, -2, 3, -4, -5, -6, 7, -8], dtype=np.int32)
    assert write_padded(tmp_path / "w", tokens, np.array([[0, 3], [3, 6], [6, 8]]), 4, 0, labelled=True) == (1, 2)
    assert Windows.open(tmp_path / "w", 4).rows.tolist() == [[-1, -2, 3, 0]]
