"""Model folders: find, check, load, stream and write them, and the record of each in ``decoct.json``."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .hub import local_folder as local_folder
    from .loading import load_config as load_config
    from .loading import load_model as load_model
    from .loading import load_tokenizer as load_tokenizer
    from .model_folder import content_hash as content_hash
    from .model_folder import save_model_folder as save_model_folder
    from .record import RECORD as RECORD
    from .record import check_record as check_record
    from .record import read_record as read_record
    from .record import verify_folder_files as verify_folder_files
    from .record import write_record as write_record
    from .structure import model_structure as model_structure

__getattr__, __dir__ = lazy_names(__name__)
