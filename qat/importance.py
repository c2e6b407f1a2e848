"""The importance of the inputs of a model's linears, from a file of llama.cpp. It imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.common.errors import UserError
from .export.gguf.names import architecture_of, gguf_place
from .readers.imatrix import read_imatrix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def importance_of(path: Path | str, model_type: str, inputs: Mapping[str, int]) -> "dict[str, NDArray[np.float32]]":
    """Read the mean squares of the inputs of linears: fp32 [inputs] by module name.

    Args:
        path: A file of llama-imatrix.
        model_type: The family, as in the model's config; it must be one that decoct writes as GGUF.
        inputs: Full names of all linears of the decoder layers, with their numbers of inputs.

    Raises:
        UserError: as ``read_imatrix`` and ``gguf_place``; the file has no entry for a linear, an entry for a layer that the model lacks,
            or one of another width.
    """
    found, architecture = read_imatrix(Path(path)), architecture_of(model_type)
    places = {module: gguf_place(f"{module}.weight", architecture).name for module in inputs}
    other = "it is of another model; make one of this model with llama-imatrix"
    # entries beside the layers, such as the head's, are not used
    surplus = [name for name in found if name.startswith("blk.") and name not in places.values()]
    if surplus:
        raise UserError(f"{path} has an entry {surplus[0]!r:.100}, and the model has no such linear ({len(surplus)} in all): {other}")
    for module, name in places.items():
        if name not in found:
            raise UserError(f"{path} has no entry {name!r} for {module}: {other}")
        if len(found[name]) != inputs[module]:
            raise UserError(f"{path}: {name} has {len(found[name]):,} numbers, and {module} has {inputs[module]:,} inputs: {other}")
    return {module: found[name] for module, name in places.items()}
