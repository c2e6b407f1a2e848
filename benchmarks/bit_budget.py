"""KL against bits per weight: widths chosen within a budget beside one width for all linears, on held-out text.

    python benchmarks/bit_budget.py [--quick] [--text FILES ...] [--method rtn] [--widths 2 3 4 8 16] [--json FILE]

A scratch teacher (the quickstart's on Python's standard library; a stronger one on --text) is rounded by the stage `quantize` in groups of
64: with 2, 3, 4, 5, 6 and 8 bits everywhere, and with `bits: auto` within budgets at and between those. Rows per case: bits per weight that
are reached, KL(full || rounded) on held-out text, and for a choice its rank correlations. At last what a choice takes beyond a rounding to
nearest, in forward passes over its text.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from distillation import prepare, recipe
from distillation_work import Bench
from quantization_training import full_model, quality
from rows import Row, report

UNIFORM = (2, 3, 4, 5, 6, 8)
GROUP = 64
TOKENS = 16_384
"""Text of a choice."""
BUDGETS = {
    "quick": (2.5, 3.5, 4.5),
    "default": (2.3, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 5.0, 5.25, 6.0, 6.25, 7.0, 8.25),
}


class Case:
    """One teacher.

    Args:
        name: What its rows begin with.
        plain: Its recipe.
        folder: Work space.
        method: How weights are rounded.
    """

    def __init__(self, name: str, plain: dict[str, Any], folder: Path, method: str) -> None:
        prepare(plain, folder)
        self.name, self.method, self.bench, self.rows = name, method, Bench(plain, folder), list[Row]()

    def rounded(self, system: str, weights: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """(what the stage says of its choice, its seconds); what it has written is measured."""
        from rich.console import Console

        from decoct.models.folder.loading import load_model
        from decoct.qat.bit_table import choice_lines
        from decoct.trainer.loop.metrics import MetricsSink
        from decoct.trainer.stages import quantize
        from decoct.trainer.stages.context import RunContext, StageContext

        origin, plain = self.bench.origin, self.bench.plain
        made = _recipe({**plain, "stages": [{"quantize": {"weights": {"group_size": GROUP, **weights}, "method": self.method}}]})
        assert self.bench.teacher_path is not None
        with tempfile.TemporaryDirectory() as place:
            run = RunContext(
                data=origin.data, tokenizer=origin.tokenizer, v_eff=origin.v_eff, trainer=made.trainer, seed=made.seed, teacher=None,
                metrics=MetricsSink(None), console=Console(stderr=True, quiet=True),
            )  # fmt: skip
            context = StageContext(
                run=run, name="00-quantize", kind="quantize", folder=Path(place), key="benchmark", input=self.bench.teacher_path,
                input_revision=None, record={},
            )  # fmt: skip
            begun = time.perf_counter()
            found = quantize.finish(made.stages[0].settings, context, None).facts.get("bits", {})
            seconds = time.perf_counter() - begun
            figures = quality(self.bench, load_model(context.model, dtype=_float32()))
        print(f"{self.name} {system}: KL {figures['kl']:.4g}, {seconds:.1f} s", *(choice_lines(found) if found else ()), sep="\n  ")
        self.rows += [Row(self.name, system, "kl", figures["kl"], "nats"), Row(self.name, system, "top1", figures["top1"], "share")]
        return found, seconds

    def curve(self, budgets: Sequence[float], widths: list[int]) -> None:
        """Rows of both curves, and of what a choice takes."""
        alone = 0.0
        for bits in UNIFORM:
            _, alone = self.rounded(f"{bits} bits everywhere", {"bits": bits})
        for budget in budgets:
            system = f"within {budget:g}"
            found, seconds = self.rounded(system, {"bits": "auto", "budget": budget, "widths": widths, "sensitivity_tokens": TOKENS})
            self.rows.append(Row(self.name, system, "bits_per_weight", found["bits_per_weight"], "bits"))
            self.rows += [Row(self.name, system, names, value, "rho") for names, value in found["rank_correlation"].items()]
            self.rows.append(Row(self.name, system, "passes", (seconds - alone) / self.forward_seconds(), "forward passes"))
        exact, _ = self.rounded(
            "exact, within 3.5",
            {"bits": "auto", "budget": 3.5, "widths": widths, "sensitivity": "exact", "sensitivity_tokens": TOKENS // 8},
        )
        self.rows += [Row(self.name, "exact, within 3.5", names, value, "rho") for names, value in exact["rank_correlation"].items()]

    def forward_seconds(self) -> float:
        """Seconds of a forward pass over the text of a choice, logits included."""
        import torch

        from decoct.trainer.stages.calibration import calibration_text

        model = full_model(self.bench).eval()
        text = calibration_text(self.bench.origin.data.train, TOKENS, 0)
        begun = time.perf_counter()
        with torch.no_grad():
            for batch in text.batches:
                model(**batch)
        return time.perf_counter() - begun


def _recipe(plain: dict[str, Any]) -> Any:
    from decoct.configs.loader import recipe_from_dict

    return recipe_from_dict(plain)


def _float32() -> Any:
    import torch

    return torch.float32


def main() -> None:
    """Draw the curves; print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--text", nargs="+", default=[], help="text files for a stronger teacher, in place of the quickstart's")
    parser.add_argument("--method", default="rtn", choices=("rtn", "mse", "gptq"))
    parser.add_argument("--widths", nargs="+", type=int, default=[2, 3, 4, 8, 16])
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    name, texts = ("text", [str(Path(one).resolve()) for one in given.text]) if given.text else ("quickstart", [])
    with tempfile.TemporaryDirectory(prefix="bit-budget-") as place:
        case = Case(name, recipe(texts, given.size), Path(place) / name, given.method)
        case.curve(BUDGETS[given.size], given.widths)
    report(case.rows, f"KL within a budget, {given.method} in groups of {GROUP}", given.json)


if __name__ == "__main__":
    main()
