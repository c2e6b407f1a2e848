"""Whether memory and start-up time grow with the corpus: a start on generated token caches of several sizes, each in fresh processes.

    python benchmarks/corpus_size.py [--tokens 10M 1B] [--seq-length 2048] [--folder DIR] [--json FILE]

The token ids are generated in place of tokenizing, which takes one batch of documents at a time whatever the corpus. Everything behind it
is a run's own: held-out documents, windows, manifest, and the start that opens them. 1B tokens take 8 GB of disk for a while, and are
removed at the end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, report

from decoct.configs.scalars import parse_number
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.trainer.data import encoded_text
from decoct.trainer.data.documents import Documents
from decoct.trainer.data.order import StepBatches
from decoct.trainer.data.prepared_data import PreparedData, prepare_data
from decoct.trainer.data.tokens import TokenStream, mapped_tokens
from decoct.trainer.data.unfinished import Unfinished
from decoct.trainer.settings import DataSettings

DOCUMENT_TOKENS = 1000
"""Mean length of a document, half of what web text has."""
STEP_WINDOWS = 64
_BLOCK = 4_000_000


@contextmanager
def watched(figures: dict[str, float], name: str) -> Iterator[None]:
    """Adds seconds, and the most anonymous memory beyond that at the beginning: mapped files are the kernel's to give up."""
    done, peak, before = threading.Event(), 0, anonymous_bytes()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.perf_counter()
    try:
        yield
    finally:
        figures[f"{name}: time"] = time.perf_counter() - began
        done.set()
        watcher.join()
        figures[f"{name}: memory"] = (max(peak, anonymous_bytes()) - before) / 1e6


def anonymous_bytes() -> int:
    """Anonymous memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def generate(work: Unfinished, tokens: int, vocabulary: int) -> TokenStream:
    """Random ids in documents of random lengths, as tokenizing leaves them."""
    draws = np.random.default_rng(0)
    for begin in range(0, tokens, _BLOCK):
        work.write(draws.integers(0, vocabulary, min(_BLOCK, tokens - begin), dtype=np.int32).data)
    work.close()
    count = tokens // DOCUMENT_TOKENS
    bounds = np.concatenate([[0], np.sort(draws.integers(1, tokens, count - 1)), [tokens]]).astype(np.int64)
    return TokenStream(mapped_tokens(work.stream), bounds, draws.integers(0, 2**63, count).astype(np.uint64))


def prepared(tokens: int, seq_length: int, folder: Path) -> PreparedData:
    """The entry of the generated text: made, or found in the cache."""
    tokenizer = train_tokenizer(iter(["a few words of text"] * 20), 280)
    settings = DataSettings(files=("generated",), seq_length=seq_length, eval_tokens=64_000)
    documents = Documents(f"{tokens:,} generated tokens", f"{tokens:064d}", tuple)
    return prepare_data(settings, tokenizer, folder, documents=documents)


def make(tokens: int, seq_length: int, folder: Path) -> dict[str, float]:
    """Split, windows and hashes of a generated stream."""
    figures: dict[str, float] = {}

    def written(_: Any, tokenizer: Any, work: Unfinished, **__: Any) -> TokenStream:
        return generate(work, tokens, len(tokenizer))

    encoded_text.write_tokens = written
    with watched(figures, "index and windows"):
        prepared(tokens, seq_length, folder)
    return figures


def begin(tokens: int, seq_length: int, folder: Path) -> dict[str, float]:
    """What a start does: finds the entry, makes the order of the windows, reads those of a step."""
    figures: dict[str, float] = {}
    with watched(figures, "open"):
        data = prepared(tokens, seq_length, folder)
    with watched(figures, "first step"):
        batches = StepBatches(
            data.train, global_batch=STEP_WINDOWS, micro_batch=STEP_WINDOWS, rank=0, world=1, seed=0, start_step=0, total_steps=1
        )  # fmt: skip
        windows = [data.train[index] for index in next(iter(batches))]
    assert len(windows) == STEP_WINDOWS
    with watched(figures, "step"):
        for index in batches.positions(STEP_WINDOWS, STEP_WINDOWS):
            assert len(data.train[index]["input_ids"]) == seq_length
    return figures


def main() -> None:
    """Print the figures of each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", nargs="+", default=["10M", "1B"])
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="where the caches are made (default: the temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(json.dumps({"make": make, "begin": begin}[given.work](int(given.tokens[0]), given.seq_length, given.folder)))
        return
    rows: list[Row] = []
    for tokens in given.tokens:
        number = parse_number(tokens)
        if number is None:
            parser.error(f"--tokens {tokens} is not a number such as 10M")
        with tempfile.TemporaryDirectory(dir=given.folder, prefix="corpus-") as folder:
            more = ["--tokens", str(int(number[0])), "--seq-length", str(given.seq_length), "--folder", folder]
            for work, system in (("make", "made once"), ("begin", "first start"), ("begin", "next start")):
                done = subprocess.run([sys.executable, __file__, "--work", work, *more], stdout=subprocess.PIPE, text=True, check=True)
                for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                    rows.append(Row(f"{tokens} tokens", system, name, value, "s" if name.endswith("time") else "MB"))
    report(rows, "a start on a prepared text, by its size", given.json)


if __name__ == "__main__":
    main()
