"""Griffe extension of the API reference: a package's face is what it imports as ``name as name`` and defines itself.

decoct's packages hand on their names lazily (``decoct.lazy_names``), so they have no ``__all__`` that a reader of source could find.
"""

import ast
from typing import Any

from griffe import Extension, Module


class Faces(Extension):
    """Gives every package an ``__all__``, by which mkdocstrings chooses what it shows."""

    def on_module_members(self, *, node: Any, mod: Module, **_: Any) -> None:
        """Called by griffe once the members of a module are known; ``node`` is the module's syntax tree."""
        if not mod.is_init_module or mod.path == "decoct":
            return
        imports = (inner for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom))
        handed_on = {alias.name for inner in imports for alias in inner.names if alias.asname == alias.name}
        own = {name for name, member in mod.members.items() if not member.is_alias and (member.is_function or member.is_class)}
        mod.exports = sorted(handed_on | {name for name in own if not name.startswith("_")})
