"""Whether the weights of a folder fit its config, from names and shapes alone, before anything is loaded."""

from pathlib import Path

from .load_report import check_report
from .loading import load_config
from .meta import meta_model
from .stored_names import ignored, module_names
from .weights import WeightFiles


def check_weight_names(path: str | Path, folder: Path) -> None:
    """``check_report`` from names and shapes alone, without loading: nothing is said of families whose weights are split or joined.

    Raises:
        UserError: as ``check_report``, and ``check_model_folder``.
    """
    with WeightFiles(folder) as files:
        model = meta_model(load_config(folder))
        names = module_names(model, files.names())
        if None in names.values():
            return
        left_out = {names[name] for name in ignored(model, files.names())}
        files.call(names)
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        stored = {name: files.shape(name) for name in files.names()}
        parameters: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameters.setdefault(id(parameter), []).append(name)
        report = {
            "missing_keys": {names[0] for names in parameters.values() if not any(name in stored for name in names)},
            "unexpected_keys": stored.keys() - own.keys() - left_out,
            "mismatched_keys": {(name, shape, own[name]) for name, shape in stored.items() if own.get(name, shape) != shape},
            "error_msgs": [],
        }
        check_report(path, model, report)
