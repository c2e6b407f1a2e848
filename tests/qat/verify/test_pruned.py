"""Verify holds a pruned folder against its record: sizes, kept indices, zeros, patterns, what it computes, and its parent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoct.models.common.errors import UserError
from decoct.models.family_map import family_of
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.folder.record import write_record
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.pattern import parse_pattern
from decoct.models.pruning.selection import pattern_mask
from decoct.models.pruning.structured import cut
from decoct.models.sizes import sizes_of
from decoct.qat.export.export import export_folder
from decoct.qat.verify import pruned_model
from decoct.qat.verify.verify import VerifyReport, verify_folder

from ...models.pruning.test_structured import CASES, CUTS
from ...support.pruned_families import CONFIGS, LAYER_NORM, LAYERS, tiny

FFN = "model.layers.0.mlp"


def write_cut(folder: Path, kind: str, kept: Kept, **record: Any) -> Path:
    """A cut model of a family, with its parent beside it."""
    dense = tiny(kind, dtype=torch.float32)
    family, student = family_of(dense), cut(dense, kept)
    facts = {"kept": kept.record(family, LAYERS), "parent_shape": sizes_of(dense.config, family).record(), **record}
    save_model_folder(folder / "parent", dense, None, {}, dtype=torch.float32)
    return save_model_folder(folder / "model", student, None, facts, dtype=torch.bfloat16)


def edit_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the record as somebody would who also renews its hash."""
    record = json.loads((folder / "decoct.json").read_text())
    change(record)
    write_record(folder, record)


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_record(folder, lambda record: None)


def verify(folder: Path, source: Path | None = None, *, runtimes: bool = False) -> VerifyReport:
    return verify_folder(folder, source=source, runtimes=runtimes)


def only_problem(folder: Path, source: Path | None = None) -> str:
    problems = verify(folder, source).problems
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.usefixtures("warm_judges")
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family_passes_each_check(kind: str, tmp_path: Path) -> None:
    kept = next(kept for case, name, kept in CASES if (case, name) == (kind, "all"))
    folder = write_cut(tmp_path, kind, kept)
    report = verify(folder, tmp_path / "parent", runtimes=True)
    assert report.problems == []
    assert report.runtimes["transformers"]["status"] == "agrees"
    said = "\n".join(report.checks)
    exact = "not compared with masks" if kind in LAYER_NORM else "with masks from decoct.json, the model computes the same logits"
    tied = tiny(kind).config.tie_word_embeddings
    wanted = [
        "names and shapes are those of config.json", "3 of 4 layers", "parameters, as its sizes say", exact,
        "generating 16 tokens with a cache computes what it does without", "the head is " + ("tied" if tied else "a matrix of its own"),
        "config.json is that of", "cut as decoct.json says", "computes the same logits in fp32",
    ]  # fmt: skip
    assert [part for part in wanted if part not in said] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["kept"]["ffn"][FFN].pop(), "keeps 4 FFN channels in model.layers.0.mlp, and config.json has 5"),
        (lambda record: record["kept"]["hidden"].reverse(), "the kept hidden channels are not ascending numbers from 0 to 23"),
        (lambda record: record["kept"]["ffn"].pop(FFN), "the kept FFN channels are not those of the layers [0, 2, 3]"),
        (lambda record: record["kept"].pop("hidden"), "config.json has 12 hidden channels, the parent had 24, and decoct.json lists none"),
        (lambda record: record["parent_shape"].pop("ffn"), "the entry 'kept' or 'parent_shape' cannot be read (KeyError"),
    ],
)  # fmt: skip
def test_indices_that_do_not_fit_are_found(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    folder = write_cut(tmp_path, "qwen3", CUTS["all"])
    edit_record(folder, change)
    assert message in only_problem(folder)


def test_indices_of_another_group_compute_something_else(tmp_path: Path) -> None:
    folder = write_cut(tmp_path, "llama", CUTS["heads"])
    edit_record(folder, lambda record: record["kept"]["heads"].update({"model.layers.0.self_attn": [0, 1, 2, 3]}))
    assert verify(folder).ok, "sizes alone do not tell"
    problems = verify(folder, runtimes=True).problems
    assert len(problems) == 1
    assert "in the shape of the parent, with masks from decoct.json, the model computes other logits" in problems[0]


def test_a_changed_config_is_found_beside_the_parent(tmp_path: Path) -> None:
    folder = write_cut(tmp_path, "llama", CUTS["ffn"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5, "vocab_size": 48}))
    edit_record(folder, lambda record: None)
    assert verify(folder).ok
    assert "config.json: rms_norm_eps is 1e-05" in only_problem(folder, tmp_path / "parent")


@pytest.mark.parametrize(("facts", "found"), [({}, True), ({"repairs": [{"repair": "ffn"}]}, False), ({"local": [{"layer": 0}]}, False)])
def test_a_changed_weight_is_found_beside_the_parent_unless_a_repair_may_have_changed_it(
    facts: dict[str, Any], found: bool, tmp_path: Path
) -> None:
    folder = write_cut(tmp_path, "llama", CUTS["ffn"], **facts)
    edit_weights(folder, lambda weights: weights[f"{FFN}.down_proj.weight"].mul_(2))
    if found:
        assert f"{FFN}.down_proj.weight is not the one of" in only_problem(folder, tmp_path / "parent")
    else:
        report = verify(folder, tmp_path / "parent")
        assert report.ok
        total = len(load_file(folder / "model.safetensors"))
        assert f"{total - 1} of {total} tensors are those of" in report.checks[-1]


def test_another_parent_is_refused(tmp_path: Path) -> None:
    folder = write_cut(tmp_path, "llama", CUTS["ffn"])
    other = save_model_folder(tmp_path / "other", tiny("llama", num_hidden_layers=5), None, {}, dtype=torch.float32)
    assert "other is not the parent: it has" in only_problem(folder, other)


def test_a_folder_without_a_cut_has_no_parent(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "model", tiny("llama"), None, {}, dtype=torch.float32)
    with pytest.raises(UserError, match=r"decoct\.json names no cut that made it, so there is nothing to compare with"):
        verify(folder, folder)


def sparse_folder(folder: Path, **pruning: Any) -> Path:
    model = tiny("llama", dtype=torch.float32)
    weight = model.get_parameter(f"{FFN}.up_proj.weight")
    mask = pattern_mask(weight.abs(), parse_pattern("2:4"))
    weight.data.mul_(mask)
    record = {"sparse": [f"{FFN}.up_proj"], "pruning": {"pattern": "2:4", "kept": int(mask.sum()), "of": mask.numel(), **pruning}}
    return save_model_folder(folder / "model", model, None, record, dtype=torch.bfloat16)


def test_zeros_of_a_mask_are_counted(tmp_path: Path) -> None:
    said = verify(sparse_folder(tmp_path)).checks[-1]
    assert "50.00% of 480 weights are zero in the 1 matrices that decoct.json lists, at most 240 are left" in said
    assert "every group follows 2:4" in said


def test_zeros_of_an_export_are_counted_in_what_it_decodes(quantized_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = quantized_folder()
    export_folder(source, tmp_path / "export", "compressed-tensors", runtimes=False)
    edit_record(tmp_path / "export", lambda record: record.update(sparse=["model.layers.0.self_attn.q_proj"]))
    # what is stored beside codes is codes times scales
    left = int(load_file(source / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].count_nonzero())
    assert f"{1 - left / 1024:.2%} of 1,024 weights are zero" in verify(tmp_path / "export").checks[-1]
    edit_record(tmp_path / "export", lambda record: record.update(pruning={"kept": left - 1}))
    assert f"{left} weights of the sparse matrices are not zero, and the masks keep {left - 1}" in only_problem(tmp_path / "export")


@pytest.mark.parametrize(
    ("pruning", "change", "message"),
    [
        ({}, lambda weight: weight[0].fill_(1), "up_proj does not follow 2:4: a group of 4 has more than 2 weights"),
        (
            {"pattern": "3:4"},
            lambda weight: weight[0].copy_(torch.tensor([1, 1, 1, 0] * 6)),
            "weights of the sparse matrices are not zero, and the masks keep 240",
        ),
        ({}, lambda weight: weight.fill_(1), "up_proj has no zero, and decoct.json lists it as sparse"),
        ({"pattern": "many"}, lambda weight: None, "the entry 'pruning' cannot be read"),
    ],
)
def test_zeros_that_went_are_found(pruning: dict[str, Any], change: Callable[[torch.Tensor], Any], message: str, tmp_path: Path) -> None:
    folder = sparse_folder(tmp_path, **pruning)
    edit_weights(folder, lambda weights: change(weights[f"{FFN}.up_proj.weight"]))
    assert message in verify(folder).problems[0]


def test_a_weight_that_is_not_finite_is_a_problem_and_no_error(tmp_path: Path) -> None:
    folder = write_cut(tmp_path, "llama", CUTS["ffn"])
    edit_weights(folder, lambda weights: weights[f"{FFN}.down_proj.weight"].fill_(float("nan")))
    problems = verify(folder, runtimes=True).problems
    assert len(problems) == 1
    assert "NaN" in problems[0]


def test_a_head_that_is_not_tied_as_the_config_says_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cut(tmp_path, "qwen3", CUTS["ffn"])
    monkeypatch.setattr(pruned_model, "is_tied", lambda model: False)
    problems = verify(folder, runtimes=True).problems
    assert problems == ["config.json says that the head is tied to the embedding, and it is not"]


def test_a_cache_that_computes_something_else_is_found(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)

    class Forgetful(torch.nn.Module):
        """Reads the last token alone whenever there is a cache."""

        config = model.config

        def forward(self, input_ids: torch.Tensor, use_cache: bool, past_key_values: Any = None) -> Any:
            return model(input_ids=input_ids, use_cache=use_cache)

    problems, _ = pruned_model.cached(Forgetful(), torch.arange(12)[None])
    assert "generating 16 tokens with a cache computes other logits than without" in problems[0]


def test_a_listed_matrix_that_is_not_there_is_found(tmp_path: Path) -> None:
    folder = sparse_folder(tmp_path)
    edit_record(folder, lambda record: record["sparse"].append("model.layers.9.mlp.up_proj"))
    assert only_problem(folder) == "decoct.json lists model.layers.9.mlp.up_proj as sparse, and there is no such matrix"
