"""An export that its format does not hold: refused with what to set, or rounded and then told everywhere with its measured error."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def measured(source: Path, export: Path) -> dict[str, Any]:
    """Changed weights, the largest change and the norm of all, of the files themselves."""
    before, after = load_file(source / "model.safetensors"), load_file(export / "model.safetensors")
    changes = torch.cat([(after[name].double() - tensor.double()).flatten() for name, tensor in before.items()])
    norm = torch.cat([tensor.double().flatten() for tensor in before.values()]).norm()
    changed, largest = int((changes != 0).sum()), float(changes.abs().max())
    return {"changed": changed, "largest": largest, "relative": pytest.approx(float(changes.norm() / norm))}


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed beside decoct")
def test_a_recipe_is_refused_or_reports_the_error_of_rounding(
    tiny: dict[str, Any], run: Any, read_report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["stages"] = [{"quantize": {"weights": {"bits": 8, "group_size": "channel"}}}, {"export": {"formats": ["safetensors"]}}]
    monkeypatch.delenv("DECOCT_VLLM_PYTHON", raising=False)
    refused = run(tiny)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "export.allow_inexact=true" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "runs/tiny/02-export/safetensors").exists()

    done = run(tiny, "stages.1.export.allow_inexact=true")
    assert done.returncode == 0, done.stdout + done.stderr
    (export,) = read_report()["exports"]
    folder = tmp_path / "runs/tiny" / export["path"]
    assert export["exact"] is False
    assert export["rounding"] == measured(tmp_path / "runs/tiny/01-quantize/model", folder)
    assert export["rounding"]["changed"] > 1000
    sentence = f"{export['rounding']['changed']:,} weights were rounded to the stored dtype, by {export['rounding']['largest']:.2g} at most"
    for told in ("02-export/safetensors/README.md", "report.md", "report.html"):
        assert sentence in (tmp_path / "runs/tiny" / told).read_text(), told
    assert sentence in done.stdout
    assert "element by element" not in (tmp_path / "runs/tiny/report.html").read_text()
    ran = export["runtimes"]["transformers"]
    assert export["tokens_per_second"] == ran["tokens_per_second"] > 0
    assert export["peak_bytes"] == ran["peak_bytes"] > 10**8
    assert export["runtimes"]["vLLM"]["status"] == "not installed"
    speed = f"{ran['tokens_per_second']:,.0f} tokens per second on the machine it was checked on"
    speed += f", with a peak memory of {ran['peak_bytes'] / 1e6:,.0f} MB"
    assert speed in (folder / "README.md").read_text()
    # the re-read files are measured, not the source
    stages = {row["name"]: row["eval"] for row in read_report()["stages"]}
    assert export["eval"]["kl"] != stages["01-quantize"]["kl"]
    assert export["eval"]["perplexity"] == pytest.approx(stages["01-quantize"]["perplexity"], rel=1e-2)


def test_the_verb_is_refused_or_tells_the_error(tiny: dict[str, Any], run: Any, verb: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"quantize": {"weights": {"bits": 8, "group_size": "channel"}}}]
    assert run(tiny).returncode == 0

    def export(*arguments: str) -> Any:
        return verb("export", "runs/tiny/01-quantize/model", "--format", "safetensors", "--out", "out", *arguments, code=None)

    refused = export()
    assert refused.returncode == 2
    assert "--allow-inexact" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = export("--allow-inexact")
    assert done.returncode == 0, done.stderr
    rounding = json.loads((tmp_path / "out/decoct.json").read_text())["export"]["rounding"]
    assert rounding == measured(tmp_path / "runs/tiny/01-quantize/model", tmp_path / "out")
    assert f"NOT exact: {rounding['changed']:,} weights were rounded" in done.stdout
    assert "every rounded weight rebuilt exactly" in done.stdout
