"""Keys and values in exports: written for who can read them, checked by the independent reader, refused in words everywhere else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoct.models.common.errors import DecoctError, UserError
from decoct.models.folder.record import seal_record
from decoct.qat.codes.kv_cache_scales import CacheState
from decoct.qat.codes.state import load_quant_state
from decoct.qat.export.compressed_tensors import kv_cache as compressed_tensors_cache
from decoct.qat.export.compressed_tensors import writer as compressed_tensors
from decoct.qat.export.export import EXPORTERS, export_folder
from decoct.qat.layers.as_stored import round_as_stored
from decoct.qat.layers.quantized_model import fold
from decoct.qat.readers.compressed_tensors import PackedFolder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.runtimes.check import check_runtimes
from decoct.qat.source.quantized_source import ExportSource
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.qat.verify.verify import verify_folder

Make = Callable[..., ExportSource]
Export = Callable[..., Path]
FORMAT = "compressed-tensors"
ATTENTIONS = ("model.layers.0.self_attn", "model.layers.1.self_attn")
FP8 = ActivationSpec(kind="fp8_e4m3", scaling="static")
W4, W8 = QuantSpec(bits=4, group_size=16), QuantSpec(bits=8, group_size="channel")
CASES: dict[str, dict[str, Any]] = {
    "w4a16": {"spec": W4, "tie_word_embeddings": True},
    "w4a16 in groups that differ": {"spec": W4, "own": {"down_proj": W8}, "model_type": "qwen3"},
    "w8a8": {"spec": W8, "activations": ActivationSpec(scaling="static"), "model_type": "qwen2"},
}


def cache(spec: ActivationSpec = FP8) -> CacheState:
    state = CacheState(spec=spec, attentions=ATTENTIONS)
    static = spec.scaling == "static"
    scales = {name: torch.tensor(2.0**-4 * (1 + number)) for number, name in enumerate(state.names)} if static else {}
    zeros = {} if spec.symmetric or not static else {name: torch.tensor(3, dtype=torch.int8) for name in state.names}
    return replace(state, scales=scales, zeros=zeros)


def made(make: Make, rounded: ActivationSpec = FP8, **case: Any) -> ExportSource:
    source = make(**case)
    return replace(source, state=replace(source.state, cache=cache(rounded)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(60).view(2, 30), use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_scales_are_written_read_and_computed_with(
    spec_source: Make, export_source: Export, random_model: Callable[..., Any], case: str
) -> None:
    source = made(spec_source, **CASES[case])
    target = export_source(source, FORMAT)
    stored = load_file(target / "model.safetensors")
    for number, name in enumerate(f"{attention}.{part}_scale" for attention in ATTENTIONS for part in "kv"):
        assert torch.equal(stored[name], torch.tensor([2.0**-4 * (1 + number)])) and stored[name].dtype == torch.float32
    assert compressed_tensors.planned_bytes(source) == sum(tensor.nbytes for tensor in stored.values())
    scheme = json.loads((target / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert {key: scheme[key] for key in wanted} == wanted
    assert PackedFolder(target).cache() == {name: float(scale) for name, scale in cache().scales.items()}
    assert verify_folder(target, runtimes=False).ok
    folded = random_model(**{k: v for k, v in {"model_type": "llama", **CASES[case]}.items() if k in ("model_type", "tie_word_embeddings")})
    fold(folded, source.state)
    plain = logits(folded)
    round_as_stored(folded, source.state)
    found = logits(load_exported_model(target))
    assert torch.equal(found, logits(folded))
    assert not torch.allclose(found, plain, atol=1e-3)
    card = (target / "README.md").read_text()
    assert "| Keys and values | fp8_e4m3, symmetric, one stored scale for the keys and one for the values of a layer |" in card
    assert "vllm serve path/to/this/folder --kv-cache-dtype fp8" in card


def test_exports_without_it_say_nothing_of_it(spec_source: Make, export_source: Export) -> None:
    target = export_source(spec_source(W4), FORMAT)
    assert json.loads((target / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] is None
    assert PackedFolder(target).cache() is None
    assert "Keys and values" not in (target / "README.md").read_text() and "kv-cache" not in (target / "README.md").read_text()


def test_the_package_reads_the_scheme(spec_source: Make, export_source: Export) -> None:
    package = pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    target = export_source(made(spec_source, **CASES["w4a16"]), FORMAT)
    parsed = package.QuantizationConfig.model_validate(json.loads((target / "config.json").read_text())["quantization_config"])
    assert (parsed.kv_cache_scheme.num_bits, str(parsed.kv_cache_scheme.type)) == (8, "float")


@pytest.mark.slow
@pytest.mark.usefixtures("warm_judges")
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(spec_source: Make, export_source: Export, case: str) -> None:
    """Through the compressed-tensors package, in a process of its own: it rounds keys and values by the stored scales."""
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    seen = check_runtimes(export_source(made(spec_source, **CASES[case]), FORMAT))["transformers"]
    assert seen["status"] == "agrees", seen


def change_tensors(target: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    record = json.loads((target / "decoct.json").read_text())
    del record["files"]["model.safetensors"]
    seal_record(target, record)


def change_config(target: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    record = json.loads((target / "decoct.json").read_text())
    del record["files"]["config.json"]
    seal_record(target, record)


K, V = f"{ATTENTIONS[0]}.k_scale", f"{ATTENTIONS[1]}.v_scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({K: t[K] * 1.0000002}), "layers.0.self_attn: its k_scale and v_scale are not those that were exported"),
        (lambda t: t.update({V: t[V] * 2}), "layers.1.self_attn: its k_scale and v_scale"),
        (lambda t: t.pop(V), "layers.1.self_attn.v_scale is missing"),
        (lambda t: [t.pop(f"{a}.{p}_scale") for a in ATTENTIONS for p in "kv"], "every k_scale and v_scale is missing"),
        (lambda t: [t.pop(f"{ATTENTIONS[1]}.{p}_scale") for p in "kv"], "layers.1.self_attn has no k_scale and v_scale"),
        (lambda t: t.update({K: torch.zeros(1)}), "finite and positive"),
        (lambda t: t.update({K: torch.full((1,), float("nan"))}), "finite and positive"),
        (lambda t: t.update({K: torch.ones(2)}), r"expected BF16 or F16 or F32 of shape (1,)"),
    ],
)
def test_every_change_of_a_scale_is_found(
    spec_source: Make, export_source: Export, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    target = export_source(made(spec_source, **CASES["w4a16"]), FORMAT)
    change_tensors(target, change)
    problems = verify_folder(target, runtimes=False).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(kv_cache_scheme=None), "config.json has no kv_cache_scheme that describes it"),
        (lambda q: q.update(kv_cache_scheme=[]), "kv_cache_scheme must be an object or null"),
        (lambda q: q["kv_cache_scheme"].update(type="int"), "kv_cache_scheme.type is 'int'"),
        (lambda q: q["kv_cache_scheme"].update(num_bits=4), "kv_cache_scheme.num_bits is 4"),
        (lambda q: q["kv_cache_scheme"].update(dynamic=True), "kv_cache_scheme.dynamic is True"),
        (lambda q: q["kv_cache_scheme"].update(strategy="attn_head"), "kv_cache_scheme.strategy is 'attn_head'"),
        (lambda q: q["kv_cache_scheme"].update(symmetric=False), "kv_cache_scheme.symmetric is False"),
    ],
)
def test_another_scheme_is_refused(spec_source: Make, export_source: Export, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    target = export_source(made(spec_source, **CASES["w4a16"]), FORMAT)
    change_config(target, change)
    assert any(message in problem for problem in verify_folder(target, runtimes=False).problems)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        load_exported_model(target)


def test_a_scheme_that_the_record_knows_nothing_of_is_found(spec_source: Make, export_source: Export) -> None:
    """Both taken out, scheme and scales: only the record still knows."""
    target = export_source(made(spec_source, **CASES["w4a16"]), FORMAT)
    change_tensors(target, lambda t: [t.pop(f"{a}.{p}_scale") for a in ATTENTIONS for p in "kv"])
    change_config(target, lambda q: q.update(kv_cache_scheme=None))
    assert any(
        "kv_cache: model.layers.0.self_attn has no k_scale and v_scale, but decoct.json lists it" in problem
        for problem in verify_folder(target, runtimes=False).problems
    )


def test_a_writer_that_gets_a_scale_wrong_is_caught(spec_source: Make, export_source: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = compressed_tensors_cache.cache_tensors
    wrong = {V: torch.full((1,), 0.5)}
    monkeypatch.setattr(compressed_tensors, "cache_tensors", lambda source: usual(source) | wrong)
    with pytest.raises(DecoctError, match=r"the export is not exact: model\.layers\.1\.self_attn\.v_scale is 0\.5, not the source's"):
        export_source(made(spec_source, **CASES["w4a16"]), FORMAT)


@pytest.mark.parametrize(
    ("rounded", "message"),
    [
        (ActivationSpec(scaling="static"), r"not int8, static: servers read .* with kv_cache: \{kind: fp8_e4m3, scaling: static\}"),
        (ActivationSpec(scaling="static", symmetric=False), "not int8, static"),
        (ActivationSpec(kind="fp8_e4m3"), "not fp8_e4m3, dynamic: it cannot describe one scale per token"),
    ],
)  # fmt: skip
def test_what_compressed_tensors_cannot_say(spec_source: Make, export_source: Export, rounded: ActivationSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_source(made(spec_source, rounded, **CASES["w4a16"]), FORMAT)


@pytest.mark.parametrize("form", [name for name in EXPORTERS if name not in (FORMAT, "bitsandbytes")])
@pytest.mark.parametrize("beside", ["kv_cache", "activations"])
def test_every_other_format_refuses_the_folder(quantized_folder: Callable[..., Path], tmp_path: Path, form: str, beside: str) -> None:
    folder = quantized_folder(bits=4, group_size=32, intermediate_size=64)
    state = load_quant_state(folder)
    state = replace(state, cache=cache()) if beside == "kv_cache" else replace(state, activations=ActivationSpec())
    save_file(state.tensors(), folder / "quant/codes.safetensors")
    record = json.loads((folder / "decoct.json").read_text())
    seal_record(folder, record | {"quant": state.record(), "files": {}})
    what = r"keys and values are rounded \(kv_cache\)" if beside == "kv_cache" else "inputs are rounded"
    with pytest.raises(UserError, match=f"{form} cannot record that {what}.*compressed-tensors"):
        export_folder(folder, tmp_path / "export", form, runtimes=False, allow_inexact=True)
    assert not (tmp_path / "export").exists()


def test_a_folder_goes_all_the_way(quantized_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized_folder(bits=4, group_size=16)
    state = replace(load_quant_state(folder), cache=cache())
    save_file(state.tensors(), folder / "quant/codes.safetensors")
    record = json.loads((folder / "decoct.json").read_text())
    seal_record(folder, record | {"quant": state.record(), "files": {}})
    export_folder(folder, tmp_path / "export", FORMAT, runtimes=False)
    report = verify_folder(tmp_path / "export", source=folder, runtimes=False)
    assert report.ok, report.problems


def test_scales_of_another_model_are_named(spec_source: Make, export_source: Export) -> None:
    target = export_source(made(spec_source, **CASES["w4a16"]), FORMAT)
    change_tensors(target, lambda t: [t.pop(f"{ATTENTIONS[1]}.{p}_scale") for p in "kv"])
    with pytest.raises(UserError, match="kv_cache: the stored scales are not those of this model's attention modules"):
        load_exported_model(target)
