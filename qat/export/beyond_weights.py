"""What is rounded beside weights (inputs, keys and values), and which formats have words for it."""

from ...models.common.errors import UserError
from ...models.folder.model_folder import read_record
from ..source.quantized_source import ExportSource
from ..spec import ActivationSpec


def check_beside(source: ExportSource, format: str, *, holds: bool) -> None:
    """Refuse a format without words for rounded inputs, or rounded keys and values: servers would compute another model.

    Args:
        source: What is exported; of plain sources the record of the folder counts.
        format: Its name.
        holds: The format says both; what exactly it can say, its own check knows.

    Raises:
        UserError: naming the key and what to choose.
    """
    quant = {} if source.state.modules else read_record(source.folder).get("quant") or {}
    if not holds and (source.state.cache or quant.get("kv_cache")):
        raise UserError(
            f"{format} cannot say that keys and values are rounded (kv_cache), so servers would compute another model; export to "
            "compressed-tensors (kv_cache: {kind: fp8_e4m3, scaling: static}), or quantize without kv_cache"
        )
    if not holds and (source.state.activations or quant.get("activations")):
        raise UserError(
            f"{format} cannot say that inputs are rounded (activations), so servers would compute another model; export to "
            "compressed-tensors, or quantize without activations"
        )


def said_of(spec: ActivationSpec | None, stored: str) -> str:
    """How something is rounded, for the model card; '' for None. ``stored`` is what has a scale of its own where scales are stored."""
    if spec is None:
        return ""
    scale = "a scale for each token, taken when it comes" if spec.scaling == "dynamic" else f"one stored scale {stored}"
    return f"{spec.kind}, {'symmetric' if spec.symmetric else 'asymmetric'}, {scale}"
