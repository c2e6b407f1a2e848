"""Inputs of a run: tokenizer, prepared text, teacher and student. Rank 0 makes them, and every rank opens them."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.common.cache_folder import cache_dir
from ...models.common.errors import UserError
from ...models.common.files import sha256_json
from ...models.family_map import family_of
from ...models.folder.hub import model_name
from ...models.folder.loading import load_config, load_model, load_tokenizer
from ...models.folder.model_folder import content_hash, save_model_folder
from ...models.folder.record import check_record
from ...models.pruning.zeros_record import check_sparse, of_kept_layers, sparse_modules
from ...models.sizes import sizes_of
from ...models.student import student_by_keeping, student_from_config, trim_vocabulary
from ...models.teachers import TeacherRef
from ...models.tokenizer.vocabulary import check_same_vocabulary, effective_vocab, embedding_rows, tokens_without_rows
from ...trainer.data.blended_data import blend_data
from ...trainer.data.documents import Documents, read_documents
from ...trainer.data.encoded_text import Helpers, help_encoding
from ...trainer.data.generated import WritingModel, generated_documents
from ...trainer.data.known_ids import check_rows
from ...trainer.data.prepared_data import PreparedData, open_prepared, prepare_data
from ...trainer.scratch import ScratchTeacher, locate_scratch, make_tokenizer
from ...trainer.settings import DataSettings
from ...trainer.stage_plan import reads_text
from ...trainer.stages.context import RunContext
from ...trainer.stages.student_and_teacher import current_device
from .text_parts import naming_part, whole_text

_LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...configs.recipe import Recipe
    from .run_folder import StageFolder
    from .session import Session


@dataclass(frozen=True)
class RunInputs:
    """Tokenizer and text of a run, open on this rank."""

    tokenizer: "PreTrainedTokenizerBase"
    v_eff: int
    data: PreparedData
    scratch: ScratchTeacher | None
    note: str = ""
    """Note on the vocabulary; usually ''."""


def open_origin(recipe: "Recipe", session: "Session") -> RunInputs:
    """Read the text, make or find the tokenizer, and tokenize once; every rank returns the same result."""
    world = session.world
    # read on rank 0 alone; the texts of a blend are prepared one after the other, so that all ranks can help with each
    texts: dict[str, Documents] = {}
    told = session.on_first(lambda: _prepare(recipe, texts))
    tokenizer = load_tokenizer(told["tokenizer"], revision=told["revision"])
    parts: list[PreparedData] = []
    for name, settings in recipe.data.texts.items():

        def assist(folder: str, settings: DataSettings = settings) -> None:
            help_encoding(folder, settings, (told["tokenizer"], told["revision"]), world, _LOG.warning)

        def tokenize(name: str = name, settings: DataSettings = settings) -> str:
            with naming_part(recipe.data, name):
                helpers = Helpers(world, session.ask) if world.size > 1 else None
                data = prepare_data(settings, tokenizer, cache_dir(), documents=texts[name], train=_learns(recipe), helpers=helpers)
                # ids beyond the embedding would fail on a GPU as an assertion without a name
                check_rows(data, tokenizer, effective_vocab(tokenizer, *_rows(recipe)))
            return str(data.path)

        parts.append(open_prepared(Path(session.on_first(tokenize, assist))))
    if world.size > 1:
        # from here on data loader workers are forked, of which the library warns when its threads are on
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    scratch = ScratchTeacher(Path(told["scratch"])) if told["scratch"] else None
    v_eff = effective_vocab(tokenizer, *_rows(recipe))
    data = blend_data(recipe.data, parts) if recipe.data.blend else parts[0]
    return RunInputs(tokenizer, v_eff, data, scratch, _without_rows(tokenizer, v_eff))


def _rows(recipe: "Recipe") -> list[int | None]:
    """Return the number of embedding rows of the given models."""
    given = [(recipe.student.path, recipe.student.revision)]
    given += [(recipe.teacher.path, recipe.teacher.revision)] if recipe.teacher else []
    return [embedding_rows(load_config(path, revision=revision)) for path, revision in given if path]


def _without_rows(tokenizer: "PreTrainedTokenizerBase", v_eff: int) -> str:
    beyond = tokens_without_rows(tokenizer, v_eff)
    if not beyond:
        return ""
    first, token = next(iter(beyond.items()))
    count = f"{len(beyond):,} tokens have" if len(beyond) > 1 else "one token has"
    return f"{count} no row in the embedding of {v_eff:,} rows (from id {first:,}, {token!r}); the text has none of them"


def _prepare(recipe: "Recipe", texts: dict[str, Documents]) -> dict[str, Any]:
    """Open each text of the recipe into ``texts``, and the tokenizer (rank 0)."""
    for path in (recipe.student.path, recipe.teacher and recipe.teacher.path):
        if path and Path(path).is_dir():
            check_record(Path(path))  # find damage before hours of tokenizing
    for name, settings in recipe.data.texts.items():
        with naming_part(recipe.data, name):
            texts[name] = _generated(recipe, settings) if settings.generate else read_documents(settings)
    # phases: the text, the scratch teacher's tokenizer on it, then tokens for everybody
    scratch = None
    if recipe.teacher and recipe.teacher.scratch:
        text = whole_text(recipe.data, texts)
        scratch = locate_scratch(recipe.teacher.scratch, recipe.data, recipe.trainer, text, recipe.seed)
        make_tokenizer(recipe.teacher.scratch, scratch, text)
    where, revision = _tokenizer_place(recipe, scratch)
    # before tokenizing, which takes hours for a large text
    _check_vocabularies(recipe, load_tokenizer(where, revision=revision))
    return {"tokenizer": where, "revision": revision, "scratch": str(scratch.folder) if scratch else None}


def _generated(recipe: "Recipe", settings: DataSettings) -> Documents:
    """The text that the recipe's teacher, or its given student, writes itself; ``configs/checks.py`` refuses recipes without it."""
    asked = settings.generate
    assert asked is not None
    given = recipe.student if asked.model == "student" else recipe.teacher
    assert given is not None and given.path is not None
    path, revision = given.path, given.revision
    tokenizer = load_tokenizer(path, revision=revision)

    def load() -> tuple[Any, int]:
        device = current_device()
        # a CPU is slow in bf16, and a GPU samples from bf16 weights as a server does
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = load_model(path, dtype=dtype, revision=revision, device=device)
        return model, effective_vocab(tokenizer, embedding_rows(model.config))

    writer = WritingModel(name=model_name(path), content=content_hash(path, revision), tokenizer=tokenizer, load=load)
    return generated_documents(settings, writer, cache_dir(), recipe.seed, _LOG.warning)


def _learns(recipe: "Recipe") -> bool:
    """Return whether anything needs text other than the evaluation text."""
    return any(reads_text(entry.settings) for entry in recipe.stages) or bool(recipe.teacher and recipe.teacher.scratch)


def _tokenizer_place(recipe: "Recipe", scratch: ScratchTeacher | None) -> tuple[str, str | None]:
    if scratch:
        return str(scratch.tokenizer), None
    # the student's own tokenizer first: it is the one that its model folder must have
    if recipe.student.path:
        return recipe.student.path, recipe.student.revision
    if recipe.teacher and recipe.teacher.path:
        return recipe.teacher.path, recipe.teacher.revision
    raise UserError("student.config needs a tokenizer: give a teacher (its tokenizer is used), or student.path")


def _check_vocabularies(recipe: "Recipe", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that teacher and student give every token id the same meaning, whatever the padding of their heads."""
    if recipe.teacher and recipe.student.path:
        if recipe.teacher.path:
            check_same_vocabulary(load_tokenizer(recipe.teacher.path, revision=recipe.teacher.revision), tokenizer)
        else:
            check_same_vocabulary(tokenizer, load_tokenizer(recipe.student.path, revision=recipe.student.revision))


def teacher_ref(recipe: "Recipe", scratch: ScratchTeacher | None) -> TeacherRef | None:
    """Return how stages open the recipe's teacher; None without one. A scratch teacher must already be trained."""
    if recipe.teacher is None:
        return None
    path = str(scratch.model) if scratch else str(recipe.teacher.path)
    name = "a scratch teacher" if scratch else model_name(path)
    return TeacherRef(
        path=path,
        load_in=recipe.teacher.load_in,
        placement=recipe.teacher.placement,
        revision=recipe.teacher.revision,
        name=name,
        content=content_hash(path, recipe.teacher.revision),
        cache=recipe.teacher.cache,
        served=recipe.teacher.served,
    )


def make_student(recipe: "Recipe", run: RunContext, folder: "StageFolder", record: dict[str, Any]) -> dict[str, Any]:
    """Make the student's first model folder if it does not exist yet (rank 0). A student given by path is used in place.

    Returns: ``{"path", "revision"}`` of the folder that the first stage reads.
    """
    settings, teacher = recipe.student, run.teacher
    if settings.path:
        if any(entry.kind != "evaluate" for entry in recipe.stages):
            _refuse_export(settings.path, settings.revision)
        return {"path": settings.path, "revision": settings.revision}
    sparse = sparse_modules(teacher.path, teacher.revision) if settings.keep and teacher else []
    key = sha256_json(
        {
            "keep": settings.keep and settings.keep.layers,
            "config": settings.config,
            "teacher": teacher and teacher.content,
            "seed": recipe.seed,
            # not part of the teacher's content hash
            **({"sparse": sparse} if sparse else {}),
        }
    )
    state = folder.begin(key, "student")
    if state.get("state") != "done":
        facts = _build_student(recipe, run, folder, record, sparse)
        folder.write({"key": key, "kind": "student", "state": "done", "makes_model": True, **facts})
    return {"path": str(folder.model), "revision": None}


def _build_student(recipe: "Recipe", run: RunContext, folder: "StageFolder", record: dict[str, Any], sparse: list[str]) -> dict[str, Any]:
    teacher = run.teacher
    facts: dict[str, Any] = {}
    zeros: list[str] = []
    if recipe.student.keep:
        if teacher is None:
            raise UserError("student.keep needs a teacher to cut the student from; add one, or use student.path")
        source = load_model(teacher.path, dtype=torch.float32, revision=teacher.revision)
        # fp32 whatever the files have: the student's master weights start from the teacher's exact values
        model, kept = student_by_keeping(source, recipe.student.keep.layers)
        check_sparse(sparse, source)
        family = family_of(source)
        facts = {"kept": {"layers": kept}, "parent_shape": sizes_of(source.config, family).record()}
        zeros = of_kept_layers(sparse, family, kept)
    else:
        model = student_from_config(dict(recipe.student.config or {}), run.tokenizer, recipe.seed)
    trim_vocabulary(model, run.v_eff)
    dtype = torch.bfloat16 if recipe.trainer.save_dtype == "bf16" else torch.float32
    # the record names the matrices with zeros, because bytes alone do not say which zeros are meant to stay
    made = {**record, "kind": "student", **facts, **({"sparse": zeros} if zeros else {})}
    save_model_folder(folder.model, model, run.tokenizer, made, dtype=dtype)
    return facts


def _refuse_export(path: str, revision: str | None) -> None:
    """Raise UserError for packed weights, which only `evaluate` can read."""
    if Path(path).is_dir() and getattr(load_config(path, revision=revision), "quantization_config", None):
        raise UserError(f"{path} contains packed weights, which cannot be trained; give the folder that it was exported from")


__all__ = ["RunInputs", "make_student", "open_origin", "teacher_ref"]
