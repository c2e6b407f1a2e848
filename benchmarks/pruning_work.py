"""What a process of benchmarks/pruning.py does: runs recipes, writes a model with a random mask or the windows, or times models.

python pruning_work.py '{"kind": "recipes", "recipes": [[FILE, RUN FOLDER], ...]}'
python pruning_work.py '{"kind": "random", "model": FOLDER, "out": FOLDER, "keep": 0.5}'
python pruning_work.py '{"kind": "windows", "model": FOLDER, "out": FILE, "data": {...}, "tokens": "32k"}'
python pruning_work.py '{"kind": "speed", "model": FOLDER, "others": {NAME: FOLDER}, "turns": 5, "out": FILE}'
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
GENERATED = 64


def recipes(told: dict[str, Any]) -> None:
    """Run recipes one after the other, all in this process; the seconds of a run's stages are kept beside it."""
    from real_models import stage_seconds

    import decoct

    for index, (file, place) in enumerate(told["recipes"], 1):
        began = time.perf_counter()
        decoct.run(file, out=place, quiet=True)
        seconds = stage_seconds(Path(place))
        (Path(place) / "cost.json").write_text(json.dumps({"seconds": seconds}))
        words = f"{Path(place).name}: {time.perf_counter() - began:.1f} s, of which {seconds:.1f} s in its stages"
        print(f"[{index}/{len(told['recipes'])}] {words}", file=sys.stderr, flush=True)


def random_mask(told: dict[str, Any]) -> None:
    """Set random weights of the decoder's linears to zero: as many in each matrix, or in each group of a pattern."""
    import torch
    from transformers import AutoTokenizer

    from decoct.models.families import decoder_linears
    from decoct.models.folder.loading import load_model
    from decoct.models.pruning.pattern import parse_pattern
    from decoct.models.pruning.selection import exact_count, largest, pattern_mask

    model = load_model(told["model"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for linear in decoder_linears(model).values():
        weight = linear.weight.data
        scores = torch.rand(weight.shape, generator=generator)
        if pattern := told.get("pattern"):
            weight.mul_(pattern_mask(scores, parse_pattern(pattern)))
        else:
            weight.mul_(largest(scores, exact_count(told["keep"], weight.numel())))
    model.bfloat16().save_pretrained(told["out"])
    AutoTokenizer.from_pretrained(told["model"]).save_pretrained(told["out"])


def windows(told: dict[str, Any]) -> None:
    """Write the calibration windows of a recipe with this text and seed 0: ``input_ids`` int64 [N, S]."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from decoct.configs.scalars import parse_number
    from decoct.models.common.cache_folder import cache_dir
    from decoct.trainer.data.prepared_data import prepare_data
    from decoct.trainer.settings import DataSettings
    from decoct.trainer.stages.calibration import calibration_text

    tokens = parse_number(told["tokens"])
    assert tokens is not None
    prepared = prepare_data(DataSettings(**told["data"]), AutoTokenizer.from_pretrained(told["model"]), cache_dir())
    text = calibration_text(prepared.train, int(tokens[0]), 0)
    save_file({"input_ids": torch.cat([batch["input_ids"] for batch in text.batches])}, Path(told["out"]))


def speed(told: dict[str, Any]) -> None:
    """Write {name: median over turns of (tokens per second of a model over those of the whole one just before it)}, and the whole one's."""
    import torch
    from transformers import AutoModelForCausalLM

    # as the models are stored, and in one thread: what is compared is the shapes
    torch.set_num_threads(1)
    whole: Any = AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32)
    seconds(whole)
    found: dict[str, float] = {}
    own: list[float] = []
    for name, folder in told["others"].items():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        seconds(model)
        ratios = []
        for _ in range(told["turns"]):
            own.append(seconds(whole))
            ratios.append(own[-1] / seconds(model))
        found[name] = statistics.median(ratios)
    Path(told["out"]).write_text(json.dumps({"whole": GENERATED / statistics.median(own), "ratios": found}))


def seconds(model: Any) -> float:
    """Seconds of generating one text of ``GENERATED`` tokens, greedily with a cache."""
    import torch

    prompt = torch.ones(1, 1, dtype=torch.int64)
    began = time.perf_counter()
    with torch.inference_mode():
        # an end of text must not cut the measurement short
        model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=GENERATED, min_new_tokens=GENERATED)
    return time.perf_counter() - began


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    {"recipes": recipes, "random": random_mask, "windows": windows, "speed": speed}[job["kind"]](job)
