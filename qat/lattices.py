"""The old place and name of ``QuantScheme``: import it from ``decoct.qat``."""

import warnings

from .scheme import QuantScheme as Lattices
from .scheme import SpecChange as SpecChange

__all__ = ["Lattices", "SpecChange"]

warnings.warn("decoct.qat.lattices has moved: import QuantScheme from decoct.qat", DeprecationWarning, stacklevel=2)
