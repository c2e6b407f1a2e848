"""Losses on hidden states and relations in recipes: how they are written, and what is refused before any work."""

from typing import Any

import pytest

from decoct.configs import recipe_from_dict
from decoct.losses.settings_features import FeatureSettings, HiddenSettings, RelationSettings
from decoct.models.common.errors import UserError

HIDDEN = {"hidden": {"weight": 0.5}}


def _recipe(features: Any, *, kind: str = "distill", teacher: Any = None, trainer: Any = None, **settings: Any) -> Any:
    stage = {kind: {"tokens": "1M", **settings, "loss": {**settings.get("loss", {}), "features": features}}}
    models = {"teacher": {"path": "big", **(teacher or {})}, "student": {"keep": {"layers": 3}}}
    return recipe_from_dict({"name": "x", **models, "data": {"files": "x.txt"}, "stages": [stage], "trainer": trainer or {}})


@pytest.mark.parametrize("layers", ["even", "kept", "last", [[0, 1], [2, 5]]])
def test_layers_are_words_or_pairs(layers: Any) -> None:
    recipe = _recipe({"hidden": {"weight": 0.5, "loss": "nmse", "layers": layers}, "relations": {"weight": "10%", "of": ["qq", "vv"]}})
    expected: Any = layers if isinstance(layers, str) else ((0, 1), (2, 5))
    assert recipe.stages[0].settings.loss.features == FeatureSettings(
        hidden=HiddenSettings(weight=0.5, loss="nmse", layers=expected),
        relations=RelationSettings(weight=0.1, of=("qq", "vv")),
    )


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "features need 'hidden' or 'relations'"),
        ({"hidden": {"loss": "mse"}}, "needs the key 'weight'"),
        ({"hidden": {"weight": 1, "layers": "evn"}}, "must be 'even', 'kept' or 'last' or a list of lists of 2 whole numbers; got"),
        ({"hidden": {"weight": 1, "layers": [[0]]}}, "must be a list of 2 whole numbers"),
        ({"hidden": {"weight": 1, "layers": [[0, -1]]}}, "-1 is out of range; it must be at least 0; layers are counted from 0"),
        ({"hidden": {"weight": 0}}, "must be greater than 0"),
        ({"relations": {"weight": 1, "of": ["qv"]}}, "must be 'qq', 'kk' or 'vv'"),
    ],
)
def test_what_is_wrong_is_said_at_its_key(features: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"features") as refused:
        _recipe(features)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"cache": "hybrid"}}, "compares with the teacher's layers, and teacher.cache keeps what the teacher predicts"),
        ({"teacher": {"served": {"url": "http://h:1/v1", "model": "m"}}}, "teacher.served gives what a server predicts"),
        ({"trainer": {"compile": True}}, "trainer.compile is true, and 01-distill reads what layers compute"),
        ({"loss": {"hard_weight": 1.0}}, "need a teacher, and hard_weight 1 trains without one"),
        ({"kind": "pretrain"}, "is not used: pretrain always trains on cross-entropy"),
        ({"kind": "prune", "tokens": None, "magnitude": {"keep": 0.5}}, "has no effect on a stage that takes no steps"),
    ],
)
def test_stages_that_cannot_have_them_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        _recipe(HIDDEN, **changes)
    assert message in str(refused.value).replace(": is true", " is true")


def test_a_stage_that_learns_from_its_own_input_may_have_them_beside_a_cache() -> None:
    models = {"teacher": {"path": "big", "cache": "hybrid"}, "student": {"keep": {"layers": 3}}, "data": {"files": "x.txt"}}
    own = {"qat": {"tokens": "1M", "weights": {"bits": 4, "group_size": 64}, "teacher": "input", "loss": {"features": HIDDEN}}}
    assert recipe_from_dict({"name": "x", **models, "stages": [{"distill": {"tokens": "1M"}}, own]}).stages[1].settings.loss.features
