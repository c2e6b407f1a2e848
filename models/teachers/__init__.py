"""Teachers: the models whose predictions a student learns, by precision and place of their weights."""

from .adapter_base import AdapterBaseTeacher as AdapterBaseTeacher
from .local import Hidden as Hidden
from .local import LocalTeacher as LocalTeacher
from .local import Teacher as Teacher
from .local import load_teacher as load_teacher
from .open_teacher import TeacherRef as TeacherRef
from .open_teacher import open_teacher as open_teacher
