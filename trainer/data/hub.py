"""Datasets of the Hugging Face hub: downloaded whole, streamed up to ``max_documents``, or read shard by shard (``hub_shards``)."""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ..settings import DataSettings
from .conversations import COLUMNS, SHAPES, is_conversation
from .file_documents import check_text_column, missing_field, whole_text
from .file_rows import Row, without_nulls
from .pieces import HubPiece

if TYPE_CHECKING:
    import datasets

_ROWS = 1024
"""Rows that are fetched together."""


def named(settings: DataSettings) -> str:
    """The dataset's name, configuration and split for messages."""
    return f"{settings.hub}" + (f" {settings.hub_config}" if settings.hub_config else "") + f" {settings.hub_split}"


def load_hub(settings: DataSettings) -> "tuple[datasets.Dataset | datasets.IterableDataset, str]":
    """The dataset and its revision.

    With ``max_documents`` or ``hub_shards`` it is streamed: what is read is fetched when it is read, and nothing of it stays on the disk.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets
    from huggingface_hub import HfApi

    name = str(settings.hub)
    local = Path(name).exists()
    try:
        if settings.hub_shards and local:
            # by names, sizes and times of the files
            builder = datasets.load_dataset_builder(name, settings.hub_config)
            return streamed(name, settings.hub_config, settings.hub_split, None), str(builder.hash)
        # the commit is looked up first: a branch may move between two starts, and what is streamed is never hashed
        if (settings.max_documents or settings.hub_shards) and not local:
            revision = str(HfApi().dataset_info(name).sha)
            return streamed(name, settings.hub_config, settings.hub_split, revision), revision
        dataset = datasets.load_dataset(name, settings.hub_config, split=settings.hub_split)
        return dataset, dataset._fingerprint
    # the hub's client and the readers of all formats raise errors of many libraries; each means that this data cannot be loaded
    except Exception as error:
        raise UserError(
            f"data.hub={name!r} (data.hub_config={settings.hub_config!r}, data.hub_split={settings.hub_split!r}) cannot be loaded: "
            f"{type(error).__name__}: {error}. Check these keys and the network, or give local text by data.files."
        ) from error


def streamed(name: str, config: str | None, split: str, revision: str | None) -> "datasets.IterableDataset":
    """A dataset whose rows are fetched when they are read."""
    import datasets

    # a local folder has no revision, and its loader knows no such argument
    more: dict[str, Any] = {} if revision is None else {"revision": revision}
    return datasets.load_dataset(name, config, split=split, **more, streaming=True)


def check_columns(dataset: Any, settings: DataSettings) -> list[str]:
    """The columns that are read.

    Raises:
        UserError: there is no column of text, or for conversations none of their shapes.
    """
    # a streamed dataset may know its columns only after its first row
    names = dataset.column_names or list(next(iter(dataset), {}))
    if settings.kind == "chat":
        columns = [name for name in COLUMNS if name in names]
        if not is_conversation(columns):
            raise UserError(f"data.hub {named(settings)} has none of {', '.join(SHAPES)}; it has {', '.join(names)}")
        return columns
    if settings.text_field not in names:
        raise missing_field(settings.text_field, names, f"data.hub {named(settings)}")
    if dataset.features is not None:
        kind = dataset.features.arrow_schema.field(settings.text_field).type
        check_text_column(kind, settings.text_field, f"data.hub {named(settings)}")
    return [settings.text_field]


def texts_in(dataset: Any, field: str) -> Iterator[str]:
    """Yields the texts in a column; a missing one is blank."""
    column = dataset.select_columns([field])
    return (text or "" for batch in column.iter(batch_size=_ROWS) for text in batch[field])


def rows_in(dataset: Any, columns: list[str], where: str = "") -> Iterator[Row]:
    """Yields the conversations of a dataset with their places; ``where`` precedes the number of the row."""
    return ((f"{where}row {number}", without_nulls(row)) for number, row in enumerate(dataset.select_columns(columns), 1))


def shard_texts(piece: HubPiece, field: str, notes: Counter[str]) -> Iterator[str]:
    """Yields the texts of a shard, blank ones too; ``notes`` counts replacements.

    Raises:
        UserError: the shard cannot be read.
    """
    return (whole_text(text, notes) for text in _read(piece, partial(texts_in, field=field)))


def shard_rows(piece: HubPiece) -> Iterator[Row]:
    """Yields the conversations of a shard.

    Raises:
        UserError: the shard cannot be read.
    """

    def rows(dataset: Any) -> Iterator[Row]:
        names = dataset.column_names or list(next(iter(dataset), {}))
        return rows_in(dataset, [name for name in COLUMNS if name in names], f"shard {piece.shard + 1}, ")

    return _read(piece, rows)


@lru_cache(maxsize=2)
def _opened(name: str, config: str | None, split: str, revision: str | None) -> "datasets.IterableDataset":
    # the listing of a dataset of many files takes seconds, and each process reads many of its shards
    return streamed(name, config, split, revision)


def _read(piece: HubPiece, read: Any) -> Iterator[Any]:
    try:
        dataset = _opened(piece.name, piece.config, piece.split, piece.revision)
        if dataset.num_shards != piece.shards:
            raise UserError(
                f"data.hub {piece.name} has {dataset.num_shards} shards here and {piece.shards} on rank 0; install the same datasets"
            )
        yield from read(dataset.shard(num_shards=piece.shards, index=piece.shard))
    except UserError:
        raise
    # many libraries again, and a network that may fail at any row; the library has tried it several times
    except Exception as error:
        raise UserError(
            f"data.hub {piece.name}: shard {piece.shard + 1} of {piece.shards} cannot be read ({type(error).__name__}: {error}); "
            "start again: shards that are tokenized are kept"
        ) from error
