"""Models: families, folders, tokenizers, teachers and pruning. Imports no other part of decoct."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .families import backbone_and_head as backbone_and_head
    from .families import decoder_layers as decoder_layers
    from .families import decoder_linears as decoder_linears
    from .families import family_of as family_of
    from .settings import KeepSettings as KeepSettings
    from .settings import ServedSettings as ServedSettings
    from .settings import StudentSettings as StudentSettings
    from .settings import TeacherSettings as TeacherSettings
    from .student import student_by_keeping as student_by_keeping
    from .student import student_from_config as student_from_config
    from .student import trim_vocabulary as trim_vocabulary

__getattr__, __dir__ = lazy_names(__name__)
