"""The cases of benchmarks/pruning.py: what is pruned how."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning_shapes import shape_for
from real_models import interpreter_with

SHARES = (0.75, 0.5)
"""Shares of the parameters of the decoder layers that a shape keeps."""
AXES = ("ffn", "heads", "kv_heads", "hidden", "layers")
SCORES = ("weight_activation", "activation", "magnitude", "taylor")
DEPTH_SCORES = ("block_influence", "contiguous", "greedy_loss")
METHODS = ("magnitude", "wanda", "sparsegpt")
TORCH_PRUNING = {"ffn": ("magnitude", "taylor"), "hidden": ("magnitude", "taylor")}
"""Axes that Torch-Pruning is asked for -> its scores."""
RECOVER = "recover"
"""Name of the distill stage of a case."""

Budget = tuple[str, str, int]
"""(case, axis, number kept)."""


@dataclass(frozen=True)
class Case:
    """A pruned model that is made and measured."""

    name: str
    """Name of the case in the rows: 50 %, 2:4, or an axis with its share."""
    system: str
    """What made it."""
    stages: tuple[dict[str, Any], ...] = ()
    """Stages of its recipe; without any it is a random mask, or the work of ``package``."""
    told: tuple[tuple[str, Any], ...] = ()
    """What the script is told that makes it without a recipe."""
    package: str = ""
    """Package of another tool, which an interpreter of --peers must have."""
    start: str = ""
    """Key of the case whose model its recipe starts from, in place of the whole model."""

    @property
    def key(self) -> str:
        """Name of its folder."""
        return f"{self.name} {self.system}".replace(" %", "").translate(str.maketrans({" ": "-", ":": "of", ",": ""}))

    @property
    def model(self) -> str:
        """Place of its model inside its folder."""
        if not self.stages:
            return "model"
        kind, settings = next(iter(self.stages[-1].items()))
        return f"{len(self.stages):02}-{settings.get('name', kind)}/model"


def cases(given: argparse.Namespace, folder: Path) -> list[Case]:
    """Every case that was asked for and has its tool; ``folder`` is the whole model."""
    budgets = list(_budgets(folder)) if {"shapes", "recovery"} & set(given.parts) else []
    parts = {"weights": _weights, "shapes": _shapes, "recovery": _recovery}
    found = [case for part in given.parts for case in parts[part](given, budgets)]
    tools = {package: interpreter_with(package, given.peers) for package in {case.package for case in found} - {""}}
    for package in sorted(package for package, python in tools.items() if python is None):
        print(f"no interpreter of --peers has {package}: its cases are left out", file=sys.stderr)
    lost = {case.key for case in found if case.package and not tools[case.package]}
    return [case for case in found if case.key not in lost and case.start not in lost]


def _weights(given: argparse.Namespace, _budgets: Sequence[Budget]) -> Iterator[Case]:
    for name, what in (("50 %", {"keep": 0.5}), ("2:4", {"pattern": "2:4"})):
        yield Case(name, "random", told=(("kind", "random"), *what.items()))
        for method in METHODS:
            more = {} if method == "magnitude" else {"calibration_tokens": given.calibration_tokens}
            yield Case(name, method, ({"prune": {method: what, **more}},))


def _cut(given: argparse.Namespace, kept: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"prune": {"structured": {**kept, **more}, "calibration_tokens": given.calibration_tokens}}


def _budgets(folder: Path) -> Iterator[Budget]:
    """Those of each axis that reaches a share."""
    for share in SHARES:
        for axis in AXES:
            if (number := shape_for(folder, axis, share)) is None:
                print(f"{axis} alone cannot be cut to {share:.0%} of the decoder layers' parameters", file=sys.stderr)
            else:
                yield f"{axis} {share:.0%}".replace("%", " %"), axis, number


def _peer(name: str, axis: str, number: int) -> Iterator[Case]:
    for score in TORCH_PRUNING.get(axis, ()):
        told = (("method", score), ("axis", axis), ("number", number))
        yield Case(name, f"Torch-Pruning {score}", told=told, package="torch_pruning")


def _shapes(given: argparse.Namespace, budgets: Sequence[Budget]) -> Iterator[Case]:
    for name, axis, number in budgets:
        slow = () if given.greedy else ("greedy_loss",)
        key, scores = ("depth_score", DEPTH_SCORES) if axis == "layers" else ("score", SCORES)
        for score in scores:
            if score not in slow:
                yield Case(name, score, (_cut(given, {axis: number}, **{key: score}),))
        yield from _peer(name, axis, number)


def _recovery(given: argparse.Namespace, budgets: Sequence[Budget]) -> Iterator[Case]:
    distill = {"distill": {"name": RECOVER, "tokens": given.distill_tokens}}
    for name, axis, number in budgets:
        # nothing of a shallower model can be repaired without training
        repaired = _cut(given, {axis: number}, **({} if axis == "layers" else {"repair": True}))
        local = {"prune": {**repaired["prune"], "local": {"tokens": given.local_tokens}}}
        if axis != "layers":
            yield Case(name, "repaired", (repaired,))
        yield Case(name, "local", (local,))
        yield Case(name, "distilled", (repaired, distill))
        yield Case(name, "local, distilled", (local, distill))
        # without the cases of the shapes there is nothing to start from
        for peer in _peer(name, axis, number) if "shapes" in given.parts else ():
            yield Case(name, f"{peer.system}, distilled", (distill,), start=peer.key)
