"""Every shipped recipe that starts from a hub model, in a tiny form of the same structure, really run to its verified export."""

from pathlib import Path
from typing import Any

import pytest

from decoct.configs import list_recipes, load_recipe, recipe_from_dict, resolved
from decoct.configs.architectures import architecture
from decoct.launch.plan.make_plan import plan

pytestmark = pytest.mark.slow
NAMES = [name for name, _, _ in list_recipes() if name != "quickstart"]


def _teacher(folder: Path, published: str, corpus: Path) -> None:
    """A model folder of the published model's family and options, small."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(iter([file.read_text() for file in sorted(corpus.iterdir())]), 300)
    config: Any = AutoConfig.for_model(**architecture(published))
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 128, 128, 4
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 32
    config.vocab_size, config.max_window_layers = len(tokenizer), 4
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:4]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tiny(name: str, folder: Path, corpus: Path) -> dict[str, Any]:
    """The recipe with every number shrunk and nothing else changed: stages, kinds, teacher and trainer options stay."""
    plain = resolved(load_recipe(name))
    _teacher(folder / "teacher", plain["teacher"]["path"], corpus)
    plain["teacher"]["path"] = str(folder / "teacher")
    if plain["student"]["keep"]:
        plain["student"]["keep"]["layers"] = 2
    else:
        plain["student"]["path"] = plain["teacher"]["path"]
    plain["data"] = {"files": [str(corpus / "*.txt")], "seq_length": 32, "eval_tokens": 512}
    for stage in plain["stages"]:
        (settings,) = stage.values()
        if settings.get("tokens"):
            settings.update(tokens=None, steps=3)
        if settings.get("structured"):
            settings.update(structured={"ffn": 96}, calibration_tokens=512)
        elif settings.get("calibration_tokens"):
            settings["calibration_tokens"] = 512
        if settings.get("weights"):
            settings["weights"]["group_size"] = 32
    devices = plain["trainer"]["devices"]
    plain["trainer"].update(global_batch_tokens=512, micro_batch=2, devices=1 if devices == "auto" else min(2, devices))
    plain["logger"] = {"kind": "none"}
    return {key: value for key, value in plain.items() if value is not None}


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_form_runs_to_a_verified_export(name: str, corpus: Path, run: Any, read_report: Any, tmp_path: Path) -> None:
    recipe = _tiny(name, tmp_path, corpus)
    done = run(recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_report(recipe["name"])
    assert report["exports"][0]["exact"]
    assert [row["kind"] for row in report["stages"]][-1] == "evaluate"
    trainer = recipe["trainer"]
    assert ("activation checkpointing" in done.stdout) == trainer["activation_checkpointing"]
    assert ("optimizer adamw-8bit" in done.stdout) == (trainer["optimizer"] == "adamw-8bit")
    assert ("2 processes (fsdp2)" in done.stdout) == (trainer["strategy"] == "fsdp2")
    rounded = recipe["teacher"]["load_in"] == "nf4"
    assert (", nf4, replicated" in done.stdout) == rounded
    assert ("teacher in nf4: KL(teacher || nf4)" in done.stdout) == rounded
    assert ("held" in report["stages"][0]) == rounded
    if rounded:
        held = report["stages"][0]["held"]
        assert 0 < held["kl"] < 0.5
        assert f"{held['kl']:.2e} nats" in done.stdout
        assert done.stdout.index("teacher in nf4") < done.stdout.index("\n01-"), "known before training"
    _check_sizes(recipe, tmp_path / "runs" / recipe["name"])


def _check_sizes(recipe: dict[str, Any], folder: Path) -> None:
    """What lies on the disk is what the plan says, within a hundredth."""
    for stage in plan(recipe_from_dict(recipe)).stages:
        if stage.model_bytes is not None:
            written = sum(file.stat().st_size for file in (folder / stage.name / "model").rglob("*.safetensors"))
            assert stage.model_bytes == pytest.approx(written, rel=0.01), stage.name
        for form, count in stage.exports.items():
            files = (file for file in (folder / stage.name / form).iterdir() if file.suffix in (".safetensors", ".gguf"))
            packed = sum(file.stat().st_size for file in files)
            assert count == pytest.approx(packed, rel=0.01), (stage.name, form)
