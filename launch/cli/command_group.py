"""Extends typer's command line: KEY=VALUE for every verb, and hints for option names of other tools.

KEY=VALUE is another way to write an option: ``decoct export MODEL out=served/ format=gguf``. A verb that runs a recipe passes the rest to
the recipe: what is not one of its options, and what is a key of the recipe or its stage.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

_PAIR = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.*)", re.DOTALL)
_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Verbs(TyperGroup):
    """The group of all verbs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return (name, command, its arguments), with KEY=VALUE turned into options unless a recipe takes it."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and hasattr(command, "params"):
            # an argument ``overrides`` is what makes a verb that of a recipe
            of_a_recipe = any(p.name == "overrides" for p in command.params)
            rest = options_from_pairs(command.params, rest, recipe_keys(name or "") if of_a_recipe else ())
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; the message about an unknown option names the right one if other tools have it."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # typer brings click's exceptions in a package of its own from some version on
            if type(error).__name__ == "NoSuchOption" and (hint := option_hint(getattr(error, "option_name", ""))):
                error.message = f"{error.message}; {hint}"  # pyright: ignore[reportAttributeAccessIssue]
            raise


def recipe_keys(verb: str) -> frozenset[str]:
    """Return the keys that mean the recipe of ``verb`` and not an option of the same name: its top-level keys and, for a single verb, those
    of its stage.

    ``teacher`` is left to the option, which has the same meaning.
    """
    from ... import types_of
    from ...configs.reading import KEYS
    from ...trainer.stages.registry import STAGE_KINDS

    # run, plan and the like are no kinds of stages, and have no keys of one
    own = set(types_of(STAGE_KINDS[verb].settings)) if verb in STAGE_KINDS else set()
    return frozenset({*KEYS, *own} - {"teacher"})


def options_from_pairs(parameters: Sequence[Any], arguments: Sequence[str], kept: Collection[str] = ()) -> list[str]:
    """Return ``arguments`` with each KEY=VALUE written as an option if its key is the name of one and is not in ``kept``.

    The value of an option is left alone, and so is text whose key is not an option: a path may contain '='.
    """
    options = {_key(name): p for p in parameters for name in p.opts if name.startswith("--")}
    # an option's value may contain '=', and is never taken for a pair
    takes_value = {name for p in parameters if not getattr(p, "is_flag", False) for name in (*p.opts, *p.secondary_opts)}
    found: list[str] = []
    after = False  # whether this argument is the value of the one before
    for position, argument in enumerate(arguments):
        # what follows -- is meant literally
        if argument == "--":
            return [*found, *arguments[position:]]
        match = None if after else _PAIR.fullmatch(argument)
        option = options.get(_key(match[1])) if match and _key(match[1]) not in kept else None
        found += [argument] if match is None or option is None else _written(option, match[1], match[2])
        # a value that is spelt like an option is still a value
        after = argument in takes_value and not after
    return found


def _written(option: Any, key: str, value: str) -> list[str]:
    if not getattr(option, "is_flag", False):
        return [option.opts[0], value]
    if value.lower() not in _SWITCH:
        raise typer.BadParameter(f"{key}={value}: write {key}=true or {key}=false")
    if _SWITCH[value.lower()]:
        return [option.opts[0]]
    # without an opposite the switch is left out, which is its default
    return [option.secondary_opts[0]] if option.secondary_opts else []


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def option_hint(option: str) -> str | None:
    """Return what an unknown option is called here, or how to write the setting of that name; None if neither is known."""
    from ... import types_of
    from ...configs.foreign_names import meant_by
    from ...configs.reading import SECTIONS
    from ...trainer.settings import TrainingBlock

    name = _key(option)
    if name in types_of(TrainingBlock):
        return f"it is a setting: write stages.0.{name}=VALUE (a recipe's first stage; {name}=VALUE with a single verb)"
    for section, settings in SECTIONS.items():
        if name in types_of(settings):
            return f"it is a setting: write {section}.{name}=VALUE"
    return meant_by(name)
