"""Makes training and evaluation windows of documents once and keeps them in ``<cache>/tokens/<fingerprint>/``.

A cache entry has ``train.tokens`` and ``evaluation.tokens`` (with ``.starts`` of packed documents, or ``.lengths`` without packing) and
``manifest.json`` with the size and sha256 of each. It is written under a temporary name and renamed, so it is complete or absent; an entry
that is damaged later is made again. Tokenizing that is killed continues at the next start (``unfinished.py``, ``shared_text.py``).
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ...models.common.files import atomic_directory, check_free_space, clean_leftovers, sha256_file, sha256_json, write_json_atomic
from ...models.common.hash_cache import cached_sha256
from ...models.common.locks import waiting_for
from ...models.common.seal import seal_is_broken, sealed
from ...models.tokenizer.chat_template import check_chat_template
from ..settings import DataSettings
from .chats import FORMAT as CHAT_FORMAT
from .documents import Documents, read_documents
from .encoded_text import Helpers, encoded, forget_units
from .sides import write_sides
from .split import BLOCKS, WORDS
from .tokens import tokenizer_hash
from .windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
"""Version of the windows; raise it whenever the same settings would give other windows."""
MANIFEST = "manifest.json"
_LOG = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Tokenized text, split into training windows and held-out windows."""

    train: Windows
    evaluation: Windows
    fingerprint: str
    """sha256 of the text, the tokenizer, the window length, packing and the split."""
    text_fingerprint: str
    """sha256 of the text only."""
    description: str
    """Description of the text for messages."""
    samples: dict[str, Any] | None
    """For conversations: ``read``, ``bad`` (left out) and ``first_bad``; None for text."""
    left_out: dict[str, int]
    """What was left out, cut, replaced or is not learned, by reason."""
    path: Path
    """The cache entry, which ``open_prepared`` opens on other ranks; of a blend the folder of the entries of its parts."""

    @property
    def packed(self) -> bool:
        """Whether windows hold several documents, which models must keep separate."""
        return self.train.packed


def prepare_data(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    cache_dir: Path,
    *,
    documents: Documents | None = None,
    train: bool = True,
    helpers: Helpers | None = None,
    say: Say = _LOG.warning,
) -> PreparedData:
    """Tokenizes the text of ``settings``, or finds it in the cache (on rank 0); waits for another process that makes the same entry.

    Args:
        settings: The text, window length and split.
        tokenizer: The tokenizer.
        cache_dir: The cache folder, from ``cache.cache_dir()``.
        documents: The text, if it is already read.
        train: Whether there is training. If not, no text is kept for it, and ``data.eval_tokens`` tokens, or all, are held out.
        helpers: Other processes that encode their part of the text; None = none. The entry is the same.
        say: Called with a line about a damaged entry, and every ten seconds about the progress.

    Raises:
        UserError: the text cannot be read (see ``read_documents``), is too short, or the cache has no room.
    """
    if train and settings.eval_tokens == "all":
        raise UserError("data.eval_tokens=all leaves nothing to train on; give a number of tokens, such as 32k")
    documents = read_documents(settings) if documents is None else documents
    facts: dict[str, Any] = {
        "format": FORMAT,
        "text": documents.fingerprint,
        "tokenizer": tokenizer_hash(tokenizer),
        "seq_length": settings.seq_length,
        "packing": settings.packing,
        "eval_tokens": settings.eval_tokens,
    }
    if settings.kind == "chat":
        facts |= {"chat_template": tokenizer.chat_template, "mask_prompts": settings.mask_prompts, "chat_format": CHAT_FORMAT}
    # only where it differs from the default, so that the fingerprints of older entries stay
    if settings.reads_control_tokens != (settings.kind == "text"):
        facts["control_tokens"] = settings.reads_control_tokens
    if not train:
        facts["train"] = False
    # the rule of runs before there were blocks is not named, so that their fingerprints stay
    if settings.held_out_rule == "blocks" and settings.eval_tokens != "all":
        facts["held_out"] = BLOCKS
    fingerprint = sha256_json(facts)
    target = cache_dir / "tokens" / fingerprint
    # checked first without the lock: a run that finds a whole entry never waits for another
    if not target.exists() or _damage(target, thorough=True):
        # other processes wait here, so the same text is tokenized once
        with waiting_for(target.with_name(f"{target.name}.making"), "tokenizes the same text", say):
            # while this process waited, another one may have made the entry
            damage = _damage(target, thorough=True) if target.exists() else "missing"
            if damage:
                if damage != "missing":
                    say(f"tokenized text in {target} is damaged ({damage}); it is made again")
                if settings.kind == "chat":
                    check_chat_template(tokenizer)
                # an entry is never repaired: whatever is wrong with it, it is made from the text again
                with _readable_errors(target.parent):
                    _clear(target)
                    _build(settings, tokenizer, documents, target, {"fingerprint": fingerprint, **facts}, train, helpers, say)
    # after the entry has its name: until then they are what a next start continues with
    forget_units(target)
    return open_prepared(target)


def open_prepared(path: Path) -> PreparedData:
    """Opens a cache entry by its folder, as the other ranks do after rank 0 has made it.

    Raises:
        UserError: the entry is missing or damaged.
    """
    # without hashing: rank 0 has done it, and all ranks would read the same bytes
    if damage := _damage(path, thorough=False):
        raise UserError(
            f"tokenized text in {path} cannot be used ({damage}); run again to rebuild it (all ranks need the same DECOCT_CACHE folder)"
        )
    manifest = json.loads((path / MANIFEST).read_text())
    return PreparedData(
        train=Windows.open(path / "train", manifest["seq_length"]),
        evaluation=Windows.open(path / "evaluation", manifest["seq_length"]),
        fingerprint=manifest["fingerprint"],
        text_fingerprint=manifest["text"],
        description=manifest["description"],
        samples=manifest.get("samples"),
        left_out=manifest.get("left_out", {}),
        path=path,
    )


def _damage(path: Path, *, thorough: bool) -> str:
    """The fault of a cache entry; '' if it has none. Hashes are compared only if ``thorough``."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT or manifest["fingerprint"] != path.name:
            return f"{MANIFEST} belongs to another entry"
        if seal_is_broken(manifest):
            return f"{MANIFEST} is not what was written"
        if type(manifest["seq_length"]) is not int or manifest["seq_length"] < 1 or not {"text", "description"} <= manifest.keys():
            return f"{MANIFEST} does not describe the windows"
        for name, file in manifest["files"].items():
            if (path / name).stat().st_size != file["bytes"]:
                return f"{name} has another size"
            if thorough and cached_sha256(path / name) != file["sha256"]:
                return f"{name} has another hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}"
    return ""


def _clear(target: Path) -> None:
    """Makes room for a new entry: removes a damaged one, and leftovers of processes that died."""
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target.parent)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


@contextmanager
def _readable_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        room = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "check its permissions"
        raise UserError(
            f"the tokenized text cannot be written to {folder} ({error.strerror or error}); {room}, or set the environment variable "
            "DECOCT_CACHE to another folder. Nothing half-written was left behind."
        ) from error


def _build(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    documents: Documents,
    target: Path,
    facts: dict[str, Any],
    train: bool,
    helpers: Helpers | None,
    say: Say,
) -> None:
    try:
        with (
            # left in reverse order: the stream is closed and removed, disk errors become readable, the folder gets its name
            atomic_directory(target) as folder,
            _readable_errors(target.parent),
            # phase 1: all tokens in the order of the text
            encoded(settings, tokenizer, documents, target, folder / "stream", helpers, say) as (stream, samples, left_out),
        ):
            # windows take about as much room as the stream, which is deleted only afterwards
            check_free_space(folder, stream.tokens.nbytes, "the tokenized text (in the cache folder, environment variable DECOCT_CACHE)")
            # phase 2: the windows of both sides, read from the stream
            split = write_sides(settings, tokenizer, stream, folder, left_out, train=train)
            description = documents.description + WORDS[split.rule]
            # the mapped file is removed next
            del stream
            # hashed as written here; the seal protects the manifest itself
            files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.glob("*.*"))}
            described = {"description": description, "samples": samples, "left_out": dict(left_out)}
            write_json_atomic(folder / MANIFEST, sealed({**facts, **described, "files": files}))
    except UserError:
        # the target may exist because another run has finished the same entry in the meantime: then that one is used
        if _damage(target, thorough=False):
            raise
