"""Parts of your own for recipes: a divergence, a data source, a stage, a callback.

A recipe names the file that registers them, ``import: my_parts.py``, and then uses them by name (docs/how-to/extend.md):

    from decoct import parts

    @parts.divergence("squared")
    def squared(student, teacher, *, power: float = 2.0):
        return (student.exp() - teacher.exp()).abs().pow(power).sum(-1)

What follows decoct's own arguments are options of the part. They are keys of the recipe, read and checked by their annotations: ``int``,
``float``, ``bool``, ``str``, ``Literal``, ``tuple``, ``dict``, ``None``, with bounds as ``Annotated[float, decoct.Bounds(gt=0)]``. A
dataclass may hold them instead: ``settings=MySettings``, and the part gets an instance after decoct's own arguments.

The decorators return what they decorate. Outside of a recipe's ``import:`` they do nothing, so the file is an ordinary module too.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

Kind = Literal["divergence", "data source", "stage", "callback"]
Target = TypeVar("Target", bound=Callable[..., Any])
MARK = "__decoct_parts__"
"""Global of every module that an ``import:`` runs: its file as messages name it. Errors are traced to the user's code by it."""


class PartError(ValueError):
    """A part returned something that decoct cannot use. The message names its file and line; exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """One use of a decorator, as it was written."""

    kind: Kind
    name: object
    target: Any
    line: int
    """Line of the decorator in its file."""
    settings: Any = None
    """Dataclass of the options; None = they stand in the signature."""
    makes_model: bool = True
    reads_text: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A part that passed the checks of ``configs/own_parts.py``."""

    kind: Kind
    name: str
    target: Callable[..., Any]
    place: str
    """File and line of its decorator, for messages."""
    file: str
    """The file's name."""
    sha256: str
    """Hash of the file; part of the key of every stage that uses it."""
    options: tuple[str, ...]
    """Names of its options, which are fields of the settings that ``configs/own_settings.py`` makes for it."""
    settings: Any = None
    """Dataclass that holds the options when the target is called; None = they are keyword arguments."""
    makes_model: bool = True
    """stage: whether it writes a model folder."""
    reads_text: bool = True
    """stage: whether it needs text besides the held-out text."""

    def call(self, *given: Any, options: Mapping[str, Any]) -> Any:
        """Call the target with decoct's own arguments and the part's options."""
        return self.target(*given, self.settings(**options)) if self.settings is not None else self.target(*given, **options)

    def key(self) -> dict[str, str]:
        """Kind, name and sha256, for the keys of stages and texts. The file's name changes no numbers."""
        return {"kind": self.kind, "name": self.name, "sha256": self.sha256}

    def identity(self) -> dict[str, str]:
        """Kind, name, file and sha256, for records."""
        return {**self.key(), "file": self.file}


_collecting: list[list[Registered]] = []
"""What the running file has registered is the last list; empty while no recipe's file runs."""


def divergence(name: str) -> Callable[[Target], Target]:
    """Register a divergence between teacher and student, for ``loss: {divergence: NAME, ...}``.

    The function gets log-probabilities of the student and of the teacher, [n, V] each, fp32 (fp64 for an fp64 student), at the loss's
    temperature, at least -1e30 where a probability is 0. It returns [n]: one number per token, summed over the vocabulary. Gradients
    come from autograd; n is a block of the tokens, so that logits are never held whole. Further arguments are keys of ``loss``.

    Args:
        name: Letters, digits, '_' and '-', a letter first; no divergence of decoct.
    """
    return _register("divergence", name)


def data_source(name: str, *, settings: type | None = None) -> Callable[[Target], Target]:
    """Register a text, for ``data: {source: NAME, ...}``.

    The function returns an iterable (it may be a generator) of documents (``str``), or with ``kind: chat`` of conversations (``dict``: the
    rows that a jsonl file would have). It is called more than once, and must give the same documents each time. Its arguments are keys of
    ``data``.

    Args:
        name: As for ``divergence``.
        settings: Dataclass of the options, in place of the arguments.
    """
    return _register("data source", name, settings=settings)


def stage(name: str, *, settings: type | None = None, makes_model: bool = True, reads_text: bool = True) -> Callable[[Target], Target]:
    """Register a kind of stage, for ``stages: [{NAME: {...}}]``.

    The function gets a ``parts.Context`` (model folder in, model folder out, seed, device, text) and runs on rank 0. It may return a dict
    of facts (JSON), which stand in ``stage.json``. Further arguments are keys of the stage.

    Args:
        name: As for ``divergence``; no kind of stage of decoct.
        settings: Dataclass of the options, in place of the arguments.
        makes_model: Whether the stage writes a model folder; if not, the next stage goes on with this one's input.
        reads_text: Whether it needs training text. If no stage of a recipe does, all text may be held out.
    """
    return _register("stage", name, settings=settings, makes_model=makes_model, reads_text=reads_text)


def callback(name: str, *, settings: type | None = None) -> Callable[[Target], Target]:
    """Register a callback of training stages, for ``callbacks: [NAME]`` or ``callbacks: [{name: NAME, ...}]``.

    Calling the class (or function) with its options gives one object for each training stage and rank: a Lightning ``Callback``, or an
    object with any of ``on_start(student, optimizer)``, ``before_step(step)``, ``after_step(step)``, ``state()`` (tensors by name, kept in
    checkpoints) and ``load(state)``.

    Args:
        name: As for ``divergence``.
        settings: Dataclass of the options, in place of the arguments.
    """
    return _register("callback", name, settings=settings)


def _register(kind: Kind, name: object, **facts: Any) -> Callable[[Target], Target]:
    # the line of the decorator: two frames up, in the user's file
    line = sys._getframe(2).f_lineno  # pyright: ignore[reportPrivateUsage]
    if callable(name):
        # ``@parts.stage`` without parentheses: Python gives the function in place of the name, and asks for no decorator
        if _collecting:
            _collecting[-1].append(Registered(kind=kind, name=name, target=name, line=line, **facts))
        return cast("Callable[[Target], Target]", name)

    def keep(target: Target) -> Target:
        if _collecting:
            _collecting[-1].append(Registered(kind=kind, name=name, target=target, line=line, **facts))
        return target

    return keep


@contextmanager
def collecting() -> Iterator[list[Registered]]:
    """The list of what decorators register inside the block; it fills while the block runs."""
    _collecting.append([])
    try:
        yield _collecting[-1]
    finally:
        _collecting.pop()


def __getattr__(name: str) -> Any:
    if name == "Context":
        from .trainer.stages.own import OwnContext

        return OwnContext
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
