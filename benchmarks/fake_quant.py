"""Fake quantization of a weight, forward and backward, beside a copy of its bytes, plain PyTorch and torchao; and what it adds to a step.

    python benchmarks/fake_quant.py [--quick] [--full] [--json FILE]

Systems in turn in one process, medians. On a GPU in bf16 at the sizes of an 8B model: seconds, and the share of a device-to-device
copy's bandwidth at which the bytes move that must be moved (forward: a weight in, a value out; backward: value's gradient and weight in,
weight's gradient out), and a step of a 1B Llama at 8,192 tokens. Elsewhere in fp32 and small: ratios alone. First the kernel's values and
gradients are compared with the reference's, bit for bit.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, report

from decoct.qat.fake_quant import fake_quant, fake_quant_learned, quantize
from decoct.qat.layers.quantized_model import prepare
from decoct.qat.spec import QuantSpec

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
CASES = {
    "quick": [(4096, 4096)] if GPU else [(256, 512)],
    "default": [(4096, 14_336), (4096, 4096)] if GPU else [(1024, 2816)],
    "full": [(4096, 14_336), (4096, 4096), (14_336, 4096), (1024, 4096)] if GPU else [(1024, 2816), (4096, 4096)],
}
"""(out, in) of the weights."""
SPEC = QuantSpec(bits=4, group_size=128)
TURNS = 30 if GPU else 9
STEP = {"quick": 5, "default": 30, "full": 30}
"""Steps of each kind in turn."""
System = Callable[[Tensor], Tensor]


def systems(weight: Tensor) -> dict[str, System]:
    """What is timed, by name; torchao where it is installed."""
    scale = quantize(weight, SPEC)[1].requires_grad_()
    found: dict[str, System] = {
        "decoct": lambda w: fake_quant(w, SPEC),
        "decoct learned": lambda w: fake_quant_learned(w, scale, SPEC),
        "dense": plain,
    }
    try:
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"torchao: not run ({error})")
        return found
    config: Any = IntxFakeQuantizeConfig(torch.int4, group_size=128, is_symmetric=True)
    return {**found, "torchao": IntxFakeQuantizer(config)}


def plain(weight: Tensor) -> Tensor:
    """What one writes without a library: scales from the largest magnitudes, a straight-through gradient, in eager PyTorch."""
    grouped = weight.float().view(weight.shape[0], -1, 128)
    scale = (grouped.detach().abs().amax(2, keepdim=True) / 7.5).bfloat16().float().clamp(2.0**-17)
    inside = (grouped / scale).clamp(-8, 7)
    rounded = inside + (inside.round() - inside).detach()
    return (rounded * scale).view(weight.shape).to(weight.dtype)


def check(weight: Tensor) -> None:
    """Stop unless value and gradients of the path in use are the reference's, bit for bit."""
    # a random gradient: with ones, wrong signs and missing terms could cancel
    given = torch.randn_like(weight)
    for call in (
        lambda w, backend: fake_quant(w, SPEC, backend=backend),
        lambda w, backend: fake_quant_learned(w, quantize(weight, SPEC)[1] * 1.1, SPEC, backend=backend),
    ):
        seen = []
        for backend in ("auto", "reference"):
            leaf = weight.detach().clone().requires_grad_()
            value = call(leaf, backend)
            value.backward(given)
            seen.append((value.detach(), leaf.grad))
        if not all(torch.equal(one, other) for one, other in zip(*seen)):
            raise SystemExit("the kernel and its reference differ; what they cost means nothing")


def seconds(work: Callable[[], object]) -> float:
    """Of one call; the device is waited for."""
    if not GPU:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    # events are read on the device, so that the time to launch a kernel is not counted
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def measure(weight: Tensor) -> dict[str, tuple[float, float]]:
    """System -> median seconds (forward, backward), in turn; ``copy`` moves a weight in and out once."""
    runs, leaf, given = systems(weight), weight.detach().requires_grad_(), torch.randn_like(weight)
    other = torch.empty_like(weight)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ("copy", *runs)}
    for turn in range(TURNS + 3):
        times = {"copy": (seconds(lambda: other.copy_(weight)), 0.0)}
        for name, run in runs.items():
            leaf.grad, made = None, []
            forward = seconds(lambda run=run, made=made: made.append(run(leaf)))
            times[name] = forward, seconds(lambda made=made: made[0].backward(given))
        for name, pair in times.items():
            # the first turns compile the Triton kernels
            if turn >= 3:
                seen[name].append(pair)
    return {name: (statistics.median(f for f, _ in pairs), statistics.median(b for _, b in pairs)) for name, pairs in seen.items()}


def rows_of(case: tuple[int, int], seen: Mapping[str, tuple[float, float]]) -> list[Row]:
    """Ratios to plain PyTorch; on a GPU also seconds and shares of the copy's bandwidth."""
    label, copied = f"{case[0]}x{case[1]}-g128", seen["copy"][0]
    rows = []
    for name, (forward, backward) in seen.items():
        if name == "copy":
            continue
        whole, reference = forward + backward, sum(seen["dense"])
        rows.append(Row(label, name, "seconds_ratio", whole / reference, "x"))
        if GPU:
            rows += [Row(label, name, "seconds forward", forward, "s"), Row(label, name, "seconds backward", backward, "s")]
            # a copy moves two weights' worth of bytes, a forward pass too; a backward pass three
            rows.append(Row(label, name, "bandwidth_share forward", copied / forward, "share"))
            rows.append(Row(label, name, "bandwidth_share backward", 1.5 * copied / backward, "share"))
    return rows


def llama(large: bool) -> Any:
    """A Llama of 1B weights, or a tiny one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = (2048, 8192, 16, 32, 8, 128_256) if large else (256, 512, 2, 4, 2, 512)
    hidden, ffn, layers, heads, keys, vocabulary = sizes
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
        vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    # as in training a model of this size; it also makes every weight round twice a step
    model.gradient_checkpointing_enable()
    return model.train()


def steps(turns: int) -> list[Row]:
    """Forward and backward pass of a Llama whose linears round, beside the same one plain; cross-entropy, bf16 autocast on a GPU."""
    tokens = 8192 if GPU else 2048
    models = {"plain": llama(GPU), "decoct": llama(GPU)}
    prepare(models["decoct"], QuantSpec(bits=4, group_size=128 if GPU else 64))
    ids = torch.randint(0, 512, (tokens // (2048 if GPU else 256), 2048 if GPU else 256), device=DEVICE)
    seen: dict[str, list[float]] = {name: [] for name in models}

    def step(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            model(input_ids=ids, labels=ids).loss.backward()

    for turn in range(turns + 2):
        for name, model in models.items():
            taken = seconds(lambda model=model: step(model))
            if turn >= 2:
                seen[name].append(taken)
    label = f"a step of a {'1B' if GPU else 'tiny'} Llama, {tokens:,} tokens"
    # pairs of neighbouring steps: a change of the clock falls on both
    ratio = statistics.median(own / other for own, other in zip(seen["decoct"], seen["plain"], strict=True))
    return [Row(label, "decoct", "seconds_ratio", ratio, "x")]


def main() -> None:
    """Check, time; print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    rows = []
    for case in CASES[given.size]:
        weight = (0.02 * torch.randn(*case, generator=torch.Generator().manual_seed(0))).to(DEVICE, DTYPE)
        check(weight)
        rows += rows_of(case, measure(weight))
    rows += steps(STEP[given.size])
    report(rows, "fake quantization of a weight, 4 bits in groups of 128", given.json)


if __name__ == "__main__":
    main()
