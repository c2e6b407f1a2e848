"""Which sizes have a Hadamard matrix that decoct builds: a power of two times one of Paley's. The file imports no torch.

A Hadamard matrix of order n has entries +1 and -1 and orthogonal rows. Paley's constructions (1933) give one of order q + 1 for a prime
q = 3 mod 4, and of order 2 (q + 1) for q = 1 mod 4, a prime or the square of one; Sylvester's doubles any. Together they have every
multiple of 4 below 92.
"""

from dataclasses import dataclass
from math import isqrt

_LARGEST_BASE = 1024
"""A base is a dense matrix, which is multiplied with; a power of two costs additions alone."""


@dataclass(frozen=True)
class Order:
    """The factors of a size: ``power`` x ``base``."""

    power: int
    """A power of two."""
    base: int
    """1, or an order of Paley's."""

    def words(self) -> str:
        """The factors in words: '16 x 36'."""
        return f"{self.power} x {self.base}" if min(self.power, self.base) > 1 else str(self.power * self.base)


def order_of(size: int) -> Order | None:
    """The factors of a size with the largest power of two; None if it has no Hadamard matrix here."""
    power = size & -size
    while power:
        base = size // power
        if base == 1 or (base <= _LARGEST_BASE and paley_field(base) is not None):
            return Order(power, base)
        power //= 2
    return None


def paley_field(order: int) -> tuple[int, bool] | None:
    """(q, whether the order is 2 (q + 1)) of Paley's matrix of an order; None if there is none."""
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and _is_prime(order - 1):
        return order - 1, False
    q = order // 2 - 1
    root = isqrt(q)
    return (q, True) if q % 4 == 1 and (_is_prime(q) or (root * root == q and _is_prime(root))) else None


def nearest_sizes(size: int) -> list[int]:
    """The next smaller and the next larger size with a matrix."""
    below = next((n for n in range(size - 1, 0, -1) if order_of(n)), None)
    above = next(n for n in range(size + 1, 4 * size + 4) if order_of(n))
    return [above] if below is None else [below, above]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))
