"""Resolves the name of a model (a folder or a hub id) to a folder on this machine.

A hub id becomes a snapshot in the Hugging Face cache, and ``loading`` checks that folder like any other. Pickled weights are never
downloaded. If the hub cannot be reached, a cached snapshot is used. decoct asks the hub once with a short time limit, so a machine without
a network gets an answer in seconds.
"""

import re
from pathlib import Path

from ..common.errors import UserError
from ..common.files import storage_error

HUB_TIMEOUT_SECONDS = 5.0
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
# Exact names: some repositories hold a second copy of their weights (consolidated.safetensors).
_WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors")


def local_folder(path_or_hub_id: str | Path, *, revision: str | None = None) -> Path | None:
    """The local folder of this name, or None when the name can only be a hub id.

    Raises:
        UserError: the name is a file, is neither a folder nor a possible hub id, or is a folder and has a ``revision``.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{path_or_hub_id} is a folder, and a folder has no revision ({revision!r}); leave the revision out")
        return folder
    if folder.exists():
        raise UserError(
            f"{path_or_hub_id} is a file; give a model folder (config.json, *.safetensors, tokenizer), a .gguf file or a hub id"
        )
    name = str(path_or_hub_id)
    # 'model.gguf' could be a hub id by its letters, and nobody means one
    if name.lower().endswith((".gguf", ".safetensors", ".bin")):
        raise UserError(f"no such file: {path_or_hub_id}; give a model folder, a .gguf file or a hub id")
    # the hub's own rules (validate_repo_id)
    if not _HUB_ID.fullmatch(name) or len(name) > 96 or ".." in name or "--" in name:
        raise UserError(f"no such folder: {path_or_hub_id}; give a model folder or a hub id such as HuggingFaceTB/SmolLM2-135M")
    return None


def model_name(path_or_hub_id: str | Path) -> str:
    """Name of a model in reports and cards: a hub id, or the last part of a path, never a whole path of this machine."""
    # a path could name the user or the machine
    return Path(path_or_hub_id).name if Path(path_or_hub_id).exists() else str(path_or_hub_id)


def hub_commit(hub_id: str, revision: str | None = None) -> str:
    """Resolve ``revision`` (default: the main branch) of a hub model to a commit, by the hub or by the local cache.

    Raises:
        UserError: the hub does not know the model or refuses access, or neither the hub nor the cache can answer.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
    except Exception as error:  # broad: the HTTP library behind the hub client may change; no network, no DNS, time-out, offline mode
        cached = None if _refused(error) else _cached_snapshot(hub_id, revision, None)
        if cached is None:
            raise _explained(hub_id, revision, error) from error
        # a snapshot folder is named by its commit
        return cached.name
    if commit is None:
        raise UserError(f"the hub gave no commit for {hub_id}; try again, or give a folder")
    return commit


def hub_snapshot(hub_id: str, *, revision: str | None = None, weights: bool = True, code: bool = False) -> Path:
    """Download a hub model or find it in the cache.

    Args:
        hub_id: Name of the model on the hub.
        revision: Branch, tag or commit; default: the main branch.
        weights: Also fetch safetensors, not only config and tokenizer.
        code: Also fetch Python files.

    Returns:
        The folder of the snapshot.

    Raises:
        UserError: as ``hub_commit``, or the download failed.
    """
    from huggingface_hub import snapshot_download

    hub_commit(hub_id, revision)  # fails within seconds; the download itself would retry for a long time
    # Python files only for code that the user asks for, never pickled weights
    patterns = [*_SMALL_FILES, *(_WEIGHT_FILES if weights else ()), *(("*.py",) if code else ())]
    try:
        # by the name of the revision, not its commit: only then does the cache record which commit the name means, for later offline use
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # see hub_commit
        cached = None if _refused(error) else _cached_snapshot(hub_id, revision, patterns)
        if cached is None:
            raise _explained(hub_id, revision, error) from error
        return cached


def snapshot_root(folder: Path) -> Path:
    """The folder that must contain the files of ``folder`` after links are resolved: itself, or its repository in the hub's cache."""
    folder = folder.resolve()
    # files of a snapshot are links to ../../blobs, inside the repository's cache folder
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent
    return folder


def _cached_snapshot(hub_id: str, revision: str | None, patterns: list[str] | None) -> Path | None:
    """The cached snapshot if it is complete for ``patterns``; with None as patterns, an incomplete snapshot counts too."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # local_files_only: the hub has just not answered, and would be waited for again
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)
        return Path(partial) if partial is not None and patterns is None else None


def _refused(error: Exception) -> bool:
    """Whether the hub answered and refused."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)


def _explained(hub_id: str, revision: str | None, error: Exception) -> UserError:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    # a full disk is not a missing network
    if readable := storage_error(error, Path(hub_id), "store in the Hugging Face cache the model"):
        return readable
    # before _refused: GatedRepoError derives from RepositoryNotFoundError
    if isinstance(error, GatedRepoError):
        return UserError(f"the hub model {hub_id} is gated: accept its terms on its page, then log in with 'hf auth login'")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"the hub model {hub_id} has no revision {revision!r}; give a branch, tag or commit of it")
    if _refused(error):
        return UserError(
            f"{hub_id!r} is neither a folder here nor a model that the hub shows you; check the name, or log in with 'hf auth login' "
            "when it is private"
        )
    reason = str(error).splitlines()[0] if str(error) else "no answer"
    return UserError(
        f"{hub_id!r}: there is no such folder here, and as a hub id it is not complete in the local cache and the hub cannot be reached "
        f"({type(error).__name__}: {reason}); give the path of a model folder, or connect to the network (and unset HF_HUB_OFFLINE) "
        "so that it can be downloaded"
    )
