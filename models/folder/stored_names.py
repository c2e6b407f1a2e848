"""Names of tensors in files and in modules, according to transformers' own conversion.

Most families use the same names in both. GPT-NeoX has ``embed_out`` in files and ``lm_head`` in its modules, others rename whole blocks;
files hold experts one by one and modules hold them as one tensor. transformers converts on loading and reverts this on saving.

Source: ``conversion_mapping.py`` and ``core_model_loading.py`` of transformers 5.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Constants that old checkpoints store and transformers computes: masks, frequencies, counters.
_CONSTANTS = re.compile(r"(^|\.)(inv_freq|(attn|attention|crossattention)\.(masked_)?bias|position_ids|(en|de)coder\.version)$")
# up to and including the first number: "model.layers.61" of "model.layers.61.mlp.gate.weight"
_NUMBERED = re.compile(r"[^.]+(\.\D[^.]*)*\.\d+(?=\.)")


def stored_tensors(model: "PreTrainedModel") -> dict[str, Tensor]:
    """The tensors that transformers writes for ``model`` (on any device): name in the file -> tensor. Tied tensors have every name."""
    return _reverted(model, model.state_dict())


def stored_names(model: "PreTrainedModel") -> dict[str, str]:
    """Module name -> name in the file, for every tensor that is stored unchanged. Split or joined tensors are left out."""
    state = model.state_dict()
    # by identity: renamed tensors stay the same object, split or joined ones are new
    names = {id(tensor): name for name, tensor in state.items()}
    return {names[id(tensor)]: stored for stored, tensor in _reverted(model, state).items() if id(tensor) in names}


def _reverted(model: "PreTrainedModel", state: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))


def module_names(model: "PreTrainedModel", files: Iterable[str]) -> dict[str, str | None]:
    """Name in the file -> module name under which transformers loads it; None for parts of a tensor that it joins.

    A name that belongs to no module is returned as the renaming leaves it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    own: dict[str, Any] = model.state_dict()
    names = list(files)
    # the common case: files and modules use the same names
    if all(name in own for name in names):
        return {name: name for name in names}
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    found: dict[str, str | None] = {}
    for name in names:
        # a pattern means that a converter splits or joins this tensor
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        # a rule for old names may match a name that is already right
        if renamed not in own and name in own:
            renamed, pattern = name, None
        found[name] = renamed if pattern is None else None
    return found


def ignored_patterns(model: "PreTrainedModel") -> list[str]:
    """Patterns of names that transformers silently ignores, such as additional heads and constants of old checkpoints."""
    # frequencies are stored by old releases of nearly every family
    return [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]


def ignored(model: "PreTrainedModel", files: Iterable[str]) -> list[str]:
    """File names of tensors that transformers silently ignores: additional heads that it knows of, and constants."""
    patterns = ignored_patterns(model)
    own = model.state_dict()
    outside = [name for name, inside in module_names(model, files).items() if inside is not None and inside not in own]
    return [name for name in outside if any(re.search(pattern, name) for pattern in patterns)]


def not_loaded(model: "PreTrainedModel", files: Iterable[str]) -> list[str]:
    """``ignored`` without the constants of old checkpoints, which transformers computes itself."""
    return [name for name in ignored(model, files) if not _CONSTANTS.search(name)]


def summary(names: Iterable[str]) -> dict[str, int]:
    """Number of tensors per module, named up to the first number or by its first part: ``{"model.layers.61.*": 17, "mtp.*": 3}``."""
    # shown by module: a list of thousands of names helps nobody
    return dict(Counter(f"{match[0] if (match := _NUMBERED.match(name)) else name.split('.')[0]}.*" for name in names))


def left_out_words(left_out: Mapping[str, int]) -> str:
    """``summary`` as a clause without a full stop."""
    count = sum(left_out.values())
    places = ", ".join(f"{name} ({number:,})" for name, number in left_out.items())
    what = "one tensor that transformers does not load is" if count == 1 else f"{count:,} tensors that transformers does not load are"
    return f"{what} left out: {places}"
