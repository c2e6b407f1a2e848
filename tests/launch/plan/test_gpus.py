"""GPUs by name: as users write them, and as drivers call them."""

import pytest

from decoct.launch.plan.gpus import find_gpu, recognized
from decoct.models.common.errors import UserError

GB = 10**9


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100", "H100"),
        ("h100-pcie", "H100-PCIe"),
        ("RTX 4090", "RTX-4090"),
        ("rtx4090", "RTX-4090"),
        ("3090", "RTX-3090"),
        ("mi300x", "MI300X"),
        ("A100-80GB", "A100"),
        ("h100 sxm", "H100"),
    ],
)
def test_names_as_users_write_them(text: str, name: str) -> None:
    assert find_gpu(text).name == name


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--gpu H100x is not a GPU that decoct knows; there are A100, .*MI300X; did you mean H100\?"):
        find_gpu("H100x")
    with pytest.raises(UserError, match="--gpu 24GB is not a GPU that decoct knows"):
        find_gpu("24GB")


@pytest.mark.parametrize(
    ("device", "memory", "name"),
    [
        ("NVIDIA H200", 150.1, "H200"),
        ("NVIDIA H100 80GB HBM3", 85.0, "H100"),
        ("NVIDIA H100 PCIe", 85.0, "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", 85.1, "A100"),
        ("NVIDIA A100-SXM4-40GB", 42.3, "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", 85.1, "A100-PCIe"),
        ("NVIDIA A100-PCIE-40GB", 42.3, "A100-PCIe-40GB"),
        ("NVIDIA L40S", 47.7, "L40S"),
        ("NVIDIA L4", 23.6, "L4"),
        ("NVIDIA GeForce RTX 4090", 25.3, "RTX-4090"),
        ("AMD Instinct MI300X", 206.1, "MI300X"),
        # others of a similar name have another speed, and are not guessed
        ("NVIDIA L40", 47.7, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 17.0, None),
        ("NVIDIA GeForce RTX 4090 D", 25.3, None),
        ("NVIDIA GeForce RTX 3090 Ti", 25.3, None),
        ("NVIDIA H100 NVL", 100.0, None),
        ("NVIDIA GH200 480GB", 102.0, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 10.0, None),
        ("NVIDIA H200", 20.0, None),
        ("Tesla T4", 15.8, None),
    ],
)
def test_names_of_drivers(device: str, memory: float, name: str | None) -> None:
    found = recognized(device, int(memory * GB))
    assert (found and found.name) == name
