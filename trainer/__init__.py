"""Training: data, the loop, checkpoints, processes, soft targets, evaluation, and the stages made of them."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .plan import TrainingPlan as TrainingPlan
    from .settings import DataSettings as DataSettings
    from .settings import DistillSettings as DistillSettings
    from .settings import TrainerSettings as TrainerSettings
    from .settings_pruning import PruneSettings as PruneSettings
    from .settings_quantization import QatSettings as QatSettings
    from .settings_quantization import QuantizeSettings as QuantizeSettings

__getattr__, __dir__ = lazy_names(__name__)
