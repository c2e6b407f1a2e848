"""Compares names, shapes and scheme of an export with its config and record; no weight is compared here."""

from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from ...models.folder.model_folder import RECORD
from ...models.folder.structure import model_structure
from ..readers.awq import AwqFolder
from ..readers.gguf_model import GgufModel, find_gguf
from ..readers.open import open_folder
from ..readers.tensors import WeightFolder
from ..spec import QuantSpec
from .exact_kv_cache import cache_of
from .gguf_metadata import gguf_problems


def structure_problems(path: Path, record: dict[str, Any], *, codes: bool = True) -> list[str]:
    """Return what disagrees, one sentence each; [] if nothing does. An unreadable export is one sentence.

    Args:
        path: The export.
        record: Content of ``decoct.json``; {} if there is none.
        codes: Also decode a GGUF file's modules and check that their codes are in the recorded range.
    """
    try:
        if find_gguf(path) is not None:
            return gguf_problems(GgufModel(path), record, codes=codes)
        opened = open_folder(path)
        structure = model_structure(path, opened.shapes())
        problems = [f"{path.name}: {problem}" for problem in structure.differences(opened.shapes())]
        # runtimes expect packed tensors for every linear that the config does not exclude
        problems += opened.unlisted(structure.linears)
        return problems + _record_problems(opened, record)
    except UserError as error:
        return [str(error)]


def _record_problems(opened: WeightFolder, record: dict[str, Any]) -> list[str]:
    quant = record.get("quant")
    # another tool's export, or plain weights: the record has nothing to compare
    if quant is None or not opened.modules:
        return []
    try:
        modules, own = set(quant["modules"]), quant.get("own_specs") or {}
        # a module without a scheme of its own has the common one
        specs = {module: QuantSpec.from_json(own.get(module, quant["spec"])) for module in modules}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        return [f"{RECORD}: the entry 'quant' cannot be read ({error})"]
    problems = _cache_problems(opened, quant)
    problems += [] if modules == set(opened.modules) else [f"the packed modules are not those that {RECORD} lists"]
    for module in opened.modules:
        spec, scheme = specs.get(module), opened.scheme_of(module)
        if spec is None:
            continue
        expected = spec.bits, None if isinstance(spec.group_size, str) else spec.group_size
        # AWQ stores zero points of symmetric weights too, and its config has no field for them
        alike = scheme.symmetric == spec.symmetric or (isinstance(opened, AwqFolder) and spec.symmetric)
        # one sentence is enough: a wrong group in the config concerns all of its modules
        if (scheme.bits, scheme.group_size) != expected or not alike or scheme.kind != spec.kind:
            problems.append(f"config.json has {scheme} for {module}; {RECORD} has {spec}")
            break
    return problems


def _cache_problems(opened: WeightFolder, quant: dict[str, Any]) -> list[str]:
    """Return attention modules whose keys and values are rounded only in the export, or only according to the record."""
    found, recorded = {name.rpartition(".")[0] for name in cache_of(opened)}, set(map(str, quant.get("attentions") or ()))
    problems = [f"kv_cache: {name} has no k_scale and v_scale, but {RECORD} lists it" for name in sorted(recorded - found)]
    return problems + [f"kv_cache: {name} has a k_scale and v_scale, but {RECORD} does not list it" for name in sorted(found - recorded)]
