import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decoct.models.common.errors import UserError
from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.settings_watching import LoggerSettings
from decoct.trainer.trackers.build import build_trackers, check_trackers, finish_trackers
from decoct.trainer.trackers.wandb_run import has_wandb_key, wandb_arguments, wandb_mode, wandb_run_id

WANDB = LoggerSettings(kind=("wandb",), tags=("tiny",))


def _png() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


def _offline_part(run_dir: Path, stage: str, steps: range, console: Console) -> None:
    config = {"seed": 3, "stages": [{"distill": {"steps": 4}}]}
    trackers = build_trackers(WANDB, run_dir, name="tiny", config=config, console=console)
    sink = MetricsSink(run_dir / "metrics.jsonl", trackers)
    for step in steps:
        values = {"tokens": 512 * step, "loss": 2.0 / step, "kl": None, "held_out_kl": 1.0 / step, "tokens_per_second": 9.0}
        sink.write(stage, step, {**values, "peak_memory_bytes": 2_500_000_000, "data_epochs": 0.25 * step})
    (run_dir / "report.html").write_text(f"<p>{stage}</p>")
    (tracker,) = trackers
    tracker.table("stages", ("step", "bytes"), [("teacher", 123), ("01-distill", 45)])
    tracker.picture("size-against-quality", _png())
    tracker.summary({"final/perplexity": 12.5})
    tracker.files([run_dir / "report.html"])
    finish_trackers(trackers)


def test_wandb_offline_parts_can_be_read_back_under_one_id(
    read_wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere, run_dir = tmp_path / "cwd", tmp_path / "run"
    elsewhere.mkdir()
    run_dir.mkdir()
    monkeypatch.chdir(elsewhere)
    said = io.StringIO()
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    _offline_part(run_dir, "01-distill", range(1, 3), Console(file=said))
    _offline_part(run_dir, "02-qat", range(1, 3), Console(file=said))
    assert list(elsewhere.iterdir()) == [], "nothing beside the run folder"
    outside = [path.read_text() for path in (tmp_path / "wandb-data").rglob("*") if path.is_file()]
    assert not [text for text in outside if text.startswith("<p>")], "W&B copies tables there; the report stays in the run folder"
    shown = capfd.readouterr()
    assert shown.out + shown.err == "", "W&B itself stays quiet"
    identifier = (run_dir / "wandb-run-id.txt").read_text().strip()
    assert [("offline" in line, identifier in line) for line in said.getvalue().splitlines()] == [(True, True)] * 2
    parts = read_wandb(run_dir)
    assert [part["id"] for part in parts] == [identifier, identifier]
    lines = [row for part in parts for row in part["history"] if "train/loss" in row]
    assert [line["train/loss"] for line in lines] == [2.0, 1.0, 2.0, 1.0]
    # one line per figure: the second stage goes on where the first has ended
    assert [(line["step"], line["tokens"], line["stage"]) for line in lines] == [(1, 512, 1), (2, 1024, 1), (3, 1536, 2), (4, 2048, 2)]
    seen = {name for line in lines for name in line if not name.startswith("_")}
    assert seen == {
        "train/loss", "train/data_epochs", "heldout/kl", "speed/tokens_per_second", "memory/peak_gb", "step", "tokens", "stage",
        "trainer/global_step",
    }  # fmt: skip
    assert lines[0]["memory/peak_gb"] == pytest.approx(2.5)
    axes = {"train/*": "tokens", "heldout/*": "tokens", "heldout/kl": "tokens", "speed/*": "step", "memory/*": "step"}
    assert axes.items() <= parts[0]["axes"].items()
    reports = [[artifact for artifact in part["artifacts"] if artifact[1] == "report"] for part in parts]
    assert reports == [[(f"report-{identifier}", "report", ["report.html"])]] * 2
    kept = sorted(run_dir.glob("wandb/offline-run-*/report/report.html"))
    assert [path.read_text() for path in kept] == ["<p>01-distill</p>", "<p>02-qat</p>"], "an offline part is uploaded as it was"
    first = parts[0]
    assert first["project"] == "decoct"
    assert first["config"]["seed"] == 3
    assert first["config"]["stages"] == [{"distill": {"steps": 4}}]
    assert first["summary"]["final/perplexity"] == 12.5
    media = {path.name.split("_")[0]: path for path in run_dir.glob("wandb/offline-run-*/files/media/*/*") if path.is_file()}
    table = json.loads(media["stages"].read_text())
    assert table["columns"] == ["step", "bytes"]
    assert table["data"] == [["teacher", 123], ["01-distill", 45]]
    assert media["size-against-quality"].read_bytes().startswith(b"\x89PNG")


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
    wanted = wandb_arguments(WANDB, tmp_path, "tiny", {})
    assert (wanted["mode"], wanted["resume"], wanted["id"]) == ("online", "allow", wandb_run_id(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_arguments(WANDB, tmp_path, "tiny", {})["mode"] == "offline", "the environment has the last word"


def test_a_service_of_another_folder_writes_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert wandb_arguments(WANDB, Path("runs"), "tiny", {})["dir"] == str(tmp_path / "runs")


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
        check_trackers(WANDB)
    check_trackers(LoggerSettings(kind=("csv",)))


@pytest.mark.parametrize("error", [ValueError("API key must have\n40 characters"), TypeError("x"), OSError("y")])
def test_whatever_wandb_stumbles_over_is_one_message(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr("wandb.init", fail)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="logger: wandb cannot start") as caught:
        build_trackers(WANDB, tmp_path, name="tiny", config={})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("known", [b"\xff", b"../../x", b"a b", b""])
def test_a_damaged_run_id_is_made_anew(known: bytes, tmp_path: Path) -> None:
    (tmp_path / "wandb-run-id.txt").write_bytes(known)
    made = wandb_run_id(tmp_path)
    assert len(made) == 8
    assert wandb_run_id(tmp_path) == made
