"""Stage export: what is written is proven once, and what an earlier start left is checked again."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import save_model_folder
from decoct.qat.codes.state import QUANT_FILE, QuantState
from decoct.qat.export import export as exporter
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.readers.compressed_tensors import PackedFolder
from decoct.qat.readers.gguf_file import GgufFile, GgufTensor
from decoct.qat.readers.gptq import GptqFolder
from decoct.qat.runtimes import llama_cpp_check, transformers_check, vllm_check
from decoct.qat.runtimes.transformers_rules import Rule
from decoct.qat.spec import QuantSpec
from decoct.trainer.evaluation.model_row import measure_folder
from decoct.trainer.settings import ExportSettings
from decoct.trainer.stages import export as stage
from decoct.trainer.stages.context import StageContext

MakeContext = Callable[..., StageContext]
FORMATS = ("compressed-tensors", "gguf", "gptq")
MODULES = 2 * 7


@pytest.fixture
def context(make_context: MakeContext, words: PreTrainedTokenizerBase, tmp_path: Path) -> StageContext:
    """The stage with a quantized folder of random weights before it, 8 bits in groups of 32, which every packed format holds."""
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    state = quantize_model(model, QuantSpec(bits=8, group_size=32))
    fold(model, state)
    record, tensors = {"kind": "quantize", "quant": state.record()}, {QUANT_FILE: state.tensors()}
    source = save_model_folder(tmp_path / "source", model, words, record, dtype=torch.float32, extra_tensors=tensors)
    return make_context("02-export", kind="export", input=str(source))


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often packed modules are decoded, and source modules dequantized, by the file that is read."""
    counts: Counter[str] = Counter()
    blocks, dequantized = GgufFile._blocks, QuantState.dequantized
    for kind in (PackedFolder, GptqFolder):
        stored_codes = kind.stored_codes

        def counted(reader: Any, module: str, stored_codes: Callable[..., Any] = stored_codes) -> Any:
            counts["compressed-tensors" if isinstance(reader, PackedFolder) else "gptq"] += 1
            return stored_codes(reader, module)

        monkeypatch.setattr(kind, "stored_codes", counted)

    def counted_blocks(file: GgufFile, tensor: GgufTensor) -> Any:
        counts["gguf"] += 1
        return blocks(file, tensor)

    def counted_source(state: QuantState, module: str) -> Any:
        counts["source"] += 1
        return dequantized(state, module)

    monkeypatch.setattr(GgufFile, "_blocks", counted_blocks)
    monkeypatch.setattr(QuantState, "dequantized", counted_source)
    return counts


@pytest.fixture
def runtimes_that_agree(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every runtime is there and answers with what the quantized folder computes."""

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return load_model(context.input, dtype=torch.float32)(input_ids=tokens, use_cache=False).logits

    def transformers(python: str, script: Any, export: Path, tokens: torch.Tensor, environment: Any) -> Any:
        facts = {"version": "transformers 9", "loading": {}, "tokens_per_second": 1.0, "peak_bytes": 1}
        return facts, {"logits": logits(tokens).numpy()}

    def server(tokens: torch.Tensor) -> Any:
        logprobs = logits(tokens).log_softmax(-1)
        best, following = logprobs.topk(8, dim=-1), logprobs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        seen = {"ids": best.indices.numpy(), "logprobs": best.values.numpy(), "next": following.numpy()}
        return {"version": "9", "tokens_per_second": 1.0, "peak_bytes": 1}, seen

    monkeypatch.setattr(Rule, "absent", ())
    monkeypatch.setattr(transformers_check, "run_judge", transformers)
    monkeypatch.setenv(vllm_check.PYTHON, "python")
    monkeypatch.setattr(vllm_check, "run_vllm", lambda python, folder, tokens, vocabulary, dtype, context: server(tokens))
    monkeypatch.setattr(llama_cpp_check, "PACKAGE", "json")
    monkeypatch.setattr(llama_cpp_check, "run_llama_cpp", lambda file, tokens, vocabulary, python: server(tokens))


@pytest.mark.usefixtures("runtimes_that_agree")
def test_an_export_is_decoded_to_prove_it_for_its_runtimes_and_to_measure_it(context: StageContext, decodes: Counter[str]) -> None:
    result = stage.finish(ExportSettings(formats=FORMATS), context, None)
    for export in result.exports:
        assert {seen["status"] for seen in export["runtimes"].values()} == {"agrees"}, export
        assert measure_folder(str(context.folder / export["path"]), None, context.run.data.evaluation)["eval"]["perplexity"] > 1
    source = decodes.pop("source")
    assert decodes == dict.fromkeys(FORMATS, 3 * MODULES), "once for the proof, once for all runtimes, once for the figures"
    assert source == (1 + len(FORMATS)) * MODULES, "the source is proven once; each export is compared with it"


def test_what_an_earlier_start_left_is_verified_and_reported_alike(
    context: StageContext, decodes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "check_runtimes", lambda folder, tokens: {})
    settings = ExportSettings(formats=(*FORMATS, "safetensors"), allow_inexact=True)
    first = stage.finish(settings, context, None)
    assert first.exports[-1]["rounding"]["changed"] > 0
    decodes.clear()
    again = stage.finish(settings, context, None)
    assert again.exports == first.exports
    source = decodes.pop("source")
    assert decodes.keys() == set(FORMATS) and max(decodes.values()) <= 3 * MODULES
    assert source == (1 + len(FORMATS)) * MODULES
    file = context.folder / "gptq" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"gptq does not verify: .*; delete it and run again"):
        stage.finish(settings, context, None)


def test_a_source_that_is_damaged_between_two_formats_is_found(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(folder: Path, tokens: Any) -> dict[str, Any]:
        file = Path(context.input) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        return {}

    monkeypatch.setattr(exporter, "check_runtimes", damage)
    with pytest.raises(UserError, match="it is not what was measured"):
        stage.finish(ExportSettings(formats=("gptq", "gguf")), context, None)
    assert (context.folder / "gptq").exists() and not (context.folder / "gguf").exists()
