"""Names of other tools lead to keys that exist, and to settings that a recipe takes as they are written in the hint."""

import re

import pytest

from decoct import types_of
from decoct.configs import recipe_from_dict
from decoct.configs.foreign_names import _BY_NAME, meant_by
from decoct.configs.reading import KEYS, SECTIONS
from decoct.losses.settings import LossSettings
from decoct.qat.spec import QuantSpec
from decoct.trainer.settings_pruning import MagnitudeSettings
from decoct.trainer.settings_quantization import QatSettings, QuantizeSettings
from decoct.trainer.settings_sparsity import SparseGptSettings, WandaSettings

HOMES = {
    **SECTIONS,
    "loss": LossSettings,
    "weights": QuantSpec,
    "magnitude": MagnitudeSettings,
    "wanda": WandaSettings,
    "sparsegpt": SparseGptSettings,
}
SENTENCES = sorted(set(_BY_NAME.values()))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lr", "learning_rate"),
        ("per_device_train_batch_size", "trainer.global_batch_tokens"),
        ("batch_size", "trainer.micro_batch"),
        ("gradient_accumulation_steps", "trainer.global_batch_tokens"),
        ("num_train_epochs", "'tokens'"),
        ("max_steps", "'steps'"),
        ("output_dir", "--out"),
        ("bf16", "trainer.precision"),
        ("fp16", "training in fp16 is not supported"),
        ("--dry-run", "decoct plan"),
        ("wbits", "weights.bits"),
        ("max_seq_length", "data.seq_length"),
        ("Warmup-Ratio", "'warmup'"),
    ],
)
def test_names_of_other_tools_are_explained(name: str, key: str) -> None:
    assert key in (meant_by(name) or "")


def test_a_name_that_nobody_uses_is_not_explained() -> None:
    assert meant_by("frobnicate") is None


@pytest.mark.parametrize("sentence", SENTENCES)
def test_every_key_that_a_hint_names_exists(sentence: str) -> None:
    for home, key in re.findall(r"\b([a-z]+)\.([a-z_]+)\b", sentence):
        if home in HOMES:
            assert key in types_of(HOMES[home]), f"{home}.{key}"
    stage_keys = {**types_of(QatSettings), **types_of(QuantizeSettings)}
    for key in re.findall(r"'([a-z_]+)'", sentence):
        assert key in stage_keys or key in KEYS, key


@pytest.mark.parametrize("example", sorted({e for s in SENTENCES for e in re.findall(r"stages\.0\.[a-z_]+=[^\s);]+", s)}))
def test_examples_of_hints_are_taken_as_they_stand(example: str) -> None:
    recipe = {
        "name": "x",
        "teacher": {"path": "t"},
        "student": {"path": "s"},
        "data": {"builtin": "python-stdlib"},
        "stages": [{"distill": {} if ".tokens=" in example or ".steps=" in example else {"tokens": "2M"}}],
    }
    plain = recipe_from_dict({**recipe, "stages": [{"distill": {"tokens": "2M"}}]})
    assert recipe_from_dict(recipe, [example]).stages[0].settings != plain.stages[0].settings
