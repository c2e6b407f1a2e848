"""The embedded teacher: a byte-level BPE tokenizer and a small Llama trained on the run's own text, cached for the next run.

It lives in ``<cache>/teachers/<hash of text, tokenizer, model and training settings>/``; a broken-off training resumes there.
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
from .settings import DataSettings, PretrainSettings, TrainerSettings

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .data.documents import Documents
    from .data.prepared_data import PreparedData

_FORMAT = 2
_LOG = logging.getLogger(__name__)
LOCK = "lock"
"""File in the teacher's folder that the run holds which makes it."""


@dataclass(frozen=True)
class ScratchTeacher:
    """Where a scratch teacher and its tokenizer are, or will be."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer alone."""
        return self.folder / "tokenizer"

    @property
    def model(self) -> Path:
        """The finished teacher's model folder."""
        return self.folder / "model"


def locate_scratch(settings: ScratchSettings, data: DataSettings, trainer: TrainerSettings, text: "Documents", seed: int) -> ScratchTeacher:
    """The cache folder that these settings and this text lead to."""
    key = sha256_json(
        {
            "format": _FORMAT,
            "scratch": asdict(settings),
            "text": text.fingerprint,
            "seq_length": data.seq_length,
            "packing": data.packing,
            "eval_tokens": data.eval_tokens,
            "batch": trainer.global_batch_tokens,
            "precision": trainer.precision,
            "clip": trainer.gradient_clip,
            "seed": seed,
        }
    )
    return ScratchTeacher(cache_dir() / "teachers" / key[:32])


def make_tokenizer(settings: ScratchSettings, place: ScratchTeacher, text: "Documents") -> None:
    """Train the tokenizer, unless it is there or another run makes it meanwhile (rank 0)."""
    if place.tokenizer.exists():
        check_scratch(place, place.tokenizer)
        return
    with waiting_for(place.folder / LOCK, "makes the same scratch teacher", _LOG.warning):
        if place.tokenizer.exists():
            return
        clean_leftovers(place.folder)
        tokenizer = train_tokenizer(iter(text), settings.vocab)
        with atomic_directory(place.tokenizer) as folder:
            tokenizer.save_pretrained(folder)
            write_record(folder, {"kind": "tokenizer"})


def check_scratch(place: ScratchTeacher, folder: Path) -> None:
    """Compare a part of a scratch teacher that an earlier run made with its record.

    Args:
        place: The teacher.
        folder: Its tokenizer's folder, or its model's.

    Raises:
        UserError: a file is not the one that was written, with the way to have it made again.
    """
    try:
        check_record(folder)
    except UserError as error:
        raise UserError(f"a scratch teacher of an earlier run is damaged; delete {place.folder}, and it is made again. {error}") from error


def scratch_config(settings: ScratchSettings, v_eff: int, context: int, end: int | None = None) -> "LlamaConfig":
    """The config of a scratch teacher.

    Args:
        settings: Its shape.
        v_eff: Tokens of its tokenizer.
        context: Longest window it will see.
        end: Id of the end-of-text token.
    """
    from transformers import LlamaConfig

    if settings.hidden % settings.heads or settings.heads % settings.kv_heads:
        raise UserError(
            f"teacher.scratch: hidden={settings.hidden} must be divisible by heads={settings.heads}, "
            f"and heads by kv_heads={settings.kv_heads}; change one of the three"
        )
    return LlamaConfig(
        vocab_size=v_eff,
        hidden_size=settings.hidden,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=max(context, 2048),
        tie_word_embeddings=settings.tie_embeddings,
        # The usual 0.02 is meant for widths of thousands; a narrow model starts too flat with it (docs/lab-book.md).
        initializer_range=settings.hidden**-0.5,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
    )


def new_llama(settings: ScratchSettings, tokenizer: "PreTrainedTokenizerBase", v_eff: int, context: int, seed: int) -> "PreTrainedModel":
    """A small Llama with random weights; every weight comes from ``seed``."""
    from transformers import LlamaForCausalLM

    end: Any = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(scratch_config(settings, v_eff, context, end))


def teacher_training(settings: ScratchSettings) -> PretrainSettings:
    """How a scratch teacher is trained."""
    return PretrainSettings(
        tokens=settings.tokens,
        learning_rate=settings.learning_rate,
        weight_decay=0.1,
        loss=LossSettings(hard_weight=1.0),
    )


def scratch_record(settings: ScratchSettings, text: "PreparedData") -> dict[str, Any]:
    """decoct.json of a scratch teacher."""
    return {"kind": "teacher", "base_model": "trained from scratch", "scratch": asdict(settings), "text": text.description}
