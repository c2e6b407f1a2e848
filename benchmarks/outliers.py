"""What outliers cost, and what transforms take of that cost: the same model clean and with planted outliers, rounded with each transform.

    python benchmarks/outliers.py [--quick] [--json FILE]                              the quickstart's teacher
    python benchmarks/outliers.py --model FOLDER --text FILES ... [--windows 4] [--calibration 8]

Gains of the norms before the linears are multiplied by --factor in every 32nd channel, and the columns that read these channels divided by
it: the same function, whose inputs and weights are uneven. Rows: KL(unrounded || rounded) on held-out windows, for weights of 3 and 4 bits
in groups of 64 (w3, w4), and for weights and inputs of 8 bits (w8a8, one scale per row and per token). `planted` = KL with outliers over
that of the clean model, both by the same system; `of_clean_rtn` = KL with outliers over that of the clean model rounded to nearest.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from distillation import prepare, recipe
from distillation_work import Bench
from rows import Row, report

BATCH = 4
"""Windows of a forward pass."""
LLM_INT8, THRESHOLD = "llm.int8", 6.0
"""The system that keeps inputs of this magnitude, that of the paper (arXiv 2208.07339)."""
EVERY = 32
"""One channel of so many gets an outlier."""


@dataclass(frozen=True)
class Case:
    """A model with its windows: int64 [N, S]."""

    folder: str
    calibration: Any
    held_out: Any


def systems() -> dict[str, tuple[Any, Any]]:
    """Name -> (method of rounding, transform before it); ``llm.int8`` leaves large inputs unrounded instead."""
    from decoct.qat.transforms.settings import TransformSettings

    awq, rotation = TransformSettings(method="awq"), TransformSettings(method="rotation")
    return {
        "rtn": ("rtn", None),
        "smoothquant": ("rtn", TransformSettings(method="smoothquant")),
        "awq": ("rtn", awq),
        "awq clip": ("rtn", TransformSettings(method="awq", clip=True)),
        "rotation": ("rtn", rotation),
        LLM_INT8: ("rtn", None),
        "gptq": ("gptq", None),
        "awq gptq": ("gptq", awq),
        "rotation gptq": ("gptq", rotation),
    }


def schemes() -> dict[str, tuple[Any, Any]]:
    """Name -> (spec of the weights, spec of the inputs)."""
    from decoct.qat.spec import ActivationSpec, QuantSpec

    in_groups = {f"w{bits}": (QuantSpec(bits=bits, group_size=64), None) for bits in (3, 4)}
    return {**in_groups, "w8a8": (QuantSpec(bits=8, group_size="channel"), ActivationSpec())}


def open_model(case: Case, factor: float) -> Any:
    """The model in fp32; with a factor, outliers are planted."""
    import torch

    from decoct.models.couplings import couplings
    from decoct.models.families import decoder_layers
    from decoct.models.family_map import family_of
    from decoct.models.folder.loading import load_model
    from decoct.qat.transforms.folding import channels, fold_scales

    model = load_model(case.folder, dtype=torch.float32)
    family = family_of(model)
    for layer in decoder_layers(model) if factor != 1 else ():
        for one in couplings(model.config):
            if one.norm:
                scales = torch.ones(channels(family, one, layer), dtype=torch.float64)
                scales[::EVERY] = 1 / factor
                fold_scales(layer, family, one, scales)
    return model


def log_probabilities(model: Any, windows: Any) -> Iterator[Any]:
    """Log-probabilities [B, S, V] of every batch."""
    import torch

    with torch.no_grad():
        for batch in windows.split(BATCH):
            yield model(input_ids=batch, use_cache=False).logits.log_softmax(-1)


def divergence(reference: list[Any], model: Any, windows: Any) -> float:
    """Mean KL(reference || model) per token, in nats."""
    total = 0.0
    for known, own in zip(reference, log_probabilities(model, windows)):
        total += float((known.exp() * (known - own)).sum(dtype=known.dtype))
    return total / windows.numel()


def measure(case: Case, factor: float, only: list[str], chosen: list[str]) -> list[Row]:
    """Rows of one model, of these systems and schemes; [] = of all."""
    import torch

    from decoct.qat.ptq import CalibrationText, RoundingMethod, round_model

    text = CalibrationText(batches=[{"input_ids": rows} for rows in case.calibration.split(BATCH)])
    reference = list(log_probabilities(open_model(case, 1), case.held_out))
    # what is compared is one function: planting changes nothing
    exact = divergence(reference, open_model(case, factor), case.held_out)
    if exact > 1e-6:
        raise SystemExit(f"planted outliers change the model: KL {exact:.3g}")
    rows: list[Row] = []
    clean: dict[tuple[str, str], float] = {}
    for scheme, (spec, inputs) in schemes().items():
        for name, (method, transform) in systems().items():
            if (only and name not in ("rtn", *only)) or (chosen and scheme not in chosen):
                continue
            # it is about inputs alone
            if name == LLM_INT8 and inputs is None:
                continue
            rounded_inputs = replace(inputs, outliers=THRESHOLD) if inputs and name == LLM_INT8 else inputs
            for kind, by in (("clean", 1.0), ("planted", factor)):
                begun, model = time.perf_counter(), open_model(case, by)
                rounding = RoundingMethod(method=method, activations=rounded_inputs, transform=transform)
                # norms and embeddings as an export stores them
                round_model(model, spec, rounding, text=text if rounding.calibrates else None, others=torch.bfloat16)
                seconds = time.perf_counter() - begun
                kl = divergence(reference, model, case.held_out)
                clean.setdefault((scheme, name), kl)
                figures = {"kl": kl, "seconds": seconds}
                if kind == "planted":
                    figures |= {"planted": kl / clean[scheme, name], "of_clean_rtn": kl / clean[scheme, "rtn"]}
                units = {"kl": "nats", "seconds": "s"}
                rows += [Row(f"{scheme} {kind}", name, metric, value, units.get(metric, "x")) for metric, value in figures.items()]
                print(f"{scheme} {kind} {name}: {figures}", file=sys.stderr, flush=True)
    return rows


def case_of(model: str, texts: list[str], windows: int, calibration: int, length: int) -> Case:
    """A model folder with the first windows of a text to calibrate on and its last to measure on."""
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    ids: list[int] = []
    for file in texts:
        ids += tokenizer(Path(file).read_text(encoding="utf-8", errors="replace"))["input_ids"]
    every = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if len(every) < windows + calibration:
        raise SystemExit(
            f"the text has {len(every)} windows of {length} tokens; give more, or ask for fewer than {windows} + {calibration}"
        )
    return Case(model, every[:calibration], every[-windows:])


def scratch_case(folder: Path, size: str, windows: int, calibration: int) -> Case:
    """The quickstart's teacher with its own windows."""
    import torch

    plain = recipe([], size)
    prepare(plain, folder)
    bench = Bench(plain, folder)
    data = bench.origin.data
    assert bench.teacher_path is not None
    train, held_out = (
        torch.stack([part[index]["input_ids"] for index in range(min(count, len(part)))])
        for part, count in ((data.train, calibration), (data.evaluation, windows))
    )
    return Case(bench.teacher_path, train, held_out)


def main() -> None:
    """Run the cases; print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--model", default=None, help="a model folder, with --text; default: the quickstart's teacher")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--calibration", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, with --model")
    parser.add_argument("--factor", type=float, default=32.0)
    parser.add_argument("--only", nargs="+", default=[], metavar="SYSTEM", help="these beside rounding to nearest")
    parser.add_argument("--schemes", nargs="+", default=[], choices=list(schemes()), help="these alone")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="outliers-") as place:
        if given.model is None:
            case = scratch_case(Path(place), given.size, given.windows, given.calibration)
        elif given.text:
            case = case_of(given.model, given.text, given.windows, given.calibration, given.length)
        else:
            raise SystemExit("--model needs --text, files to calibrate and to measure on")
        rows = measure(case, given.factor, given.only, given.schemes)
    report(rows, "what outliers cost", given.json)


if __name__ == "__main__":
    main()
