import random

import numpy as np
import pytest
import torch

from decoct.trainer.loop.rng import capture_generators, restore_generators, seed_generators
from decoct.trainer.plan import derive_seed

CPU = torch.device("cpu")


def _draw() -> list[float]:
    return [*torch.randn(3).tolist(), *np.random.randn(3).tolist(), random.gauss(0, 1), random.random()]


@pytest.fixture(autouse=True)
def _leave_generators_alone() -> object:
    saved = capture_generators(CPU)
    yield
    restore_generators(saved, CPU)


@pytest.mark.parametrize("warm_up", [0, 1])
def test_restored_generators_repeat_every_draw(warm_up: int) -> None:
    seed_generators(7)
    for _ in range(warm_up):
        _draw()  # leaves half of a Gaussian pair in the caches of Python and NumPy
        random.gauss(0, 1)
        np.random.randn()
    saved = capture_generators(CPU)
    first = _draw()
    assert _draw() != first
    restore_generators(saved, CPU)
    assert _draw() == first


def test_seeding_decides_every_generator() -> None:
    seed_generators(derive_seed(1, "dropout", 0, 0))
    first = _draw()
    seed_generators(derive_seed(1, "dropout", 0, 0))
    assert _draw() == first
    seed_generators(derive_seed(1, "dropout", 1, 0))
    assert all(a != b for a, b in zip(_draw(), first))
