"""The old place of ``save_quantized_folder``: import from ``decoct.qat``."""

import warnings

from .layers.save_folder import save_quantized_folder as save_quantized_folder

warnings.warn("decoct.qat.folder has moved: import from decoct.qat", DeprecationWarning, stacklevel=2)
