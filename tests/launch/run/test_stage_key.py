"""Everything that changes numbers changes the key; nothing else does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decoct.configs.nodes import node_from_python
from decoct.configs.own_parts import load_parts
from decoct.launch.run.stage_key import stage_key
from decoct.losses.settings import LossSettings
from decoct.losses.settings_features import FeatureSettings, HiddenSettings, RelationSettings
from decoct.qat.transforms.settings import TransformSettings
from decoct.trainer.settings import DistillSettings, TrainerSettings
from decoct.trainer.settings_local import LocalSettings
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings, StructuredSettings
from decoct.trainer.settings_quantization import QuantizeSettings
from decoct.trainer.settings_samples import SamplesSettings
from decoct.trainer.settings_sparsity import MovementSettings, SparseGptSettings, WandaSettings
from decoct.trainer.settings_watching import EarlyStoppingSettings

from ...support.own_parts import write_parts

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
KEYS_OF_BEFORE = [
    "acb16f6c41290c25cc700acdcd4126e943123a4d5a424501c35f0e5a06cf1bc1",
    "e5f189a7a1eb738759dafd5a02457c130d169060b7c0319c329909ec0677e28f",
    "3c0f7c4d0a8b9e715a870aeb4d632325175237bdc0f3e9dcc213f90c15e8c87a",
]
"""Keys of prune stages: magnitude along a schedule, magnitude in one shot, channels."""


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


def test_keys_of_before_there_was_a_choice_of_weights_stay() -> None:
    # made by the version before ``result`` and ``early_stopping``
    assert stage_key(**BASE) == "cf007fc3ca8459013065cd5c9d073af6b8a695ba3c827d946504de336a495bd3"


def test_keys_of_before_there_were_other_axes_than_the_ffn_stay() -> None:
    cut = {**BASE, "name": "01-prune", "kind": "prune", "format_version": 2, "input_hash": "i", "teacher": None}
    told = stage_key(**{**cut, "settings": PruneSettings(structured=StructuredSettings(ffn=8))})
    # made by the version that cut FFN channels alone
    assert told == "d6f985f2e3596f5e88337d79e0d00cda8e9b43e857fbfabc0c92f3db947bc698"
    others: tuple[dict[str, Any], ...] = (
        {"ffn": 8, "heads": 2},
        {"ffn": 8, "repair": True},
        {"ffn": 8, "score": "taylor"},
        {"layers": 2},
        {"hidden": 8},
    )
    keys = {stage_key(**{**cut, "settings": PruneSettings(structured=StructuredSettings(**other))}) for other in others}
    assert len({told, *keys}) == 6


def test_keys_of_before_there_were_other_methods_of_pruning_stay() -> None:
    # made by the version before ``wanda``, ``sparsegpt``, ``movement`` and ``pattern``
    base = {**BASE, "kind": "prune"}
    whole = PruneSettings(magnitude=MagnitudeSettings(keep=0.7, scope="global"), calibration_tokens=512)
    scheduled = PruneSettings(magnitude=MagnitudeSettings(keep=0.7), tokens=1000)
    channels = PruneSettings(structured=StructuredSettings(ffn=64))
    known = [stage_key(**{**base, "settings": settings}) for settings in (scheduled, whole, channels)]
    assert known == KEYS_OF_BEFORE
    others = [
        PruneSettings(magnitude=MagnitudeSettings(pattern="2:4")),
        PruneSettings(magnitude=MagnitudeSettings(pattern="1:4")),
        PruneSettings(wanda=WandaSettings(pattern="2:4")),
        PruneSettings(wanda=WandaSettings(keep=0.5)),
        PruneSettings(wanda=WandaSettings(keep=0.5), calibration_tokens=512),
        PruneSettings(sparsegpt=SparseGptSettings(keep=0.5)),
        PruneSettings(sparsegpt=SparseGptSettings(keep=0.5, damping=0.1)),
        PruneSettings(movement=MovementSettings(keep=0.5), tokens=1000),
        PruneSettings(structured=StructuredSettings(ffn=64), local=LocalSettings()),
        PruneSettings(structured=StructuredSettings(ffn=64), local=LocalSettings(epochs=2)),
    ]
    keys = {stage_key(**{**base, "settings": settings}) for settings in others}
    assert len(keys | set(known)) == 13


def test_keys_of_before_there_were_transforms_stay() -> None:
    def key(**given: Any) -> str:
        return stage_key(**{**BASE, "kind": "quantize", "settings": QuantizeSettings(**given)})

    # made by the version before ``transform``
    assert key() == "3086bc188bb2665c542492d7086a0209e3949ef95665bbc10b356438e3191780"
    transforms = [{"method": "awq"}, {"method": "awq", "clip": True}, {"method": "smoothquant"}, {"method": "rotation", "heads": False}]
    assert len({key(), *(key(transform=TransformSettings(**one)) for one in transforms)}) == 5


def test_samples_count_where_a_stage_has_them_and_their_batch_never() -> None:
    def key(**given: Any) -> str:
        return stage_key(**{**BASE, "settings": DistillSettings(tokens=1000, samples=SamplesSettings(**given))})

    assert stage_key(**BASE) != key() != key(share=0.25)
    assert key(from_="mix") != key() == key(batch=8)


def test_when_a_stage_is_evaluated_counts_where_it_decides() -> None:
    often = {"trainer": TrainerSettings(evaluate_every=5)}
    assert stage_key(**BASE) == stage_key(**{**BASE, **often})
    keys = {stage_key(**BASE)}
    for settings in (
        DistillSettings(tokens=1000, result="best"),
        DistillSettings(tokens=1000, early_stopping=EarlyStoppingSettings(patience=2)),
        DistillSettings(tokens=1000, early_stopping=EarlyStoppingSettings(patience=3)),
        DistillSettings(tokens=1000, early_stopping=EarlyStoppingSettings(patience=2, min_change=0.1)),
    ):
        keys |= {stage_key(**{**BASE, "settings": settings}), stage_key(**{**BASE, **often, "settings": settings})}
    assert len(keys) == 9


@pytest.mark.parametrize(
    "change",
    [
        {"settings": DistillSettings(tokens=1000, checkpoint_every=7)},
        {"trainer": TrainerSettings(devices=4, strategy="ddp", num_workers=2, micro_batch=1)},
    ],
)
def test_what_changes_no_numbers_keeps_the_key(change: dict[str, Any]) -> None:
    assert stage_key(**BASE) == stage_key(**{**BASE, **change})


def test_a_stage_without_callbacks_keeps_the_key_of_versions_that_had_none() -> None:
    assert stage_key(**BASE) == "cf007fc3ca8459013065cd5c9d073af6b8a695ba3c827d946504de336a495bd3"


def test_the_file_of_a_part_is_in_the_key_of_a_stage_that_uses_it(tmp_path: Path) -> None:
    def key(body: str, name: str = "my_parts.py", **options: Any) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        file = write_parts(tmp_path, body, name)
        parts = load_parts(node_from_python({"import": str(file)}), tmp_path)
        loss, callback = parts.settings("divergence", "d"), parts.settings("callback", "c")
        assert loss is not None and callback is not None
        used = {"loss": {"loss": loss()}, "callbacks": {"callbacks": (callback(**options),)}}["callbacks" if options else "loss"]
        return stage_key(**{**BASE, "settings": DistillSettings(tokens=1000, **used)})

    body = "@parts.divergence('d')\ndef d(s, t): pass\n@parts.callback('c')\nclass C:\n    def __init__(self, *, x: int = 1): pass\n"
    keys = [key(body), key(body + "# changed\n"), key(body, x=1), key(body, x=2), key(body + "# changed\n", x=1), stage_key(**BASE)]
    assert len(set(keys)) == len(keys)
    assert key(body, "other.py") == key(body), "the file's name changes no numbers"


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


def test_features_count_where_a_loss_has_them_and_keep_old_keys_otherwise() -> None:
    def key(loss: LossSettings) -> str:
        return stage_key(**{**BASE, "settings": DistillSettings(tokens=1000, loss=loss)})

    hidden = FeatureSettings(hidden=HiddenSettings(weight=0.5))
    keys = {
        key(LossSettings()),
        key(LossSettings(features=hidden)),
        key(LossSettings(features=replace(hidden, relations=RelationSettings(weight=0.5)))),
    }
    assert len(keys) == 3
    assert key(LossSettings()) == stage_key(**BASE), "whose key is written down above"
