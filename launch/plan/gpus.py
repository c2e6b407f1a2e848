"""GPUs that a plan knows by name: the peak of dense matrix products, memory, and the link between the GPUs of one machine.

Peaks are the vendors' figures for matrix products without sparsity, bf16 with fp32 sums and plain fp32 (no TF32), in FLOP/s. Sparse
figures, which product pages print first, are twice as large. ``link`` is what one GPU can send to others of its machine, in bytes per
second in one direction, half of the total that vendors print. ``bandwidth`` is that of the GPU's own memory.

Sources: NVIDIA A100 (80 GB and 40 GB, SXM and PCIe), H100 (SXM, PCIe), H200 (SXM), L4 and L40S data sheets; NVIDIA HGX B200 data sheet;
NVIDIA Ampere GA102 and Ada GPU architecture white papers (GeForce RTX 3090 and 4090); AMD Instinct MI300X data sheet. PCIe 4.0 x16:
32 GB/s, 5.0 x16: 64 GB/s.
"""

import difflib
import re
from dataclasses import dataclass

from ...models.common.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    bf16: float
    """Peak of dense bf16 matrix products with fp32 sums, FLOP/s."""
    fp32: float
    """Peak of fp32 matrix products, FLOP/s."""
    memory: int
    """Bytes."""
    link: float
    """Bytes per second from one GPU to others of its machine."""
    bandwidth: float
    """Bytes per second that it reads from its memory."""


_TERA, _GB = 1e12, 10**9
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312 * _TERA, 19.5 * _TERA, 80 * _GB, 300e9, 2039 * _GB),
        Gpu("A100-40GB", 312 * _TERA, 19.5 * _TERA, 40 * _GB, 300e9, 1555 * _GB),
        Gpu("A100-PCIe", 312 * _TERA, 19.5 * _TERA, 80 * _GB, 32e9, 1935 * _GB),
        Gpu("A100-PCIe-40GB", 312 * _TERA, 19.5 * _TERA, 40 * _GB, 32e9, 1555 * _GB),
        Gpu("H100", 989 * _TERA, 67 * _TERA, 80 * _GB, 450e9, 3350 * _GB),
        Gpu("H100-PCIe", 756 * _TERA, 51 * _TERA, 80 * _GB, 64e9, 2000 * _GB),
        Gpu("H200", 989 * _TERA, 67 * _TERA, 141 * _GB, 450e9, 4800 * _GB),
        Gpu("B200", 2250 * _TERA, 75 * _TERA, 180 * _GB, 900e9, 8000 * _GB),
        Gpu("L4", 121 * _TERA, 30.3 * _TERA, 24 * _GB, 32e9, 300 * _GB),
        Gpu("L40S", 362 * _TERA, 91.6 * _TERA, 48 * _GB, 32e9, 864 * _GB),
        Gpu("RTX-3090", 71 * _TERA, 35.6 * _TERA, 24 * _GB, 32e9, 936 * _GB),
        Gpu("RTX-4090", 165.2 * _TERA, 82.6 * _TERA, 24 * _GB, 32e9, 1008 * _GB),
        Gpu("MI300X", 1307 * _TERA, 163.4 * _TERA, 192 * _GB, 448e9, 5300 * _GB),
    )
}
"""Name -> GPU."""

_ALSO = {
    "A100": ("80gb", "sxm", "sxm4"),
    "A100-40GB": ("40gbsxm",),
    "H100": ("80gb", "sxm", "sxm5"),
    "H200": ("141gb", "sxm"),
    "B200": ("180gb",),
}
"""What may follow a name without meaning another GPU."""

# words of slower or faster models, and of slices, that share a name
_OTHERS = {"mig", "laptop", "mobile", "max", "d", "ti", "super", "nvl"}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name as a user writes it: 'h100', 'RTX 4090'.

    Raises: UserError with the known names.
    """
    # case, spaces and dashes do not count: 'rtx 4090' is RTX-4090
    wanted = _plain(name)
    known = {_plain(key): gpu for key, gpu in GPUS.items()}
    # as drivers and clouds call them: the memory or the socket that the plain name stands for
    known |= {f"{_plain(name)}{suffix}": GPUS[name] for name, suffixes in _ALSO.items() for suffix in suffixes}
    # a 4090 is also asked for without its RTX
    known |= {key.removeprefix("rtx"): gpu for key, gpu in known.items()}
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"; did you mean {known[near[0]].name}?" if near else ""
        raise UserError(f"--gpu {name} is not a GPU that decoct knows; there are {', '.join(GPUS)}{hint}")
    return known[wanted]


def recognized(device: str, memory: int) -> Gpu | None:
    """Return the GPU that a driver calls ``device``, such as 'NVIDIA H200' or 'NVIDIA A100-SXM4-40GB'; None if it is none of ``GPUS``.

    Args:
        device: Name from the driver.
        memory: Its bytes. They tell models of one name apart, and slices of a GPU (MIG), which have a share of its speed, from all of it.
    """
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    if words & _OTHERS:
        return None
    # the longest name first: an A100 of 40 GB and a PCIe card are told apart from their plain names
    for gpu in sorted(GPUS.values(), key=lambda gpu: -len(gpu.name)):
        # within a tenth: vendors print round numbers, in GB or GiB, and drivers keep a part
        if {part.lower() for part in gpu.name.split("-")} <= words and 0.9 * gpu.memory <= memory <= 1.1 * gpu.memory:
            return gpu
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
