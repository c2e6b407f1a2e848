"""Teachers: where the predictions come from that a student learns, in which precision and in whose memory."""

from .adapter_base import AdapterBaseTeacher as AdapterBaseTeacher
from .local import Hidden as Hidden
from .local import LocalTeacher as LocalTeacher
from .local import Teacher as Teacher
from .local import load_teacher as load_teacher
from .open_teacher import TeacherRef as TeacherRef
from .open_teacher import open_teacher as open_teacher
