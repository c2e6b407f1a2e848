"""Makes a recipe readable without the files that it imports, for verbs that only look at run folders and must run nobody's code."""

from .. import types_of
from ..losses.settings import DIVERGENCES
from ..trainer.settings import DataSettings
from ..trainer.settings_text import BlendPart
from ..trainer.stages.registry import STAGE_KINDS
from .nodes import Entry, Listing, Mapping, Node, Scalar, is_null
from .reading import stage_parts

_STAND_IN = "quantize"
"""What an imported stage is read as: a kind after which any stage may come."""


def forget_parts(root: Node) -> None:
    """Replace what imported files register, in place; a recipe that imports nothing stays as it is."""
    # an empty ``import`` is none
    if not isinstance(root, Mapping) or "import" not in root.entries or is_null(root.entries["import"].node):
        return
    del root.entries["import"]
    if "data" in root.entries and isinstance(data := root.entries["data"].node, Mapping):
        _forget_source(data, DataSettings)
        blend = data.entries["blend"].node if "blend" in data.entries else None
        for part in blend.items if isinstance(blend, Listing) else []:
            if isinstance(part, Mapping):
                _forget_source(part, BlendPart)
    if "stages" in root.entries and isinstance(stages := root.entries["stages"].node, Listing):
        stages.items = [_known_stage(item) for item in stages.items]


def _forget_source(data: Mapping, section: type) -> None:
    source = data.entries.get("source")
    if source is None or is_null(source.node):
        return
    # what is no key of the section is an option of the imported source, and goes with it
    known = types_of(section)
    data.entries = {key: entry for key, entry in data.entries.items() if key in known and key not in ("source", "kind", "mask_prompts")}
    # the section needs exactly one source of text, and a look at the stages reads none of it
    data.entries["builtin"] = Entry(source.place, Scalar("python-stdlib", source.place))


def _known_stage(item: Node) -> Node:
    found = stage_parts(item)
    if found is None:
        return item
    kind, body = found
    if kind not in STAGE_KINDS:
        label = body.entries.get("name") if isinstance(body, Mapping) else None
        named = label if label is not None and not is_null(label.node) else Entry(item.place, Scalar(kind, item.place))
        # one scale per row fits every width
        weights = Mapping(item.place, {"group_size": Entry(item.place, Scalar("channel", item.place))})
        settings = Mapping(item.place, {"name": named, "weights": Entry(item.place, weights)})
        return Mapping(item.place, {_STAND_IN: Entry(item.place, settings)})
    if isinstance(body, Mapping):
        # callbacks are named by what imported files register, and do not matter to what a stage writes
        body.entries.pop("callbacks", None)
        loss = body.entries.get("loss")
        chosen = loss.node.entries.get("divergence") if loss is not None and isinstance(loss.node, Mapping) else None
        # the whole loss goes: its other keys may be options of the imported divergence
        if chosen is not None and not (isinstance(chosen.node, Scalar) and chosen.node.value in DIVERGENCES):
            del body.entries["loss"]
    return item
