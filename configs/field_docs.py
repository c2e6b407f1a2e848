"""Reads the descriptions of the fields of a settings dataclass: the strings below the fields in the source.

The JSON Schema of recipes and the reference of recipe keys show them, so each must be useful to a user.
"""

import ast
import inspect
import textwrap
from functools import cache


@cache
def field_docs(settings: type) -> dict[str, str]:
    """Return field -> description on one line; a field that a subclass redefines without a description keeps that of the base."""
    found: dict[str, str] = {}
    # base classes first, so that a subclass can describe a field anew
    for base in reversed(settings.__mro__[:-1]):
        # from the source, as Python keeps no docstrings of fields
        # a class inside a function is indented as a whole
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        # each statement with the one below it: the string that follows a field describes it
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = one_line(str(below.value.value))
    return found


def class_doc(settings: type) -> str:
    """Return the first paragraph of a dataclass's docstring, on one line."""
    return one_line(inspect.cleandoc(settings.__doc__ or "").partition("\n\n")[0])


def one_line(text: str) -> str:
    """Return text without line breaks, with names marked as in Markdown."""
    return " ".join(text.split()).replace("``", "`")
