"""Loading a model so that what comes back is what the files say, or a readable refusal.

transformers follows '../' in a local index file, falls back to pickled weights and fills missing weights with random numbers under a
warning. Here the folder is checked before anything is loaded (``folder_check``) and the result afterwards.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config_check import check_numbers, check_size
from .errors import UserError
from .folder_check import check_model_folder
from .hub import hub_snapshot, local_folder
from .inputs import check_text_model
from .json_file import read_json
from .quiet import quiet_transformers
from .record import check_record

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
_SHOWN = 5
_PIECE = 2**22
_logger = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    *,
    dtype: "torch.dtype",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: "str | torch.device" = "cpu",
) -> "PreTrainedModel":
    """Load a causal language model from a folder or hub id, in ``dtype``, in eval mode, on ``device``.

    ``from_pretrained`` returns eval mode and trainers keep it: whoever trains calls ``.train()``.

    Raises:
        UserError: the folder fails ``check_model_folder`` or its config ``check_numbers``, it is not a causal LM that transformers
            knows, weights are missing, unexpected or of another shape (a tied head may be missing), or a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM

    folder = find_model_folder(path, revision, trust_remote_code, weights=True)
    files = check_model_folder(folder)
    if not trust_remote_code:
        config = load_config(folder)
        check_text_model(path, config)
        check_size(path, config, files)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below with our own words
            )
    except MemoryError:
        raise
    except Exception as error:
        raise _not_loadable(path, "a causal language model", error) from error
    model, report = loaded
    check_report(path, model, report)
    settle_ties(path, model)
    _check_finite(path, model, dtype)
    return model.to(device).eval()


def load_tokenizer(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder or hub id.

    Raises:
        UserError: there is none, or it cannot be read. (transformers alone would make up an empty one from the model type.)
    """
    from transformers import AutoTokenizer

    folder = find_model_folder(path, revision, trust_remote_code, weights=False)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        raise UserError(f"{path} has no tokenizer (tokenizer.json or a vocabulary file); copy the tokenizer's files into the folder")
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _not_loadable(path, "a tokenizer", error) from error


def load_config(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """Load the config of a folder or hub id (no weights are read or downloaded)."""
    from transformers import AutoConfig

    folder = find_model_folder(path, revision, trust_remote_code, weights=False)
    check_numbers(read_json(folder / "config.json"), folder / "config.json")
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _not_loadable(path, "a model config", error) from error


def meta_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model of ``config`` on the meta device: every shape and name, no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    check_text_model(config.name_or_path or "the model", config)
    try:
        with quiet_transformers(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise _not_loadable(config.model_type, "a causal language model", error) from error


def find_model_folder(path: str | Path, revision: str | None, trust_remote_code: bool = False, *, weights: bool) -> Path:
    """The local folder of a model folder or hub id, which is downloaded when needed (``weights`` and all, or the small files alone).

    A folder with a record is checked against it, all but the bytes of its weights, which ``check_model_folder`` looks at.
    """
    folder = local_folder(path, revision=revision)
    if folder is not None:
        check_record(folder, weights=False)
        return folder
    if trust_remote_code and revision is None:
        raise UserError(f"running code from the hub model {path} needs a pinned revision; give the commit that you have read")
    return hub_snapshot(str(path), revision=revision, weights=weights, code=trust_remote_code)


def _not_loadable(path: object, what: str, error: Exception) -> UserError:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"{path} cannot be loaded as {what}: {first}")


def check_report(path: str | Path, model: "PreTrainedModel", report: dict[str, Any]) -> None:
    """Refuse what transformers only warns about; a head that is tied to the embedding may be missing."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = {name for name in report["missing_keys"] if name not in tied or tied[name] in report["missing_keys"]}
    faults = {
        "missing (they would be random)": sorted(missing),
        "unexpected": sorted(report["unexpected_keys"]),
        "of another shape than config.json says": [f"{name} {tuple(a)} vs {tuple(b)}" for name, a, b in sorted(report["mismatched_keys"])],
        "unreadable": [str(message) for message in report["error_msgs"]],
    }
    found = [f"{len(names)} weights are {fault}: {_few(names)}" for fault, names in faults.items() if names]
    if found:
        raise UserError(f"the weights in {path} do not fit its config.json; {'; '.join(found)}. Fetch or export the model again")


def settle_ties(path: str | Path, model: "PreTrainedModel") -> None:
    """Make the config say whether the head is the embedding's table, as it is in memory: readers of what is saved believe the config.

    transformers unties a head that the files hold with values of its own, and leaves ``tie_word_embeddings`` as it was.
    """
    tied = has_tied_head(model)
    if tied is None or tied == says_tied(model.config):
        return
    if not tied:
        _logger.warning(
            "%s says tie_word_embeddings: true, but holds a head with values of its own, which is what was trained and is kept; what is "
            "saved from here says false",
            path,
        )
    set_tied(model.config, tied)


def has_tied_head(model: "PreTrainedModel") -> bool | None:
    """Whether the output head multiplies by the input embedding's table; None for a model without a plain head."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    one, two = getattr(embedding, "weight", None), getattr(head, "weight", None)
    return None if one is None or two is None else one is two


def says_tied(config: "PreTrainedConfig") -> bool:
    """What ``config`` says of it."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def set_tied(config: "PreTrainedConfig", tied: bool) -> None:
    """Write it into ``config``, the part of a text model included."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = tied


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _check_finite(path: str | Path, model: "PreTrainedModel", dtype: "torch.dtype") -> None:
    for name, parameter in model.named_parameters():
        check_finite(path, name, parameter, dtype)


def check_finite(path: str | Path, name: str, weight: "torch.Tensor", dtype: "torch.dtype") -> None:
    """Refuse NaN and infinite numbers in a weight that was loaded as ``dtype``."""
    # in pieces: the temporaries of a whole matrix are as large as it is
    if weight.is_floating_point() and not all(bool(piece.isfinite().all()) for piece in weight.detach().reshape(-1).split(_PIECE)):
        raise UserError(
            f"weight {name} of {path} holds NaN or infinite numbers (loaded as {dtype}); the model is damaged or was saved after its "
            "training diverged; fetch it again or take an earlier one"
        )
