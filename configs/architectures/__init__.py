"""Architecture numbers of published models, for plans, footprints and tests that cannot reach the hub.

Each ``<model>.json`` holds the fields of the model's published ``config.json`` under their present transformers names.
"""

import difflib
import json
from importlib.resources import files
from typing import Any

from ...models.common.errors import UserError

HUB_IDS = {
    "HuggingFaceTB/SmolLM2-1.7B": "SmolLM2-1.7B",
    "HuggingFaceTB/SmolLM2-360M": "SmolLM2-360M",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2-135M-Instruct",
    "Qwen/Qwen2.5-0.5B": "Qwen2.5-0.5B",
    "meta-llama/Meta-Llama-3-70B": "Llama-3-70B",
    "meta-llama/Llama-3.1-8B": "Llama-3.1-8B",
    "Qwen/Qwen3-8B": "Qwen3-8B",
}
"""Hub id -> name of the stored architecture."""


def names() -> list[str]:
    """Names of the stored architectures, sorted."""
    return sorted(file.name.removesuffix(".json") for file in files(__package__ or __name__).iterdir() if file.name.endswith(".json"))


def architecture(name_or_hub_id: str) -> dict[str, Any]:
    """The transformers config fields (``model_type`` among them) of a stored architecture, a new dict at each call.

    Args:
        name_or_hub_id: ``SmolLM2-1.7B`` or ``HuggingFaceTB/SmolLM2-1.7B``; upper and lower case are the same.

    Raises:
        UserError: there is none; the message lists the stored ones.
    """
    # stored names first, then hub ids, compared in lower case as hub ids are typed
    known = {key.lower(): name for key, name in ({name: name for name in names()} | HUB_IDS).items()}
    name = known.get(name_or_hub_id.lower())
    if name is None:
        near = difflib.get_close_matches(name_or_hub_id.lower(), known, n=1)
        hint = f"; did you mean {known[near[0]]!r}?" if near else ""
        raise UserError(f"no architecture {name_or_hub_id!r} is stored; there are {', '.join(names())}{hint}")
    return json.loads((files(__package__ or __name__) / f"{name}.json").read_text(encoding="utf-8"))
