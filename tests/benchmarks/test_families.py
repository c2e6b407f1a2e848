"""The table of families, and the facts that plans go by, are what every architecture shows when it is run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from decoct.models.capabilities import ACTIONS, measured_reasons

ROOT = Path(__file__).parents[2]
FACTS = json.loads((ROOT / "models" / "family_facts.json").read_text())


@pytest.mark.slow
def test_table_and_facts_are_as_committed() -> None:
    import transformers

    if ".".join(transformers.__version__.split(".")[:2]) != FACTS["transformers"]:
        pytest.skip(f"the table is of transformers {FACTS['transformers']}")
    script = [sys.executable, str(ROOT / "benchmarks" / "families.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, "python benchmarks/families.py --write makes it anew:\n" + done.stdout[-4000:] + done.stderr[-4000:]


def test_facts_are_of_known_actions_and_of_this_transformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {action for reasons in FACTS["reasons"].values() for action in reasons} <= set(ACTIONS)
    assert "apart" in measured_reasons("opt")["packing"]
    monkeypatch.setattr("transformers.__version__", "6.1.0")
    assert measured_reasons("opt") == {}
