"""A head that gets weights of its own."""

from pathlib import Path

import pytest
import torch

from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.ties import is_tied, untie

from ..support.pruned_families import logits, tiny


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_an_untied_head_is_the_same_model_and_stays_when_the_table_changes(kind: str) -> None:
    model = tiny(kind, tie_word_embeddings=True)
    before = logits(model)
    assert is_tied(model)
    untie(model)
    assert not is_tied(model) and model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(model), before)
    head = model.get_output_embeddings().weight.detach().clone()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    assert torch.equal(model.get_output_embeddings().weight, head)


@pytest.mark.parametrize("by", ["decoct", "transformers"])
def test_both_tables_are_written_and_read(by: str, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
    untie(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    if by == "decoct":
        save_model_folder(tmp_path / "model", model, None, {"kind": "pretrain"}, dtype=None)
    else:
        model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model))
    assert not is_tied(again)


def test_a_head_of_its_own_is_left() -> None:
    model = tiny("llama", tie_word_embeddings=False)
    head = model.get_output_embeddings().weight
    untie(model)
    assert model.get_output_embeddings().weight is head
