"""Settings of what an owner follows while a run goes on: when a stage has learned enough, and where its curves are sent."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .. import Bounds, Count, check_fields

LoggerKind = Literal["wandb", "tensorboard", "mlflow", "csv", "none"]

_READERS: dict[str, tuple[LoggerKind, ...]] = {
    "project": ("wandb", "mlflow"),
    "entity": ("wandb",),
    "group": ("wandb",),
    "tags": ("wandb",),
}
"""Option -> the loggers that read it."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingSettings:
    """End a stage when evaluations on held-out text no longer get better (``trainer.evaluate_every``)."""

    patience: Count
    """Evaluations in a row without a better figure after which the stage ends."""
    min_change: Annotated[float, Bounds(ge=0, lt=1, why="it is a share of the figure")] = 0.0
    """Smallest fall of the figure that counts as better, as a share of it: 1% is 0.01."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class LoggerSettings:
    """Where curves go in addition to the run folder's ``metrics.jsonl``. ``logger: wandb`` is short for ``logger: {kind: wandb}``,
    ``logger: [wandb, csv]`` for several."""

    kind: tuple[LoggerKind, ...] = ("none",)
    """wandb = Weights & Biases (offline without a key); tensorboard and mlflow = files in the run folder, with the package of that name;
    csv = files in the run folder; none = only metrics.jsonl. One, or a list."""
    project: str | None = None
    """wandb: project; mlflow: experiment. Default: the environment variable WANDB_PROJECT (wandb), then 'decoct'."""
    entity: str | None = None
    """wandb: user or team. Default: the account's own."""
    group: str | None = None
    """wandb: group that the run is shown in."""
    tags: tuple[str, ...] = ()
    """wandb: tags of the run."""

    def __post_init__(self) -> None:
        if isinstance(self.kind, str):
            # one word is a list of one, as in a recipe
            object.__setattr__(self, "kind", (self.kind,))
        check_fields(self)
        # the faults are told at 'logger', which a recipe's short forms have in place of 'kind'
        if not self.kind:
            raise ValueError("names no logger; name one or more, or none")
        twice = next((name for name in self.kind if self.kind.count(name) > 1), None)
        if twice:
            raise ValueError(f"names {twice} twice; leave one out")
        if "none" in self.kind and len(self.kind) > 1:
            raise ValueError("names none beside others; leave none out")
        for option, readers in _READERS.items():
            value = getattr(self, option)
            if value and not set(readers) & set(self.kind):
                shown = list(value) if isinstance(value, tuple) else value
                chosen = ", ".join(self.kind)
                raise ValueError(
                    f"{option}={shown} has no effect: it belongs to {' and '.join(readers)}, and kind is {chosen}; leave it out"
                )
