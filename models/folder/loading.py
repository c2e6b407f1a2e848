"""Loads a model with exactly the weights of its files, or refuses it with a readable message.

transformers follows '../' in a local index file, falls back to pickled weights, and fills missing weights with random numbers after a
warning. Here the folder is checked before anything is loaded (``folder_checks``), and the loaded model afterwards.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..common.json_file import read_json
from ..common.light_configs import import_configs_alone
from ..common.quiet import quiet_transformers
from ..known_config import known_config
from ..ties import settle_ties
from ..tokenizer.tokenizer_checks import check_tokenizer_files, read_safely
from .config_checks import check_numbers, check_size
from .folder_checks import check_model_folder
from .gguf_place import gguf_file
from .hub import hub_snapshot, local_folder
from .load_report import check_report
from .meta import meta_model as meta_model
from .meta import not_loadable
from .record import check_record
from .refused_inputs import check_text_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
# Contains long runs: a pre-tokenizer pattern that backtracks exponentially does not finish on them.
_TRIAL = "Hello, world! 123 " + "a" * 100 + " " * 100 + "é"
_PIECE = 2**22  # elements per check


def load_model(
    path: str | Path,
    *,
    dtype: "torch.dtype",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: "str | torch.device" = "cpu",
) -> "PreTrainedModel":
    """Load a causal language model from a folder or hub id, in ``dtype``, in eval mode, on ``device``.

    The model is in eval mode, as ``from_pretrained`` returns it; call ``.train()`` before training.

    Raises:
        UserError: the folder fails ``check_model_folder`` or its config ``check_numbers``, it is not a causal LM that transformers
            knows, weights are missing, unexpected or of another shape (a tied head may be missing), or a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM

    folder = find_model_folder(path, revision, trust_remote_code, weights=True)
    # before transformers touches the folder: what it would follow, run or guess is refused here
    files = check_model_folder(folder)
    # these checks build the config and an empty model, which is not done with code from a repository
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
                ignore_mismatched_sizes=True,  # reported, and refused below with a better message
            )
    except MemoryError:
        raise
    except Exception as error:
        raise not_loadable(path, "a causal language model", error) from error
    model, report = loaded
    # in this order: missing weights are random, so they are refused before any value is looked at
    check_report(path, model, report)
    settle_ties(path, model)
    _check_finite(path, model, dtype)
    return model.to(device).eval()


def load_tokenizer(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder or hub id.

    Raises:
        UserError: the folder has no tokenizer, or it cannot be read. (transformers alone would build an empty one from the model type.)
    """
    folder = find_model_folder(path, revision, trust_remote_code, weights=False, tokenizer=True)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        if not (folder / "config.json").is_file():
            read_json(folder / "config.json")
        raise UserError(f"{path} has no tokenizer (tokenizer.json or a vocabulary file); copy the tokenizer's files into the folder")
    # before the tokenizers library reads them: it panics, or takes all memory, on some files
    check_tokenizer_files(folder)
    try:
        with quiet_transformers():
            return read_safely(f"{path} cannot be loaded as a tokenizer", lambda: _tried(folder, trust_remote_code))
    except UserError:
        raise
    except Exception as error:
        raise not_loadable(path, "a tokenizer", error) from error


def _tried(folder: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    tokenizer.encode(_TRIAL)  # some contradictions in the files show only here
    return tokenizer


def load_config(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, light: bool = False
) -> "PreTrainedConfig":
    """Load the config of a folder or hub id, without reading or downloading weights.

    Args:
        path: Folder or hub id.
        revision: Revision on the hub.
        trust_remote_code: Whether code of the folder may run.
        light: For a caller that only reads sizes: a ``KnownConfig`` where the family and its fields are known, which needs no
            transformers, and otherwise transformers' configs without its modelling code.

    Raises:
        UserError: the config is missing, damaged, of an unknown kind, or fails ``check_numbers``.
    """
    folder = find_model_folder(path, revision, trust_remote_code, weights=False)
    # before transformers sees it: some configs build lists with one entry per layer
    fields = read_json(folder / "config.json")
    check_numbers(fields, folder / "config.json")
    if light:
        known: Any = known_config(fields)
        if known is not None:
            known.name_or_path = str(folder)
            return known
        import_configs_alone()
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise not_loadable(path, "a model config", error) from error


def find_model_folder(
    path: str | Path, revision: str | None, trust_remote_code: bool = False, *, weights: bool, tokenizer: bool = False
) -> Path:
    """The local folder of a model folder or hub id, downloaded if needed: with its weights, or only config and tokenizer.

    A folder with a record is checked against it, except for the bytes of its weights, which ``check_model_folder`` checks. A GGUF file is
    imported into the cache once; without ``weights`` only its header is read, and its tokenizer is made only for ``tokenizer``.

    Raises:
        UserError: the model cannot be found, differs from its record, cannot be imported, or runs code from the hub without a pinned
            revision.
    """
    if (file := gguf_file(path)) is not None:
        if revision is not None:
            raise UserError(f"{path} is a file on this machine, which has no revision ({revision!r}); leave the revision out")
        check_record(file.parent, weights=weights)
        # imported late: it reads weights, and so needs torch
        from .gguf_folder import cached_folder

        return cached_folder(file, "weights" if weights else "tokenizer" if tokenizer else "config")
    folder = local_folder(path, revision=revision)
    if folder is not None:
        check_record(folder, weights=False)
        return folder
    # code on a branch can change after the user has read it
    if trust_remote_code and revision is None:
        raise UserError(f"running code from the hub model {path} needs a pinned revision; give the commit that you have read")
    return hub_snapshot(str(path), revision=revision, weights=weights, code=trust_remote_code)


def _check_finite(path: str | Path, model: "PreTrainedModel", dtype: "torch.dtype") -> None:
    for name, parameter in model.named_parameters():
        check_finite(path, name, parameter, dtype)


def check_finite(path: str | Path, name: str, weight: "torch.Tensor", dtype: "torch.dtype") -> None:
    """Refuse NaN and infinite numbers in a weight that was loaded as ``dtype``.

    Raises:
        UserError: the weight is not finite.
    """
    # in pieces: the temporaries for a whole matrix would be as large as the matrix
    if weight.is_floating_point() and not all(bool(piece.isfinite().all()) for piece in weight.detach().reshape(-1).split(_PIECE)):
        raise UserError(
            f"weight {name} of {path} holds NaN or infinite numbers (loaded as {dtype}); the model is damaged or was saved after its "
            "training diverged; fetch it again or take an earlier one"
        )
