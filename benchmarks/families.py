"""What decoct can do with every causal architecture of transformers: run in tiny form, looked at in its default size.

``python benchmarks/families.py --write`` writes ``models/family_facts.json`` (what only running shows, which plans go by) and
``docs/families.md`` (the table). A test compares both with what comes out. About two minutes on a CPU.
"""

import argparse
import difflib
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from family_models import VOCABULARY, architectures, tiny_config, tiny_model
from transformers.initialization import no_init_weights

from decoct.models.batches import backbone_inputs, keeps_documents_apart
from decoct.models.capabilities import capabilities, percent
from decoct.models.causality import future_reason
from decoct.models.common.errors import DecoctError, UserError
from decoct.models.families import backbone_and_head, check_head, decoder_linears, is_plain_linear, text_config
from decoct.models.family_map import FAMILIES
from decoct.models.folder.codes_file import CODES
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.folder.refused_inputs import check_text_model
from decoct.models.teachers import open_teacher
from decoct.qat.export.limits.gguf import family_refusal
from decoct.qat.layers.quantized_model import fold, prepare, quantize_model
from decoct.qat.ptq import CalibrationText, RoundingMethod, round_model
from decoct.qat.source.quantized_source import open_source
from decoct.qat.spec import QuantSpec

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "models" / "family_facts.json"
PAGE = ROOT / "docs" / "families.md"
LARGEST = 3_000_000
"""Parameters of a tiny form that is run; those with parts for images or sound, whose sizes are other configs', are not."""
_LAYER = re.compile(r"\S+\.\d+\.(?=\w)")
"""What stands before the name of a module inside its layer."""
SPEC = QuantSpec(bits=4, group_size="channel")
COLUMNS = ("distil", "packing", "keep layers", "prune channels", "prune weights", "rtn", "gptq", "qat", "export", "gguf")
"""Of the table; 'distil' stands for 'measure' too."""


@dataclass
class Row:
    """One architecture."""

    model_type: str
    share: float | None = None
    """Of the decoder's weights that are in linears, in the default size; None where transformers cannot make it."""
    measured: dict[str, str] = field(default_factory=dict)
    """Action -> why not, as running showed."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Column -> why not."""
    encoder: bool = False
    """Whether it sees later tokens unless its config has ``is_decoder``."""
    ran: bool = False
    """Whether the tiny form was run."""
    note: str = ""
    """Why it was not, or not even made."""


def look_at(model_type: str) -> Row:
    """Run the tiny form, then look at the default size with what that showed."""
    row = Row(model_type)
    large: Any = None
    try:
        small = tiny_config(model_type)
        text = text_config(small)
        check_text_model("it", small)
        if text is not small:
            raise UserError(f"not run: transformers takes its text model, {text.model_type}")
        large = _shapes(small)
        if sum(parameter.numel() for parameter in large.parameters()) > LARGEST:
            row.note = f"not run: its tiny form has more than {LARGEST:,} parameters"
        else:
            tiny = tiny_model(model_type)
            with torch.no_grad():
                tiny(input_ids=torch.arange(1, 9)[None], use_cache=False)
            row.measured, row.ran = _measured(tiny), True
            # encoders such as BERT are causal only with this field; without it they would see the token that they predict
            if "is_decoder" in large.config.to_dict():
                row.encoder = future_reason(tiny_model(model_type, decoder=False)) is not None
    except UserError as error:
        row.note = str(error)
        if "more than a text model" in row.note:
            way = "`decoct plain` makes its text model" if "decoct plain" in row.note else "transformers has no text-only form of it"
            row.note = ""
            row.share = 0.0
            row.reasons = dict.fromkeys(COLUMNS, f"it is more than a text model; {way}")
            return row
    except Exception as error:
        row.note = f"not run: transformers does not run its tiny form ({_first(error)})"
    try:
        from transformers import AutoConfig

        config = AutoConfig.for_model(model_type)
        if row.encoder:
            config.is_decoder = True
        model = _shapes(config)
    except Exception as error:
        row.note += ("; " if row.note else "") + f"transformers makes no model of its default config ({_first(error)})"
        if large is None:
            return row
        model = large
    # shapes of the default size with what running the tiny form has shown: a share of weights needs real widths
    found = capabilities(model, row.measured)
    row.share = found.weights.share()
    row.reasons = dict(found.reasons)
    if reason := row.reasons.pop("measure", None):
        row.reasons["distil"] = reason
    if reason := family_refusal(model.config, [name for name, _ in model.named_parameters()]):
        row.reasons["gguf"] = reason
    # without linears there are no codes to pack either, so both columns have the reason of rounding
    if "rtn" in row.reasons and not found.weights.linears:
        row.reasons |= {"export": row.reasons["rtn"], "gguf": row.reasons["rtn"]}
    return row


def _made(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def _shapes(config: Any) -> Any:
    """The model on the meta device, without drawing weights."""
    with torch.device("meta"), no_init_weights():
        model = _made(config)
    model.tie_weights()
    return model


def _measured(model: Any) -> dict[str, str]:
    """Action -> why not, for the actions that a tiny model fails."""
    found: dict[str, str] = {}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps: dict[str, Callable[[Any], None]] = {"measure": _measures, "distil": _trains, "bf16 teacher": _teaches, "packing": _packs}
    if decoder_linears(model):
        # each of these changes the model
        steps |= {"gptq": _calibrates, "export": _exports, "qat": _trains_rounded}
    for action, step in steps.items():
        if action in ("gptq", "export", "qat"):
            model = _fresh(model.config, state)
        try:
            step(model)
        except DecoctError as error:
            found[action] = _plain(str(error))
        except Exception as error:
            found[action] = f"its code fails there: {_first(error)}"
        if action == "measure" and action in found:
            return {"measure": found["measure"], "distil": found["measure"]}
    return found


def _fresh(config: Any, state: Mapping[str, torch.Tensor]) -> Any:
    model = _made(config).to(torch.float32).eval()
    model.load_state_dict(state)
    model.tie_weights()
    return model


def _measures(model: Any) -> None:
    backbone_and_head(model)
    if reason := future_reason(model):
        raise UserError(reason)
    try:
        check_head(model)
    except UserError:
        # the difference, which the message has, is another one on every machine
        raise UserError("it does something between head and logits that decoct does not know") from None


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    # one row is padded, since a family may read past its mask
    mask[1, 11:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _trains(model: Any) -> None:
    """A backward pass over padded windows: gradients are finite, and the decoder's weights have some."""
    backbone, weight, bias = backbone_and_head(model)
    model.train()
    try:
        hidden = backbone(**backbone_inputs(_batch())).last_hidden_state
        torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)[..., 0].mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise UserError("a backward pass gives no finite gradients")
    finally:
        model.zero_grad()
        model.eval()


def _teaches(model: Any) -> None:
    """As a teacher in bf16, which is how recipes hold one."""
    with tempfile.TemporaryDirectory() as place:
        folder = save_model_folder(Path(place) / "model", model, None, {"kind": "x"}, dtype=torch.bfloat16)
        hidden, head, _, _ = open_teacher(folder, v_eff=VOCABULARY, name="it").hidden_and_head(_batch())
    if not bool(torch.isfinite(hidden).all()) or hidden.dtype != head.dtype:
        raise UserError("as a teacher in bf16 it gives no finite hidden states")


def _packs(model: Any) -> None:
    if not keeps_documents_apart(model):
        raise UserError("it does not keep packed documents apart")


def _calibrates(model: Any) -> None:
    ids = torch.randint(1, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    text = CalibrationText(batches=[{"input_ids": ids}])
    try:
        round_model(model, SPEC, RoundingMethod(method="gptq"), skip=_special(model), text=text)
    except UserError as error:
        raise UserError(_LAYER.sub("", str(error)).partition(", so nothing")[0].partition(" and cannot be")[0]) from error


def _exports(model: Any) -> None:
    """Whether what is saved has the names that a packed folder asks for."""
    state = quantize_model(model, SPEC, skip=_special(model))
    fold(model, state)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        record = {"kind": "quantize", "quant": state.record()}
        save_model_folder(folder, model, None, record, dtype=torch.float32, extra_tensors={CODES: state.tensors()})
        try:
            open_source(folder)
        except UserError as error:
            if "as a model config" in str(error):
                return  # a field of the tiny form that the file cannot hold says nothing of the family
            # paths and layer numbers go, so that the reason is the same on every machine and families share a note
            what = _LAYER.sub("", str(error).replace(f"{folder}: ", "")).partition(" is missing")[0]
            raise UserError(f"what is saved has other names than its modules ({what})") from error


def _trains_rounded(model: Any) -> None:
    prepare(model, SPEC, _special(model))
    _trains(model)


def _special(model: Any) -> list[str]:
    """Linears with a forward of their own, which are left alone: the table says so."""
    return [name for name, linear in decoder_linears(model).items() if not is_plain_linear(linear)]


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {_plain(lines[-1] if lines else '').split('. ')[0][:120]}"


def _plain(text: str) -> str:
    return " ".join(text.split())


def facts(rows: list[Row]) -> dict[str, Any]:
    """The content of ``family_facts.json``."""
    import transformers

    version = ".".join(transformers.__version__.split(".")[:2])
    return {
        "transformers": version,
        "encoders": [row.model_type for row in rows if row.encoder],
        "reasons": {row.model_type: row.measured for row in rows if row.measured},
    }


_PAGE = """# Families

What decoct can do with the causal language models of transformers {version}. `python benchmarks/families.py --write` makes this page, and a
slow test checks it. Each architecture is run with random weights in a tiny form, and its modules are inspected in the default size of
its config. `decoct plan` and `decoct run` refuse what the table marks with "no" before any work, with the reason and the remedy.

*Weights* is the share of the decoder's weights (without embeddings, positions and head) in the `nn.Linear` layers that pruning and
quantization work on. Less than 95 % is refused, unless the stage has `allow_partial: true`; then the rest stays as it is, and the plan, the
console and the report say how much it is. Experts are not reached because transformers keeps them in three-dimensional parameters.

*distil* is training and measuring. *packing* is several documents per window (`data.packing: false` is the alternative). *round* is
rounding to nearest and with searched scales. *export* is compressed-tensors, gptq, gptq_v2, awq and safetensors, as far as widths and bits
allow. ? means not run here: decoct checks when the model is loaded. GPT-2's layers are not `nn.Linear` and are not rounded; `gguf-bf16` and
similar formats take its weights as they are. An export of a partly quantized model with experts is exact by decoct's own reader,
but transformers 5.23 does not load it, because its conversion of the experts fails.

Of {total} architectures {made} were run: {carried} of these can be distilled, and {rounded} rounded and exported whole.

| family | weights | {columns} |
|---|---:|{rules}|
{rows}

{notes}

## Axes

What structured pruning can cut of each family that has an axis map (`models/family_map.py`). FFN channels and layers can be cut of all of
them. *exact* says whether the cut model computes what the whole one does with the removed hidden channels set to zero. *vLLM* says whether
vLLM reads `head_dim` from the config; if not, it serves a shape only while hidden / heads is `head_dim`.

| family | heads | kv_heads | hidden | exact | vLLM |
|---|---|---|---|---|---|
{axes}
"""


def axes() -> str:
    """The rows of the table of axes, from the axis maps."""
    rows = []
    for name, family in sorted(FAMILIES.items()):
        own = family.own_head_dim
        hidden = "a multiple of the query heads" if family.whole_heads else "yes" if own else "with heads"
        cells = (
            "yes" if own else "with hidden: `head_dim` is hidden / heads",
            "yes" if "kv_heads" in family.fields else "no: each query head has its own",
            hidden,
            "no: a LayerNorm's mean changes" if family.layer_norm else "yes",
            "yes" if own and family.vllm_head_dim else "hidden / heads",
        )
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def page(rows: list[Row]) -> str:
    """The content of ``docs/families.md``."""
    import transformers

    notes: dict[str, int] = {}

    def cell(row: Row, column: str) -> str:
        if row.share is None:
            return "-"
        reason = row.reasons.get(column)
        if reason is None and not row.ran and column in ("distil", "packing", "gptq", "qat", "export"):
            return "?"
        if column == "distil" and reason is None and "bf16 teacher" in row.reasons:
            return "yes; as a teacher in fp32 alone"
        return "yes" if reason is None else f"no [{notes.setdefault(_general(row, column, reason), len(notes) + 1)}]"

    lines = []
    for row in rows:
        note = f" [{notes.setdefault(row.note, len(notes) + 1)}]" if row.note else ""
        note += " (with `is_decoder: true`)" if row.encoder else ""
        share = "-" if row.share is None or "text model" in row.reasons.get("distil", "") else percent(row.share)
        lines.append(f"| {row.model_type}{note} | {share} | " + " | ".join(cell(row, column) for column in COLUMNS) + " |")
    made = [row for row in rows if row.ran]
    return _PAGE.format(
        version=transformers.__version__,
        made=len(made),
        carried=sum("distil" not in row.reasons for row in made),
        rounded=sum(not {"distil", "rtn", "export"} & set(row.reasons) for row in made),
        total=len(rows),
        columns=" | ".join("round" if column == "rtn" else column for column in COLUMNS),
        rules="---|" * len(COLUMNS),
        rows="\n".join(lines),
        notes="\n".join(f"{number}. {text}" for text, number in notes.items()),
        axes=axes(),
    ).replace("||\n", "|\n")


def _general(row: Row, column: str, reason: str) -> str:
    """The reason without what belongs to one family alone, so that families share it."""
    if column in ("keep layers", "prune channels") and "text model" not in reason:
        return "it is not among the families whose parts are known by name"
    if column == "gguf" and "no conversion of model_type" in reason:
        return "decoct knows no conversion to GGUF"
    if reason.startswith("only ") and "3-dimensional" in reason:
        return "less than 95 % of its decoder weights are in linears: experts are in 3-dimensional parameters"
    return reason.replace(f"{row.model_type!r}", "its type")


def main() -> None:
    """Print the page; with --write, write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true", help="say whether the files are what comes out; exit code 1 when not")
    parser.add_argument("families", nargs="*", help="these alone; default: all")
    arguments = parser.parse_args()
    rows = all_rows(arguments.families)
    made = {FACTS: json.dumps(facts(rows), indent=1, sort_keys=True) + "\n", PAGE: page(rows)}
    if arguments.check:
        other = [text for path, text in made.items() for text in _differences(path, text)]
        print("\n".join(other) or "as committed")
        raise SystemExit(1 if other else 0)
    for path, text in made.items():
        if arguments.write:
            path.write_text(text, encoding="utf-8")
        else:
            print(text)


def _differences(path: Path, text: str) -> list[str]:
    return list(difflib.unified_diff(path.read_text(encoding="utf-8").splitlines(), text.splitlines(), str(path), "now", lineterm="", n=0))


def all_rows(families: list[str] | None = None) -> list[Row]:
    """A row for each architecture, quietly."""
    from transformers.utils import logging

    logging.set_verbosity(50)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [look_at(model_type) for model_type in families or architectures()]


if __name__ == "__main__":
    main()
