"""The decorators of parts: without a recipe that imports the file they do nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from decoct import parts

ROOT = Path(__file__).resolve().parent.parent


def test_a_decorator_returns_what_it_decorates_and_registers_nothing_outside_of_an_import() -> None:
    def function() -> None: ...

    for decorate in (parts.divergence, parts.data_source, parts.stage, parts.callback):
        assert decorate("name")(function) is function
    with parts.collecting() as found:
        assert parts.stage("name", makes_model=False)(function) is function
    (one,) = found
    assert (one.kind, one.name, one.target, one.makes_model) == ("stage", "name", function, False)
    parts.stage("later")(function)
    assert len(found) == 1


def test_the_line_is_that_of_the_decorator() -> None:
    with parts.collecting() as found:

        @parts.stage("first")
        def function() -> None: ...

    source = Path(__file__).read_text().splitlines()
    assert source[found[0].line - 1].strip() == '@parts.stage("first")'


def test_the_example_is_a_module_that_imports_alone() -> None:
    code = "import my_parts, torch; print(my_parts.squared_hellinger(*torch.zeros(2, 3, 4).log_softmax(-1)).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs" / "examples", capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([3])", done.stderr


def test_unknown_names_of_the_module_are_refused() -> None:
    assert parts.Context.__name__ == "OwnContext"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        parts.nothing  # noqa: B018 - the access is the subject
