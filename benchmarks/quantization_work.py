"""What a process of benchmarks/quantization.py does: rounds, trains or times a model, and prints figures as JSON."""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillation_work import Bench, reset_peak, status
from quantization_training import full_model, quality, step_seconds, train

BATCH = 8
"""Windows of a forward pass while calibrating, for everyone."""
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4}
"""The model on which rounding is timed; random weights."""
WIDE_WINDOWS = (32, 512)


def write_windows(bench: Bench, count: int) -> dict[str, float]:
    """Windows of training text spread over all of it, each from a single document, as every system calibrates on:
    ``windows.safetensors``; and beside them ``full``, the model."""
    import torch
    from safetensors.torch import save_file

    windows = bench.origin.data.train
    # llm-compressor knows no packed documents; windows of one document mean the same to everybody
    single = [index for index in range(len(windows)) if int((windows[index]["position_ids"] == 0).sum()) == 1]
    chosen = [single[place * len(single) // count] for place in range(min(count, len(single)))]
    save_file({"input_ids": torch.stack([windows[index]["input_ids"] for index in chosen])}, bench.folder / "windows.safetensors")
    (bench.folder / "full").symlink_to(str(bench.teacher_path))
    return {"windows": len(chosen)}


def calibration(file: Path) -> Any:
    """The same windows for ``round_model``."""
    from safetensors.torch import load_file

    from decoct.qat.ptq import CalibrationText

    ids = load_file(file)["input_ids"]
    return CalibrationText(batches=[{"input_ids": rows} for rows in ids.split(BATCH)])


def round_by(model: Any, windows: Path, method: str, bits: int, group: int, grid: str = "bf16_fp16") -> tuple[Any, dict[str, float]]:
    """(what ``round_model`` found, its seconds and its peak bytes beyond the loaded model)."""
    from decoct.qat.ptq import RoundingMethod, round_model
    from decoct.qat.spec import QuantSpec

    spec = QuantSpec(bits=bits, group_size=group, scale_grid=grid)  # pyright: ignore[reportArgumentType]
    rounding = RoundingMethod(method=method)  # pyright: ignore[reportArgumentType]
    text = None if rounding.needs == "nothing" else calibration(windows)
    before, begun = reset_peak(), time.perf_counter()
    rounded = round_model(model, spec, rounding, text=text)
    return rounded, {"seconds": time.perf_counter() - begun, "extra_bytes": status("VmHWM") - before}


def round_and_measure(bench: Bench, method: str, bits: int, group: int) -> dict[str, float]:
    """A row of rounding after training; method 'full' rounds nothing."""
    model, figures = full_model(bench), {}
    if method != "full":
        _, figures = round_by(model, bench.folder / "windows.safetensors", method, bits, group)
    return {**quality(bench, model), **figures}


def measure_written(bench: Bench, file: str, method: str, bits: int, group: int) -> dict[str, float]:
    """The figures of weights that another system has written, after checking that they are what it was asked for.

    Raises:
        SystemExit: a linear is missing, or holds more values a group than ``bits`` allow; or round to nearest, which leaves nothing to
            choose, is not what ours is with scales of fp32 too.
    """
    from safetensors.torch import load_file

    from decoct.models.families import decoder_linears

    model, written = full_model(bench), load_file(file)
    linears = dict(decoder_linears(model))
    if missing := [name for name in linears if f"{name}.weight" not in written]:
        raise SystemExit(f"{file}: {missing[0]} was not rounded")
    ours = full_model(bench)
    if method == "rtn":
        # llm-compressor keeps scales in fp32; on our bf16 grid the codes would differ
        round_by(ours, Path(), "rtn", bits, group, grid="fp32")
    for name, linear in linears.items():
        weight, scale = written[f"{name}.weight"], written[f"{name}.scale"]
        # whole numbers within range, or the file is not what it claims to be
        codes = weight.view(weight.shape[0], -1, group) / scale.unsqueeze(2)
        if float((codes - codes.round()).abs().max()) > 1e-3 or float(codes.max()) > 2 ** (bits - 1) - 0.5:
            raise SystemExit(f"{file}: {name} is not on a spec of {bits} bits in groups of {group}")
        linear.weight.data.copy_(weight)
        if method == "rtn":
            # a scale that differs in its last bit moves a weight on a tie to the next code
            same = ((weight - ours.get_parameter(f"{name}.weight")).abs() < 1e-6).float().mean()
            if float(same) < 0.999:
                raise SystemExit(f"{file}: {1 - float(same):.1%} of {name} differs from round to nearest")
    return quality(bench, model)


def make_wide(bench: Bench) -> dict[str, float]:
    """The model and the tokens on which rounding is timed; llm-compressor wants a tokenizer beside them."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, tie_word_embeddings=True, use_cache=False, **WIDE))  # pyright: ignore
    model.save_pretrained(bench.folder / "wide")
    bench.origin.tokenizer.save_pretrained(bench.folder / "wide")
    save_file({"input_ids": torch.randint(0, 1024, WIDE_WINDOWS)}, bench.folder / "wide.safetensors")
    return {}


def time_wide(folder: Path, bits: int, group: int) -> dict[str, float]:
    """Our GPTQ on the wide model; the second of two runs counts."""
    import torch

    from decoct.models.folder.loading import load_model

    # the first run warms up libraries and the page cache
    for _ in range(2):
        model = load_model(folder / "wide", dtype=torch.float32)
        _, figures = round_by(model, folder / "wide.safetensors", "gptq", bits, group)
    return figures


def do(folder: Path, plain: dict[str, Any], kind: str, rest: Sequence[Any]) -> dict[str, float]:
    """One piece of work."""
    if kind == "time_wide":
        return time_wide(folder, *rest)
    work = {
        "windows": write_windows,
        "make_wide": make_wide,
        "round": round_and_measure,
        "written": measure_written,
        "train": train,
        "steps": step_seconds,
    }
    return work[kind](Bench(plain, folder), *rest)


def worker(told: str) -> None:
    """A worker's whole life: prints its figures as JSON."""
    import torch

    torch.set_num_threads(1)
    folder, plain, kind, *rest = json.loads(told)
    with contextlib.redirect_stdout(sys.stderr):
        figures = do(Path(folder), plain, kind, rest)
    print(json.dumps(figures))


if __name__ == "__main__":
    worker(sys.argv[1])
