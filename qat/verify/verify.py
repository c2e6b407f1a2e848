"""Verifies that a folder is still what was written: hashes, structure, scales, cuts, every weight, and the results of installed runtimes.

Exports of other tools can be verified too: without a record there is no hash to compare with, and the report notes it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ...models.folder.model_folder import RECORD, read_record, verify_folder_files
from ...models.folder.safetensors_read import read_header
from ..footprint import weight_files
from ..readers.gguf_model import find_gguf
from ..readers.open import is_export
from ..rebuild import load_exported_model as load_exported_model
from ..runtimes.check import check_runtimes
from ..source.openers import SourceFolder
from .exactness import check_recorded, prove
from .pruned import kept_problems, stored_weights, zeros_problems
from .pruned_model import computed
from .pruned_parent import parent_problems
from .structure import structure_problems

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class VerifyReport:
    """Result of a verification; the folder is sound if ``problems`` is empty."""

    problems: list[str] = field(default_factory=list)
    """One sentence each, naming the file or tensor."""
    checks: list[str] = field(default_factory=list)
    """Checks that passed, one sentence each."""
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Entry by runtime, as in ``check_runtimes``."""

    @property
    def ok(self) -> bool:
        """Return whether there are no problems."""
        return not self.problems

    def note(self, problems: list[str], passed: str) -> None:
        """Record the result of one check."""
        # two checks may find the same fault
        self.problems += [problem for problem in problems if problem not in self.problems]
        if not problems:
            self.checks.append(passed)


def verify_folder(
    path: Path, *, source: Path | SourceFolder | None = None, runtimes: bool = True, tokens: "Tensor | None" = None
) -> VerifyReport:
    """Check a model folder without changing it; problems are reported, not raised.

    Args:
        path: An export, a GGUF file, or any other model folder, of which files, any codes and any cut or masks are checked.
        source: The quantized folder it was made from, to compare every weight with; for a folder that a cut made, its parent.
        runtimes: Load a sound export or cut model in every installed runtime, each in a fresh process, and compare logits. A cut model is
            also run here: with and without a cache, and in its parent's shape.
        tokens: int64 [B, S], real text for the runtimes; adds their perplexity.

    Raises:
        UserError: ``path`` does not exist, or ``source`` cannot be used.
    """
    path = Path(path)
    source = SourceFolder(source) if isinstance(source, str | Path) else source
    file = find_gguf(path)
    if file is not None:
        path = file.parent
        # a file from elsewhere, with nothing beside it that could be compared
        if not any((path / name).exists() for name in ("config.json", RECORD)):
            return _verify_bare_gguf(file, source)
    if not path.is_dir():
        what = "file" if path.suffix == ".gguf" else "folder"
        raise UserError(f"no such {what}: {path}; give a model folder, such as one that 'decoct export' wrote, or a .gguf file")
    report = VerifyReport()
    # hashes first: they need no reader and name the damaged file
    record = _check_files(path, report)
    try:
        packed = is_export(path)
    except UserError as error:
        # without a sound config nobody can say what kind of folder it is
        report.note([str(error)], "")
        return report
    if packed:
        _check_packed(path, record, report)
        # its record is of the plain folder that was exported, in which the cut model is run
        _check_pruned(path, record, report, run=False)
        if source is not None:
            _check_source(path, source, report)
        if runtimes:
            _check_runtimes(path, tokens, report)
    else:
        _check_plain(path, record, report)
        _check_pruned(path, record, report, run=runtimes)
        if source is not None:
            _check_parent(path, record, source.path, report)
        if runtimes and "kept" in record:
            _check_runtimes(path, tokens, report)
    return report


def _verify_bare_gguf(path: Path, source: SourceFolder | None) -> VerifyReport:
    """Verify a single GGUF file without a record, and without a config for metadata or a reference model."""
    report = VerifyReport()
    _, problems = check_recorded(path, {})
    report.note(problems, "an independent reader rebuilds every weight: header sound, values and scales finite")
    report.checks.append("no config.json beside the file: metadata and runtimes are not checked")
    if source is not None:
        _check_source(path, source, report)
    return report


def _check_files(path: Path, report: VerifyReport) -> dict[str, Any]:
    """Compare every file's sha256 with the record; return the record, {} if there is none or it cannot be read."""
    try:
        record = read_record(path)
        # a file without a recorded hash is reported as well
        problems = verify_folder_files(path) if record else []
    except UserError as error:
        report.note([str(error)], "")
        return {}
    if not record:
        report.checks.append(f"no recorded hash to compare with ({RECORD} is not there: the folder was made by another tool)")
        return {}
    report.note(problems, f"{len(record.get('files', {}))} files have their recorded sha256")
    return record


def _check_packed(path: Path, record: dict[str, Any], report: VerifyReport) -> None:
    compared, problems = check_recorded(path, record)
    note = f", {compared} of them as recorded" if compared else ", nothing recorded to compare them with"
    report.note(problems, f"an independent reader rebuilds every weight: finite, scales positive{note}")
    report.note(structure_problems(path, record), "names and shapes are those of config.json")


def _check_source(path: Path, source: SourceFolder, report: VerifyReport) -> None:
    folder = path.parent if path.is_file() else path
    # for the recorded format: plain weights are compared as they were cast for it
    opened = source.open(read_record(folder).get("export", {}).get("format"))
    try:
        problems = prove(path, opened).problems
    except UserError as error:
        problems = [str(error)]
    report.note(problems, f"every weight equals that of {source.path}, element by element")


def _check_parent(path: Path, record: dict[str, Any], parent: Path, report: VerifyReport) -> None:
    if "kept" not in record:
        what = f"{path} is not an export (its weights are plain), and {RECORD} names no cut that made it"
        raise UserError(f"{what}, so there is nothing to compare with {parent}")
    # indices that cannot be used are among the problems already
    if not report.problems:
        for problems, passed in parent_problems(path, record, parent):
            report.note(problems, passed)


def _check_runtimes(path: Path, tokens: "Tensor | None", report: VerifyReport) -> None:
    if report.problems:
        return
    try:
        # only for a sound export: a damaged one would only repeat its fault in every runtime
        report.runtimes = check_runtimes(path, tokens=tokens)
    except UserError as error:
        report.note([str(error)], "")
    for name, seen in report.runtimes.items():
        if seen["status"] == "differs":
            report.note([f"{name} differs: {seen['reason']}"], "")
        elif seen["status"] == "agrees":
            how = (
                "the same logits in fp32"
                if name == "transformers" and "arithmetic" not in seen
                else f"the same tokens ({seen['top1']:.2%} of {seen['positions']:,})"
            )
            report.checks.append(f"{name} ({seen['version']}) computes {how}")


def _check_pruned(path: Path, record: dict[str, Any], report: VerifyReport, *, run: bool) -> None:
    """Check a folder whose record has a cut or masks; with ``run`` a cut model also computes what its record says."""
    # what cannot be read is among the problems already
    if report.problems or not ("kept" in record or record.get("sparse")):
        return
    report.note(structure_problems(path, record), "names and shapes are those of config.json")
    for problems, passed in (kept_problems(path, record), zeros_problems(record, stored_weights(path))):
        if problems or passed:
            report.note(problems, passed)
    if run and "kept" in record and not report.problems:
        try:
            for problems, passed in computed(path, record):
                report.note(problems, passed)
        except UserError as error:
            report.note([str(error)], "")


def _check_plain(path: Path, record: dict[str, Any], report: VerifyReport) -> None:
    """Check a folder without packed weights: sound files, and for a quantized folder codes that match its weights."""
    from ..codes.state import load_quant_state

    try:
        for file in weight_files(path):
            read_header(file)
        report.checks.append("the weights are plain (not packed); every weight file has a sound header")
        if record.get("quant"):
            load_quant_state(path)
            report.checks.append("codes times scales are the stored weights, element by element")
    except UserError as error:
        report.note([str(error)], "")
