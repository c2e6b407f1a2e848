"""Loads an export as a user would and writes its logits, in a process of its own: ``python -m decoct.qat.runtimes.transformers_process``.

This file is the only part of decoct that runs here, with plain transformers and the packages that the format needs, so the result is
independent of decoct. ``transformers_check.py`` starts this process and compares.
"""

import argparse
import contextlib
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

GENERATED = 64


def run_transformers(
    folder: str, tokens: Tensor, dtype: torch.dtype = torch.float32, loaded: Callable[[], None] = lambda: None
) -> tuple[Tensor, dict[str, list[str]], float]:
    """Return the logits of plain transformers, its loading problems and its speed.

    Args:
        folder: The export.
        tokens: int64 [B, S].
        dtype: Dtype of the computation.
        loaded: Called between loading and predicting.

    Returns:
        (logits fp32 [B, S, V], names transformers reported as missing, unexpected or mismatched, tokens per second).
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True, **loading_options(folder)}
    model, info = cast(tuple[Any, dict[str, Any]], AutoModelForCausalLM.from_pretrained(folder, **options))
    _compute_in(model, dtype)
    model.eval()
    loaded()
    with torch.inference_mode():
        # row by row, as the reference computes them
        logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in tokens])
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return logits.float(), {kind: sorted(map(str, info[kind])) for kind in names if info[kind]}, generation_speed(model, tokens[:1, :1])


def _compute_in(model: Any, dtype: torch.dtype) -> None:
    """Make a model of bitsandbytes compute in ``dtype``: transformers leaves its unquantized parameters in the stored dtype, and its NF4
    linears multiply in the dtype that the folder names."""
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(getattr(module, "compute_dtype", None), torch.dtype):
            module.compute_dtype = dtype
            # a kernel of processors with bf16 rounds inputs and scales to bf16, whatever dtype is asked for
            module.support_avx512bf16_for_cpu = dtype == torch.bfloat16


def generation_speed(model: Any, prompt: Tensor) -> float:
    """Return tokens per second of generating one text; 0 if the model's context leaves no room."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # the prompt takes one position
    count = min(GENERATED, room - 1 if room else GENERATED)
    if count < 1:
        return 0.0
    with torch.inference_mode():
        started = time.perf_counter()
        # min_new_tokens: an end of text must not cut the measurement short
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, min_new_tokens=count)
        return (made.shape[1] - 1) / (time.perf_counter() - started)


def peak_bytes() -> int:
    """Return the peak memory of this process. On Linux ``ru_maxrss`` includes the parent's, VmHWM does not."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def needs_dequantizing(quantization: dict[str, Any]) -> bool:
    """Return whether a ``quantization_config`` has packed zero points or 4-bit floats, in any of its groups: unless it dequantizes on
    loading, transformers reads the first as unpacked ones, and computes with the second in bf16 alone."""
    groups = quantization.get("config_groups", {}).values()
    return any(_dequantized(group) for group in groups)


def _dequantized(group: dict[str, Any]) -> bool:
    # int-quantized, the format with rounded inputs, stores zero points unpacked
    if group.get("format") == "pack-quantized":
        return not group["weights"]["symmetric"]
    # dequantized modules do not round their inputs
    return group.get("format") in ("mxfp4-pack-quantized", "nvfp4-pack-quantized") and not group.get("input_activations")


def loading_options(folder: str) -> dict[str, Any]:
    """Return further arguments of ``from_pretrained``.

    GPTQ and AWQ need the kernel that unpacks weights and multiplies in the inputs' dtype (the fast kernels compute in fewer bits). Packed
    zero points and 4-bit floats need dequantizing on loading (``needs_dequantizing``; transformers 5.23 with compressed-tensors 0.20).
    """
    import transformers

    quantization = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    method = quantization.get("quant_method")
    # backend torch: the default kernel on a CPU computes in bf16
    if method == "gptq":
        return {"quantization_config": transformers.GPTQConfig(bits=quantization["bits"], backend="torch")}
    if method == "awq":
        return {"quantization_config": transformers.AwqConfig(backend=cast(Any, "torch_awq"))}
    if needs_dequantizing(quantization):
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return {}


def _versions() -> dict[str, str]:
    found = {}
    for name in ("transformers", "compressed-tensors", "optimum", "gptqmodel", "bitsandbytes", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Read ``--tokens`` (npy, int64 [B, S]), write ``--seen`` (npz, ``logits`` fp32 [B, S, V]) and ``--result`` (JSON)."""
    parser = argparse.ArgumentParser(description="Logits of an export in plain transformers, on the CPU.")
    parser.add_argument("folder", help="export folder")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--seen", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write: version, loading problems, speed, memory")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokens, version = torch.from_numpy(np.load(options.tokens)), f"transformers {_versions().get('transformers', 'unknown')}"
    _tell(options.result, phase="loading", version=version)
    try:
        logits, loading, speed = run_transformers(
            options.folder, tokens, getattr(torch, options.dtype), lambda: _tell(options.result, phase="predicting", version=version)
        )
    # transformers imports the package of a format only when it loads such a model
    except ImportError as error:
        _tell(options.result, phase="loading", not_installed=(str(error).strip() or type(error).__name__).splitlines()[0])
        return
    np.savez(options.seen, logits=logits.numpy())
    version = ", ".join(f"{name} {number}" for name, number in _versions().items())
    _tell(options.result, phase="done", version=version, loading=loading, tokens_per_second=speed, peak_bytes=peak_bytes())


def _tell(file: Path, **facts: Any) -> None:
    """Write the phase for ``judge_process.py``, which reads it even if this process crashes."""
    file.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
