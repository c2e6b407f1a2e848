"""What scores of pruning cost in forward passes, and what a second shape of the same model costs once they are kept.

    python benchmarks/pruning_scores.py [--config FILE] [--tokens 4096] [--seq-length 512] [--json FILE]

The weights are random, which changes no times. A forward pass is that of the decoder alone, over the same text, as scoring makes it.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, report

from decoct.configs.scalars import parse_number
from decoct.models.family_map import family_of
from decoct.models.pruning.repair import refitted
from decoct.models.pruning.score_cache import ScoreCache
from decoct.models.pruning.score_store import ScoreStore
from decoct.models.pruning.shape_choice import selected
from decoct.models.sizes import sizes_of

SMOLLM2 = Path(__file__).parents[1] / "configs/architectures/SmolLM2-135M-Instruct.json"


def seconds(work: Any) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def measured(config: Any, tokens: int, seq_length: int, folder: Path) -> list[Row]:
    """The rows: seconds, and the share of a forward pass."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    family = family_of(model)
    sizes = sizes_of(model.config, family)
    windows = torch.randint(config.vocab_size, (max(1, tokens // seq_length), seq_length))
    text = [{"input_ids": batch} for batch in windows.split(4)]
    names = refitted(family, ["ffn", "heads"], sizes.layers)
    half: dict[Any, int] = {"ffn": sizes.ffn // 2, "layers": sizes.layers * 3 // 4}

    def forward() -> None:
        for batch in text:
            model.base_model(input_ids=batch["input_ids"], use_cache=False)

    def cache(name: str) -> ScoreCache:
        return ScoreCache(model, text, ScoreStore(folder / name))

    # the first pass warms up
    forward()
    one = seconds(forward)
    figures = {
        "forward pass": one,
        "scores of all axes": seconds(lambda: cache("plain").prepare("weight_activation")),
        "scores and Gram matrices": seconds(lambda: cache("whole").prepare("weight_activation", names)),
        "another shape, from kept scores": seconds(lambda: selected(cache("whole"), half)),
        "and its Gram matrices": seconds(lambda: list(cache("whole").grams(names))),
    }
    case = f"{config.model_type}, {sizes.layers} layers x {sizes.hidden}, {windows.numel():,} tokens"
    return [
        row
        for name, value in figures.items()
        for row in (Row(case, name, "time", value, "s"), Row(case, name, "share", value / one, "forward passes"))
    ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default=str(SMOLLM2), help="config.json of a model")
    parser.add_argument("--tokens", default="4096", help="tokens of calibration text")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--json", type=Path, help="file for the rows")
    given = parser.parse_args()
    number = parse_number(given.tokens)
    if number is None:
        parser.error(f"--tokens {given.tokens} is not a number such as 32k")
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(given.config)
        rows = measured(config, int(number[0]), given.seq_length, Path(folder))
    report(rows, "scores of pruning, in forward passes", given.json)


if __name__ == "__main__":
    main()
