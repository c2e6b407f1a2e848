"""The JSON Schema of recipes: made from the settings dataclasses, shipped, and of one mind with the loader about single keys."""

import json
from typing import Any

import jsonschema
import pytest
import yaml

from decoct.configs import list_recipes, load_recipe, recipe_from_dict, resolved, shipped_text
from decoct.configs.json_schema import recipe_schema, schema_text
from decoct.configs.shipped import SCHEMA_FILE
from decoct.models.common.errors import UserError

NAMES = [name for name, _, _ in list_recipes()]
CHECKER = jsonschema.Draft202012Validator(recipe_schema())


def test_the_shipped_schema_is_the_one_that_is_made() -> None:
    assert SCHEMA_FILE.read_text() == schema_text(), "run `make reference`"
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_fits_and_names_the_schema(name: str) -> None:
    CHECKER.validate(yaml.safe_load(shipped_text(name)))
    CHECKER.validate(resolved(load_recipe(name)))
    file = next(path for other, path, _ in list_recipes() if other == name)
    first, _, named = shipped_text(name).splitlines()[0].partition("=")
    assert first == "# yaml-language-server: $schema"
    assert (file.parent / named).resolve() == SCHEMA_FILE


def test_every_key_is_described() -> None:
    def walk(node: Any, path: str) -> None:
        for key, inner in node.get("properties", {}).items():
            if not (path.endswith("items") or "description" in inner):
                raise AssertionError(f"{path}.{key}")
        for key, inner in node.items():
            if isinstance(inner, dict):
                walk(inner, f"{path}.{key}")

    walk({key: node for key, node in recipe_schema().items() if key != "properties"}, "")


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe of one qat stage. A change is a key path with ``__`` between its keys, ``qat__`` standing for the stage."""
    made: dict[str, Any] = {
        "name": "x",
        "teacher": {"path": "a/teacher"},
        "student": {"path": "a/student"},
        "data": {"builtin": "python-stdlib"},
        "stages": [{"qat": {"tokens": "1M"}}],
        "trainer": {},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = made
        for section in sections:
            place = made["stages"][0]["qat"] if section == "qat" else place.setdefault(section, {})
        place[key] = value
    return made


@pytest.mark.parametrize("value", ["1M", "1.5M", "500k", "2B", "1_000_000", "1e6", 1_000_000, 1e6, 1, "64"])
def test_a_number_of_tokens_is_written_as_the_loader_reads_it(value: object) -> None:
    CHECKER.validate(recipe(qat__tokens=value))
    assert recipe_from_dict(recipe(qat__tokens=value)).stages[0].settings.tokens >= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"qat__warmup": "10%"},
        {"qat__learning_rate": "1e-4"},
        {"qat__weights": {"bits": 8, "group_size": "channel"}},
        {"qat__skip": "*.o_proj"},
        {"qat__skip": ["*.o_proj", "*.q_proj"]},
        {"qat__overrides": {"*.down_proj": {"bits": 8}}},
        {"qat__loss": {"hard_weight": "50%"}},
        {"qat__name": "second"},
        {"qat__tokens": None, "qat__steps": 10},
        {"trainer__precision": 32},
        {"trainer__devices": "auto"},
        {"trainer__micro_batch": 1},
        {"trainer": None},
        {"logger": "wandb"},
        {"logger": {"kind": "csv"}},
        {"logger": ["tensorboard", "mlflow"]},
        {"logger": {"kind": ["wandb", "csv"], "project": "mine"}},
        {"qat__early_stopping": {"patience": 3, "min_change": "1%"}, "qat__result": "best"},
        {"teacher__cache": "hybrid"},
        {"teacher__revision": "5e10"},
        {"data": {"files": "*.txt", "eval_tokens": "64k"}},
        {"student": {"config": {"model_type": "llama", "anything": [1, {"else": None}]}}},
        {"student__path": None, "student__config": {"model_type": "llama"}},
        {"stages": [{"prune": {"structured": {"ffn": 8}, "magnitude": None}}, {"evaluate": None}, "evaluate"]},
        {"seed": 2**32 - 1},
    ],
)
def test_what_the_loader_takes_fits(changes: dict[str, Any]) -> None:
    recipe_from_dict(recipe(**changes))
    CHECKER.validate(recipe(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"qat__tokens": "1m"},
        {"qat__tokens": "5%"},
        {"qat__tokens": "1.5"},
        {"qat__tokens": "-1M"},
        {"qat__tokens": 0},
        {"qat__tokens": True},
        {"qat__tokns": "1M"},
        {"qat__betas": [0.9]},
        {"qat__betas": [0.9, 1.0]},
        {"qat__overrides": {"*.down_proj": {"bit": 8}}},
        {"qat__overrides": {"*.down_proj": {"bits": 9}}},
        {"qat__skip": [{"a": 1}]},
        {"qat__name": "2"},
        {"qat__name": "distill"},
        {"qat__loss": "forward_kl"},
        {"qat__start": "gtpq"},
        {"trainer__precision": 16},
        {"trainer__deterministic": 1},
        {"trainer__devices": 2000},
        {"trainer__betas": [0.9, 0.99]},
        {"teacher__cache": "topk"},
        {"teacher__path": "https://me:secret@host/m"},
        {"data__seq_length": 1},
        {"student__keep": {}},
        {"stages": []},
        {"stages": {"qat": {"tokens": "1M"}}},
        {"stages": [{"qat": {"tokens": "1M"}, "export": None}]},
        {"stages": ["expotr"]},
        {"student": None},
        {"student__keep": {"layers": 4}},
        {"data__files": "a.txt"},
        {"data": {"seq_length": 64}},
        {"teacher": {"load_in": "fp32"}},
        {"stages": ["prune"]},
        {"stages": [{"prune": None}]},
        {"stages": [{"prune": {"allow_partial": True}}]},
        {"stages": [{"prune": {"structured": {"ffn": 8}, "magnitude": {"keep": 0.5}}}]},
        {"seed": -1},
        {"name": "runs/x"},
    ],
)
def test_what_the_loader_refuses_for_one_key_or_section_does_not_fit(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        recipe_from_dict(recipe(**changes))
    assert not CHECKER.is_valid(recipe(**changes))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"qat__tokens": "1m"}, "stages.0.qat.tokens"),
        ({"qat__weights": {"bits": 9}}, "stages.0.qat.weights.bits"),
        ({"qat__overrides": {"*.down_proj": {"bits": 9}}}, "stages.0.qat.overrides.*.down_proj.bits"),
        ({"qat__loss": {"temperature": "warm"}}, "stages.0.qat.loss.temperature"),
        ({"stages": [{"prune": {"magnitude": {"keep": 2}}}]}, "stages.0.prune.magnitude.keep"),
        ({"stages": [{"prune": {"allow_partial": True}}]}, "stages.0.prune"),
        ({"stages": [{"prune": {"structured": {}}}]}, "stages.0.prune.structured"),
        ({"teacher__cache": {"mode": "topk"}}, "teacher.cache.mode"),
        ({"logger": {"kind": "tensorbord"}}, "logger.kind"),
        ({"logger": ["csv", "tensorbord"]}, "logger.1"),
        ({"qat__early_stopping": {"min_change": 0.1}}, "stages.0.qat.early_stopping"),
        ({"data": {"files": ["a.txt", {}]}}, "data.files.1"),
        ({"trainer__precision": 16}, "trainer.precision"),
    ],
)
def test_an_editor_marks_the_key_that_is_wrong(changes: dict[str, Any], place: str) -> None:
    assert {".".join(map(str, error.absolute_path)) for error in CHECKER.iter_errors(recipe(**changes))} == {place}
