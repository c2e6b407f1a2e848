"""Teachers and students that cannot be taken are refused before any work, by the plan, the run and the single verbs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from decoct.configs.loader import recipe_from_dict
from decoct.launch.cli.app import main
from decoct.launch.plan.input_models import check_inputs
from decoct.launch.plan.make_plan import plan
from decoct.launch.plan.stage_shapes import ImpossibleStageError
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

SMALL: dict[str, Any] = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(**SMALL, intermediate_size=24, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer(["one two three", "two three four"], 260).save_pretrained(folder)
    return folder


def _recipe(teacher: Path, student: Path, seq_length: int = 32, kind: str = "distill") -> Any:
    return recipe_from_dict(
        {
            "name": "x",
            "teacher": {"path": str(teacher)},
            "student": {"path": str(student)},
            "data": {"builtin": "python-stdlib", "seq_length": seq_length},
            "stages": [{kind: {"steps": 2} if kind == "distill" else {}}],
        }
    )


def _fp8(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


def _adapter(folder: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base", "peft_type": "LORA"}))


def _vision(folder: Path) -> None:
    text = {"model_type": "gemma3_text", **SMALL}
    transformers.Gemma3Config(text_config=text).save_pretrained(folder)


def _prefixed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "fp8": (_fp8, r"packed quantized weights \(.*: fp8\).*decoct plain"),
    "an adapter": (_adapter, r"holds an adapter of some/base .*decoct import"),
    "names of a wrapper": (_prefixed, r"begins with 'module\.', which DistributedDataParallel adds"),
    "text and images": (_vision, r"is more than a text model: it has vision beside it.*decoct plain"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_what_is_no_plain_text_model_is_refused_by_the_plan(llama: Path, tmp_path: Path, case: str, role: str) -> None:
    change, message = REFUSED[case]
    other = shutil.copytree(llama, tmp_path / "other")
    change(other)
    with pytest.raises(ImpossibleStageError, match=rf"^{role}\.path: .*{message}"):
        plan(_recipe(*((other, llama) if role == "teacher" else (llama, other))))


def test_an_export_may_be_measured(llama: Path, tmp_path: Path) -> None:
    packed = shutil.copytree(llama, tmp_path / "packed")
    _fp8(packed)
    check_inputs(_recipe(llama, packed, kind="evaluate"))
    with pytest.raises(ImpossibleStageError, match=r"student\.path"):
        check_inputs(_recipe(llama, packed))


def test_a_single_verb_says_it_before_any_work(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = shutil.copytree(llama, tmp_path / "adapter")
    _adapter(adapter)
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(adapter), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert f"merge it into its model first: decoct import {adapter} --out MODEL" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


POSITIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "opt": {**SMALL, "max_position_embeddings": 64, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt_neo": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]], "max_position_embeddings": 64},
    "gptj": {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64},
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_windows_longer_than_a_table_of_positions_are_refused(llama: Path, tmp_path: Path, kind: str) -> None:
    transformers.AutoConfig.for_model(kind, **{"vocab_size": 260, **POSITIONS[kind]}).save_pretrained(tmp_path)
    check_inputs(_recipe(tmp_path, llama, seq_length=64))
    with pytest.raises(ImpossibleStageError, match=rf"^teacher\.path: data\.seq_length=128 is longer than the 64 positions of {tmp_path}"):
        check_inputs(_recipe(tmp_path, llama, seq_length=128))


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt_neox", "gemma3_text"])
def test_computed_positions_have_no_limit(llama: Path, tmp_path: Path, kind: str) -> None:
    fields = {**SMALL, "n_head": 2, "max_position_embeddings": 64, "intermediate_size": 24}
    transformers.AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path)
    check_inputs(_recipe(tmp_path, llama, seq_length=128))
