"""verify and the readers behind it refuse a config.json with absurd numbers beside any kind of export, at once."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decoct.models.common.errors import UserError
from decoct.qat.export.export import export_folder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.verify.verify import verify_folder

ABSURD: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**7),
    ("num_hidden_layers", 900),
    ("num_hidden_layers", True),
    ("hidden_size", 2**40),
    ("vocab_size", 2**31),
    ("num_attention_heads", 0),
    ("intermediate_size", 10**12),
    ("num_experts", 10**9),
]


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq", "gguf"])
def test_every_reader_of_exports_refuses_them(quantized_folder: Callable[..., Path], tmp_path: Path, form: str) -> None:
    export = tmp_path / "export"
    export_folder(quantized_folder(group_size=32, intermediate_size=64), export, form, runtimes=False)
    (export / "decoct.json").unlink()
    assert verify_folder(export, runtimes=False).ok
    config = json.loads((export / "config.json").read_text())
    for number, (name, value) in enumerate(ABSURD):
        damaged = tmp_path / f"damaged-{number}"
        shutil.copytree(export, damaged)
        (damaged / "config.json").write_text(json.dumps({**config, name: value}))
        started = time.process_time()
        problems = verify_folder(damaged, runtimes=False).problems
        assert any("config.json" in problem for problem in problems), (name, value, problems)
        with pytest.raises(UserError, match=r"config\.json|cannot be loaded"):
            load_exported_model(damaged)
        assert time.process_time() - started < 3, (name, value)
