"""Checks of a model folder before anything is loaded from it. They cover every file that transformers would read."""

from pathlib import Path

from ..common.errors import UserError
from ..common.json_file import read_json as read_json
from .codes_file import codes_file
from .config_checks import check_depth
from .hub import snapshot_root
from .record import check_record
from .refused_inputs import check_files
from .safetensors_read import read_header
from .tensor_places import TensorPlace, safetensors_files, tensor_places


def check_model_folder(folder: Path) -> list[Path]:
    """Check a model folder without loading it.

    Returns:
        The weight files that make up the model.

    Raises:
        UserError: no config.json, no safetensors (pickled weights are never read), an adapter, packed quantized weights, a name in
            the index that leaves the folder (absolute, '../', a link), a damaged safetensors file, or a file that differs from the
            folder's record (``check_record``).
    """
    folder = Path(folder)
    check_files(folder)
    config = read_json(folder / "config.json")
    files = safetensors_files(folder)
    root = snapshot_root(folder)
    # libraries may read any safetensors file of the folder, not only those that make up the model
    others = {*folder.glob("*.safetensors"), *filter(None, [codes_file(folder)])} - {*files}
    for file in sorted({*files, *others}):
        if not file.resolve().is_relative_to(root):
            raise UserError(f"{file} is a link to {file.resolve()}, outside the model folder; copy the file itself into the folder")
        if file in others:
            read_header(file)
    tensors = tensor_places(files)
    # before anything builds the model: a wrong depth would take hours
    check_depth(config, len(tensors), folder / "config.json")
    # last: it may hash every byte, which the cheaper checks above can make unnecessary
    check_record(folder)
    return files


def checked_places(folder: Path) -> dict[str, TensorPlace]:
    """Place of each tensor of the model, in file order, after ``check_model_folder``."""
    return tensor_places(check_model_folder(folder))
