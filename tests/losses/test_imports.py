"""losses/ is to be lifted into anyone's training loop: it imports with torch alone."""

import subprocess
import sys
from pathlib import Path

LOSSES = Path(__file__).resolve().parents[2] / "losses"
SCRIPT = """
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
ours = tuple("decoct." + folder for folder in ("models", "trainer", "qat", "configs", "launch"))
foreign = ("transformers", "lightning", "pydantic", "datasets", *ours)
loaded = sorted(name for name in sys.modules if name.startswith(foreign))
assert not loaded, loaded
"""


def module_names() -> list[str]:
    parts = [path.relative_to(LOSSES.parent).with_suffix("").parts for path in sorted(LOSSES.rglob("*.py"))]
    return [".".join(("decoct", *(part for part in p if part != "__init__"))) for p in parts]


def test_every_module_imports_with_torch_alone() -> None:
    names = module_names()
    assert "decoct.losses.linear_divergence.chunked" in names
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(names=names)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_settings_import_without_torch() -> None:
    script = "import sys, decoct.losses.settings; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
