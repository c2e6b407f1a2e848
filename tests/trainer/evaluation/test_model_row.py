"""Measuring a quantized folder that memory does not hold: its weights are the pages of its files."""

from pathlib import Path

import pytest
import torch

from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import save_model_folder
from decoct.trainer.evaluation.model_row import open_for_measuring, too_large_to_measure


def mapped(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether the memory of a tensor is a file of ``folder``."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return str(folder) in line
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_fp32_folders_take_no_memory_of_their_own(trained_folder: Path, tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "wide", load_model(trained_folder, dtype=torch.float32), None, {}, dtype=torch.float32)
    assert all(mapped(parameter, folder) for parameter in open_for_measuring(str(folder)).parameters())
    assert not any(mapped(parameter, trained_folder) for parameter in open_for_measuring(str(trained_folder)).parameters())


def test_a_folder_that_memory_does_not_hold_in_fp32_is_known_beforehand(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = sum(p.numel() for p in load_model(trained_folder, dtype=torch.float32).parameters())
    wide = save_model_folder(tmp_path / "wide", load_model(trained_folder, dtype=torch.float32), None, {}, dtype=torch.float32)
    for room, told in ((4 * parameters, False), (4 * parameters - 1, True)):
        monkeypatch.setattr("decoct.trainer.evaluation.model_row.available_bytes", lambda room=room: room)
        assert bool(too_large_to_measure(str(trained_folder))) == told
        assert too_large_to_measure(str(wide)) is None, "transformers maps its files"
    monkeypatch.setattr("decoct.trainer.evaluation.model_row.available_bytes", lambda: None)
    assert too_large_to_measure(str(trained_folder)) is None
