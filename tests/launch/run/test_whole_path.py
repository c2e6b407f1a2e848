"""The quickstart's path, tiny, through the real command line: what it makes, what it skips, what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_whole_path_leaves_verified_export_and_report(tiny: dict[str, Any], run: Any, read_report: Any, tmp_path: Path) -> None:
    done = run(tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    report = read_report()
    rows = {row["name"]: row for row in report["stages"]}
    assert list(rows) == ["teacher", "00-student", "01-distill", "02-prune", "03-recover", "04-zeros", "05-qat", "06-export", "07-evaluate"]
    assert report["stages"][0]["kind"] == "teacher"
    assert rows["teacher"]["eval"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["teacher"]["eval"]["top1"] == 1.0
    assert rows["00-student"]["change"]["since"] == "teacher"
    assert rows["01-distill"]["change"]["kl"] == pytest.approx(rows["01-distill"]["eval"]["kl"] - rows["00-student"]["eval"]["kl"])
    assert rows["05-qat"]["packed_bytes"] < 0.5 * rows["05-qat"]["bytes"]
    assert rows["05-qat"]["packed_bytes"] == pytest.approx(report["exports"][0]["bytes"], rel=0.25)
    assert rows["02-prune"]["parameters"] < rows["01-distill"]["parameters"] < rows["teacher"]["parameters"]
    assert rows["04-zeros"]["sparsity"] == pytest.approx(0.4, abs=0.002)
    export = report["exports"][0]
    assert export["exact"]
    assert export["sparsity"] >= rows["04-zeros"]["sparsity"]
    assert export["eval"]["perplexity"] == pytest.approx(rows["05-qat"]["eval"]["perplexity"], rel=1e-5)
    assert export["bytes"] < rows["04-zeros"]["bytes"]
    assert report["baselines"][0]["name"] == "teacher rounded to int4"
    page = (tmp_path / "runs/tiny/report.html").read_text()
    assert page.count("<svg") == 3
    assert str(tmp_path) not in (tmp_path / "runs/tiny/report.json").read_text().replace(str(tmp_path / "text"), "")
    assert not list((tmp_path / "runs/tiny").rglob("*.tmp"))
    card = (tmp_path / "runs/tiny/06-export/compressed-tensors/README.md").read_text()
    assert str(tmp_path) not in card

    again = run(tiny)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is done, skipped") == 6
    assert read_report()["stages"] == report["stages"]


def test_both_formats_of_an_export_are_the_same_model_in_the_report(
    tiny: dict[str, Any], run: Any, read_report: Any, tmp_path: Path
) -> None:
    weights = {"bits": 4, "group_size": 32}
    tiny["stages"] = [{"quantize": {"weights": weights}}, {"export": {"formats": ["compressed-tensors", "gguf"]}}]
    done = run(tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    packed, gguf = read_report()["exports"]
    assert (packed["format"], gguf["format"]) == ("compressed-tensors", "gguf")
    assert gguf["exact"]
    assert gguf["eval"] == packed["eval"]
    assert gguf["parameters"] == packed["parameters"]
    assert gguf["bytes"] == (tmp_path / "runs/tiny/02-export/gguf/model.gguf").stat().st_size
    assert gguf["runtimes"].keys() == {"llama.cpp"}
    assert str(tmp_path) not in (tmp_path / "runs/tiny/02-export/gguf/README.md").read_text()


def test_training_that_makes_the_student_worse_is_told(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"distill": {"steps": 6, "learning_rate": 0.3, "warmup": 0.0}}, {"distill": {"name": "gentle", "steps": 6}}]
    done = run(tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = (line for line in done.stdout.splitlines() if "ends worse on held-out text than it began" in line)
    assert told.startswith("note: 01-distill ends worse on held-out text than it began: KL to the teacher")
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    assert report["notes"] == [told.removeprefix("note: ")]
    assert report["notes"][0] in (tmp_path / "runs/tiny/report.md").read_text()
    rows = {row["name"]: row for row in report["stages"]}
    assert rows["01-distill"]["change"]["perplexity"] > 0 > rows["02-gentle"]["change"]["perplexity"]


def test_changed_settings_run_from_there_and_keep_the_old_folder(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"distill": {"steps": 4}}, {"distill": {"name": "second", "steps": 4}}]
    assert run(tiny).returncode == 0
    before = json.loads((tmp_path / "runs/tiny/02-second/stage.json").read_text())
    changed = run(tiny, "stages.second.steps=6")
    assert changed.returncode == 0, changed.stderr
    assert changed.stdout.count("is done, skipped") == 1
    aside = tmp_path / f"runs/tiny/02-second.{before['key'][:8]}"
    assert json.loads((aside / "stage.json").read_text()) == before


def test_a_gate_ends_the_run_where_it_stands_and_a_wider_one_lets_it_go_on(
    tiny: dict[str, Any], run: Any, read_report: Any, tmp_path: Path
) -> None:
    rounded = {"quantize": {"weights": {"bits": 4, "group_size": 32}}}
    tiny["stages"] = [rounded, {"evaluate": {"max_kl": 1e-9, "round_teacher": False}}, {"export": {}}]
    for _ in range(2):  # a second start stands there again
        done = run(tiny)
        assert done.returncode == 3, done.stderr
        assert "02-evaluate: KL to the teacher is" in done.stderr and "max_kl=1e-09" in done.stderr
        assert "Not run: 03-export." in done.stderr
        assert "Traceback" not in done.stderr
        assert "stopped at a gate" in done.stdout
        assert not (tmp_path / "runs/tiny/03-export").exists()
        report = read_report()
        assert report["stages"][-1]["name"] == "02-evaluate"
        assert report["exports"] == []
        assert "allowed is max_kl=1e-09" in report["gates"][0]
        for page in ("report.md", "report.html"):
            assert "The run ended at a gate: 02-evaluate: KL" in (tmp_path / "runs/tiny" / page).read_text()

    done = run(tiny, "stages.evaluate.max_kl=50")
    assert done.returncode == 0, done.stderr
    assert "01-quantize is done, skipped" in done.stdout
    report = read_report()
    assert report["gates"] == []
    assert [row["format"] for row in report["exports"]] == ["compressed-tensors"]


def test_a_gate_ends_every_process_with_code_3(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"distill": {"steps": 1}}, {"evaluate": {"max_kl": 1e-9}}, {"distill": {"name": "after", "steps": 1}}]
    done = run(tiny, "trainer.devices=2")
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("the model is worse than the recipe allows") == 1
    assert not (tmp_path / "runs/tiny/03-after").exists()


def test_model_folders_load_in_plain_transformers(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny["stages"] = [{"distill": {"steps": 2}}, {"quantize": {"weights": {"bits": 8, "group_size": "channel"}}}]
    assert run(tiny).returncode == 0
    folder = tmp_path / "runs/tiny/02-quantize/model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)("kado lota minu.", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()


def test_two_processes_give_the_curve_of_one(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"distill": {"steps": 20}}]
    curves, watched = [], []
    for name, overrides in (
        ("one", ["trainer.devices=1"]),
        ("ddp", ["trainer.devices=2", "trainer.strategy=ddp"]),
        ("fsdp2", ["trainer.devices=2", "trainer.strategy=fsdp2"]),
    ):
        done = run({**tiny, "name": name}, *overrides, ranks=1 if name == "one" else 2)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        steps = [line for line in map(json.loads, lines) if line["stage"] == "01-distill"]
        curves.append([line["loss"] for line in steps if line["step"] > 0])
        watched.append([line["held_out_kl"] for line in steps if "held_out_kl" in line])
    assert len(curves[0]) == 20
    for alone, *together in zip(*curves, strict=True):
        assert together == pytest.approx([alone, alone], rel=1e-5)
    assert len(watched[0]) > 5
    for others in watched[1:]:
        assert others == pytest.approx(watched[0], rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_whole_path_runs_under_torchrun(tiny: dict[str, Any], run: Any, read_report: Any, strategy: str) -> None:
    done = run(tiny, "trainer.devices=2", f"trainer.strategy={strategy}", "trainer.activation_checkpointing=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_report()["exports"][0]["exact"]
    assert f"2 processes ({strategy}), activation checkpointing" in done.stdout


def test_failure_on_rank_0_is_one_message_and_its_code_under_torchrun(tiny: dict[str, Any], run: Any) -> None:
    # only who has read the text knows that it is too short
    tiny["data"]["eval_tokens"] = 10**6
    done = run(tiny, "trainer.devices=2")
    assert done.returncode == 2, done.stderr
    assert "tiny -> runs/tiny" in done.stdout, "the run has begun"
    assert done.stderr.count("error:") == 1
    assert "eval_tokens" in done.stderr
    assert "Traceback" not in done.stderr
