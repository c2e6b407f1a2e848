"""`logger: wandb` without a key: a real offline run, read back from its own file."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def records(file: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(file))
    found = []
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def test_offline_run_holds_config_curves_table_and_pictures(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"distill": {"steps": 3}}]
    done = run({**tiny, "logger": "wandb"}, WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "offline" in done.stdout
    assert not (tmp_path / "wandb").exists()
    (file,) = (tmp_path / "runs/tiny").rglob("*.wandb")
    found = records(file)
    identifier = (tmp_path / "runs/tiny/wandb-run-id.txt").read_text().strip()
    assert {r.run.run_id for r in found if r.WhichOneof("record_type") == "run"} == {identifier}
    assert any("seq_length" in item.value_json for r in found for item in r.run.config.update)
    keys = {"/".join(item.nested_key) or item.key for r in found for item in r.history.item}
    assert {"01-distill/loss", "01-distill/kl"} <= keys
    assert any("stages" in key for key in keys)
    assert any("size-quality" in key for key in keys)
    again = run({**tiny, "logger": "wandb"}, "stages.0.steps=4", WANDB_MODE="offline")
    assert again.returncode == 0
    ids = {r.run.run_id for f in (tmp_path / "runs/tiny").rglob("*.wandb") for r in records(f) if r.WhichOneof("record_type") == "run"}
    assert ids == {identifier}
