import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decoct.models.common.errors import UserError
from decoct.trainer.loop.loggers import (
    build_loggers,
    check_logger,
    finish_loggers,
    has_wandb_key,
    log_image,
    log_summary,
    log_table,
    wandb_arguments,
    wandb_mode,
    wandb_run_id,
)
from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.settings import LoggerSettings


def _png() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


def _offline_part(run_dir: Path, steps: range, console: Console) -> None:
    loggers = build_loggers(
        LoggerSettings(kind="wandb", tags=("tiny",)),
        run_dir,
        name="tiny",
        config={"seed": 3, "stages": [{"distill": {"steps": 4}}]},
        console=console,
    )
    sink = MetricsSink(run_dir / "metrics.jsonl", loggers)
    for step in steps:
        sink.write("01-distill", step, {"tokens": 512 * step, "loss": 2.0 / step, "kl": None})
    log_table(loggers, "stages", ("step", "bytes"), [("teacher", 123), ("01-distill", 45)])
    log_image(loggers, "size-against-quality", _png())
    log_summary(loggers, {"final/perplexity": 12.5})
    sink.close()


def test_wandb_offline_parts_can_be_read_back_under_one_id(
    read_wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere, run_dir = tmp_path / "cwd", tmp_path / "run"
    elsewhere.mkdir()
    run_dir.mkdir()
    monkeypatch.chdir(elsewhere)
    said = io.StringIO()
    _offline_part(run_dir, range(1, 3), Console(file=said))
    _offline_part(run_dir, range(3, 5), Console(file=said))
    assert list(elsewhere.iterdir()) == [], "nothing beside the run folder"
    shown = capfd.readouterr()
    assert shown.out + shown.err == "", "W&B itself stays quiet"
    identifier = (run_dir / "wandb-run-id.txt").read_text().strip()
    assert [("offline" in line, identifier in line) for line in said.getvalue().splitlines()] == [(True, True)] * 2
    parts = read_wandb(run_dir)
    assert [part["id"] for part in parts] == [identifier, identifier]
    losses = [row["01-distill/loss"] for part in parts for row in part["history"] if "01-distill/loss" in row]
    assert losses == [2.0, 1.0, 2.0 / 3, 0.5]
    tokens = [row["tokens"] for part in parts for row in part["history"] if "01-distill/loss" in row]
    assert tokens == [512, 1024, 1536, 2048]
    assert parts[0]["axes"]["*"] == "tokens"
    first = parts[0]
    assert first["project"] == "decoct"
    assert first["config"]["seed"] == 3
    assert first["config"]["stages"] == [{"distill": {"steps": 4}}]
    assert first["summary"]["final/perplexity"] == 12.5
    kept = {path.name.split("_")[0]: path for path in run_dir.glob("wandb/offline-run-*/files/media/*/*") if path.is_file()}
    table = json.loads(kept["stages"].read_text())
    assert table["columns"] == ["step", "bytes"]
    assert table["data"] == [["teacher", 123], ["01-distill", 45]]
    assert kept["size-against-quality"].read_bytes().startswith(b"\x89PNG")


def test_a_run_keeps_its_id_and_runs_do_not_share_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = wandb_run_id(tmp_path / "a")
    assert wandb_run_id(tmp_path / "a") == first
    assert wandb_run_id(tmp_path / "b") != first


def test_keys_are_found_in_environment_and_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine example.org login user password secret\n")
    os.chmod(tmp_path / "netrc", 0o600)
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_wandb_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert has_wandb_key()


def test_with_a_key_the_run_is_online_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    wanted = wandb_arguments(LoggerSettings(kind="wandb"), tmp_path, "tiny", {})
    assert (wanted["mode"], wanted["resume"], wanted["id"]) == ("online", "allow", wandb_run_id(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_arguments(LoggerSettings(kind="wandb"), tmp_path, "tiny", {})["mode"] == "offline", "the environment has the last word"


def test_a_service_of_another_folder_writes_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert wandb_arguments(LoggerSettings(kind="wandb"), Path("runs"), "tiny", {})["dir"] == str(tmp_path / "runs")


def test_csv_keeps_the_curves_of_every_start(tmp_path: Path) -> None:
    for step in (1, 2):
        loggers = build_loggers(LoggerSettings(kind="csv"), tmp_path, name="tiny", config={})
        MetricsSink(tmp_path / "metrics.jsonl", loggers).write("a", step, {"loss": 0.5})
        log_table(loggers, "stages", ("x",), [(1,)])
        finish_loggers(loggers)
    files = sorted(tmp_path.glob("csv/version_*/metrics.csv"))
    assert [path.read_text().splitlines() for path in files] == [["a/loss,step", "0.5,1"], ["a/loss,step", "0.5,2"]]


def test_none_is_nothing_and_others_are_refused(tmp_path: Path) -> None:
    assert build_loggers(LoggerSettings(), tmp_path, name="tiny", config={}) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="kind='tensorboard' is not one of wandb, csv, none"):
        LoggerSettings(kind="tensorboard")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": " Offline "}, "offline"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "false"}, "online"),
    ],
)
def test_the_environment_decides_how_wandb_runs(environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode() == mode


def test_a_mode_that_wandb_does_not_have_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE='sometimes' is not one of online, offline and disabled"):
        check_logger(LoggerSettings(kind="wandb"))
    check_logger(LoggerSettings(kind="csv"))


@pytest.mark.parametrize("error", [ValueError("API key must have\n40 characters"), TypeError("x"), OSError("y")])
def test_whatever_wandb_stumbles_over_is_one_message(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr("wandb.init", fail)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="logger: wandb cannot start") as caught:
        build_loggers(LoggerSettings(kind="wandb"), tmp_path, name="tiny", config={})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("known", [b"\xff", b"../../x", b"a b", b""])
def test_a_damaged_run_id_is_made_anew(known: bytes, tmp_path: Path) -> None:
    (tmp_path / "wandb-run-id.txt").write_bytes(known)
    made = wandb_run_id(tmp_path)
    assert len(made) == 8
    assert wandb_run_id(tmp_path) == made
