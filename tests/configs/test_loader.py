"""Recipes load with their defaults, from files, names and data, and the resolved recipe loads to an equal one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from decoct.configs import Recipe, load_recipe, recipe_from_dict, resolved
from decoct.losses.settings import LossSettings
from decoct.models.common.errors import UserError
from decoct.qat.spec import QuantSpec
from decoct.trainer.settings import DistillSettings, LoggerSettings
from decoct.trainer.settings_quantization import QatSettings

FULL = """\
name: everything
seed: 3
teacher: {path: a/teacher, load_in: fp32, revision: 5e10}
student: {keep: {layers: 4}}
data:
  files:
    - a.txt
    - "b*.jsonl"
  seq_length: 1_024
  text_field: 1k
stages:
  - distill:
      name: first
      tokens: 1.5B
      learning_rate: 1e-4
      warmup: 5%
      loss: {temperature: 2, t_squared: false}
  - qat: {steps: 1e3, weights: {bits: 8, group_size: channel}, skip: "*.o_proj"}
  - export
  - evaluate:
trainer: {precision: 32, global_batch_tokens: 2048, micro_batch: auto}
logger: wandb
"""


def test_every_kind_of_value_means_what_its_key_says(load: Callable[..., Recipe]) -> None:
    recipe = load(FULL)
    assert (recipe.name, recipe.seed) == ("everything", 3)
    assert recipe.teacher is not None
    assert recipe.teacher.revision == "5e10"
    assert recipe.data.files == ("a.txt", "b*.jsonl")
    assert (recipe.data.seq_length, recipe.data.text_field) == (1024, "1k")
    assert recipe.trainer.precision == "32"
    assert recipe.logger == LoggerSettings(kind=("wandb",))
    assert [(entry.index, entry.kind, entry.name, entry.label) for entry in recipe.stages] == [
        (0, "distill", "01-first", "first"),
        (1, "qat", "02-qat", "qat"),
        (2, "export", "03-export", "export"),
        (3, "evaluate", "04-evaluate", "evaluate"),
    ]
    assert recipe.stages[0].settings == DistillSettings(
        tokens=1_500_000_000, learning_rate=1e-4, warmup=0.05, loss=LossSettings(temperature=2.0, t_squared=False)
    )
    assert recipe.stages[1].settings == QatSettings(steps=1000, weights=QuantSpec(bits=8, group_size="channel"), skip=("*.o_proj",))


def test_resolved_recipe_loads_to_an_equal_one(load: Callable[..., Recipe]) -> None:
    recipe = load(FULL)
    plain = resolved(recipe)
    assert recipe_from_dict(plain) == recipe
    assert load(yaml.safe_dump(plain, sort_keys=False)) == recipe
    # Nothing is left to a default that may change later.
    assert plain["stages"][0]["distill"]["schedule"] == "cosine"
    assert plain["trainer"]["save_dtype"] == "bf16"


CONFIG_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8).filter(str.isprintable),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8).filter(str.isprintable), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(1, 10**15),
    rate=st.floats(1e-12, 1e3),
    keep=st.floats(0.001, 0.999),
    config=st.dictionaries(st.text(max_size=8).filter(str.isprintable), CONFIG_VALUES, max_size=4),
)
def test_any_value_survives_the_resolved_form(tokens: int, rate: float, keep: float, config: dict[str, object]) -> None:
    data = {
        "name": "x",
        "teacher": {"path": "a/teacher"},
        "student": {"config": {**config, "hidden_size": 64}},
        "data": {"builtin": "python-stdlib"},
        "stages": [{"prune": {"tokens": tokens, "learning_rate": rate, "magnitude": {"keep": keep}}}],
    }
    recipe = recipe_from_dict(data)
    assert recipe.student.config == {**config, "hidden_size": 64}
    assert recipe.stages[0].settings.magnitude.keep == keep
    assert recipe_from_dict(resolved(recipe)) == recipe


def test_free_form_config_has_yamls_types(load: Callable[..., Recipe]) -> None:
    recipe = load(
        "teacher: {path: t}\n"
        "student: {config: {model_type: llama, hidden_size: 64, rms_norm_eps: 1e-5, tie: true, x: null, v: 1k, list: [1, b]}}\n"
        "data: {builtin: python-stdlib}\nstages: [{distill: {tokens: 1M}}]\n"
    )
    assert recipe.student.config == {
        "model_type": "llama",
        "hidden_size": 64,
        "rms_norm_eps": 1e-5,
        "tie": True,
        "x": None,
        "v": "1k",
        "list": [1, "b"],
    }


def test_name_defaults_to_the_files(load: Callable[..., Recipe]) -> None:
    assert load(FULL.replace("name: everything\n", "")).name == "my"


def test_qat_and_pruning_learn_from_their_input_without_a_teacher() -> None:
    stages = [{"prune": {"tokens": "1M", "magnitude": {"keep": 0.5}}}, {"qat": {"tokens": "1M"}}, {"pretrain": {"tokens": "1M"}}]
    stages.append({"distill": {"tokens": "1M", "loss": {"hard_weight": 1}}})
    recipe = recipe_from_dict({"name": "x", "student": {"path": "s"}, "data": {"builtin": "python-stdlib"}, "stages": stages})
    assert recipe.teacher is None


@pytest.mark.parametrize("codes", ["quant/codes.safetensors", "quant.safetensors"])
def test_export_of_a_folder_that_is_quantized_already_is_allowed(tmp_path: Path, codes: str) -> None:
    data = {"name": "x", "student": {"path": str(tmp_path)}, "data": {"builtin": "python-stdlib"}, "stages": ["export"]}
    with pytest.raises(UserError, match="never rounds; put one of the two before it"):
        recipe_from_dict(data)
    (tmp_path / codes).parent.mkdir(exist_ok=True)
    (tmp_path / codes).touch()
    assert recipe_from_dict(data).stages[0].kind == "export"


def test_file_and_shipped_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").name == "quickstart"
    (tmp_path / "quickstart").write_text(FULL)
    assert load_recipe("quickstart").name == "everything"
    assert load_recipe(tmp_path / "quickstart").name == "everything"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "quickstrt",
            "there is no recipe file 'quickstrt' and no shipped recipe of that name, did you mean 'quickstart'? shipped: quickstart, ",
        ),
        (
            "configs/quickstart.yaml",
            "there is no recipe file 'configs/quickstart.yaml' and no shipped recipe of that name, did you mean 'quickstart'?",
        ),
        ("nothing-like-it", "there is no recipe file 'nothing-like-it' and no shipped recipe of that name; shipped: quickstart, "),
        (".", ". is a folder; give a recipe file in it, or one of the shipped recipes: quickstart, "),
        ("/dev/null", "/dev/null is no regular file; give a recipe file, "),
    ],
)
def test_missing_recipe_names_the_nearest(given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_recipe(given)
    assert str(caught.value).startswith(expected)


def test_a_model_folder_given_for_a_recipe_is_told_what_sizes_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a folder \('decoct footprint .*' says what the model in it takes\); give a recipe file"):
        load_recipe(str(tmp_path))


def test_importing_and_loading_needs_no_torch() -> None:
    code = (
        "import sys, decoct.configs as c; c.load_recipe('quickstart');"
        "print([m for m in ('torch', 'transformers', 'lightning', 'numpy', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
