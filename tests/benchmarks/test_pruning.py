"""The benchmark of pruning: every case is a recipe with a plan, a killed call goes on where it was, and rows become a table."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.configs import load_recipe
from decoct.launch.plan.make_plan import plan

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import pruning  # pyright: ignore[reportMissingImports] - a script, found by sys.path
import pruning_cases  # pyright: ignore[reportMissingImports]
import pruning_picture  # pyright: ignore[reportMissingImports]
import pruning_shapes  # pyright: ignore[reportMissingImports]


@pytest.fixture
def given(tmp_path: Path) -> argparse.Namespace:
    """The command line with every kind of case, and an interpreter that counts as Torch-Pruning's."""
    (tmp_path / "text.txt").write_text("words " * 1000)
    return argparse.Namespace(
        parts=list(pruning.PARTS), calibration_tokens="2k", local_tokens="4k", distill_tokens="4k", step_tokens=1024, greedy=False,
        peers=["python"], turns=1, tokens="2k", folder=tmp_path / "work", text=[str(tmp_path / "text.txt")],
    )  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Any:
    config = AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "teacher")
    return pruning.Model(tmp_path / "teacher", {"files": [str(tmp_path / "text.txt")], "seq_length": 512, "eval_tokens": 1024})


@pytest.fixture
def asked(given: argparse.Namespace, model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(pruning_cases, "interpreter_with", lambda package, peers: peers[0] if peers else None)
    return pruning_cases.cases(given, model.folder)


def test_every_case_is_a_recipe_that_has_a_plan(given: argparse.Namespace, model: Any, asked: list[Any]) -> None:
    assert len({case.key for case in asked}) == len(asked)
    systems = {case.name: {other.system for other in asked if other.name == case.name} for case in asked}
    assert systems["2:4"] == {"random", "magnitude", "wanda", "sparsegpt"}
    assert systems["layers 50 %"] == {"block_influence", "contiguous", "local", "distilled", "local, distilled"}
    assert systems["ffn 75 %"] >= {"taylor", "repaired", "Torch-Pruning taylor", "Torch-Pruning taylor, distilled"}
    # attention holds too few of the parameters
    assert not any(name.startswith(("heads", "kv_heads")) for name in systems)
    maker = pruning.Maker(given, model)
    for case in asked:
        if not case.stages or case.start:
            continue
        made = plan(load_recipe(str(maker.recipe(case)), ()))
        assert [stage.kind for stage in made.stages] == [next(iter(stage)) for stage in case.stages]
        # where the run writes the model
        assert case.model.startswith(f"{made.stages[-1].name}/")


def test_without_an_interpreter_the_other_tool_and_what_starts_from_it_is_left_out(
    given: argparse.Namespace, model: Any, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    given.peers = []
    assert {case.key for case in asked} - {case.key for case in pruning_cases.cases(given, model.folder)} == {
        case.key for case in asked if "Torch-Pruning" in case.system
    }
    assert "no interpreter of --peers has torch_pruning" in capsys.readouterr().err


def test_a_second_call_makes_what_is_missing_alone(
    given: argparse.Namespace, model: Any, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, made = pruning.Maker(given, model), []

    def run(command: list[Any], what: str, *, own: bool = True) -> None:
        told = json.loads(command[-1])
        for _, place in told.get("recipes", ()):
            made.append(Path(place).name)
            if len(made) == 3:
                raise SystemExit("killed")
            Path(place, "cost.json").write_text("{}")
        if "recipes" not in told and told.get("kind") != "windows":
            made.append(Path(told["out"]).parent.name)

    monkeypatch.setattr(pruning, "_run", run)
    some = [case for case in asked if case.stages and not case.start][:5]
    with pytest.raises(SystemExit):
        maker.make(some)
    models = maker.make(some)
    assert made == [case.key for case in (*some[:3], *some[2:])]
    assert models[some[0].key] == given.folder / some[0].key / some[0].model
    # before the recipes that start from it
    begun = next(case for case in asked if case.start)
    made[:] = ["none", "none", "none"]
    maker.make([begun, next(case for case in asked if case.key == begun.start)])
    assert made[3:] == [begun.start, begun.key]
    assert begun.start in (given.folder / begun.key / "case.yaml").read_text()


@pytest.mark.parametrize(("axis", "share"), [("ffn", 0.75), ("ffn", 0.5), ("hidden", 0.5), ("layers", 0.75), ("layers", 0.5)])
def test_a_shape_has_its_share_of_the_layers_parameters(axis: Any, share: float, model: Any) -> None:
    config = AutoConfig.from_pretrained(model.folder)
    number = pruning_shapes.shape_for(model.folder, axis, share)

    def inside(**changes: int) -> int:
        small = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.folder, head_dim=16, **changes))
        return sum(parameter.numel() for name, parameter in small.named_parameters() if ".layers." in name)

    field = {"ffn": "intermediate_size", "hidden": "hidden_size", "layers": "num_hidden_layers"}[axis]
    assert number is not None
    assert number < getattr(config, field)
    assert inside(**{field: number}) / inside() == pytest.approx(share, abs=0.03)
    assert pruning_shapes.shape_for(model.folder, "heads", share) is None


def test_rows_become_a_table_in_their_place_and_a_picture(tmp_path: Path) -> None:
    row = {"eval": {"perplexity": 10.0, "kl": 0.125, "kl_p99": 1.0, "top1": 0.8}, "parameters": 75, "bytes": 150_000}
    rows = [
        *pruning.rows_of("whole", "whole", {"eval": {"perplexity": 9.0}, "parameters": 100, "bytes": 200_000}, {}),
        pruning.Row("ffn 75 %", "shape", "speed", 1.25, "x whole"),
        *pruning.rows_of("ffn 75 %", "weight_activation", row, {"seconds": 2.0}),
    ]
    values = pruning_picture.values_of([vars(row) for row in rows])
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{pruning_picture.BEGIN}\nold\n{pruning_picture.END}\n\nafter\n")
    pruning_picture.write_table(page, pruning_picture.table(values))
    text = page.read_text()
    assert text.startswith("before\n\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert "| ffn 75 % | weight_activation | 0.1250 | 10.00 | 80.0% | 75.0% | 0.15 | 1.25 | 2.0 |" in text
    assert "| whole | whole |  | 9.00 |  | 100.0% | 0.20 |  |  |" in text
    pruning_picture.draw(values, tmp_path / "picture.svg")
    once = (tmp_path / "picture.svg").read_bytes()
    pruning_picture.draw(values, tmp_path / "picture.svg")
    assert once == (tmp_path / "picture.svg").read_bytes()
