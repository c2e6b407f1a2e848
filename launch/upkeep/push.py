"""Uploads a model folder or an export to the Hugging Face hub: what it would upload first, then one commit."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from ...models.common.json_file import read_json
from ...models.folder.folder_checks import check_model_folder
from ...models.folder.record import CONTENT, RECORD, read_record, verify_folder_files
from ...qat.footprint import weight_files
from ...qat.readers.gguf_model import find_gguf
from ...qat.readers.open import is_export
from ..run.run_folder import STAGE_FILE, StageFolder

CARD = "README.md"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_BESIDE = (CARD, "generation_config.json", "quantize_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files that belong to a folder without a record, besides those that decide its numbers."""


@dataclass(frozen=True)
class Upload:
    """What goes to the hub."""

    folder: Path
    hub_id: str
    files: dict[str, int]
    """Name -> bytes."""
    card: str | None
    """A model card to upload where the folder has none."""
    notes: list[str]
    """What a visitor of the page would miss."""

    @property
    def bytes(self) -> int:
        """Size of everything."""
        return sum(self.files.values())


def plan_upload(folder: Path, hub_id: str) -> Upload:
    """Check the folder and list its files.

    Raises:
        UserError: the name is no hub id, the folder is not whole (every byte is compared with its record), or its stage has not finished.
    """
    # the hub's own rules for names
    if not _ID.fullmatch(hub_id) or len(hub_id) > 96 or ".." in hub_id or "--" in hub_id:
        raise UserError(f"{hub_id!r} is no name on the hub; write OWNER/NAME, such as {folder.name and 'me/' + _word(folder)}")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a model folder or an export")
    _check_whole(folder)
    record = read_record(folder)
    if record.get("files"):
        # the record names all files but itself and the card, which may be written later
        names = [*record["files"], RECORD, *([CARD] if (folder / CARD).is_file() else [])]
    else:
        # without a record: the files that decide the numbers, and the usual ones beside them
        names = [file.relative_to(folder).as_posix() for pattern in (*CONTENT, *_BESIDE) for file in folder.glob(pattern)]
    files = {name: (folder / name).stat().st_size for name in sorted(set(names))}
    card = None
    if CARD not in files:
        card = _card(folder, hub_id, record)
        # a card that is still to be written is uploaded too
        files[CARD] = len(card.encode())
    return Upload(folder, hub_id, files, card, check_card(card if card is not None else (folder / CARD).read_text(encoding="utf-8"), CARD))


def _word(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-.") or "model"


def _check_whole(folder: Path) -> None:
    """UserError unless the folder is a finished model or export with every file as it was written."""
    if folder.name.endswith(".tmp"):
        raise UserError(f"{folder} is half written; wait until it has its name, or make it again")
    # the folder of a stage is whole when the stage says so
    if (folder.parent / STAGE_FILE).is_file() and StageFolder(folder.parent).read().get("state") != "done":
        raise UserError(f"the stage {folder.parent} has not finished; run its recipe to the end first")
    if find_gguf(folder) is None:
        # its message says what to give instead
        read_json(folder / "config.json")
    if read_record(folder).get("files"):
        if problems := verify_folder_files(folder):
            raise UserError(f"{folder} is not what was written: {problems[0]}; make it again, or see `decoct verify {folder}`")
    elif is_export(folder):
        weight_files(folder)
    else:
        check_model_folder(folder)


def _card(folder: Path, hub_id: str, record: dict[str, Any]) -> str:
    """A short model card for a folder that has none."""
    base = record.get("base_model")
    # a folder on this machine is no base model that a visitor could look up
    based = [f"base_model: {base}"] if isinstance(base, str) and _ID.fullmatch(base) and not Path(base).exists() else []
    kind = read_json(folder / "config.json").get("model_type", "") if (folder / "config.json").is_file() else ""
    head = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *based,
        "tags:",
        "- decoct",
        *([f"- {kind}"] if kind else []),
    ]
    made = f"Made with decoct from {base}." if isinstance(base, str) and base else "Made with decoct."
    return "\n".join([*head, "---", "", f"# {hub_id.partition('/')[2]}", "", made, ""])


def check_card(text: str, name: str) -> list[str]:
    """What the metadata of a model card lacks, a sentence each.

    Raises:
        UserError: the metadata is not what the hub takes.
    """
    import yaml

    # the hub reads the block only at the very top
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?(\n|$)", text, re.DOTALL)
    if match is None:
        return [f"{name} has no metadata (a block between --- lines at its top), so the hub shows no library, base model or license"]
    try:
        found = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise UserError(f"{name}: its metadata is not YAML ({str(error).splitlines()[0]}); mend the block between the --- lines") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}: its metadata must be lines of key: value; mend the block between the --- lines")
    for key, kinds in {
        "tags": (list,),
        "license": (str,),
        "library_name": (str,),
        "pipeline_tag": (str,),
        "base_model": (str, list),
    }.items():
        if key in found and not isinstance(found[key], kinds):
            raise UserError(f"{name}: {key} in its metadata is {str(found[key])!r:.60}; write {'a list' if kinds == (list,) else 'text'}")
    lacks = {"license": "license, so nobody knows what they may do with it", "base_model": "base_model, so the hub shows no origin"}
    return [f"{name} has no {words}" for key, words in lacks.items() if key not in found]


def visibility(hub_id: str) -> str | None:
    """'public' or 'private' of a repository that is there already; None for a new one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return "private" if HfApi().model_info(hub_id).private else "public"
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # the HTTP library behind the hub's client may change
        raise _explained(hub_id, error) from error


def upload(planned: Upload, *, private: bool, message: str) -> str:
    """Make the repository if it is new, and upload everything in one commit; returns its address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        url = str(api.create_repo(planned.hub_id, private=private, exist_ok=True))
        content = {name: planned.folder / name for name in planned.files}
        # one commit: a reader of the repository never sees half of it
        operations = [
            CommitOperationAdd(name, planned.card.encode() if name == CARD and planned.card is not None else file)
            for name, file in content.items()
        ]
        api.create_commit(planned.hub_id, operations, commit_message=message)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # see visibility
        raise _explained(planned.hub_id, error) from error
    return url


def _explained(hub_id: str, error: Exception) -> UserError:
    # by attribute: the class of the error depends on the HTTP library
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or "token" in type(error).__name__.lower():
        return UserError(
            f"the hub does not let you write {hub_id}; log in with 'hf auth login' and a token that may write, or give your own name"
        )
    first = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "no reason given")
    return UserError(
        f"{hub_id} cannot be uploaded: {type(error).__name__}: {first}. Nothing half-uploaded is visible; the same command tries again "
        "(unset HF_HUB_OFFLINE if it is set)"
    )
