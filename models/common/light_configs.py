"""transformers' configs without its modelling code, whose import takes longer than a whole plan."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_ACTIVATIONS, _KERNELS = "transformers.activations", "transformers.integrations.hub_kernels"


def import_configs_alone() -> None:
    """Import what a config of transformers needs, and leave what it does not need to whoever builds a model.

    Every config checks its ``hidden_act`` against ``transformers.activations``, which takes one decorator from ``hub_kernels``, which
    imports attention, loading and torch's compiler. Where the package ``kernels`` is not installed that decorator returns the class as it
    is, and so does the one that stands in for it here. Does nothing where ``kernels`` is installed, where one of the two modules is
    imported already, or where this release of transformers is made otherwise.
    """
    if _ACTIVATIONS in sys.modules or _KERNELS in sys.modules or find_spec("kernels") is not None:
        return
    stand_in: Any = ModuleType(_KERNELS)
    stand_in.use_kernel_forward_from_hub = lambda *_: lambda layer: layer
    sys.modules[_KERNELS] = stand_in
    try:
        importlib.import_module(_ACTIVATIONS)
    except ImportError:
        sys.modules.pop(_ACTIVATIONS, None)
    finally:
        del sys.modules[_KERNELS]
