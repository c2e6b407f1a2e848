"""YAML is data: what could surprise, expand or execute is refused, in words, and quickly."""

from collections.abc import Callable
from pathlib import Path

import pytest

from decoct.configs import Recipe
from decoct.configs.yaml_source import MAX_BYTES, read_yaml_file
from decoct.models.common.errors import UserError

UNREADABLE = {
    "unclosed": (
        "a: [1,\n",
        "my.yaml:2: not readable as YAML: while parsing a flow node; expected the node content, but found '<stream end>'",
    ),
    "tab": (
        "data:\n\tfiles: x",
        "my.yaml:2: not readable as YAML: while scanning for the next token; "
        "found character '\\t' that cannot start any token; indent with spaces, not tabs",
    ),
    "empty": ("", "my.yaml is empty; copy a shipped recipe to start from: decoct recipes copy quickstart"),
    "only a comment": ("# nothing\n", "my.yaml is empty; copy a shipped recipe to start from: decoct recipes copy quickstart"),
    "alias": (
        "name: &x a\nseed: *x\n",
        "my.yaml:1: YAML anchors (&) and aliases (*) are not allowed in a recipe; quote the text if it is meant literally",
    ),
    "glob that YAML takes for an alias": (
        "data:\n  files: [*.txt]\n",
        "my.yaml:2: not readable as YAML: while scanning an alias; expected alphabetic or numeric character, but found '.'; "
        "quote text that begins with a special character: '*.txt'",
    ),
    "colon in text": (
        "name: a: b\n",
        "my.yaml:1: not readable as YAML: mapping values are not allowed here; quote text that contains a colon and a space",
    ),
    "tag": (
        "a: !!python/object/apply:os.system [ls]",
        "my.yaml:1: YAML tag 'tag:yaml.org,2002:python/object/apply:os.system' "
        "is not allowed in a recipe; quote the text if it is meant literally",
    ),
    "two documents": ("a: 1\n---\nb: 2\n", "my.yaml:3: a second YAML document; a recipe file holds one recipe"),
    "deep": ("[" * 5000, "my.yaml:1: nested more than 16 levels deep, which no recipe needs"),
    "long": ("[" + "1," * 400_000 + "]", "my.yaml:1: more than 10,000 keys and values; is this a recipe?"),
    "deep in keys": ("{" * 5000, "my.yaml:1: a list or mapping cannot be a key"),
    "mapping as a key": ("{a: b}: c\n", "my.yaml:1: a list or mapping cannot be a key"),
    "character out of range": ('a: "\\Uffffffff"', "my.yaml: not readable as YAML: "),
    "control character": ("a: \x00", "my.yaml: not readable as YAML: unacceptable character #x0000: special characters are not allowed"),
    "escape in a key": ('"a\\e[2J": 1', "my.yaml:1: a key contains characters that cannot be printed; write plain text"),
    "escape in a value": (
        'name: "a\\e[2J"',
        "my.yaml has 4 problems:\n  my.yaml:1: name: contains characters that cannot be printed; write plain text on one line",
    ),
    "lone surrogate": (
        'name: "a\\ud800"',
        "my.yaml has 4 problems:\n  my.yaml:1: name: contains characters that cannot be printed; write plain text on one line",
    ),
    "not UTF-8": (b"name: a\nseed: \xff\n", "my.yaml:2: not UTF-8 text (byte 14); is this a recipe?"),
    "too large": (
        b"#" * (MAX_BYTES + 1),
        "my.yaml is larger than 1,000,000 bytes; a recipe holds settings only, text belongs in data.files",
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_plain_yaml_is_refused(case: str, message: Callable[..., str]) -> None:
    text, expected = UNREADABLE[case]
    told = message(text)
    assert told.startswith(expected)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(message: Callable[..., str]) -> None:
    assert message(b"\xef\xbb\xbfname: a\r\nsead: 1\r\n").splitlines()[1].startswith("  my.yaml:2: sead: unknown key, did you mean 'seed'?")


def test_environment_and_other_keys_are_never_interpolated(load: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "told")
    text = "teacher: {path: '${SECRET}'}\nstudent: {path: '${oc.env:SECRET}'}\ndata: {builtin: python-stdlib}\nstages: [quantize]\n"
    recipe = load(text)
    assert recipe.teacher is not None
    assert (recipe.teacher.path, recipe.student.path) == ("${SECRET}", "${oc.env:SECRET}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read \(No such file or directory\)"):
        read_yaml_file(tmp_path / "gone.yaml", "gone.yaml")
