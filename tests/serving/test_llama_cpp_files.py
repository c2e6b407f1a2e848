"""What GGUF files say beyond the usual blocks, in llama.cpp itself: narrow blocks, sampling settings, several ends of a text."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.models.folder.loading import load_tokenizer
from decoct.qat.export.export import export_folder
from decoct.qat.readers.gguf_model import GgufModel
from decoct.qat.runtimes.llama_cpp_check import check_llama_cpp, run_llama_cpp
from decoct.qat.runtimes.llama_cpp_process import Server
from decoct.qat.scheme import QuantScheme
from decoct.qat.spec import QuantSpec
from decoct.qat.super_blocks import SUPER_BLOCKS
from decoct.qat.verify.verify import verify_folder

pytestmark = pytest.mark.serving
Build = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def llama_cpp() -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")


@pytest.mark.parametrize(
    ("form", "spec", "stored"),
    [
        ("gguf", QuantSpec(bits=5, group_size=32), {"Q5_0"}),
        ("gguf", QuantSpec(bits=2, group_size=32, symmetric=False), {"Q4_1"}),
        ("gguf", QuantSpec(bits=4, group_size=32, symmetric=False), {"Q5_1"}),
        ("gguf-q2_0", QuantSpec(bits=2, group_size=64), {"Q2_0"}),
    ],
    ids=["Q5_0", "Q4_1 of 2 bits", "Q5_1 of 4 bits", "Q2_0"],
)
def test_narrow_blocks_predict_what_was_trained(
    quantized_folder: Build, known_text: Tensor, form: str, spec: QuantSpec, stored: set[str]
) -> None:
    source = quantized_folder("llama", spec)
    folder = export_folder(source, source.parent / form, form, runtimes=False).path
    assert {GgufModel(folder).scheme[f"{module}.weight"] for module in GgufModel(folder).modules} == stored
    seen = check_llama_cpp(folder, known_text)
    print(stored, spec.group_size, seen)
    assert seen["status"] == "agrees", seen
    assert verify_folder(folder, source=source, runtimes=False).ok


@pytest.mark.parametrize(
    ("form", "scheme", "stored"),
    [
        *(("gguf", QuantScheme(weights=QuantSpec(kind=kind)), {kind.upper()}) for kind in SUPER_BLOCKS),  # pyright: ignore[reportArgumentType]
        ("gguf", QuantScheme(weights=QuantSpec(kind="q4_k"), mix="q4_k_m"), {"Q4_K", "Q6_K"}),
        ("gguf", QuantScheme(weights=QuantSpec(kind="mxfp4", group_size=32)), {"MXFP4"}),
        ("gguf", QuantScheme(weights=QuantSpec(ternary=True, group_size=256, divisor="full_range")), {"TQ2_0"}),
        ("gguf-tq1_0", QuantScheme(weights=QuantSpec(ternary=True, group_size=256, divisor="full_range")), {"TQ1_0"}),
    ],
    ids=[*SUPER_BLOCKS, "q4_k_m", "mxfp4", "TQ2_0", "TQ1_0"],
)
def test_blocks_of_256_and_floats_predict_what_was_trained(
    quantized_folder: Build, known_text: Tensor, form: str, scheme: QuantScheme, stored: set[str]
) -> None:
    source = quantized_folder("llama", scheme, hidden_size=256, head_dim=64, steps=600)
    folder = export_folder(source, source.parent / form, form, runtimes=False).path
    assert {GgufModel(folder).scheme[f"{module}.weight"] for module in GgufModel(folder).modules} == stored
    seen = check_llama_cpp(folder, known_text)
    print(stored, seen)
    assert seen["status"] == "agrees", seen
    assert verify_folder(folder, source=source, runtimes=False).ok


def test_rows_of_2_bits_predict_the_same_in_q2_0_and_in_q4_0(quantized_folder: Build, known_text: Tensor, tmp_path: Path) -> None:
    """So coarse a model is unsure, and llama.cpp's inputs of 8 bits decide some choices: the same ones in both."""
    source = quantized_folder("llama", QuantSpec(bits=2, group_size="channel"))
    seen = []
    for form in ("gguf", "gguf-q2_0"):
        file = export_folder(source, tmp_path / form, form, runtimes=False).path / "model.gguf"
        seen.append(run_llama_cpp(file, known_text[:4], 1000, sys.executable)[1])
    wide, narrow = seen
    assert wide is not None and narrow is not None
    assert (wide["ids"][..., 0] == narrow["ids"][..., 0]).mean() > 0.995
    difference = abs(wide["next"] - narrow["next"])
    assert difference.max() < 0.05
    assert difference.mean() < 0.002


def with_generation(source: Path, **settings: Any) -> Path:
    file = source / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return source


def test_the_server_samples_as_generation_config_says(plain_folder: Build) -> None:
    dials = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.05}
    source = with_generation(plain_folder("llama", torch.float16), **dials)
    folder = export_folder(source, source.parent / "sampling", "gguf-f16", runtimes=False).path
    told = Server(str(folder / "model.gguf"), 512, 1).get("/props")["default_generation_settings"]["params"]
    found = {name: told[name] for name in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "repeat_last_n")}
    wanted = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.02, "repeat_penalty": 1.05, "repeat_last_n": 512}
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_text_ends_at_every_token_of_the_list(plain_folder: Build, known_text: Tensor) -> None:
    """The third and fourth token that the model would say are made ends of a text, one at a time beside the usual one."""
    source = plain_folder("llama", torch.float16)
    end: Any = load_tokenizer(source).eos_token_id
    prompt: Any = known_text[0, :32].tolist()
    ask = {"prompt": prompt, "n_predict": 8, "temperature": -1.0, "return_tokens": True}
    usual = export_folder(source, source.parent / "usual", "gguf-f16", runtimes=False).path
    said = Server(str(usual / "model.gguf"), 512, 1).ask("/completion", ask)["tokens"]
    first, second = said[2], said[3]
    assert len({first, second, *said[:2], end}) >= 4, "the model says different tokens there"
    for number, ends in enumerate(([0, first, 999], [0, 999, second])):
        folder = export_folder(
            with_generation(source, eos_token_id=ends), source.parent / f"ends-{number}", "gguf-f16", runtimes=False
        ).path
        answer = Server(str(folder / "model.gguf"), 512, 1).ask("/completion", ask)
        assert answer["stop_type"] == "eos"
        assert answer["tokens"][: 2 + number] == said[: 2 + number]
        assert len(answer["tokens"]) <= 3 + number
