import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from decoct.models.folder.safetensors_read import read_header
from decoct.models.folder.safetensors_write import write_safetensors

TENSORS = {
    "odd": torch.arange(7, dtype=torch.int8),
    "wide": torch.randn(3, 5, dtype=torch.float64),
    "plain": torch.randn(4, 3),
    "turned": torch.randn(4, 3).T,
    "half": torch.randn(5).to(torch.bfloat16),
    "mask": torch.tensor([[True, False], [False, True]]),
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 4),
    "step": torch.tensor(12, dtype=torch.int64),
}


def test_the_library_reads_back_every_dtype_and_shape(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    write_safetensors(file, TENSORS, {"format": "pt"})
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert set(read_header(file).tensors) == set(TENSORS)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_library_writes_the_same_bytes(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    names = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn")
    one_of_each = {f"{place}.{name}": torch.ones(3, 2, dtype=getattr(torch, name)) for place in "ba" for name in names}
    for number, tensors in enumerate((TENSORS, one_of_each, {"alone": torch.ones(2)})):
        ours, theirs = tmp_path / f"{number}.ours", tmp_path / f"{number}.theirs"
        write_safetensors(ours, tensors, metadata)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, theirs, metadata=metadata)
        assert ours.read_bytes() == theirs.read_bytes()


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    file.write_text("mine")
    with pytest.raises(FileExistsError):
        write_safetensors(file, TENSORS)
    assert file.read_text() == "mine"


_MEMORY = """
import re, sys, threading, time
from pathlib import Path
import torch
from decoct.models.folder.safetensors_write import write_safetensors
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
tensors = {str(i): torch.ones(1_000_000, 4) for i in range(20)}
base, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
write_safetensors(Path(sys.argv[1]), tensors)
done = True
thread.join()
print(most - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_no_second_copy_is_made(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(tmp_path / "f")], capture_output=True, text=True, check=True)
    assert int(re.findall(r"-?\d+", done.stdout)[0]) < 20_000_000, "320 MB were written"
