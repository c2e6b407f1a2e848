"""Prepares a student for a training stage (activation checkpointing, compiling), shards it over ranks, and collects it at the end."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...models.families import decoder_layers
from ...models.folder.streaming import parameter_places, stored_name
from ...qat.layers.quant_linear import RoundedWeight
from ..plan import TrainingPlan
from ..processes.sharding import allocate, gather_into, local, mesh_of_copies, row_range, shard, skeleton_of
from ..processes.strategy import copies, gathers_bf16, shards
from ..processes.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...models.folder.weights import WeightFiles
    from .module import Shard


class Placed:
    """The student of a stage, whole or sharded.

    Args:
        student: Whole on every rank, or on the meta device (with real buffers) if ``weights`` is given.
        weights: Files with its values.
        plan: Strategy, activation checkpointing and compiling.
        world: The ranks over which it is sharded.
    """

    def __init__(self, student: "PreTrainedModel", weights: "WeightFiles | None", plan: TrainingPlan, world: World) -> None:
        self.student = student
        self.world = world
        self._weights = weights
        self._plan = plan
        # taken now: fully_shard changes the class of modules and replaces their parameters, so no plain copy could be made later
        self._skeleton = skeleton_of(student) if shards(plan.strategy, world) else None

    def prepare(self) -> "Shard | None":
        """Makes it ready to train; returns the function that shards it over a mesh, or None if every rank keeps it whole."""
        if self._skeleton is None:
            self.whole()
        if self._plan.activation_checkpointing:
            # only the non-reentrant form works with frozen inputs and with FSDP2's hooks
            self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self._plan.compile:
            for layer in decoder_layers(self.student):
                # in place: torch.compile(layer) would add a prefix to names in the state dict
                layer.compile()
        return None if self._skeleton is None else self._shard

    def whole(self) -> "PreTrainedModel":
        """The student with all its weights on this rank."""
        if self._weights is not None:
            allocate(self.student, torch.device("cpu"))
            self._fill()
        return self.student

    def collect(self) -> "PreTrainedModel":
        """The trained student, whole, on the CPU, in eval mode; under FSDP2 only rank 0 gets its weights."""
        if self._skeleton is None:
            self._undo()
            return self.student.eval()
        # all ranks take part, rank 0 alone keeps the result: one whole student on one host, not one per rank
        gather_into(self._skeleton, self.student, keep=self.world.is_first)
        return self._skeleton.eval()

    def _undo(self) -> None:
        if self._plan.activation_checkpointing:
            self.student.gradient_checkpointing_disable()
        if self._plan.compile:
            for layer in decoder_layers(self.student):
                # torch has no inverse of Module.compile; without this, evaluation after the stage would run compiled layers too
                layer._compiled_call_impl = None

    def _shard(self, step: nn.Module, student: Any, mesh: Any) -> None:
        # called when parameters are sharded but still on the meta device: each rank allocates and reads its own rows, and none ever holds
        # the whole student
        def materialize() -> None:
            allocate(student, torch.device(mesh.device_type))
            self._fill()

        plan = self._plan
        if (machines := copies(plan.strategy, self.world)) > 1:
            mesh = mesh_of_copies(mesh.device_type, machines, self.world.local_size)
        rounded = any(isinstance(module, RoundedWeight) for module in student.modules())
        bf16 = gathers_bf16(plan.precision, rounded=rounded, compiled=plan.compile, family=student.config.model_type)
        shard(step, student, mesh, materialize if self._weights is not None else None, bf16=bf16)

    @torch.no_grad()
    def _fill(self) -> None:
        """Reads this rank's rows of every parameter that the files hold; the stage's hooks set the parameters that the stage has added."""
        assert self._weights is not None
        for places in parameter_places(self.student):
            module, key, _ = places[0]
            if isinstance(module, RoundedWeight) and module.is_extra(key):
                continue
            parameter = getattr(module, key)
            rows = row_range(parameter)
            local(parameter).copy_(self._weights.read(stored_name(places, self._weights), slice(*rows) if rows else None))
