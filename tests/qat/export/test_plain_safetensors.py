"""Plain safetensors: the dtype that is exact where there is one, else a refusal, or the measured error."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.folder.record import read_record, seal_record, write_record
from decoct.qat.export.export import export_folder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.runtimes.check import check_runtimes
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

Build = Callable[..., Path]
TOKENS = torch.arange(20)[None]


def fit_for_fp16(model: PreTrainedModel) -> None:
    """Values that bf16 and fp16 both hold."""
    for parameter in model.parameters():
        parameter.data = (parameter.data * 64).round() / 64


def exported(source: Path, target: Path, **options: Any) -> tuple[dict[str, torch.Tensor], str]:
    export_folder(source, target, "safetensors", runtimes=False, **options)
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    return load_file(target / "model.safetensors"), config["dtype"]


@pytest.mark.parametrize(("bits", "kind"), [(2, torch.bfloat16), (3, torch.float16), (4, torch.float16)])
def test_symmetric_weights_of_few_bits_are_exact(quantized_folder: Build, tmp_path: Path, bits: int, kind: torch.dtype) -> None:
    source = quantized_folder(bits=bits, group_size=8, change=fit_for_fp16, tie_word_embeddings=True)
    stored, dtype = exported(source, tmp_path / "export")
    assert dtype == str(kind).removeprefix("torch.")
    for name, tensor in load_file(source / "model.safetensors").items():
        assert stored[name].dtype == kind
        assert torch.equal(stored[name].float(), tensor), name
    report = verify_folder(tmp_path / "export", source=source, runtimes=False)
    assert report.ok, report.problems


def test_an_unquantized_folder_is_stored_as_it_is(
    random_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = random_model("qwen2")
    for dtype in (torch.bfloat16, torch.float32):
        source = save_model_folder(tmp_path / f"plain-{dtype}", model, tokenizer, {"kind": "distill"}, dtype=dtype)
        stored, written = exported(source, tmp_path / f"export-{dtype}")
        assert written == "bfloat16"
        assert all(torch.equal(stored[name].float(), tensor.float()) for name, tensor in load_file(source / "model.safetensors").items())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / f"export-{dtype}", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
        assert torch.equal(load_exported_model(tmp_path / f"export-{dtype}")(TOKENS).logits, model(TOKENS).logits)


def test_what_no_dtype_holds_is_refused_or_reported_with_its_error(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder(bits=8, group_size=16, change=fit_for_fp16)
    with pytest.raises(UserError, match=r"safetensors does not hold [\d,]+ of the weights .*safetensors-f32.*--allow-inexact"):
        export_folder(source, tmp_path / "export", "safetensors", runtimes=False)
    assert not (tmp_path / "export").exists()
    result = export_folder(source, tmp_path / "export", "safetensors", runtimes=False, allow_inexact=True)
    stored, original = load_file(tmp_path / "export" / "model.safetensors"), load_file(source / "model.safetensors")
    changes = {name: (stored[name].double() - tensor.double()).abs() for name, tensor in original.items()}
    assert result.rounding is not None
    assert not result.exact
    assert result.rounding.changed == sum(int((change > 0).sum()) for change in changes.values())
    assert result.rounding.largest == max(float(change.max()) for change in changes.values()) > 0
    # fp16 has three more digits than bf16, and so changes fewer of these
    assert all(tensor.dtype == torch.float16 for tensor in stored.values())
    record = json.loads((tmp_path / "export" / "decoct.json").read_text())
    errors, norms = (sum(float(x.double().square().sum()) for x in part.values()) for part in (changes, original))
    assert result.rounding.relative == pytest.approx((errors / norms) ** 0.5)
    assert record["export"]["rounding"] == dataclasses.asdict(result.rounding)
    assert f"{result.rounding.changed:,} weights were rounded" in (tmp_path / "export" / "README.md").read_text()
    assert verify_folder(tmp_path / "export", source=source, runtimes=False).ok


def test_each_tensor_is_in_the_dtype_that_holds_it_where_no_one_dtype_holds_all(quantized_folder: Build, tmp_path: Path) -> None:
    """Embeddings of a usual size have values that fp16 does not hold; 4-bit products have digits that bf16 does not hold."""

    def small(model: PreTrainedModel) -> None:
        weight = model.get_parameter("model.embed_tokens.weight")
        weight.data[5] = (weight.data[5] * 1e-6).bfloat16().float()

    source = quantized_folder(bits=4, group_size=16, change=small, tie_word_embeddings=True)
    stored, dtype = exported(source, tmp_path / "export")
    assert dtype == "float32"
    for name, tensor in load_file(source / "model.safetensors").items():
        assert stored[name].dtype == (torch.float16 if "_proj" in name else torch.bfloat16), name
        assert torch.equal(stored[name].float(), tensor), name
    assert verify_folder(tmp_path / "export", source=source, runtimes=False).ok
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert loaded.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(loaded(TOKENS).logits, load_exported_model(tmp_path / "export")(TOKENS).logits)


@pytest.mark.parametrize("spec", [QuantSpec(bits=8, group_size=16), QuantSpec(bits=5, group_size=16, symmetric=False)])
def test_fp32_holds_every_lattice(quantized_folder: Build, tmp_path: Path, spec: QuantSpec) -> None:
    source = quantized_folder(spec=spec)
    result = export_folder(source, tmp_path / "export", "safetensors-f32", runtimes=False)
    assert result.exact
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in load_file(source / "model.safetensors").items())
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "float32"
    assert result.bytes == (source / "model.safetensors").stat().st_size
    assert verify_folder(tmp_path / "export", source=source, runtimes=False).ok


def test_values_beyond_fp16_go_to_bf16(quantized_folder: Build, tmp_path: Path) -> None:
    def change(model: PreTrainedModel) -> None:
        fit_for_fp16(model)
        model.get_parameter("model.embed_tokens.weight").data[7, 3] = 2.0**17

    source = quantized_folder(bits=8, group_size=8, change=change)
    stored, dtype = exported(source, tmp_path / "export", allow_inexact=True)
    assert dtype == "bfloat16"
    assert float(stored["model.embed_tokens.weight"][7, 3]) == 2.0**17
    stored, dtype = exported(quantized_folder(bits=4, group_size=8, change=change), tmp_path / "other")
    assert dtype == "float32"
    assert float(stored["model.embed_tokens.weight"][7, 3]) == 2.0**17


def test_a_flipped_bit_is_found_and_the_folder_is_no_longer_quantized(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder(bits=4, group_size=8, change=fit_for_fp16)
    exported(source, tmp_path / "export")
    with pytest.raises(UserError, match=r"holds no codes .* can be exported with --format safetensors, safetensors-f32, gguf-f32"):
        export_folder(tmp_path / "export", tmp_path / "again", "compressed-tensors", runtimes=False)
    file = tmp_path / "export" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    record = json.loads((tmp_path / "export" / "decoct.json").read_text())
    del record["files"]["model.safetensors"]
    seal_record(tmp_path / "export", record)
    assert "is not the weight that was exported" in " ".join(verify_folder(tmp_path / "export", runtimes=False).problems)


@pytest.mark.parametrize("form", ["safetensors-f32", "gguf-f32"])
def test_plain_weights_of_a_quantized_folder_record_no_codes_and_verify(quantized_folder: Build, tmp_path: Path, form: str) -> None:
    source, target = quantized_folder(), tmp_path / form
    export_folder(source, target, form, runtimes=False)
    assert "quant" in read_record(source) and "quant" not in read_record(target)
    assert verify_folder(target, source=source, runtimes=False).ok


def test_a_damaged_quantized_folder_is_refused(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder(bits=4, group_size=8, change=fit_for_fp16)
    tensors = load_file(source / "quant/codes.safetensors")
    first = next(iter(tensors))
    tensors[first] = tensors[first].clone()
    tensors[first][0] = 1
    from safetensors.torch import save_file

    save_file(tensors, source / "quant/codes.safetensors")
    with pytest.raises(UserError, match=r"quant/codes\.safetensors has changed since it was written"):
        export_folder(source, tmp_path / "export", "safetensors", runtimes=False)
    write_record(source, read_record(source))
    with pytest.raises(UserError, match="differ from what decoct"):
        export_folder(source, tmp_path / "export", "safetensors", runtimes=False)


@pytest.mark.slow
@pytest.mark.usefixtures("warm_judges")
def test_transformers_computes_the_logits_of_the_rebuilt_model(quantized_folder: Build, tmp_path: Path) -> None:
    exported(quantized_folder(bits=4, group_size=8, change=fit_for_fp16), tmp_path / "export")
    assert check_runtimes(tmp_path / "export")["transformers"]["status"] == "agrees"
