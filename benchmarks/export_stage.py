"""Time of the stage `export`, and how often it decodes each packed module, on a random Llama.

    python benchmarks/export_stage.py [--layers 14] [--hidden 768] [--repeat 3] [--runtimes] [--json FILE]

The model has int4 weights in groups of 64 and is written as compressed-tensors and as GGUF. Without ``--runtimes`` no runtime loads the
exports, so that the figures are work of this package alone.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, report
from serving_student import read_text

from decoct.models.folder.model_folder import save_model_folder
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.qat.codes import state as codes_state
from decoct.qat.export import export as exporter
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.readers.compressed_tensors import PackedFolder
from decoct.qat.readers.gguf_file import GgufFile
from decoct.qat.spec import QuantSpec
from decoct.trainer.settings import ExportSettings
from decoct.trainer.stages.export import finish

FORMATS = ("compressed-tensors", "gguf")
SEQUENCE, ROWS = 128, 16


def quantized_folder(place: Path, layers: int, hidden: int) -> tuple[Path, int, int]:
    """(a folder as the stage `quantize` writes it, its parameters, its quantized modules)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer([read_text([])], 1000)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3 // 64 * 64, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "vocab_size": len(tokenizer)}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    for parameter in model.parameters():
        # unquantized tensors of a quantized folder lie on the bf16 grid, and exporters refuse others
        parameter.data = parameter.data.bfloat16().float()
    state = quantize_model(model, QuantSpec(bits=4, group_size=64))
    fold(model, state)
    record = {"kind": "quantize", "quant": state.record()}
    tensors = {codes_state.QUANT_FILE: state.tensors()}
    folder = save_model_folder(place / "quantized", model, tokenizer, record, dtype=torch.float32, extra_tensors=tensors)
    return folder, sum(parameter.numel() for parameter in model.parameters()), len(state.modules)


def counted(counts: Counter[str], name: str, function: Callable[..., Any], counts_it: Callable[..., bool]) -> Callable[..., Any]:
    """``function``, counted under ``name`` where ``counts_it`` says so of its arguments."""

    def call(*arguments: Any, **options: Any) -> Any:
        counts[name] += counts_it(*arguments)
        return function(*arguments, **options)

    return call


class Text:
    """Windows of random tokens."""

    seq_length = SEQUENCE

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(1, 900, (SEQUENCE,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def context(folder: Path, target: Path) -> Any:
    """What the stage reads of its context."""
    return SimpleNamespace(
        name="02-export",
        kind="export",
        folder=target,
        input=str(folder),
        input_revision=None,
        run=SimpleNamespace(data=SimpleNamespace(evaluation=Text())),
        say=lambda text: print(text, file=sys.stderr),
    )


def main() -> None:
    """Export once per format; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--runtimes", action="store_true", help="also load the exports in installed runtimes")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    if not given.runtimes:
        exporter.check_runtimes = lambda folder, **options: {}
    counts: Counter[str] = Counter()
    packed: Any = lambda file, tensor: tensor.type.startswith("Q")  # noqa: E731
    # counted where the work is done, so that a decoding that a refactor adds somewhere shows up
    PackedFolder.stored_codes = counted(counts, "decodes", PackedFolder.stored_codes, lambda *arguments: True)
    GgufFile._blocks = counted(counts, "decodes", GgufFile._blocks, packed)
    codes_state.QuantState.dequantized = counted(
        counts, "dequantized", codes_state.QuantState.dequantized, lambda *arguments: True
    )  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="export-stage-") as place:
        folder, parameters, modules = quantized_folder(Path(place), given.layers, given.hidden)
        for formats in ((FORMATS[0],), (FORMATS[1],), FORMATS):
            case = f"{parameters / 1e6:.0f}M, {' and '.join(formats)}"
            seconds, cpu = [], []
            for turn in range(given.repeat):
                counts.clear()
                target = Path(place) / f"{'-'.join(formats)}-{turn}"
                target.mkdir()
                started, worked = time.perf_counter(), time.process_time()
                settings: Any = {"formats": formats}
                finish(ExportSettings(**settings), context(folder, target), None)
                seconds.append(time.perf_counter() - started)
                cpu.append(time.process_time() - worked)
            # the least of the turns: other load can only add time
            rows.append(Row(case, "decoct", "seconds", min(seconds), "s"))
            rows.append(Row(case, "decoct", "cpu_seconds", min(cpu), "s"))
            rows.append(Row(case, "decoct", "decodes of a packed module", counts["decodes"] / modules, ""))
            rows.append(Row(case, "decoct", "source modules dequantized", counts["dequantized"] / modules, ""))
    report(rows, "the stage `export`", given.json)


if __name__ == "__main__":
    main()
