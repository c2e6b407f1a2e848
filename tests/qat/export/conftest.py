"""Sources of exports with lattices that no stage writes yet, made here of random weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.qat.codes.state import QuantState
from decoct.qat.export.export import export_folder
from decoct.qat.fake_quant.encoding import encode
from decoct.qat.source.openers import OPENERS
from decoct.qat.source.quantized_source import ExportSource, open_source
from decoct.qat.spec import ActivationSpec, QuantSpec

SpecSource = Callable[..., ExportSource]
ExportSourceTo = Callable[[ExportSource, str], Path]


@pytest.fixture
def spec_source(quantized_folder: Callable[..., Path]) -> SpecSource:
    """``spec_source(spec, own={suffix: spec}, activations=None, **folder)``: random weights on these lattices."""

    def build(
        spec: QuantSpec, own: dict[str, QuantSpec] | None = None, activations: ActivationSpec | None = None, **folder: Any
    ) -> ExportSource:
        opened = open_source(quantized_folder(bits=8, group_size="channel", **folder))
        state = opened.state
        specs = {module: next((s for end, s in (own or {}).items() if module.endswith(end)), spec) for module in state.modules}
        generator = torch.Generator().manual_seed(7)
        static = activations is not None and activations.scaling == "static"
        zeros = static and activations is not None and not activations.symmetric
        made = QuantState(
            spec=spec,
            modules=state.modules,
            codes={},
            scales={},
            own_specs={module: its for module, its in specs.items() if its is not spec},
            activations=activations,
            input_scales={module: torch.tensor(0.0625) for module in state.modules} if static else {},
            input_zeros={module: torch.tensor(5, dtype=torch.int8) for module in state.modules} if zeros else {},
        )
        for module, its in specs.items():
            weight = torch.randn(state.codes[module].shape, generator=generator) * 0.1 + 0.03
            weight[3] = 0  # a pruned row, a row whose zero point is the smallest code and one whose zero point is the largest
            weight[4] = weight[4].abs() + 0.01
            weight[5] = -weight[5].abs() - 0.01
            # one global scale for all, as parts that servers join have to share it
            encoded = encode(weight, its, whole=torch.tensor([2688.0]))
            made.codes[module], made.scales[module] = encoded.codes, encoded.scales
            if encoded.global_scale is not None:
                made.global_scales[module] = encoded.global_scale
            if encoded.zeros is not None:
                made.zero_points[module] = encoded.zeros
        return dataclasses.replace(opened, state=made)

    return build


@pytest.fixture
def export_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportSourceTo:
    """``export_source(source, format, **options)``: the folder that ``export_folder`` makes of a source."""

    def run(source: ExportSource, form: str, **options: Any) -> Path:
        monkeypatch.setitem(OPENERS, form, lambda folder, load: source)
        target = tmp_path / f"{form}-{len(list(tmp_path.iterdir()))}"
        export_folder(source.folder, target, form, runtimes=False, **options)
        return target

    return run
