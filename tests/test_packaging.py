"""The package list and the typing links hold what the folders on disk say; start-up imports nothing heavy."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = ("trainer", "models", "losses", "qat", "launch", "configs")


def packages_on_disk() -> set[str]:
    folders = [f for top in TOP for f in (ROOT / top, *(ROOT / top).rglob("*")) if f.is_dir() and f.name != "__pycache__"]
    return {".".join(("decoct", *f.relative_to(ROOT).parts)) for f in (ROOT, *folders)}


def test_every_folder_is_a_listed_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_package_has_init_and_type_marker() -> None:
    for package in packages_on_disk():
        folder = ROOT.joinpath(*package.split(".")[1:])
        assert (folder / "__init__.py").is_file(), package
        assert (folder / "py.typed").is_file(), package


def test_typing_links_cover_every_top_folder() -> None:
    assert {link.name for link in (ROOT / ".typing" / "decoct").iterdir()} == {*TOP, "__init__.py", "parts.py"}


@pytest.mark.parametrize(
    "module",
    ["decoct.losses.settings", "decoct.qat.spec", "decoct.qat.export.limits.formats", "decoct.trainer.settings", "decoct.launch.cli.app"],
)
def test_start_up_path_imports_without_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'lightning', 'pydantic', 'wandb') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nobody_imports_a_folder_by_its_bare_name() -> None:
    """From the repository's root `import models` would work, and give a second copy of every class."""
    bare = re.compile(rf"^\s*(?:from|import) ({'|'.join(TOP)})\b", re.MULTILINE)
    for top in (*TOP, "tests"):
        for file in (ROOT / top).rglob("*.py"):
            assert not bare.search(file.read_text()), file


@pytest.mark.parametrize(
    ("place", "name", "new"),
    [
        ("decoct.qat.lattices", "Lattices", "QuantScheme"),
        ("decoct.qat.modules", "prepare", "prepare"),
        ("decoct.qat.kv_cache", "round_cache", "round_cache"),
        ("decoct.qat.folder", "save_quantized_folder", "save_quantized_folder"),
        ("decoct.qat.ptq", "Rounding", "RoundingMethod"),
    ],
)
def test_documented_names_of_before_are_found_with_a_warning(place: str, name: str, new: str) -> None:
    code = f"import warnings; warnings.simplefilter('error'); from {place} import {name}"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DeprecationWarning" in refused.stderr, refused.stderr
    code = f"import decoct.qat; from {place} import {name}; assert {name} is decoct.qat.{new}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
