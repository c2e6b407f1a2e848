"""Imports bitsandbytes only when it is needed, with a readable error if it does not work.

Version 0.50 has CPU kernels for everything that decoct uses of it (nf4 and int8 linear layers, 8-bit AdamW); paged moments need CUDA.
"""

import logging
from functools import cache
from typing import Any

from .common.errors import UserError


@cache
def load_bitsandbytes(key: str) -> Any:
    """Imports and returns the module.

    Args:
        key: Recipe key and value that need it, such as "trainer.optimizer: adamw-8bit", for the message.

    Raises:
        UserError: bitsandbytes is not installed, or its library does not load here.
    """
    logger = logging.getLogger("bitsandbytes")
    # as a user may have set it; put back below
    level = logger.level
    # at import it logs that an optional package of CPU kernels is missing
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"{key} needs bitsandbytes, which is not installed here ({error}): pip install bitsandbytes") from error
    except Exception as error:
        raise _broken(key, error) from error
    finally:
        logger.setLevel(level)
    return bitsandbytes


def check_low_bit(key: str, device: Any = "cpu") -> None:
    """Checks that bitsandbytes works on ``device``, by quantizing and dequantizing 256 numbers.

    Raises:
        UserError: it does not work, or is not installed.
    """
    import torch

    functional = load_bitsandbytes(key).functional
    # a ramp over the whole range, so that every code occurs
    numbers = torch.linspace(-1, 1, 256, device=device)
    try:
        # by trial: the import succeeds even where the library has no kernels for this device
        back = functional.dequantize_blockwise(*functional.quantize_blockwise(numbers))
    except Exception as error:
        raise _broken(key, error) from error
    # the error of 8-bit blocks stays below this; wrong kernels are far off
    if not torch.allclose(back, numbers, atol=0.02):
        raise UserError(f"{key}: bitsandbytes computes wrong numbers on {device}; install another version of it or leave the key out")


def _broken(key: str, error: Exception) -> UserError:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(
        f"{key} needs bitsandbytes, which does not work here: {first}. 'python -m bitsandbytes' prints details; install a build for this "
        "machine, or leave the key out"
    )
