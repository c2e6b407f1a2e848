"""What each field of a settings dataclass is for: the strings below the fields, read from the source.

The JSON Schema of recipes and the reference of recipe keys are made of them, so each must be a sentence that a user can act on.
"""

import ast
import inspect
from functools import cache


@cache
def field_docs(settings: type) -> dict[str, str]:
    """Field -> its description on one line; a field that a subclass gives anew without a description keeps the base's."""
    found: dict[str, str] = {}
    # base classes first, so that a subclass can describe a field anew
    for base in reversed(settings.__mro__[:-1]):
        # from the source, as Python keeps no docstrings of fields
        (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
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
    """The first paragraph of a dataclass's docstring, on one line."""
    return one_line(inspect.cleandoc(settings.__doc__ or "").partition("\n\n")[0])


def one_line(text: str) -> str:
    """Text without line breaks, with names marked as Markdown does."""
    return " ".join(text.split()).replace("``", "`")
