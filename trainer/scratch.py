"""Scratch teacher: a byte-level BPE tokenizer and a small Llama, trained on the text of the run and cached for later runs.

The folder is ``<cache>/teachers/<hash of text, tokenizer, model and training settings>/``; an interrupted training resumes there.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..losses.settings import LossSettings
from ..models.common.cache_folder import cache_dir
from ..models.common.errors import UserError
from ..models.common.files import atomic_directory, clean_leftovers, sha256_json
from ..models.common.locks import waiting_for
from ..models.folder.record import check_record, write_record
from ..models.settings import ScratchSettings
from ..models.tokenizer.scratch_tokenizer import train_tokenizer
from .data.split import BLOCKS
from .scratch_fields import scratch_fields
from .settings import DataSettings, PretrainSettings, TrainerSettings

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .data.documents import Documents
    from .data.prepared_data import PreparedData

_FORMAT = 2
_LOG = logging.getLogger(__name__)
LOCK = "lock"
"""Lock file in the teacher's folder, held by the run that trains it."""


@dataclass(frozen=True)
class ScratchTeacher:
    """Folder of a scratch teacher and its tokenizer, which need not exist yet."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.folder / "tokenizer"

    @property
    def model(self) -> Path:
        """Model folder of the trained teacher."""
        return self.folder / "model"


def locate_scratch(settings: ScratchSettings, data: DataSettings, trainer: TrainerSettings, text: "Documents", seed: int) -> ScratchTeacher:
    """Cache folder for these settings and this text. Only values that change the teacher are part of its hash."""
    key = sha256_json(
        {
            # increased when the same settings give another teacher
            "format": _FORMAT,
            "scratch": asdict(settings),
            "text": text.fingerprint,
            "seq_length": data.seq_length,
            "packing": data.packing,
            "eval_tokens": data.eval_tokens,
            **({"held_out": BLOCKS} if data.held_out_rule == "blocks" else {}),
            "batch": trainer.global_batch_tokens,
            "precision": trainer.precision,
            "clip": trainer.gradient_clip,
            "seed": seed,
        }
    )
    return ScratchTeacher(cache_dir() / "teachers" / key[:32])


def make_tokenizer(settings: ScratchSettings, place: ScratchTeacher, text: "Documents") -> None:
    """Train the tokenizer (rank 0), unless it exists or another run trains it at the same time."""
    if place.tokenizer.exists():
        check_scratch(place, place.tokenizer)
        return
    # other runs with the same text and settings wait here, and then use this tokenizer
    with waiting_for(place.folder / LOCK, "makes the same scratch teacher", _LOG.warning):
        if place.tokenizer.exists():
            return
        # safe under the lock: no other run writes here now
        clean_leftovers(place.folder)
        # outside the temporary folder: a damaged document stops the training before anything is written
        tokenizer = train_tokenizer(iter(text), settings.vocab)
        with atomic_directory(place.tokenizer) as folder:
            tokenizer.save_pretrained(folder)
            write_record(folder, {"kind": "tokenizer"})


def check_scratch(place: ScratchTeacher, folder: Path) -> None:
    """Compare a cached part of a scratch teacher with its record.

    Args:
        place: Place of the teacher.
        folder: Folder of its tokenizer or of its model.

    Raises:
        UserError: a file has changed. The message names the folder to delete.
    """
    try:
        check_record(folder)
    except UserError as error:
        raise UserError(f"a scratch teacher of an earlier run is damaged; delete {place.folder}, and it is made again. {error}") from error


def scratch_config(settings: ScratchSettings, v_eff: int, context: int, end: int | None = None) -> "LlamaConfig":
    """Config of a scratch teacher, of the fields of ``scratch_fields``."""
    from transformers import LlamaConfig

    return LlamaConfig(**scratch_fields(settings, v_eff, context, end))


def new_llama(settings: ScratchSettings, tokenizer: "PreTrainedTokenizerBase", v_eff: int, context: int, seed: int) -> "PreTrainedModel":
    """Small Llama (fp32, CPU) whose random weights depend only on ``seed``."""
    from transformers import LlamaForCausalLM

    end: Any = tokenizer.eos_token_id
    # the global random state stays as it was: a cached teacher must not change the run after it
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(scratch_config(settings, v_eff, context, end))


def teacher_training(settings: ScratchSettings) -> PretrainSettings:
    """Training settings of a scratch teacher: cross-entropy on the text."""
    return PretrainSettings(
        tokens=settings.tokens,
        learning_rate=settings.learning_rate,
        weight_decay=0.1,
        # there is no teacher to learn from yet
        loss=LossSettings(hard_weight=1.0),
    )


def scratch_record(settings: ScratchSettings, text: "PreparedData") -> dict[str, Any]:
    """Content of decoct.json for a scratch teacher."""
    return {"kind": "teacher", "base_model": "trained from scratch", "scratch": asdict(settings), "text": text.description}
