"""The transforms by name. A new one is an entry of ``TRANSFORMS``, a name in ``settings``, and what it cannot do in ``limits``."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from ...models.family_map import FAMILIES
from ..spec import QuantSpec
from .layer_case import LayerTransform, TransformCase
from .limits import transform_refusal
from .rotation import Rotated
from .scales import Awq, SmoothQuant
from .settings import TransformSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRANSFORMS: dict[str, Callable[[TransformCase], LayerTransform]] = {"awq": Awq, "smoothquant": SmoothQuant, "rotation": Rotated}


def open_transform(
    model: "PreTrainedModel", settings: TransformSettings, specs: Mapping[str, QuantSpec], *, sparse: Iterable[str] = (), seed: int = 0
) -> LayerTransform:
    """The transform of a model that is about to be rounded.

    Args:
        model: On any device.
        settings: The transform.
        specs: Spec of every module that will be rounded, by full name.
        sparse: Modules whose exact zeros are a pruning mask.
        seed: Seed of random rotations.

    Raises:
        UserError: the family or this model cannot do it (``limits.transform_refusal``).
    """
    masked = frozenset(sparse)
    if reason := transform_refusal(settings, model.config, sparse=bool(masked), tensors=model.state_dict()):
        raise UserError(f"transform {settings.method}: {reason}")
    family = FAMILIES[model.config.model_type]
    return TRANSFORMS[settings.method](TransformCase(model=model, family=family, settings=settings, specs=specs, sparse=masked, seed=seed))
