"""MLflow's file store, read back with its own package where that is installed; else what is asked of the logger."""

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import pytest

from decoct.models.common.errors import UserError

from .conftest import Follow

RUN = "0123456789abcdef0123456789abcdef"


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_two_stages_and_a_resume_is_one_run(follow: Follow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    # a server that somebody has set up for other work is not asked
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    follow("mlflow", "01-distill", range(1, 4))
    follow("mlflow", "01-distill", range(2, 5))
    said = follow("mlflow", "02-qat", range(1, 3), report=True)
    run_dir = tmp_path / "run"
    identifier = (run_dir / "mlflow-run-id.txt").read_text().strip()
    where = run_dir / "mlruns"
    assert said == f"MLflow logs into {where} (run id {identifier}); `mlflow ui --backend-store-uri {where}` shows it\n"
    client = tracking.MlflowClient((run_dir.resolve() / "mlruns").as_uri())
    (experiment,) = (found for found in client.search_experiments() if found.name == "decoct")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (identifier, "tiny", "FINISHED")
    assert run.data.params["stages/0/qat/overrides/_.down_proj/bits"] == "8"
    assert run.data.params["tags"] == "['a', 'b']"
    assert run.data.metrics["final/perplexity"] == 13.25
    history = {point.step: point.value for point in client.get_metric_history(identifier, "train/loss")}
    assert history == {1: 2.0, 2: 1.0, 3: pytest.approx(2 / 3), 4: 0.5, 5: 2.0, 6: 1.0}
    assert {entry.path for entry in client.list_artifacts(identifier)} == {"curves.png", "stages.csv", "report.md"}


class _Client:
    """What of an MLflow client is used."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def update_run(self, run: str, status: str) -> None:
        self.calls.append(("status", run, status))

    def set_terminated(self, run: str, status: str) -> None:
        self.calls.append(("end", run, status))

    def log_text(self, run: str, text: str, name: str) -> None:
        self.calls.append(("text", run, text.splitlines(), name))

    def log_artifact(self, run: str, path: str) -> None:
        self.calls.append(("artifact", run, Path(path).name, Path(path).exists()))


class _Logger:
    """Lightning's logger, without the package behind it."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, **arguments: Any) -> None:
        self.calls.append(("open", arguments["experiment_name"], arguments["run_name"], arguments["run_id"]))
        self.uri = arguments["tracking_uri"]
        self.run_id = RUN
        self.experiment = _Client(self.calls)
        kept = Path(self.uri.removeprefix("file://")) / "1" / RUN / "meta.yaml"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("")

    def log_hyperparams(self, params: dict[str, str]) -> None:
        self.calls.append(("parameters", params))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append(("metrics", sorted(metrics), step))

    def save(self) -> None:
        self.calls.append(("save",))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the stand-in of Lightning's logger is asked."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setattr("lightning.pytorch.loggers.MLFlowLogger", _Logger)
    monkeypatch.setattr(_Logger, "calls", [])
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    return _Logger.calls


def test_what_is_asked_of_the_logger(follow: Follow, calls: list[tuple[Any, ...]]) -> None:
    follow("mlflow", "01-distill", range(1, 2))
    assert calls[:3] == [
        ("open", "decoct", "tiny", None),
        ("parameters", {"seed": "3", "stages/0/qat/steps": "4", "stages/0/qat/overrides/_.down_proj/bits": "8", "tags": "['a', 'b']"}),
        ("status", RUN, "RUNNING"),
    ]
    del calls[:]
    follow("mlflow", "02-qat", range(1, 2), report=True, exit_code=3)
    assert calls == [
        ("open", "decoct", "tiny", RUN),
        ("status", RUN, "RUNNING"),
        ("metrics", ["heldout/kl", "stage", "step", "tokens", "train/loss"], 2),
        ("text", RUN, ["step,perplexity,kl", "teacher,12.5,", "01|distill,13.25,0.5"], "stages.csv"),
        ("artifact", RUN, "curves.png", True),
        ("metrics", ["final/perplexity"], 2),
        ("artifact", RUN, "report.md", True),
        ("save",),
        ("end", RUN, "FAILED"),
    ]


@pytest.mark.parametrize("known", ["../../x", "", "0" * 32])
def test_an_id_without_its_run_is_made_anew(follow: Follow, calls: list[tuple[Any, ...]], known: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mlflow-run-id.txt").write_text(known)
    follow("mlflow", "01-distill", range(1, 2))
    assert calls[0] == ("open", "decoct", "tiny", None)
    assert (tmp_path / "run/mlflow-run-id.txt").read_text() == f"{RUN}\n"


def test_whatever_mlflow_stumbles_over_is_one_message(
    follow: Follow, calls: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, **_: Any) -> None:
        raise RuntimeError("no\nstore")

    monkeypatch.setattr(_Logger, "__init__", fail)
    with pytest.raises(UserError) as caught:
        follow("mlflow", "01-distill", range(1, 2))
    assert str(caught.value) == f"logger: mlflow cannot start: no store. Remove {tmp_path / 'run/mlruns'}, or leave mlflow out."
    assert not (tmp_path / "run/mlflow-run-id.txt").exists()
