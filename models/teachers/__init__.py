"""Teachers: where the predictions come from that a student learns."""

from .local import Hidden as Hidden
from .local import LocalTeacher as LocalTeacher
from .local import Teacher as Teacher
from .local import load_teacher as load_teacher
