"""Shared by the tests of training: the tiny stage of ``support/training_case.py``, text, a trained folder, a stage's context."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from decoct.models.folder.model_folder import save_model_folder
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.trainer.data.prepared_data import PreparedData, prepare_data
from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.settings import DataSettings, TrainerSettings
from decoct.trainer.stages.context import RunContext, StageContext

from ..support import training_case

MakeContext = Callable[..., StageContext]
SEQ = 32


@pytest.fixture(scope="session")
def training() -> ModuleType:
    """The module itself: Case, run_case, tiny_model, RandomWindows."""
    return training_case


@pytest.fixture
def training_command() -> list[str]:
    """The arguments of a Python that runs the stage; add WORK, KIND and options."""
    return [training_case.__file__]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Sums in one order whatever the machine; and threads waiting for each other on busy cores slow tiny models down a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _sentences() -> list[str]:
    """Sentences of a small grammar: something a tiny model can learn."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ra") for b in ("do", "fi", "gu", "ta")]
    starts = [(rng.randrange(24), rng.randrange(4, 12)) for _ in range(1600)]
    return [" ".join(words[(first + 5 * i) % 24] for i in range(count)) + "." for first, count in starts]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 text files."""
    folder = tmp_path_factory.mktemp("text")
    lines = _sentences()
    for part in range(16):
        (folder / f"{part:02d}.txt").write_text("\n".join(lines[part * 100 : part * 100 + 100]) + "\n")
    return folder


@pytest.fixture(scope="session")
def words(texts: Path) -> PreTrainedTokenizerBase:
    return train_tokenizer(iter([file.read_text() for file in sorted(texts.iterdir())]), 300)


@pytest.fixture(scope="session")
def prepared(texts: Path, words: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreparedData]:
    """``prepared(**settings)``: the text in windows of 32 tokens; other ``files`` where they are given."""
    cache = tmp_path_factory.mktemp("cache")

    def prepare(**settings: Any) -> PreparedData:
        given = {"files": (str(texts / "*.txt"),), "seq_length": SEQ, "eval_tokens": 2048, **settings}
        return prepare_data(DataSettings(**given), words, cache)

    return prepare


@pytest.fixture(scope="session")
def trained_folder(prepared: Callable[..., PreparedData], words: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers that has learned the grammar, in bf16."""
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    windows = prepared().train
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0)
    order = torch.Generator().manual_seed(0)
    model.train()
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * (1 - step / 150)
        rows = [windows[index] for index in torch.randint(len(windows), (16,), generator=order).tolist()]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        loss: Any = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained") / "model"
    return save_model_folder(folder, model.eval(), words, {"kind": "pretrain"}, dtype=torch.bfloat16)


@pytest.fixture
def make_context(
    trained_folder: Path, prepared: Callable[..., PreparedData], words: PreTrainedTokenizerBase, tmp_path: Path
) -> MakeContext:
    """``make_context(name, input=, data=, seed=)``: a stage in a new folder; what it says goes to ``run.console.file``."""

    def make(name: str, *, kind: str = "quantize", **changes: Any) -> StageContext:
        (tmp_path / name).mkdir(exist_ok=True)
        shared: dict[str, Any] = {
            "teacher": None,
            "data": changes.pop("data", None) or prepared(),
            "tokenizer": words,
            "v_eff": len(words),
            "trainer": TrainerSettings(precision="32"),
            "seed": 0,
            "metrics": MetricsSink(None),
            "console": Console(file=io.StringIO(), width=200),
        }
        run = RunContext(**{key: changes.pop(key, value) for key, value in shared.items()})
        facts: dict[str, Any] = {
            "run": run,
            "name": name,
            "kind": kind,
            "folder": tmp_path / name,
            "key": "key",
            "input": str(trained_folder),
            "input_revision": None,
            "record": {"base_model": "tiny", "run": "test"},
        }
        return StageContext(**{**facts, **changes})

    return make
