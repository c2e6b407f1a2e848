"""Rebuilds an export as a plain fp32 transformers model with the independent reader; reports call it "the re-read export"."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..models.common.errors import UserError
from ..models.common.quiet import quiet_transformers
from ..models.folder.loading import meta_model
from ..models.folder.record import check_record
from ..models.folder.structure import model_structure, plain_config
from .readers.open import open_export
from .rebuild_inputs import Arithmetic, hook_cache, hook_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_exported_model(path: Path, *, inputs: Arithmetic = "kernels") -> "PreTrainedModel":
    """Rebuild an export (a folder, or a GGUF file with config.json in its folder) without any runtime's package.

    Args:
        path: The export.
        inputs: How inputs are rounded to int8, if the export does so: like serving kernels, or like the package that transformers uses.

    Returns:
        The model in eval mode on the CPU, plain ``nn.Linear`` layers, fp32: codes times scales, and every other tensor's stored value.

    Raises:
        UserError: the folder is damaged or differs from its record, is of an unknown kind, or its weights do not match its config.
    """
    from transformers import GenerationConfig

    path = Path(path)
    # 1. the files are checked before any tensor is read
    opened = open_export(path)
    path = path.parent if path.is_file() else path
    check_record(path)
    shapes = opened.shapes()
    structure = model_structure(path, shapes)
    problems = structure.differences(shapes)
    if problems:
        raise UserError(f"{path}: {problems[0]} ({len(problems)} differences in all); export the model again")
    # 2. every tensor decoded to fp32; memory holds the whole model
    tensors = {name: torch.from_numpy(opened.tensor(name)) for name in shapes}
    config = plain_config(path)
    # the auto class needs a path; the model's own class takes tensors, ties them and creates the buffers that no file holds
    model_class: Any = type(meta_model(config))
    with quiet_transformers():
        model, loaded = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True)
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loaded[kind]]
    if wrong:
        raise UserError(f"{path}: transformers did not take {sorted(map(str, wrong))[0]} ({len(wrong)} in all); export the model again")
    # 3. what the weights do not contain: sampling defaults, and the rounding of inputs, keys and values
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    hook_inputs(model, opened, inputs, structure.modules)
    hook_cache(model, opened, structure.modules)
    return model.eval()
