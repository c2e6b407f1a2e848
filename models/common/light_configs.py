"""Import transformers' configs without its modelling code, whose import takes longer than a whole plan."""

import importlib
import sys
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_ACTIVATIONS, _KERNELS = "transformers.activations", "transformers.integrations.hub_kernels"


def transformers_version() -> str:
    """The installed version of transformers, without importing it."""
    loaded = sys.modules.get("transformers")
    # its own word, where it is there already: a checkout may differ from the metadata of an older installation
    return version("transformers") if loaded is None else loaded.__version__


def import_configs_alone() -> None:
    """Import ``transformers.activations``, which every config needs, without the modelling code behind it.

    Every config checks its ``hidden_act`` against ``transformers.activations``. That module takes one decorator from ``hub_kernels``,
    which imports attention, loading and torch's compiler. Without the package ``kernels`` the decorator returns its class unchanged, and so
    does the stand-in used here. The function has no effect if ``kernels`` is installed, if one of the two modules is already imported, or
    if this release of transformers is structured differently.
    """
    if _ACTIVATIONS in sys.modules or _KERNELS in sys.modules or find_spec("kernels") is not None:
        return
    stand_in: Any = ModuleType(_KERNELS)
    stand_in.use_kernel_forward_from_hub = lambda *_: lambda layer: layer
    # registered before the import below, so that `activations` finds it instead of the real module
    sys.modules[_KERNELS] = stand_in
    try:
        importlib.import_module(_ACTIVATIONS)
    except ImportError:
        # a half-imported module would break the later, normal import
        sys.modules.pop(_ACTIVATIONS, None)
    finally:
        # whoever builds a model must get the real module
        del sys.modules[_KERNELS]
