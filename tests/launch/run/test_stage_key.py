"""Everything that changes numbers changes the key; nothing else does."""

from dataclasses import replace
from typing import Any

import pytest

from decoct.launch.run.stage_key import stage_key
from decoct.losses.settings import LossSettings
from decoct.trainer.settings import DistillSettings, TrainerSettings
from decoct.trainer.settings_quantization import QuantizeSettings

BASE: dict[str, Any] = {
    "name": "01-distill",
    "kind": "distill",
    "settings": DistillSettings(tokens=1000),
    "format_version": 1,
    "input_hash": "a",
    "data": "d",
    "teacher": "t",
    "trainer": TrainerSettings(),
    "seed": 0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "qat"},
        {"name": "02-distill"},
        {"settings": DistillSettings(tokens=2000)},
        {"settings": DistillSettings(tokens=1000, loss=LossSettings(temperature=2.0))},
        {"format_version": 2},
        {"input_hash": "b"},
        {"data": "e"},
        {"teacher": None},
        {"seed": 1},
        {"sparse": ["model.layers.0.mlp.up_proj"]},
        *(
            {"trainer": replace(TrainerSettings(), **c)}
            for c in ({"precision": "32"}, {"global_batch_tokens": 1024}, {"gradient_clip": 0.5})
        ),
    ],
)
def test_what_changes_numbers_changes_the_key(change: dict[str, Any]) -> None:
    assert stage_key(**BASE) != stage_key(**{**BASE, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"settings": DistillSettings(tokens=1000, checkpoint_every=7)},
        {"trainer": TrainerSettings(devices=4, strategy="ddp", num_workers=2, micro_batch=1)},
    ],
)
def test_what_changes_no_numbers_keeps_the_key(change: dict[str, Any]) -> None:
    assert stage_key(**BASE) == stage_key(**{**BASE, **change})


def test_how_codes_are_chosen_changes_the_key_and_where_weights_lie_does_not() -> None:
    base = {**BASE, "kind": "quantize", "settings": QuantizeSettings(method="gptq")}
    changes = (
        {"method": "mse"},
        {"calibration_tokens": 1000},
        {"damping": 0.1},
        {"activation_order": False},
        {"scale": "mse"},
        {"skip": ("a",)},
    )
    keys = {stage_key(**{**base, "settings": QuantizeSettings(**{"method": "gptq", **change})}) for change in changes}
    assert len(keys | {stage_key(**base)}) == len(changes) + 1
    assert stage_key(**{**base, "settings": QuantizeSettings(method="gptq", stream="always")}) == stage_key(**base)
