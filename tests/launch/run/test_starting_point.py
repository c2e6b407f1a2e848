"""The student that a run makes, and what its folder says."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.launch.run.run_folder import StageFolder
from decoct.launch.run.starting_point import make_student
from decoct.models.families import decoder_linears
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import content_hash, read_record, save_model_folder
from decoct.models.settings import KeepSettings
from decoct.models.teachers import TeacherRef
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.trainer.settings import TrainerSettings


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """``make(sparse, layers=3)``: record of a student of some of 5 layers, teacher and student; the teacher's record names ``sparse``."""
    tokenizer = train_tokenizer(iter(["a few words of text, and a few more of them"] * 20), 280)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(config)
    for linear in decoder_linears(teacher).values():
        linear.weight.data *= torch.rand_like(linear.weight) > 0.3

    def made(sparse: list[str], layers: int | tuple[int, ...] = 3) -> tuple[dict[str, Any], Any, Any, dict[str, Any]]:
        place = tmp_path / f"teacher{len(sparse)}"
        if not place.exists():
            save_model_folder(place, teacher, tokenizer, {"sparse": sparse}, dtype=torch.bfloat16)
        student: Any = SimpleNamespace(path=None, revision=None, keep=KeepSettings(layers=layers), config=None)
        recipe: Any = SimpleNamespace(student=student, seed=0, trainer=TrainerSettings())
        reference = TeacherRef(
            path=str(place), load_in="fp32", placement="replicated", revision=None, name="t", content=content_hash(place)
        )
        folder = StageFolder(tmp_path / "00-student")
        run: Any = SimpleNamespace(tokenizer=tokenizer, v_eff=len(tokenizer), teacher=reference)
        path = make_student(recipe, run, folder, {"run": "test"})["path"]
        return read_record(Path(path)), teacher, load_model(path, dtype=torch.float32), folder.read()

    return made


def test_the_record_of_zeros_follows_the_layers_that_are_kept(make: Any) -> None:
    names = [f"model.layers.{index}.mlp.{part}_proj" for index in range(5) for part in ("up", "down")]
    record, teacher, student, _ = make(names)
    assert record["kept"] == {"layers": [0, 2, 4]}
    assert record["sparse"] == [f"model.layers.{index}.mlp.{part}_proj" for index in range(3) for part in ("up", "down")]
    for new, old in enumerate((0, 2, 4)):
        ours, theirs = (model.get_submodule(f"model.layers.{at}.mlp.up_proj").weight for model, at in ((student, new), (teacher, old)))
        assert torch.equal(ours == 0, theirs == 0)


def test_the_record_names_the_layers_that_were_asked_for(make: Any) -> None:
    record, teacher, student, _ = make([], (1, 3))
    assert (record["kept"], record["parent_shape"]["layers"]) == ({"layers": [1, 3]}, 5)
    for new, old in enumerate((1, 3)):
        ours, theirs = (model.get_submodule(f"model.layers.{at}.mlp.up_proj").weight for model, at in ((student, new), (teacher, old)))
        assert torch.equal(ours, theirs.bfloat16().float())


def test_a_student_made_without_the_record_is_made_again(make: Any) -> None:
    """As by a version that dropped it: the teacher's weights are the same, and only its record tells the two apart."""
    plain, _, _, state = make([])
    assert "sparse" not in plain
    again, _, _, after = make(["model.layers.4.mlp.up_proj"])
    assert again["sparse"] == ["model.layers.2.mlp.up_proj"]
    assert state["key"] != after["key"]
