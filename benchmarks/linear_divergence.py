"""Forward KL from hidden states and heads, forward and backward: decoct beside plain PyTorch, the bare matrix products and its peers.

    python benchmarks/linear_divergence.py [--quick] [--full] [--json FILE]

Time: systems in turn in one process, medians. Memory: each system alone in a process of its own, peak beyond inputs, weights and their
gradients. First every system's loss and gradients are compared with plain PyTorch's. On a GPU in bf16 at the sizes of an 8B model, and
there also the error of the gradient against fp64 beside that of logits rounded to bf16; else in fp32 on the CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, report

from decoct.losses.linear_divergence import TeacherHidden, linear_divergence
from decoct.losses.settings import LossSettings

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
CASES = {
    "quick": [(1024, 4096, 128_256)] if GPU else [(512, 256, 16_000)],
    "default": [(tokens, 4096, 128_256) for tokens in (1024, 4096, 8192)] if GPU else [(2048, 512, 32_000)],
    "full": [(tokens, 4096, 128_256) for tokens in (1024, 4096, 8192, 16_384)] if GPU else [(2048, 512, 32_000), (1024, 1024, 128_256)],
}
"""tokens, hidden size, vocabulary."""
TURNS = 20 if GPU else 7
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""student hidden states and head (leaves), teacher hidden states and head, labels."""


def inputs_of(case: tuple[int, int, int], dtype: torch.dtype = DTYPE, gap: float = 0.1) -> Inputs:
    """Sharp logits (standard deviation 8) of a teacher, and a student that nearly agrees with it."""
    tokens, width, vocab = case
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # divided by the square root of the width, so that logits have the same spread at every width
    hidden, head = randn(tokens, width), randn(vocab, width) * 8 / width**0.5
    teacher_head = head + randn(vocab, width) * gap / width**0.5
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    hidden, head, teacher_hidden, teacher_head = (part.to(DEVICE, dtype) for part in (hidden, head, hidden.clone(), teacher_head))
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, labels.to(DEVICE)


def dense(inputs: Inputs) -> Tensor:
    """What one writes without a library: logits in full, softmax in fp32."""
    hidden, head, teacher_hidden, teacher_head, _ = inputs
    log_q = F.log_softmax((hidden @ head.T).float(), -1)
    with torch.no_grad():
        log_p = F.log_softmax((teacher_hidden @ teacher_head.T).float(), -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).sum()


def decoct(inputs: Inputs) -> Tensor:
    """linear_divergence as the training stages call it."""
    hidden, head, teacher_hidden, teacher_head, labels = inputs
    return linear_divergence(hidden, head, TeacherHidden(teacher_hidden, teacher_head), labels, LossSettings(), v_eff=len(head)).loss


def liger(inputs: Inputs) -> Tensor:
    """Liger-Kernel's fused linear JSD at beta 0, which is forward KL; its loss is a mean."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    hidden, head, teacher_hidden, teacher_head, labels = inputs
    return LigerFusedLinearJSD(jsd_beta=0.0)(hidden, head, teacher_hidden, teacher_head, labels) * len(hidden)


def trl(inputs: Inputs) -> Tensor:
    """TRL's chunked divergence at beta 0."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    hidden, head, teacher_hidden, teacher_head, _ = inputs
    return ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, 0.0)[0].sum()


def products(inputs: Inputs) -> None:
    """The four matrix products that no exact method can do without."""
    hidden, head, teacher_hidden, teacher_head, _ = inputs
    with torch.no_grad():
        logits = hidden @ head.T
        torch.mm(teacher_hidden, teacher_head.T, out=logits)
        logits @ head
        logits.T @ hidden


SYSTEMS: dict[str, Callable[[Inputs], Tensor]] = {"dense": dense, "decoct": decoct, "liger": liger, "trl": trl}


def there() -> list[str]:
    """Systems that can run here; a line for each that cannot."""
    found = ["dense", "decoct"]
    for name in ("liger", "trl"):
        try:
            small = inputs_of((32, 64, 128))
            SYSTEMS[name](small).backward()
            found.append(name)
        except Exception as error:  # any failure of a peer is its own
            print(f"{name}: not run ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''})")
    return found


def check(case: tuple[int, int, int], names: list[str]) -> None:
    """Stop unless all systems give the loss and gradients of the dense form in fp32."""
    # a few tokens suffice: the full logits of the dense form in fp32 would not fit at the largest sizes
    inputs = inputs_of((min(case[0], 256), case[1], case[2]), torch.float32)
    truth = dense(inputs)
    wanted = torch.autograd.grad(truth, inputs[:2])
    for name in names:
        loss = SYSTEMS[name](inputs)
        got = torch.autograd.grad(loss, inputs[:2])
        worst = max(abs(loss.item() / truth.item() - 1), *(((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted)))
        # wide enough for peers that compute in lower precision, narrow enough for any wrong formula
        if worst > 1e-2:
            raise SystemExit(f"{name} is wrong: relative difference {worst:.2g} from plain PyTorch")


def once(run: Callable[[Inputs], Tensor | None], inputs: Inputs) -> float:
    """Seconds of one forward and backward pass."""
    for leaf in inputs[:2]:
        leaf.grad = None
    if GPU:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    loss = run(inputs)
    if loss is not None:
        loss.backward()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def times(case: tuple[int, int, int], names: list[str]) -> dict[str, float]:
    """Median seconds of each system and of the bare products, in turn."""
    inputs = inputs_of(case)
    runs: dict[str, Callable[[Inputs], Tensor | None]] = {"products": products, **{name: SYSTEMS[name] for name in names}}
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 2):
        for name, run in runs.items():
            seconds = once(run, inputs)
            if turn >= 2:
                seen[name].append(seconds)
    return {name: statistics.median(values) for name, values in seen.items()}


def extra_bytes(case: tuple[int, int, int], name: str) -> float:
    """Peak memory of one pass beyond inputs, weights and gradients, in this process."""
    # the first call compiles kernels and loads libraries, which would count as its memory
    once(SYSTEMS[name], inputs_of((32, 64, 128)))
    inputs = inputs_of(case)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in inputs[:2])
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(SYSTEMS[name], inputs)
        return torch.cuda.max_memory_allocated() - before - gradients
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    once(SYSTEMS[name], inputs)
    return _status("VmHWM") - before - gradients


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(case: tuple[int, int, int], name: str) -> float:
    """``extra_bytes`` in a fresh process."""
    command = [sys.executable, __file__, "--memory", json.dumps([*case, name])]
    # glibc then gives every block of 64 KiB or more back to the system when it is freed, so that the peak is of what is alive
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def gradient_errors(case: tuple[int, int, int]) -> dict[str, float]:
    """Relative error of the gradient of the hidden states against fp64, before any cast: decoct's, and that of bf16-rounded logits."""
    hidden, head, teacher_hidden, teacher_head, labels = inputs_of((256, *case[1:]))
    exact = tuple(part.detach().double() for part in (hidden, head, teacher_hidden, teacher_head))
    p, q = (exact[2] @ exact[3].T).softmax(-1), (exact[0] @ exact[1].T).softmax(-1)
    truth = (q - p) @ exact[1]
    leaf = hidden.detach().float().requires_grad_()
    (own,) = torch.autograd.grad(decoct((leaf, head.detach(), teacher_hidden, teacher_head, labels)), [leaf])
    # what a model does that rounds its logits to bf16 before the softmax
    p, q = ((part @ weight.T).bfloat16().float().softmax(-1) for part, weight in ((teacher_hidden, teacher_head), (hidden, head)))
    rounded = (q - p) @ head.float()
    return {"decoct": ((own.double() - truth).norm() / truth.norm()).item(), "dense": ((rounded - truth).norm() / truth.norm()).item()}


def main() -> None:
    """Check, time, measure; print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--memory", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        *case, name = json.loads(given.memory)
        print(extra_bytes(tuple(case), name))
        return
    names, rows = there(), []
    for case in CASES[given.size]:
        label = "x".join(map(str, case))
        check(case, names)
        seconds = times(case, names)
        for name, median in seconds.items():
            if GPU:
                rows.append(Row(label, name, "seconds", median, "s"))
            rows.append(Row(label, name, "seconds_ratio", median / seconds["products" if GPU else "dense"], "x"))
        rows += [Row(label, name, "extra_bytes", memory(case, name), "B") for name in names]
        if GPU:
            rows += [Row(label, name, "gradient_error", error, "relative") for name, error in gradient_errors(case).items()]
    report(rows, "forward KL from hidden states and heads, forward + backward", given.json)


if __name__ == "__main__":
    main()
