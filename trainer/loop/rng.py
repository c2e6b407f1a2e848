"""Saves and restores every random generator that training may use, as bytes in safetensors form, so that no pickle is loaded.

Lightning saves no generator at all, so a resumed run with dropout would differ from one never stopped.
"""

import random

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seeds the global generators of torch (CPU and all CUDA devices), NumPy and Python, because libraries draw from them."""
    torch.manual_seed(seed)
    # NumPy takes 32 bits
    np.random.seed(seed % 2**32)
    random.seed(seed)


def capture_generators(device: torch.device) -> bytes:
    """The state of torch's CPU generator, the device's own, NumPy's and Python's."""
    from safetensors.torch import save

    kind, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    if kind != 3 or name != "MT19937":
        raise RuntimeError(f"unknown generators (python state {kind}, numpy {name}): their state cannot be saved")
    tensors = {
        "torch": torch.get_rng_state(),
        # unsigned 32-bit words, as NumPy's keys are: int64 holds them in every version of torch
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        # only this process's own device: other ranks save theirs
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return save(tensors)


def restore_generators(data: bytes, device: torch.device) -> None:
    """Inverse of ``capture_generators``. If the state has no generator of this device, that generator is not changed."""
    from safetensors.torch import load

    state = load(data)
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    gauss = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python.words"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy.position"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy.gauss"].item()))
