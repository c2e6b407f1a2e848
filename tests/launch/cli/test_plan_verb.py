"""Options of `decoct plan` that say how fast and how dear GPUs are."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from decoct.launch.cli.plan_verb import Asked, run_plan
from decoct.models.common.errors import UserError

QWEN = "qwen3-8b-4b-int4"


def planned(capsys: pytest.CaptureFixture[str], recipe: str = QWEN, **options: Any) -> dict[str, Any]:
    run_plan(recipe, (), Asked(**options), as_json=True)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "H100x"}, "--gpu H100x is not a GPU that decoct knows"),
        ({"efficiency": 40.0}, "--efficiency=40 must be above 0 and at most 1; it is a share of the GPU's peak, such as 0.4"),
        ({"efficiency": 0.0}, "--efficiency=0 must be above 0"),
        ({"price": -1.0}, "--price=-1 must be a number of at least 0, the price of one GPU for an hour"),
        ({"price": float("nan")}, "--price=nan must be a number of at least 0"),
        ({"link": "fast"}, "--link=fast is not what a GPU sends in a second; write it with its unit, such as 50GB"),
        ({"link": "50"}, "--link=50 is not what a GPU sends in a second"),
        ({"tokens_per_second": "many"}, "--tokens-per-second=many must be a number above 0, such as 12000 or 12k"),
        ({"tokens_per_second": "0"}, "--tokens-per-second=0 must be a number above 0"),
        ({"tokens_per_second": "5%"}, "--tokens-per-second=5% must be a number above 0"),
    ],
    ids=str,
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run_plan("quickstart", (), Asked(**options), as_json=True)
    assert message in str(caught.value)


def test_a_price_needs_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(
        UserError, match=r"--price is for one GPU and hour, and this plan is for a CPU; name the GPUs \(--gpus 8 --gpu H100\)"
    ):
        run_plan("quickstart", (), Asked(price=2.0), as_json=True)
    # the remedy works
    run_plan(QWEN, (), Asked(gpus=8, gpu="H100", price=2.0), as_json=True)


@pytest.mark.parametrize("options", [{"efficiency": 0.5}, {"link": "50GB"}], ids=str)
def test_options_about_gpus_need_gpus(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=r"has no effect on a plan for a CPU; name the GPUs \(--gpus 8 --gpu H100\)"):
        run_plan("quickstart", (), Asked(**options), as_json=True)


def test_the_sum_names_the_communication_that_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    for link, named in ((None, True), ("50GB", False)):
        run_plan(QWEN, (), Asked(gpus=8, nodes=2, gpu="H100", link=link), as_json=False)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time: about")]
        assert ("without communication between machines, tokenizing" in line) == named


def test_a_gpu_gives_memory_too_and_its_own_option_wins(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, gpus=8, gpu="H200")["machine"]["gpu_memory"] == 141 * 10**9
    assert planned(capsys, gpus=8, gpu="H200", gpu_memory="80GB")["machine"]["gpu_memory"] == 80 * 10**9


def test_twice_the_efficiency_is_half_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = (planned(capsys, gpus=8, gpu="H100", efficiency=share, price=1.0)["cost"] for share in (0.2, 0.4))
    assert slow["seconds"] == pytest.approx(2 * fast["seconds"])
    assert slow["money"] == pytest.approx(slow["gpu_hours"]) == pytest.approx(8 * slow["seconds"] / 3600)


def test_a_slow_link_takes_longer(capsys: pytest.CaptureFixture[str]) -> None:
    found = [planned(capsys, gpus=8, gpu="H100", link=link)["stages"][0]["durations"][0] for link in ("450GB", "1GB/s")]
    assert found[0]["seconds"] < found[1]["seconds"]
    assert found[0]["compute_seconds"] == found[1]["compute_seconds"]
    assert found[1]["communication_seconds"] == pytest.approx(450 * found[0]["communication_seconds"])


def test_a_measured_speed_times_the_first_stage(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, gpus=8, gpu_memory="80GB", tokens_per_second="20k")
    training = [stage for stage in found["stages"] if stage["training"]]
    assert training[0]["durations"][0]["seconds"] == training[0]["training"]["tokens"] / 20_000
    # the rounding of qat is no training, and has no speed without a GPU
    assert found["cost"]["unknown"] == ["04-qat, rounding"]


def test_a_run_that_has_begun_tells_its_own_speed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    rows = [{"stage": "01-distill", "step": step, "tokens_per_second": 5000.0} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first, _, recover, *_ = planned(capsys, "quickstart", out=tmp_path)["stages"]
    tokens = first["training"]["tokens"]
    assert first["durations"][0]["seconds"] == tokens / 5000
    assert first["durations"][0]["origin"] == "5,000 tokens/s, as this run has logged"
    assert recover["durations"][0]["origin"].startswith("from 01-distill, by operations: ")
    # for other machines it says nothing
    elsewhere = planned(capsys, "quickstart", out=tmp_path, gpus=2, gpu_memory="80GB")
    assert elsewhere["cost"]["seconds"] is None


@pytest.mark.parametrize(("name", "known"), [("NVIDIA H200", "H200"), ("Some GPU of tomorrow", None)])
def test_a_gpu_that_is_found_is_known_by_its_name(
    name: str, known: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(name=name, total_memory=150_100_000_000))
    found = planned(capsys, "smollm2-1.7b-half-int4", out=tmp_path)
    assert found["machine"]["gpus"] == 2
    assert found["cost"]["gpu"] == known
    assert (found["cost"]["seconds"] is None) is (known is None)
    # a plan for other GPUs does not take the speed of this one
    assert planned(capsys, "smollm2-1.7b-half-int4", gpus=2, gpu_memory="80GB")["cost"]["seconds"] is None


def test_a_logger_without_its_package_is_told_as_the_run_would(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("decoct.trainer.trackers.build.importlib.util.find_spec", lambda name: None)
    needs = "logger: tensorboard needs the package tensorboard, which is not installed here: pip install 'decoct[tensorboard]'"
    with pytest.raises(UserError, match="this recipe cannot work there:") as refused:
        run_plan("quickstart", ["logger=tensorboard"], Asked(), as_json=True)
    assert needs in str(refused.value)
    assert json.loads(capsys.readouterr().out)["problems"][0].startswith(needs)
    # another machine may have the package
    run_plan(QWEN, ["logger=tensorboard"], Asked(gpus=8, gpu="H100"), as_json=True)
    told = capsys.readouterr()
    assert json.loads(told.out)["problems"] == []
    assert told.err.startswith(f"decoct: on this machine, {needs}")


def test_a_run_folder_that_tells_no_speed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: tuple[tuple[Path, dict[str, Any], str], ...] = (
        (tmp_path / "none", {}, "there is no such run folder"),
        (tmp_path, {}, "has no steps whose speed was measured"),
        (
            tmp_path,
            {"tokens_per_second": "12k"},
            "is not read: the options give another machine or speed than the one that it was measured on",
        ),
    )
    for out, more, why in cases:
        run_plan("quickstart", (), Asked(out=out, **more), as_json=True)
        assert capsys.readouterr().err == f"decoct: --out {out}: {why}; the times are not those of a run\n"
    run_plan("quickstart", (), Asked(), as_json=True)
    assert capsys.readouterr().err == ""
