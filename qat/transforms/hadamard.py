"""Random Hadamard rotations: x -> (x * signs) H / sqrt(n), with H a Kronecker product of Sylvester's and Paley's matrices.

Source: Ashkboos et al. (QuaRot), arXiv 2404.00456, section 3; the matrices are those of ``hadamard_orders``.
"""

import hashlib

import torch
from torch import Tensor

from .hadamard_orders import Order, order_of, paley_field
from .limits import ROTATED_AT_ONCE


class Rotation:
    """An orthogonal matrix of a size, drawn by a seed and a word.

    Args:
        size: Its order; ``order_of`` must know it.
        seed: The seed.
        word: What is rotated: other words draw other signs.
    """

    def __init__(self, size: int, seed: int, word: str) -> None:
        order = order_of(size)
        assert order is not None, f"no Hadamard matrix of order {size}"
        self.size, self.order = size, order
        # through a hash, so that neighbouring seeds and layers have nothing in common
        drawn = int.from_bytes(hashlib.sha256(f"{seed} {word}".encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(drawn)
        self._signs = torch.randint(2, (size,), generator=generator).to(torch.float64) * 2 - 1
        self._base = paley(order.base)

    def rotated(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """The tensor rotated along a dimension that is one or more vectors of ``size`` long; fp64 inside, its own dtype and device."""
        moved = tensor.movedim(dim, -1)
        rows = moved.reshape(-1, self.size)
        found = torch.empty_like(rows)
        step = max(1, ROTATED_AT_ONCE // self.size)
        for begin in range(0, len(rows), step):
            found[begin : begin + step] = self._product(rows[begin : begin + step].to(torch.float64)).to(tensor.dtype)
        return found.reshape(moved.shape).movedim(-1, dim).contiguous()

    def _product(self, rows: Tensor) -> Tensor:
        power, base = self.order.power, self.order.base
        parts = (rows * self._signs.to(rows.device)).reshape(-1, power, base)
        # H of the power of two along the first axis: sums and differences of halves
        half = power // 2
        while half:
            pairs = parts.reshape(len(parts), -1, 2, half, base)
            parts = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).reshape(-1, power, base)
            half //= 2
        if base > 1:
            parts = parts @ self._base.to(rows.device)
        return parts.reshape(-1, self.size) / self.size**0.5


def matrix(order: Order) -> Tensor:
    """fp64 [n, n]: the Hadamard matrix of an order, Sylvester's (x) Paley's."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < order.power:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return torch.kron(found, paley(order.base))


def paley(order: int) -> Tensor:
    """fp64 [n, n]: Paley's Hadamard matrix of an order; [[1]] for order 1."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    field = paley_field(order)
    assert field is not None, f"no Paley matrix of order {order}"
    q, doubled = field
    # bordered Jacobsthal matrix: skew for q = 3 mod 4, symmetric for q = 1 mod 4
    inner = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    inner[0, 1:] = 1
    inner[1:, 0] = 1 if doubled else -1
    inner[1:, 1:] = _jacobsthal(q)
    eye = torch.eye(q + 1, dtype=torch.float64)
    if not doubled:
        return inner + eye
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(inner, plus.double()) + torch.kron(eye, minus.double())


def _jacobsthal(q: int) -> Tensor:
    """fp64 [q, q]: the quadratic character of a - b for all elements a, b of the field with q elements, a prime or the square of one."""
    root = round(q**0.5)
    prime = root if root * root == q else q
    character = torch.tensor([0] + [1 if pow(x, (prime - 1) // 2, prime) == 1 else -1 for x in range(1, prime)], dtype=torch.float64)
    numbers = torch.arange(prime)
    differences = (numbers[:, None] - numbers) % prime
    if prime == q:
        return character[differences]
    # elements a + b sqrt(r), r not a square: one is a square where its norm a^2 - r b^2 is a square of the prime field
    free = next(x for x in range(2, prime) if character[x] == -1)
    norms = (differences[:, None, :, None] ** 2 - free * differences[None, :, None, :] ** 2) % prime
    return character[norms].reshape(q, q)
