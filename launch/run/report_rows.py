"""Measures every model of a run once, stores the figures in the stage's folder, and passes them to the report."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.capabilities import capabilities
from ...models.common.errors import UserError
from ...models.common.files import sha256_json
from ...models.folder.hub import model_name
from ...models.folder.loading import load_model
from ...models.folder.model_folder import content_hash, read_record
from ...models.teachers import LocalTeacher, TeacherRef
from ...qat.export.export import export_folder
from ...qat.export.limits.formats import refusals
from ...qat.export.limits.stored_model import StoredModel
from ...qat.layers.quantized_model import quantize_model
from ...qat.layers.save_folder import save_quantized_folder
from ...qat.spec import QuantSpec
from ...trainer.evaluation.model_row import best_device, measure_folder, measure_teacher, quant_record, too_large_to_measure
from ...trainer.evaluation.spread import MOST_BLOCKS
from ...trainer.evaluation.teacher_drift import ROUNDED, teacher_drift
from ...trainer.progress import part_lines
from ...trainer.settings import EvaluateSettings
from ...trainer.stages.context import RunContext
from ...trainer.stages.registry import stage_kind
from ..report.curves import read_curves
from .changes import change_between, warning_of
from .run_folder import RunFolder, StageFolder
from .samples import report_samples
from .stored_figures import read_figures, store_figures
from .task_scores import TaskScores

if TYPE_CHECKING:
    from ...configs.recipe import Recipe, StageEntry

Row = dict[str, Any]
_SIZES = ("parameters", "bytes", "bits_per_weight", "packed_bytes", "packed_bits_per_weight", "sparsity")


class ReportRows:
    """The rows of the report, filled as the run goes (used on rank 0)."""

    def __init__(self, recipe: "Recipe", run: RunContext, folder: RunFolder) -> None:
        self.recipe = recipe
        self.run = run
        self.teacher = run.teacher
        self.folder = folder
        self.exports: list[Row] = []
        self.notes: list[str] = []
        """Important notes for readers of the report, one sentence each."""
        self._rows: list[Row] = []
        self._figures: dict[str, Row] = {}
        """Figures measured in this start, by key."""
        self._teacher_row: Row | None = None
        self._opened: LocalTeacher | None = None
        self._quantized: str | None = None
        self._last_export: str | None = None

    @property
    def stages(self) -> list[Row]:
        """Return the rows of teacher and stages, in order."""
        first = [self.teacher_row()] if self.teacher else []
        return first + self._rows

    def protocol(self) -> dict[str, Any]:
        """Return how the figures are measured."""
        windows = self.run.data.evaluation
        return {
            "text": self.run.data.description,
            "text_hash": self.run.data.fingerprint,
            "context": windows.seq_length,
            "tokens": windows.tokens,
            "blocks": min(len(windows), MOST_BLOCKS),
            "dtype": "float32",
            **({"samples": self.run.data.samples} if self.run.data.samples else {}),
            **({"left_out": self.run.data.left_out} if self.run.data.left_out else {}),
        }

    def teacher_row(self) -> Row:
        """Return the teacher's own figures."""
        assert self.teacher is not None
        if self._teacher_row is None:
            seen = self._remembered(self.folder.path / ".measured" / "teacher.json", self.teacher.path, self.teacher.revision)
            local = Path(self.teacher.path)
            # a scratch teacher records the cost of its training, whichever run that was
            spent = {"tokens": 0, "seconds": 0.0} | (read_record(local).get("training", {}) if local.is_dir() else {})
            drift = read_figures(self.folder.path / ".measured" / "teacher-drift.json").get("row")
            # a drift file may remain from a run with a rounded teacher; it says nothing of one held in full precision
            held = {"held": {"load_in": self.teacher.load_in, **drift}} if drift and self.teacher.load_in in ROUNDED else {}
            self._teacher_row = {"name": "teacher", "kind": "teacher", "path": self.teacher.name, **spent, **seen, **held}
        return self._teacher_row

    def first_row(self, at: dict[str, Any]) -> None:
        """Add the row of the first stage's input, so that the report shows what each stage changed; none if the stage is ``evaluate``.

        A model that does not fit into memory in fp32 gets a note instead of a row.
        """
        # ``start_row`` measures the model of a recipe that begins with evaluate
        if stage_kind(self.recipe.stages[0].kind, self.recipe.stages[0].settings).load().finish is None:
            return
        made = self.recipe.student.path is None
        name, file = ("00-student", self.folder.path / "00-student/measured.json") if made else ("input", self._kept("input.json"))
        if problem := too_large_to_measure(at["path"], at["revision"]):
            self._note(f"{name} is not measured: {problem}")
            return
        seen = self._remembered(file, at["path"], at["revision"])
        self._add({"name": name, "kind": "student", "path": self._relative(at["path"]), "tokens": 0, "seconds": 0.0, **seen})

    def _kept(self, name: str) -> Path:
        return self.folder.path / ".measured" / name

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.run.console.print(f"note: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _add(self, row: Row) -> Row:
        """Append a row with what changed since the measured one before it (the teacher is the first)."""
        self._rows.append({**row, "change": change_between(self._before(), row)})
        return self._rows[-1]

    def _before(self) -> Row | None:
        """Return the last row with figures."""
        return next((row for row in reversed(self.stages) if row.get("eval")), None)

    def teacher_drift(self) -> Row | None:
        """Return the loss of holding the teacher in nf4 or int8, measured once and reported before training; None if it is not
        rounded."""
        teacher = self.teacher
        if teacher is None or teacher.load_in not in ROUNDED:
            return None
        file = self.folder.path / ".measured" / "teacher-drift.json"
        # all that the figures depend on; the same key means the same figures
        key = sha256_json([teacher.content, teacher.load_in, self.run.data.fingerprint, self.run.v_eff])
        before = read_figures(file)
        drift = (
            before["row"] if before.get("key") == key and isinstance(before.get("row"), dict) else self._measure_drift(teacher, file, key)
        )
        self.run.say(
            f"teacher in {teacher.load_in}: KL(teacher || {teacher.load_in}) {drift['kl']:.2e} nats, the same likeliest token for "
            f"{drift['top1']:.1%} of {drift['tokens']:,} held-out tokens"
        )
        return drift

    def _measure_drift(self, teacher: TeacherRef, file: Path, key: str) -> Row:
        device = best_device()
        exact = self._open_teacher()
        assert exact is not None
        with self.run.console.status(f"measuring the teacher in {teacher.load_in}"):
            held = teacher.open(device=device, v_eff=self.run.v_eff)
            drift = teacher_drift(exact, held, self.run.data.evaluation, device)
        # from here on only ``_opened`` holds the exact copy, so that ``_release`` can free it
        del exact
        self._release()
        store_figures(file, key, drift)
        return drift

    def start_row(self, entry: "StageEntry", at: dict[str, Any]) -> None:
        """Add a row for a stage that makes no model. It shows the current model, or the run's input if there is no other stage.

        The tasks of the stage are scored for the model and for the teacher.
        """
        judged, revision = (self._last_export, None) if self._last_export else (at["path"], at["revision"])
        tasks = self._task_rows(entry.settings, judged, revision) if entry.settings.tasks else {}
        # after an export the gates judge what will be served, which is measured on the files read back
        if self.exports:
            seen = {k: self.exports[-1].get(k) for k in (*_SIZES, "layer_sparsity", "eval", "blocks")}
            path = self.exports[-1]["path"]
        else:
            seen = self._remembered(self.folder.path / entry.name / "measured.json", at["path"], at["revision"])
            path = self._relative(at["path"])
        # the table shows the model's own row, and this one where there is no other
        shown = self.exports[-1] if self.exports else next((row for row in reversed(self._rows) if row.get("eval")), {})
        shown["tasks"] = shown.get("tasks", {}) | tasks
        row = {"name": entry.name, "kind": entry.kind, "path": path, "tokens": 0, "seconds": 0.0, **seen, "change": None, "tasks": tasks}
        self._rows.append(row)

    def _task_rows(self, settings: EvaluateSettings, path: str, revision: str | None) -> Row:
        """Scores of a model on the tasks of a stage, by name; the teacher's are added to its row."""
        scores = TaskScores(self.run, self.folder, settings)
        if self.teacher is not None:
            row = self.teacher_row()
            row["tasks"] = row.get("tasks", {}) | scores.of(self.teacher.path, self.teacher.revision, "the teacher")
        return scores.of(path, revision, "the model")

    def stage_row(self, entry: "StageEntry", folder: StageFolder) -> bool:
        """Add the rows of a finished stage; return whether it made a model that the next stage reads."""
        state = folder.read()
        for export in state["exports"]:
            path = folder.path / export["path"]
            self._last_export = str(path)
            seen = self._remembered(folder.path / f"measured-{export['format']}.json", str(path), None)
            # speed and memory of the first runtime that ran it
            ran = next((outcome for outcome in export["runtimes"].values() if outcome.get("tokens_per_second")), {})
            measured = {name: ran.get(name) for name in ("tokens_per_second", "peak_bytes")}
            row = {**export, "path": self._relative(str(path)), **measured, **seen}
            self.exports.append({**row, "change": change_between(self._before(), row)})
        # an export leaves the model as it is: the row repeats the sizes, and has no figures of its own
        if not state["makes_model"]:
            last = self._rows[-1] if self._rows else {}
            seen = {k: last.get(k) for k in _SIZES} | {"eval": None}
            if state["exports"]:
                seen |= {k: self.exports[-1].get(k) for k in _SIZES}
        else:
            seen = self._remembered(folder.path / "measured.json", str(folder.model), None)
            if quant_record(str(folder.model)):
                self._quantized = str(folder.model)
        # taken before the new row is added, since the row of a stage is compared with the model it began with
        before = self._before()
        row = self._add(
            {
                "name": entry.name,
                "kind": entry.kind,
                "path": self._relative(str(folder.path)),
                "tokens": state.get("tokens"),
                "seconds": state.get("seconds"),
                "coverage": state.get("coverage"),
                "held_out": state.get("held_out"),
                # only where there are any, so that rows without them are those of earlier versions
                **{name: found for name in ("samples", "terms", "texts", "bits", "search", "rounds") if (found := state.get(name))},
                **seen,
            }
        )
        if warning := warning_of(entry, before, row, read_curves(self.folder.metrics).get(entry.name, [])):
            self._note(warning)
        return state["makes_model"]

    def baselines(self) -> list[Row]:
        """Return a row for comparison: the teacher, only rounded with the run's QuantSpec; [] without a teacher or a spec."""
        wanted = any(isinstance(e.settings, EvaluateSettings) and e.settings.round_teacher for e in self.recipe.stages)
        if not (wanted and self.teacher and self._quantized):
            return []
        quant = quant_record(self._quantized)
        assert quant is not None
        spec = QuantSpec.from_json(quant["spec"])
        # named by teacher and spec, so that a changed recipe finds no stale folder
        place = self.folder.path / f".measured/teacher-rtn-{sha256_json([self.teacher.content, spec.to_json()])[:8]}"
        packed = place / "packed"
        if not packed.exists():
            try:
                self._round_teacher(spec, place)
            except UserError as error:
                # the run's own work is done, and this row is only a comparison: a failure must not lose the report
                self.run.say(f"the teacher is not rounded for comparison: {error}")
                return []
        seen = self._remembered(place / "measured.json", str(packed), None)
        form = spec.kind if spec.kind != "int" else "ternary codes" if spec.ternary else f"int{spec.bits}"
        row = {"name": f"teacher rounded to {form}", "kind": "quantize", "path": self._relative(str(packed)), "tokens": 0, "seconds": 0.0}
        row |= seen
        return [{**row, "change": change_between(self.teacher_row(), row)}]

    def samples(self, at: dict[str, Any]) -> dict[str, Any] | None:
        """How teacher and model go on from a few prompts, for recipes that evaluate; the model is the last export or model folder."""
        settings = next((e.settings for e in reversed(self.recipe.stages) if isinstance(e.settings, EvaluateSettings)), None)
        if settings is None:
            return None
        path, revision = at["path"], at["revision"]
        if self.exports:
            path, revision = str(self.folder.path / self.exports[-1]["path"]), None

        def teacher() -> Any:
            opened = self._open_teacher()
            return opened and opened.model

        try:
            return report_samples(settings, self.run, path, revision, teacher, self._kept("samples.json"))
        # the run's own work is done: whatever keeps a model from answering must not lose the report
        except Exception as error:
            self.run.say(f"no samples: {str(error).strip() or type(error).__name__}")
            return None
        finally:
            self._release()

    def _round_teacher(self, spec: QuantSpec, place: Path) -> None:
        """Round the teacher to nearest, pack it like the student, and keep only the packed folder."""
        assert self.teacher is not None
        self.run.console.print("rounding the teacher, for comparison", highlight=False)
        model = load_model(self.teacher.path, dtype=torch.float32, revision=self.teacher.revision)
        if reason := capabilities(model).refusal("rtn"):
            raise UserError(reason)
        state = quantize_model(model, spec)
        unpacked = place / "unpacked"
        # what an interrupted start left behind; ``save_quantized_folder`` writes into no existing folder
        if unpacked.exists():
            shutil.rmtree(unpacked)
        place.mkdir(parents=True, exist_ok=True)
        save_quantized_folder(model, state, unpacked, tokenizer=self.run.tokenizer, base_model=self.teacher.name)
        if not refusals("compressed-tensors", StoredModel.of_weights(spec)):
            # the fp32 copy is several times the size of the packed one, which holds the same weights exactly
            export_folder(unpacked, place / "packed", "compressed-tensors", runtimes=False)
            shutil.rmtree(unpacked)
        else:
            # no format packs it, so the rounded values are measured
            unpacked.rename(place / "packed")

    def _remembered(self, file: Path, path: str, revision: str | None) -> Row:
        """Measure ``path``, or read the stored figures of the same bytes, teacher and text."""
        # "blocks": rows of earlier versions have no sums over blocks, and are measured again
        parts = [content_hash(path, revision), self.teacher and self.teacher.content, self.run.data.fingerprint, self.run.v_eff, "blocks"]
        # this word in the key invalidates older rows of quantized folders, which lack a packed size
        key = sha256_json([*parts, "packed"] if quant_record(path) else parts)
        before = read_figures(file)
        if before.get("key") == key and _is_row(before.get("row")):
            return before["row"]
        # the student of a run may be its teacher: the same bytes have the same figures
        if key in self._figures:
            store_figures(file, key, self._figures[key])
            return self._figures[key]
        told = f"measuring {Path(path).parent.name if Path(path).name == 'model' else Path(path).name}"
        with self.run.console.status(told):
            progress = part_lines(self.run.console, told, "held-out windows")
            row = measure_folder(path, self._open_teacher(), self.run.data.evaluation, revision, progress)
        self._release()
        store_figures(file, key, row)
        self._figures[key] = row
        return row

    def _open_teacher(self) -> LocalTeacher | None:
        if self.teacher is None:
            return None
        if self._opened is None:
            self._opened = measure_teacher(self.teacher.path, self.teacher.revision, self.run.v_eff)
        return self._opened

    def _release(self) -> None:
        """Free the GPU for training: the measuring teacher is fp32, and the plan counts only the training one."""
        if best_device() != "cpu":
            self._opened = None
            torch.cuda.empty_cache()

    def _relative(self, path: str) -> str:
        """Return a path relative to the run folder, or a bare name: reports contain no absolute paths of this machine."""
        try:
            return str(Path(path).resolve().relative_to(self.folder.path.resolve()))
        except ValueError:
            return model_name(path)


def _is_row(row: Any) -> bool:
    """Return whether a stored row is complete; a damaged one is measured again."""
    if not isinstance(row, dict) or not isinstance(row.get("eval"), dict | None):
        return False
    # type(), since isinstance would take True for a number
    return all(type(row.get(name, "")) in (int, float, type(None)) for name in ("parameters", "bytes", "bits_per_weight", "sparsity"))
