"""Refuses weights that do not fit a config: missing, unexpected or of another shape, with remedies for the usual causes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 5
_WRAPPERS = {
    "_orig_mod.": "torch.compile adds; save model._orig_mod",
    "module.": "DistributedDataParallel adds; save model.module",
    "_fsdp_wrapped_module.": "FSDP adds; save its full state dict",
    "base_model.model.": "an adapter of peft adds; merge it (merge_and_unload) and save the result",
}


def check_report(path: str | Path, model: "PreTrainedModel", report: dict[str, Any]) -> None:
    """Refuse what transformers only warns about. A head that is tied to the embedding may be missing.

    Args:
        path: Folder or hub id of the weights.
        model: Model into which they were loaded.
        report: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys`` and ``error_msgs`` as ``from_pretrained`` gives them.

    Raises:
        UserError: the weights do not fit. The message names the first of each kind and the remedy.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    # a tied weight is missing only if the weight that it repeats is missing too
    missing = sorted(name for name in report["missing_keys"] if name not in tied or tied[name] in report["missing_keys"])
    unexpected = sorted(report["unexpected_keys"])
    faults = {
        "missing (they would be random)": missing,
        "unexpected": unexpected,
        "of another shape than config.json gives": [f"{name} {tuple(a)} vs {tuple(b)}" for name, a, b in sorted(report["mismatched_keys"])],
        "unreadable": [str(message) for message in report["error_msgs"]],
    }
    found = [f"{len(names)} weights are {fault}: {_few(names)}" for fault, names in faults.items() if names]
    if found:
        raise UserError(f"the weights in {path} do not fit its config.json; {'; '.join(found)}. {_remedy(model, missing, unexpected)}")


def _remedy(model: "PreTrainedModel", missing: list[str], unexpected: list[str]) -> str:
    # a wrapper renames every weight; one name without the prefix has another cause
    for prefix, cause in _WRAPPERS.items():
        if unexpected and all(name.startswith(prefix) for name in unexpected):
            return f"Every name begins with {prefix!r}, which {cause} (save_pretrained)"
    named = getattr(model.config, "architectures", None)
    kind = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    # a class without a head for tokens, such as a reward model
    if missing and kind and not kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return f"It is a {kind}, which predicts no tokens; give a causal language model"
    head: Any = model.get_output_embeddings()
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    # only the head is missing: the config probably forgot the tie
    if missing and set(missing) == names:
        return "If its head is the embedding's table, set tie_word_embeddings to true in config.json; else the head is lost: fetch it again"
    return "Fetch or export the model again"


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
