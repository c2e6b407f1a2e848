"""Collects a stage's tensors (student, optimizer, hooks) by name for a checkpoint, and restores them.

Sharded tensors stay sharded: each rank saves its own rows, and reads back the rows that it holds now, for any number of ranks that wrote
the checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...models.common.errors import UserError
from ..checkpoints.optimizer_moments import load_state_tensors, parameter_state
from ..checkpoints.read import Checkpoint
from ..checkpoints.write import Groups
from ..processes.sharding import ParameterViews, Rows, like, local, row_range
from .hooks import StepHook


def student_tensors(student: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied tensor appears once, under its first name."""
    # keep_vars, because detached copies of a tied parameter would have different identities
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in student.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def optimizer_tensors(views: ParameterViews, optimizer: torch.optim.Optimizer) -> dict[str, Tensor | Rows]:
    """Optimizer state as ``<parameter name>.<state name>``: fp32 moments, sharded as their parameter is, and step counts."""
    return {
        # moments have the shape of this rank's rows and get their place in the whole; the step count is a scalar
        f"{name}.{key}": like(value, views.owners[name]) if value.shape == view.shape else value
        for name, view in views.views.items()
        for key, value in parameter_state(optimizer, view).items()
    }


def hook_tensors(hooks: Sequence[StepHook]) -> dict[str, Tensor | Rows]:
    """State of all hooks as ``<hook>/<tensor>``."""
    return {f"{hook.name}/{key}": value for hook in hooks for key, value in hook.state().items()}


def load_student(student: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies saved values into the student in place; names, shapes and dtypes must be the same."""
    current = student_tensors(student)
    if different := sorted(current.keys() ^ set(checkpoint.names("student"))):
        raise UserError(f"the checkpoint holds another model: {len(different)} names differ, the first is {different[0]}")
    # all shapes and dtypes first, so that a foreign checkpoint leaves the student unchanged
    for name, tensor in current.items():
        saved = checkpoint.shape("student", name)
        if tuple(tensor.shape) != saved:
            raise UserError(f"the checkpoint holds another model: {name} is {saved}, the model has {tuple(tensor.shape)}")
        dtype = checkpoint.dtype("student", name)
        if dtype != tensor.dtype:
            raise UserError(f"the checkpoint holds another model: {name} is {dtype}, the model has {tensor.dtype}")
    for name, tensor in current.items():
        # one tensor at a time, and only this rank's rows: the whole student never is in memory twice
        local(tensor).copy_(checkpoint.read("student", name, row_range(tensor)))


def load_optimizer(views: ParameterViews, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Inverse of ``optimizer_tensors``; reads the rows of each moment that this rank steps."""
    # "<parameter>.<state>": the name before the last dot is the parameter's
    for full in checkpoint.names("optimizer"):
        if full.rsplit(".", 1)[0] not in views.owners:
            raise UserError(f"the checkpoint holds another model: it trains {full.rsplit('.', 1)[0]}, which this student does not have")
    load_state_tensors(optimizer, views.views, _SavedMoments(checkpoint, views))


class _SavedMoments(Mapping[str, Tensor]):
    """Optimizer state in a checkpoint, read on access: this rank's rows."""

    def __init__(self, checkpoint: Checkpoint, views: ParameterViews) -> None:
        self._checkpoint, self._views = checkpoint, views
        self._names = checkpoint.names("optimizer")
        self._known = set(self._names)

    def __getitem__(self, full: str) -> Tensor:
        owner = self._views.owners[full.rsplit(".", 1)[0]]
        # moments have their parameter's shape and are read by rows; step counts are whole on every rank
        shaped = self._checkpoint.shape("optimizer", full) == tuple(owner.shape)
        return self._checkpoint.read("optimizer", full, row_range(owner) if shaped else None)

    def __contains__(self, full: object) -> bool:
        return full in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_hooks(hooks: Sequence[StepHook], checkpoint: Checkpoint) -> None:
    """Gives every started hook its saved tensors, with the rows that it holds now."""
    # Compared by hook and not by tensor: a hook may have saved tensors that it has not made yet after ``on_start``, such as ranges.
    current = hook_tensors(hooks)
    saved = checkpoint.names("hooks")
    there = {name.split("/", 1)[0] for name in saved}
    optional = {hook.name for hook in hooks if getattr(hook, "optional", False)}
    if foreign := sorted(there ^ {name.split("/", 1)[0] for name in current} - (optional - there)):
        known = sorted(hook.name for hook in hooks)
        raise UserError(f"{checkpoint.path} was written with other hooks than this stage has ({known}): {foreign[0]} differs")
    for hook in hooks:
        prefix = f"{hook.name}/"
        hook.load(
            {
                name.removeprefix(prefix): checkpoint.read("hooks", name, row_range(current[name]) if name in current else None)
                for name in saved
                if name.startswith(prefix)
            }
        )


def restore(
    checkpoint: Checkpoint, student: nn.Module, views: ParameterViews, optimizer: torch.optim.Optimizer, hooks: Sequence[StepHook]
) -> None:
    """Restores student, optimizer and started hooks from the checkpoint."""
    load_student(student, checkpoint)
    load_optimizer(views, optimizer, checkpoint)
    load_hooks(hooks, checkpoint)


def state_groups(student: nn.Module, views: ParameterViews, optimizer: torch.optim.Optimizer, hooks: Sequence[StepHook]) -> Groups:
    """All tensors of a checkpoint by group."""
    return {
        "student": student_tensors(student),
        "optimizer": optimizer_tensors(views, optimizer),
        "hooks": hook_tensors(hooks),
    }
