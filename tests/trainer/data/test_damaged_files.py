"""Whatever happens to the bytes of a file, it is read or refused with a message: never a traceback."""

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.data.file_documents import read_file
from decoct.trainer.data.file_rows import read_rows

TEXTS = [f"text number {n} \u00e9\u6f22" for n in range(40)]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
TALKS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text, "calls": [{"f": text}]}]} for text in TEXTS
]
MUTATIONS = 60


def parquet(rows: list[dict[str, Any]], **more: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, **more)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.txt": "\n".join(TEXTS).encode("utf-16"),
    "a.jsonl": LINES.encode(),
    "marked.jsonl": LINES.encode("utf-16"),
    "a.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "a.csv": ("text,b\n" + "".join(f'"{text}",1\n' for text in TEXTS)).encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
    "a.jsonl.zst": pa.Codec("zstd").compress(LINES.encode(), asbytes=True),
    "a.parquet": parquet([{"text": text} for text in TEXTS]),
    "packed.parquet": parquet([{"text": text} for text in TEXTS], compression="zstd"),
    "talks.parquet": parquet(TALKS),
}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, taken out or put in; half of the time near the end, where Parquet and zip formats keep their tables."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed)) if rng.random() < 0.5 else len(changed) - 1 - rng.randrange(min(len(changed), 300))
        if rng.random() < 0.7:
            changed[at] = rng.randrange(256)
        elif rng.random() < 0.5 and len(changed) > 40:
            del changed[at : at + rng.randrange(1, 20)]
        else:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    file = tmp_path / name
    refused: list[str] = []
    for _ in range(MUTATIONS):
        file.write_bytes(mutated(FILES[name], rng))
        try:
            if name.startswith("talks"):
                list(read_rows(file, ["messages"]))
            else:
                list(read_file(file, "text"))
        except UserError as error:
            refused.append(str(error))
    assert refused
    assert all(name in message for message in refused)
