"""What trackers call the numbers of a line."""

import pytest

from decoct.trainer.trackers.names import AXES, before, stage_number, tracked


def test_every_number_of_a_step_has_a_group_with_an_axis() -> None:
    line = {
        "tokens": 512, "loss": 1.0, "kl": None, "learning_rate": 1e-3, "held_out_kl": 0.5, "held_out_perplexity": 9.0, "ended_early": 1,
        "evaluations_since_better": 2, "tokens_per_second": 100.0, "peak_memory_bytes": 3_000_000_000, "data_epochs": 0.5, "seconds": 4.0,
    }  # fmt: skip
    assert tracked(line) == pytest.approx(
        {
            "train/loss": 1.0, "train/learning_rate": 1e-3, "train/data_epochs": 0.5, "heldout/kl": 0.5, "heldout/perplexity": 9.0,
            "heldout/ended_early": 1.0, "heldout/evaluations_since_better": 2.0, "speed/tokens_per_second": 100.0,
            "speed/stage_seconds": 4.0, "memory/peak_gb": 3.0,
        }
    )  # fmt: skip
    assert {name.partition("/")[0] for name in tracked(line)} == set(AXES)


def test_figures_of_a_text_keep_its_name_and_their_group() -> None:
    line = {"loss.math": 1.0, "held_out_kl.math": 0.5, "data_epochs.the-web": 2.0}
    assert tracked(line) == {"train/loss.math": 1.0, "heldout/kl.math": 0.5, "train/data_epochs.the-web": 2.0}


def test_stages_have_the_number_of_their_folder() -> None:
    assert [stage_number(name) for name in ("teacher", "01-distill", "12-qat", "distill")] == [0, 1, 12, None]
    rows = [{"stage": stage, "step": step, "tokens": tokens} for stage, step, tokens in (("10-b", 5, 50), ("09-a", 2, 20), ("09-a", 1, 10))]
    assert before("10-b", rows) == (2, 20)
    assert before("11-c", rows) == (7, 70)
    assert before("distill", rows) == (0, 0)
    assert before("10-b", [{"stage": "09-a", "step": 3}]) == (3, 0), "a line may have no tokens"
