"""What a recipe imports: files are run, checked and named in messages; options are keys like any other."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from decoct.configs import Recipe, load_recipe, recipe_from_dict, resolved
from decoct.configs.json_schema import recipe_schema
from decoct.configs.loader import outline_of
from decoct.models.common.errors import UserError

from ..support.own_parts import write_parts

RECIPE = """\
import: my_parts.py
teacher: {path: a/teacher}
student: {path: a/student}
data: {source: letters, count: 1k, words: [a, b], seq_length: 64}
stages:
  - distill:
      tokens: 1M
      loss: {divergence: power, exponent: 50%, temperature: 2}
      callbacks: [plain, {name: ema, decay: 0.5}]
  - shake: {mode: hard}
  - audit
"""
PARTS = '''
import dataclasses

@parts.divergence("power")
def power(student, teacher, *, exponent: Annotated[float, Bounds(gt=0)] = 2.0):
    return (student.exp() - teacher.exp()).abs().pow(exponent).sum(-1)

@parts.data_source("letters")
def letters(*, count: int, words: tuple[str, ...] = ()):
    yield "a"

@parts.stage("shake")
def shake(context, *, mode: Literal["soft", "hard"] = "soft", strength=0.1):
    """Shakes."""

@parts.stage("audit", makes_model=False, reads_text=False)
def audit(context):
    pass

@parts.callback("plain")
class Plain:
    def after_step(self, step): pass

@dataclasses.dataclass
class EmaSettings:
    decay: Annotated[float, Bounds(ge=0, lt=1)] = 0.9
    every: int | None = None

    def __post_init__(self):
        if self.every is not None and self.every > 9:
            raise ValueError(f"every={self.every} is more than 9; lower it")

@parts.callback("ema", settings=EmaSettings)
class Ema:
    def __init__(self, settings): self.settings = settings
    def on_start(self, student, optimizer): pass
'''
Load = Callable[..., Recipe]
Message = Callable[..., str]


@pytest.fixture
def parts(load: Load, tmp_path: Path) -> Path:
    return write_parts(tmp_path, PARTS)


def test_names_and_options_are_read_by_the_types_of_the_parts(load: Load, parts: Path) -> None:
    recipe = load(RECIPE)
    distill, shake, audit = recipe.stages
    assert (recipe.data.source, recipe.data.seq_length) == ("letters", 64)
    assert vars(recipe.data)["count"] == 1000
    assert vars(recipe.data)["words"] == ("a", "b")
    loss = distill.settings.loss
    assert (loss.divergence, loss.exponent, loss.temperature) == ("power", 0.5, 2.0)
    assert [one.name for one in distill.settings.callbacks] == ["plain", "ema"]
    assert distill.settings.callbacks[1].own_options() == {"decay": 0.5, "every": None}
    assert (shake.kind, shake.name, shake.settings.own_options()) == ("shake", "02-shake", {"mode": "hard", "strength": 0.1})
    assert audit.settings.part.makes_model is audit.settings.part.reads_text is False
    assert [file.path for file in recipe.imports] == ["my_parts.py"]
    assert type(shake.settings).__doc__ == "Shakes."


def test_a_resolved_recipe_is_read_back_as_an_equal_one(load: Load, parts: Path) -> None:
    recipe = load(RECIPE)
    assert recipe_from_dict(resolved(recipe)) == recipe
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(resolved(recipe)))) == recipe
    assert resolved(recipe)["stages"][0]["distill"]["callbacks"][1] == {"name": "ema", "decay": 0.5, "every": None}
    assert "import" not in resolved(load_recipe("quickstart"))


def test_overrides_reach_parts_and_import_may_be_one_itself(load: Load, parts: Path, tmp_path: Path) -> None:
    changed = load(
        RECIPE, ["stages.shake.strength=2", "stages.0.loss.exponent=3", "stages.0.callbacks={name: ema, decay: 0.1}", "data.count=7"]
    )
    assert changed.stages[1].settings.strength == 2.0
    assert changed.stages[0].settings.loss.exponent == 3.0
    assert changed.stages[0].settings.callbacks[0].decay == 0.1
    assert vars(changed.data)["count"] == 7
    (tmp_path / "elsewhere").mkdir()
    moved = parts.rename(tmp_path / "elsewhere" / "mine.py")
    # of an override the path is relative to the working directory, and it is read before the others
    assert (
        load(RECIPE.partition("\n")[2], ["stages.shake.strength=2", f"import={os.path.relpath(moved)}"]).stages[1].settings.strength == 2.0
    )


def test_a_path_is_relative_to_the_recipe_and_a_file_is_run_once(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.write_text(parts.read_text() + "\nwith open('ran', 'a') as file:\n    file.write('x')\n")
    (tmp_path / "my.yaml").write_text(RECIPE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    told: list[Path] = []
    first, second = (load_recipe("../my.yaml", tell=told.append) for _ in range(2))
    assert first == second
    assert told == [Path("../my_parts.py")]
    assert Path("ran").read_text() == "x"
    parts.write_text(parts.read_text() + "\n# another content\n")
    third = load_recipe("../my.yaml", tell=told.append)
    assert len(told) == 2
    assert third.imports[0].sha256 != first.imports[0].sha256
    assert third != first


WRONG = {
    "a divergence": (("divergence: power", "divergence: powr"),
        "my.yaml:8: stages.0.distill.loss.divergence: unknown divergence 'powr', did you "
        "mean 'power'? known: forward_kl, reverse_kl, jsd, gkd_jsd, skew_forward_kl, skew_reverse_kl, adaptive_kl, symmetric_kl, "
        "total_variation, power"),
    "a data source": (("source: letters", "source: leters"),
        "my.yaml:4: data.source: unknown data source 'leters', did you mean 'letters'? "
        "known: letters"),
    "a stage": (("- shake:", "- shak:"), "my.yaml:10: stages.1: unknown stage kind 'shak', did you mean 'shake'? kinds: pretrain, distill, "
        "prune, qat, quantize, export, evaluate, shake, audit"),
    "a callback": (("[plain,", "[plane,"),
        "my.yaml:9: stages.0.distill.callbacks.0.name: unknown callback 'plane', did you mean 'plain'? known: "
        "plain, ema"),
    "an option": (("exponent:", "exponnt:"), "my.yaml:8: stages.0.distill.loss.exponnt: unknown key, did you mean 'exponent'? valid here: "
        "divergence, temperature, t_squared, beta, alpha, balance, head_mass, hard_weight, features, exponent"),
    "an option's bounds": (("50%", "-1"), "my.yaml:8: stages.0.distill.loss.exponent: -1 is out of range; it must be greater than 0"),
    "an option's type": (("count: 1k", "count: many"), "my.yaml:4: data.count: must be a whole number (64, 500k, 2M); got 'many'"),
    "an option's choice": (("mode: hard", "mode: hrd"),
        "my.yaml:10: stages.1.shake.mode: must be 'soft' or 'hard'; got 'hrd', did you mean "
        "'hard'?"),
    "a missing option": (("count: 1k, ", ""), "my.yaml:4: data: needs the key 'count': a whole number (64, 500k, 2M)"),
    "an option's own check": (("decay: 0.5", "every: 10"),
        "my.yaml:9: stages.0.distill.callbacks.1.every: every=10 is more than 9; lower it"),
    "an option of none": (("- audit", "- audit: {x: 1}"), "my.yaml:11: stages.2.audit.x: unknown key; valid here: name"),
    "a callback twice": (("[plain,", "[ema,"), "my.yaml:9: stages.0.distill.callbacks: callbacks=['ema', 'ema'] names ema twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_one_message_with_its_line_and_the_registered_names(case: str, message: Message, parts: Path) -> None:
    (old, new), expected = WRONG[case]
    assert message(RECIPE.replace(old, new)).startswith(expected)


def test_without_an_import_a_message_says_what_is_missing(message: Message) -> None:
    text = "student: {path: a/student}\nstages: [evaluate]\ndata: {source: letters}\n"
    assert message(text) == (
        "my.yaml:3: data.source: source='letters' is no data source that the recipe imports; name the file that "
        "registers it (import: FILE.py)"
    )
    text = "student: {path: a/student}\ndata: {builtin: python-stdlib}\nstages:\n  - pretrain: {tokens: 1M, callbacks: ema}\n"
    assert message(text) == (
        "my.yaml:4: stages.0.pretrain.callbacks.0.name: name='ema' is no callback that the recipe imports; name the file that registers it "
        "(import: FILE.py)"
    )
    # with a name like one of decoct's, the slip is likelier: tests/configs/test_messages.py
    text = "student: {path: a/student}\ndata: {builtin: python-stdlib}\nstages:\n  - shuffle: {strength: 1}\n"
    assert message(text) == (
        "my.yaml:4: stages.0: unknown stage kind 'shuffle'; kinds: pretrain, distill, prune, qat, quantize, export, evaluate; "
        "a part of your own needs import: FILE.py"
    )
    text = text.replace("shuffle: {strength: 1}", "distill: {tokens: 1M, teacher: input, loss: {divergence: power, exponent: 2}}")
    told = message(text)
    assert told.startswith("my.yaml:4: stages.0.distill.loss.divergence: must be 'forward_kl', 'reverse_kl', ")
    assert told.endswith("; got 'power'; a part of your own needs import: FILE.py")
    assert message(text.replace("power, exponent: 2", "revers_kl")).endswith("; got 'revers_kl', did you mean 'reverse_kl'?")


FILES = {
    "raises": ("x = 1 / 0\n", "my_parts.py:4: ZeroDivisionError: division by zero; the recipe imports this file"),
    "raises in a function of its own": ("def f():\n    raise KeyError('k')\n\nf()\n",
        "my_parts.py:5: KeyError: 'k'; the recipe imports this file"),
    "raises in a library": ("import json\njson.loads('{')\n",
        "my_parts.py:5: JSONDecodeError: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1); the recipe imports this file"),
    "ends the process": ("raise SystemExit(0)\n", "my_parts.py:4: SystemExit: 0; the recipe imports this file"),
    "is no Python": ("def f(:\n", "my_parts.py:4: SyntaxError: invalid syntax; the recipe imports this file"),
    "imports what is not there": ("import not_there\n",
        "my_parts.py:4: ModuleNotFoundError: No module named 'not_there'; the recipe imports this file"),
    "registers nothing": ("x = 1\n", "my_parts.py:1: registers no part; decorate a function or class with "
        'parts.divergence("NAME"), data_source, stage or callback (from decoct import parts)'),
    "names no stage": ("@parts.stage\ndef f(c): pass\n", 'my_parts.py:4: parts.stage takes the name: @parts.stage("f")'),
    "names no divergence": ("x = 1\n@parts.divergence\ndef f(s, t): pass\n",
        'my_parts.py:5: parts.divergence takes the name: @parts.divergence("f")'),
    "names no data source": ("@parts.data_source\ndef f(): pass\n",
        'my_parts.py:4: parts.data_source takes the name: @parts.data_source("f")'),
    "names no callback": ("@parts.callback\nclass Ema: pass\n", 'my_parts.py:4: parts.callback takes the name: @parts.callback("Ema")'),
    "registers a name twice": ("@parts.stage('a')\ndef f(c): pass\n\n@parts.stage('a')\ndef g(c): pass\n",
        "my_parts.py:7: the stage a is registered twice, first at my_parts.py:4; rename one"),
    "takes a name of decoct's": ("@parts.stage('distill')\ndef f(c): pass\n",
        "my_parts.py:4: distill is a stage of decoct; choose another name"),
    "takes a divergence of decoct's": ("@parts.divergence('jsd')\ndef f(s, t): pass\n",
        "my_parts.py:4: jsd is a divergence of decoct; choose another name"),
    "takes no name": ("@parts.stage('a b')\ndef f(c): pass\n",
        "my_parts.py:4: 'a b' cannot name a stage; use letters, digits, '_' and '-', a letter first"),
    "takes too few arguments": ("@parts.divergence('d')\ndef f(s): pass\n",
        "my_parts.py:4: divergence d must take student and teacher as its first arguments"),
    "has an option without a type": ("@parts.data_source('d')\ndef f(*, x): pass\n",
        "my_parts.py:4: data source d has the option x without a type; annotate it, such as x: float = 1.0"),
    "has an option that no recipe can give": ("@parts.data_source('d')\ndef f(*, x: list[int] = []): pass\n",
        "my_parts.py:4: data source d has the option x of type list[int], which a recipe cannot give; use int, float, bool, str, Literal, "
        "tuple[..., ...], dict[str, ...] or None"),
    "has an option of the section's name": ("@parts.data_source('d')\ndef f(*, seq_length: int = 1): pass\n",
        "my_parts.py:4: data source d has the option seq_length, which is a key of the section already; give it another name"),
    "has nameless options": ("@parts.callback('d')\ndef f(**more): pass\n",
        "my_parts.py:4: callback d takes *more; options need names, types and defaults of their own"),
    "has settings that are none": ("@parts.callback('d', settings=int)\ndef f(settings): pass\n",
        "my_parts.py:4: callback d has settings=<class 'int'>, which is no dataclass"),
    "decorates a number": ("parts.stage('d')(3)\n", "my_parts.py:4: stage d is registered for 3; decorate a function or a class"),
    "has two faults": ("@parts.stage('distill')\ndef f(c): pass\n@parts.divergence('d')\ndef g(): pass\n",
        "the imported files have 2 problems:\n  my_parts.py:4: distill is a stage of decoct; choose another name\n"
        "  my_parts.py:6: divergence d must take student and teacher as its first arguments"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_use_is_one_message_with_its_line(case: str, message: Message, tmp_path: Path) -> None:
    body, expected = FILES[case]
    write_parts(tmp_path, body)
    assert message("import: my_parts.py\nstages: [evaluate]\n") == expected


def test_a_file_that_is_not_there_is_named_with_the_place_that_names_it(message: Message, tmp_path: Path) -> None:
    rest = "\nstages: [evaluate]\n"
    assert message("import: [none.py]" + rest) == "my.yaml:1: import: there is no file none.py; the path is relative to the recipe's folder"
    assert message(rest, ["import=none.py"]) == (
        "override 'import=none.py': import: there is no file none.py; the path is relative to the working directory"
    )
    assert message("import: my.yaml" + rest) == "my.yaml:1: import: my.yaml is no Python file; give one whose name ends in .py"
    assert message("import: {a: b}" + rest) == ("my.yaml:1: import: must be a Python file or a list of them, such as import: my_parts.py")
    (tmp_path / "folder.py").mkdir()
    assert message("import: folder.py" + rest) == "my.yaml:1: import: folder.py cannot be read (Is a directory); give a Python file"


@pytest.mark.parametrize("place", ["override/my.yaml", "overrides.yaml", "override 'import=my_parts.py'"])
def test_a_recipe_whose_path_begins_like_an_override_imports_from_its_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path(place)
    recipe.parent.mkdir(exist_ok=True)
    below = recipe.parent / "below"
    below.mkdir()
    write_parts(below, "@parts.stage('audit', makes_model=False)\ndef audit(context): pass\n")
    recipe.write_text(
        "import: below/my_parts.py\nname: own\nteacher: {path: a}\nstudent: {path: b}\ndata: {builtin: python-stdlib}\nstages: [audit]\n"
    )
    assert load_recipe(recipe).stages[0].kind == "audit"
    recipe.write_text(recipe.read_text().replace("below/", "none/"))
    with pytest.raises(UserError, match="relative to the recipe's folder"):
        load_recipe(recipe)


def test_two_files_may_not_register_the_same_name(message: Message, tmp_path: Path) -> None:
    for name in ("one.py", "two.py"):
        write_parts(tmp_path, "@parts.stage('same')\ndef f(c): pass\n", name)
    assert (
        message("import: [one.py, two.py]\nstages: [same]\n")
        == "two.py:4: the stage same is registered twice, first at one.py:4; rename one"
    )


def test_two_recipes_may_give_one_name_two_meanings(tmp_path: Path) -> None:
    plain = {"name": "x", "student": {"path": "a"}, "data": {"builtin": "python-stdlib"}, "stages": ["same"]}
    made = []
    for name, default in (("one.py", 1), ("two.py", 2)):
        file = write_parts(tmp_path, f"@parts.stage('same')\ndef f(c, *, x: int = {default}): pass\n", name)
        made.append(recipe_from_dict({**plain, "import": str(file)}))
    assert [recipe.stages[0].settings.x for recipe in made] == [1, 2]
    with pytest.raises(UserError, match="unknown stage kind 'same'"):
        recipe_from_dict(plain)


def test_an_export_needs_a_quantizing_stage_after_one_that_makes_a_model(message: Message, load: Load, parts: Path) -> None:
    text = RECIPE + "  - quantize: {weights: {bits: 8}}\n  - audit: {name: again}\n  - export\n"
    assert load(text).stages[-1].kind == "export"
    assert "the last stage before it, stages.4 (shake), writes none" in message(text.replace("audit: {", "shake: {"))


def test_an_outline_is_read_without_running_anybody_s_code(load: Load, parts: Path, tmp_path: Path) -> None:
    parts.write_text("raise RuntimeError('was run')\n")
    (tmp_path / "my.yaml").write_text(RECIPE + "  - quantize: {weights: {bits: 8}}\n  - audit: {name: late}\n  - export\n")
    outline = outline_of(tmp_path / "my.yaml")
    assert [entry.name for entry in outline.stages] == ["01-distill", "02-shake", "03-audit", "04-quantize", "05-late", "06-export"]
    assert outline.data.seq_length == 64
    assert outline.stages[0].settings.tokens == 1_000_000


def test_the_schema_marks_no_name_of_the_user_s_in_a_recipe_that_imports() -> None:
    checker = jsonschema.Draft202012Validator(recipe_schema())
    checker.validate(yaml.safe_load(RECIPE))
    without = yaml.safe_load(RECIPE)
    del without["import"]
    places = {".".join(map(str, error.absolute_path)) for error in checker.iter_errors(without)}
    # of a callback any name is text: only its use is known to the loader
    assert places == {"data", "stages.0.distill.loss", "stages.0.distill.loss.divergence", "stages.1", "stages.2"}
    # decoct's own keys are checked as ever
    wrong: Any = yaml.safe_load(RECIPE)
    wrong["stages"][0]["distill"]["tokns"] = 1
    wrong["data"]["seq_length"] = 1
    wrong["stages"].append({"quantize": {"weights": {"bits": 99}}})
    places = {".".join(map(str, error.absolute_path)) for error in checker.iter_errors(wrong)}
    assert places == {"data.seq_length", "stages.0.distill", "stages.3.quantize.weights.bits"}
