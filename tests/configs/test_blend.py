"""A blend of texts in a recipe: what it resolves to, and what is refused with which words."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from decoct.configs import load_recipe, recipe_from_dict, resolved
from decoct.configs.json_schema import recipe_schema
from decoct.models.common.errors import UserError

from ..support.own_parts import write_parts

BASE: dict[str, Any] = {
    "name": "x",
    "teacher": {"path": "big"},
    "student": {"path": "small"},
    "data": {
        "blend": [{"files": "math/*.jsonl", "kind": "chat", "weight": "30%"}, {"hub": "some/web", "weight": 0.7, "eval_tokens": 4096}],
        "seq_length": 256,
        "held_out": "blocks",
    },
    "stages": [{"distill": {"tokens": "1M"}}],
}


def test_each_part_is_a_text_by_itself() -> None:
    recipe = recipe_from_dict(BASE)
    assert recipe_from_dict(resolved(recipe)) == recipe
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(resolved(recipe)))) == recipe
    math, web = recipe.data.texts.values()
    assert list(recipe.data.texts) == ["math", "web"]
    assert (math.files, math.kind, math.seq_length, math.eval_tokens, math.held_out) == (("math/*.jsonl",), "chat", 256, 32768, None)
    assert (web.hub, web.kind, web.eval_tokens, web.held_out) == ("some/web", "text", 4096, "blocks")
    assert recipe.data.has_chats
    assert jsonschema.Draft202012Validator(recipe_schema()).is_valid(BASE)
    plain = recipe_from_dict({**BASE, "data": {"files": "a.txt"}}).data
    assert plain.texts == {"": plain} and not plain.has_chats


def test_names_are_made_of_the_sources_and_told_apart() -> None:
    parts = [{"files": path, "weight": 1} for path in ("a/b.jsonl.gz", "*.txt", "x y/*.txt", "b/x y/")]
    parts += [{"builtin": "python-stdlib", "weight": 1}, {"files": "b.txt", "weight": 1}, {"files": "c.txt", "name": "b-2", "weight": 1}]
    data = recipe_from_dict({**BASE, "data": {"blend": parts}}).data
    assert list(data.texts) == ["b", "files", "x-y", "x-y-2", "python-stdlib", "b-3", "b-2"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"files": "a.txt"}, "data: data needs exactly one of 'builtin', 'files', 'hub', 'generate', 'source' and 'blend'; given: "),
        ({"kind": "chat"}, "data.kind: kind='chat' has no effect beside blend; each part has a key kind of its own"),
        ({"blend.0": {"weight": 0}}, "data.blend.0.weight: 0 is out of range; it must be greater than 0"),
        ({"blend.0": {"weight": None}}, "data.blend.0: a part of a blend needs 'weight' (a share, such as 0.3) or 'tokens' (such as 10M)"),
        ({"blend.0": {"tokens": 5}}, "data.blend.0: a part of a blend needs 'weight' (a share, such as 0.3) or 'tokens' (such as 10M)"),
        ({"blend.0": {"weight": None, "tokens": "1M"}}, "data: blend has parts with 'weight' and parts with 'tokens'"),
        ({"blend.0": {"builtin": "python-stdlib"}}, "data.blend.0: a part of a blend needs exactly one of 'builtin', 'files', 'hub',"),
        ({"blend.0": {"name": "two words"}}, "data.blend.0.name: name='two words' cannot name a part; use at most 40 letters"),
        ({"blend.0": {"name": "web"}, "blend.1": {"name": "web"}}, "blend has two parts of the name 'web'"),
        ({"blend.0": {"wieght": 1}}, "data.blend.0.wieght: unknown key, did you mean 'weight'?"),
        ({"blend.0": {"hub_config": "en"}}, "hub_config= configures a hub dataset, and hub is not given"),
        ({"blend.1": {"eval_tokens": 100}}, "blend: part 1 has eval_tokens=100, shorter than one window of seq_length=256; raise it"),
        ({"eval_tokens": "all"}, "blend: part 1 has eval_tokens=4096, and eval_tokens beside blend is 'all'; remove one"),
        ({"blend": []}, "data needs exactly one of"),
        ({"blend.0": {"files": None, "kind": "text", "generate": {"tokens": 30_000, "model": "student"}}},
         "data.blend.0.generate.tokens: 30,000 leaves no text to train on beside data.eval_tokens=32,768; write more, or hold out less"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(data: dict[str, Any], message: str) -> None:
    changed = yaml.safe_load(yaml.safe_dump(BASE["data"]))
    for key, value in data.items():
        section, _, number = key.partition(".")
        changed.update({key: value}) if not number else changed[section][int(number)].update(value)
    with pytest.raises(UserError) as caught:
        recipe_from_dict({**BASE, "data": changed})
    assert message in str(caught.value)


def test_samples_need_one_kind_of_text() -> None:
    sampled = {**BASE, "stages": [{"distill": {"tokens": "1M", "samples": {}}}]}
    with pytest.raises(
        UserError, match=r"goes on from answers in conversations and from beginnings in documents, and data\.blend has parts"
    ):
        recipe_from_dict(sampled)
    alike = [{**part, "kind": "text"} for part in BASE["data"]["blend"]]
    recipe_from_dict({**sampled, "data": {**BASE["data"], "blend": alike}})


def test_a_scratch_teacher_has_no_template_for_a_part_of_conversations() -> None:
    with pytest.raises(UserError, match=r"data\.blend\.0\.kind: is 'chat', and a scratch teacher's tokenizer has no chat template"):
        recipe_from_dict({**BASE, "teacher": {"scratch": {}}, "student": {"keep": {"layers": 2}}})


def test_an_imported_source_may_be_a_part(tmp_path: Path) -> None:
    body = '@parts.data_source("letters")\ndef letters(*, count: int, words: tuple[str, ...] = ()):\n    yield "a"\n'
    parts = write_parts(tmp_path, body)
    text = (
        f"import: {parts.name}\nstudent: {{path: a}}\nteacher: {{path: b}}\nstages: [{{distill: {{tokens: 1M}}}}]\n"
        "data:\n  blend:\n    - {source: letters, count: 1k, words: [a, b], weight: 2}\n    - {files: a.txt, weight: 1}\n"
    )
    (tmp_path / "my.yaml").write_text(text)
    letters = load_recipe(str(tmp_path / "my.yaml")).data.texts["letters"]
    assert (letters.source, letters.count, letters.words) == ("letters", 1000, ("a", "b"))  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "my.yaml").write_text(text.replace("count: 1k", "conut: 1k"))
    with pytest.raises(UserError, match=r"my\.yaml:7: data\.blend\.0\.conut: unknown key, did you mean 'count'"):
        load_recipe(str(tmp_path / "my.yaml"))


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"files": "FOLDER/*.txt"}, {"files": "FOLDER/b.txt"}, r"reads .*b\.txt \(1 files in all\)"),
        ({"files": "FOLDER/*.txt"}, {"files": "FOLDER/"}, r"reads .*a\.txt \(2 files in all\)"),
        ({"hub": "some/web"}, {"hub": "some/web"}, "reads some/web"),
        ({"builtin": "python-stdlib"}, {"builtin": "python-stdlib"}, "reads python-stdlib"),
        ({"generate": {"tokens": "300k"}}, {"generate": {"tokens": "400k"}}, "reads the text of the same 'generate'"),
    ],
)
def test_parts_that_share_a_source_are_refused(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], what: str) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    parts = [{**part, "weight": 1} for part in (first, second)]
    for part in parts:
        if "files" in part:
            part["files"] = part["files"].replace("FOLDER", str(tmp_path))
    with pytest.raises(UserError, match=rf"data\.blend\.1: {what}, as part 0 \(.*give each file or dataset to one part"):
        recipe_from_dict({**BASE, "data": {"blend": parts}})


def test_parts_of_different_sources_are_not(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    parts = [{"files": str(tmp_path / f"{name}.txt"), "weight": 1} for name in "ab"]
    parts += [{"hub": "some/web", "hub_config": name, "weight": 1} for name in ("en", "de")]
    assert len(recipe_from_dict({**BASE, "data": {"blend": parts}}).data.texts) == 4
