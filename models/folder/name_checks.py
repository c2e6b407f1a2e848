"""Checks whether the weights of a folder fit its config, by names and shapes, before anything is loaded."""

from pathlib import Path

from .load_report import check_report
from .loading import load_config
from .meta import meta_model
from .stored_names import ignored, module_names
from .weights import WeightFiles


def check_weight_names(path: str | Path, folder: Path) -> None:
    """``check_report`` from names and shapes, without loading. Families whose weights are split or joined are not checked.

    Args:
        path: Folder or hub id that the message names.
        folder: Local folder of the model.

    Raises:
        UserError: as ``check_report`` and ``check_model_folder``.
    """
    with WeightFiles(folder) as files:
        model = meta_model(load_config(folder))
        names = module_names(model, files.names())
        # transformers joins or splits these while loading, so shapes in files and model differ by design
        if None in names.values():
            return
        left_out = {names[name] for name in ignored(model, files.names())}
        # from here on under the names of the modules
        files.call(names)
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        stored = {name: files.shape(name) for name in files.names()}
        parameters: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            # a tied parameter has several names and needs only one of them in the files
            parameters.setdefault(id(parameter), []).append(name)
        report = {
            "missing_keys": {names[0] for names in parameters.values() if not any(name in stored for name in names)},
            "unexpected_keys": stored.keys() - own.keys() - left_out,
            "mismatched_keys": {(name, shape, own[name]) for name, shape in stored.items() if own.get(name, shape) != shape},
            "error_msgs": [],
        }
        check_report(path, model, report)
