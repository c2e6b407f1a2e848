"""models/config_defaults.json is what the installed transformers has."""

import importlib.util
import json
from pathlib import Path

import pytest

from decoct.models.common.light_configs import transformers_version

ROOT = Path(__file__).resolve().parents[2]
RECORD = json.loads((ROOT / "models" / "config_defaults.json").read_text())


def test_the_record_is_as_committed() -> None:
    if ".".join(transformers_version().split(".")[:2]) != RECORD["transformers"]:
        pytest.skip(f"the record is of transformers {RECORD['transformers']}")
    spec = importlib.util.spec_from_file_location("config_defaults", ROOT / "benchmarks" / "config_defaults.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.record() == RECORD, "run: python benchmarks/config_defaults.py --write"
