"""Every shipped recipe loads, resolves to itself, and builds its models on the meta device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from decoct.configs import Recipe, list_recipes, load_recipe, recipe_from_dict, resolved, shipped_text
from decoct.configs.architectures import architecture
from decoct.models.common.errors import UserError
from decoct.models.student import student_by_keeping
from decoct.trainer.scratch import new_llama
from decoct.trainer.settings import DistillSettings
from decoct.trainer.settings_pruning import PruneSettings
from decoct.trainer.settings_quantization import QatSettings, QuantizeSettings

NAMES = [name for name, _, _ in list_recipes()]


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def meta_teacher(recipe: Recipe) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    assert recipe.teacher is not None
    with torch.device("meta"):
        if recipe.teacher.scratch:
            tokenizer: Any = SimpleNamespace(bos_token_id=0, eos_token_id=0)
            return new_llama(recipe.teacher.scratch, tokenizer, recipe.teacher.scratch.vocab, recipe.data.seq_length, recipe.seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture(str(recipe.teacher.path))))


def test_the_recipes_are_listed_with_what_they_do() -> None:
    assert NAMES == [
        "quickstart",
        "llama-3.1-8b-4.5b-depth-int4",
        "qwen3-8b-4b-int4",
        "smollm2-1.7b-1b-24gb",
        "smollm2-1.7b-gptq-int4",
        "smollm2-1.7b-half-int4",
        "smollm2-135m-int4",
        "smollm2-135m-pruned",
    ]
    for name, path, about in list_recipes():
        assert path.read_text() == shipped_text(name)
        assert len(about) > 40
        assert load_recipe(name).name == name


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no shipped recipe is called 'quickstat', did you mean 'quickstart'\? shipped: quickstart, llama"):
        shipped_text("quickstat")


@pytest.mark.parametrize("name", NAMES)
def test_it_resolves_to_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_dict(resolved(recipe)) == recipe
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(resolved(recipe)))) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_its_models_build_and_its_lattice_fits_them(name: str) -> None:
    recipe = load_recipe(name)
    student = teacher = meta_teacher(recipe)
    if recipe.student.keep is None:
        assert recipe.teacher is not None
        assert recipe.student.path == recipe.teacher.path
    else:
        student, kept = student_by_keeping(teacher, recipe.student.keep.layers)
        assert (kept[0], kept[-1]) == (0, teacher.config.num_hidden_layers - 1)
        assert parameters(student) < parameters(teacher)
    for entry in recipe.stages:
        if isinstance(entry.settings, PruneSettings) and entry.settings.structured:
            assert entry.settings.structured.ffn < student.config.intermediate_size
        if isinstance(entry.settings, QatSettings | QuantizeSettings):
            for module in student.model.layers.modules():
                if isinstance(module, torch.nn.Linear):
                    entry.settings.weights.group_width(module.in_features)


def test_smollm2_is_halved() -> None:
    recipe = load_recipe("smollm2-1.7b-half-int4")
    assert recipe.teacher is not None
    assert recipe.teacher.path == "HuggingFaceTB/SmolLM2-1.7B"
    teacher = meta_teacher(recipe)
    student, kept = student_by_keeping(teacher, 12)
    assert parameters(teacher) == 1_711_376_384
    assert parameters(student) == 906_020_864
    assert kept == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    assert (recipe.data.hub, recipe.data.hub_config) == ("HuggingFaceTB/smollm-corpus", "cosmopedia-v2")
    assert [entry.kind for entry in recipe.stages] == ["distill", "qat", "export", "evaluate"]
    assert (recipe.stages[1].settings.weights.bits, recipe.stages[1].settings.weights.group_size) == (4, 128)


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [
        ("qwen3-8b-4b-int4", 8_190_735_360, 4_717_699_584),
        ("llama-3.1-8b-4.5b-depth-int4", 8_030_261_248, 4_540_469_248),
        ("smollm2-1.7b-1b-24gb", 1_711_376_384, 1_040_246_784),
    ],
)
def test_recipes_start_from_models_of_these_sizes(name: str, teacher: int, student: int) -> None:
    recipe = load_recipe(name)
    assert recipe.student.keep is not None
    model = meta_teacher(recipe)
    assert parameters(model) == teacher
    assert parameters(student_by_keeping(model, recipe.student.keep.layers)[0]) == student


def test_quickstart_goes_through_every_step() -> None:
    recipe = load_recipe("quickstart")
    kinds = ["distill", "prune", "distill", "prune", "qat", "export", "evaluate"]
    assert [entry.kind for entry in recipe.stages] == kinds
    assert recipe.stages[2].name == "03-recover"
    assert isinstance(recipe.stages[0].settings, DistillSettings)
    assert recipe.data.builtin == "python-stdlib"
    assert (recipe.trainer.precision, recipe.logger.kind) == ("32", ("none",))
    quant = recipe.stages[4].settings.weights
    assert (quant.bits, quant.group_size) == (4, 64)
    magnitude = recipe.stages[3].settings
    assert (magnitude.magnitude.keep, magnitude.tokens is not None) == (0.7, True)
