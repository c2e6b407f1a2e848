"""Plans a recipe's needs and results from shapes alone, in seconds: ``plan`` makes a ``Plan``, ``show`` draws it."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .make_plan import plan as plan
    from .plan_types import Machine as Machine
    from .plan_types import Plan as Plan
    from .plan_types import StagePlan as StagePlan
    from .plan_types import Training as Training
    from .show import draw as draw

__getattr__, __dir__ = lazy_names(__name__)
