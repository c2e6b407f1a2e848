"""Finds the GGUF file that a path means."""

from pathlib import Path

from ..common.errors import UserError
from ..gguf.parts import only_model


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file ``path``, or the one in the folder ``path``, the first if it is in parts; None if it is neither.

    A folder with a config.json or safetensors is read as a model folder; the file in it has to be named.

    Raises:
        UserError: the folder has several files.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        other = (place / "config.json").is_file() or any(place.glob("*.safetensors"))
        found = [] if other else sorted(place.glob("*.gguf"))
        # the parts of one model are found by the first
        if (first := only_model(found)) is not None:
            return first
        if len(found) > 1:
            raise UserError(f"{place} has {len(found)} GGUF files ({found[0].name}, {found[1].name}, ...); name the one that is meant")
        return found[0] if found else None
    return place if place.suffix.lower() == ".gguf" and place.is_file() else None
