"""The estimate of a teacher's bytes, beside the bytes that an opened teacher really holds, for every way to hold one."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.families import decoder_layers
from decoct.models.folder.loading import load_config, meta_model
from decoct.models.settings import LoadIn, Placement
from decoct.models.teachers import open_teacher
from decoct.models.teachers.offloaded import Offloading
from decoct.trainer.processes.teacher_memory import TeacherSize, teacher_bytes, teacher_size

RANKS = 8


@pytest.fixture(scope="module", params=[("llama", False), ("qwen2", True)], ids=["llama", "qwen2-tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of 4 layers in fp32; Qwen2 has biases, and here one table for embedding and head."""
    family, tied = request.param
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=384, tie_word_embeddings=tied, **sizes)
    place = tmp_path_factory.mktemp(family)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


def size_of(folder: Path) -> TeacherSize:
    return teacher_size(meta_model(load_config(folder)))


def storages(tensors: Iterator[Any]) -> int:
    """Bytes of the memory behind tensors, shared memory once."""
    plain = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain if t.device.type != "meta"}.values())


def weights(model: torch.nn.Module) -> Iterator[Any]:
    """Parameters, and what bitsandbytes keeps of them elsewhere: nf4's scales, int8's codes and scales."""
    yield from model.parameters()
    for module in model.modules():
        if (nf4 := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            yield nf4.absmax
        if (int8 := getattr(module, "state", None)) is not None:
            yield from (tensor for tensor in (int8.CB, int8.SCB) if tensor is not None)


@pytest.mark.parametrize("load_in", ["fp32", "bf16", "int8", "nf4"])
def test_a_replicated_teacher_holds_the_bytes_of_the_estimate(folder: Path, load_in: LoadIn) -> None:
    model = open_teacher(folder, load_in=load_in, v_eff=384).model
    assert teacher_bytes(size_of(folder), load_in, "replicated", RANKS) == storages(weights(model))


@pytest.mark.parametrize("load_in", ["fp32", "bf16"])
def test_an_offloaded_teacher_holds_what_is_outside_its_layers_and_two_of_them(
    folder: Path, load_in: LoadIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = Offloading._send

    def counted(self: Offloading, index: int) -> Any:
        weights, arrived = send(self, index)
        sent.append(storages(iter(weights)))
        return weights, arrived

    monkeypatch.setattr(Offloading, "_send", counted)
    model: Any = open_teacher(folder, load_in=load_in, placement="offloaded", v_eff=384).model
    inside = {id(parameter) for layer in decoder_layers(model) for parameter in layer.parameters()}
    resident = storages(parameter for parameter in model.parameters() if id(parameter) not in inside)
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    # with CUDA the next layer is on its way while one computes
    assert teacher_bytes(size_of(folder), load_in, "offloaded", RANKS) == resident + 2 * max(sent)


class Peak(TorchDispatchMode):
    """The most bytes of living tensors, looked at when FSDP2 copies a gathered layer to its place."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "split_with_sizes_copy" in str(func):
            self.most = max(self.most, living())
        return result


def living() -> int:
    # tests of compiled layers leave tensors without memory behind in this process
    unreal = (FakeTensor, FunctionalTensor)
    return storages(found for found in gc.get_objects() if isinstance(found, torch.Tensor) and not isinstance(found, unreal))


@contextmanager
def eight_processes() -> Iterator[None]:
    """A process group of ranks that are not there: collectives do nothing, memory is taken as with them."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*reduce_op.*:FutureWarning")
@pytest.mark.parametrize("load_in", ["fp32", "bf16"])
def test_a_sharded_teacher_holds_its_share_and_the_layers_that_are_gathered(folder: Path, load_in: LoadIn) -> None:
    with eight_processes(), torch.no_grad():
        gc.collect()
        before = living()
        model: Any = open_teacher(folder, load_in=load_in, placement="sharded", v_eff=384).model
        ids = torch.zeros(1, 2, dtype=torch.int64)
        model(input_ids=ids)  # the first pass makes buffers that stay
        with Peak() as peak:
            model(input_ids=ids)
        estimate = teacher_bytes(size_of(folder), load_in, "sharded", RANKS)
        assert peak.most - before == pytest.approx(estimate, rel=0.01)
    del model


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
def test_one_process_holds_a_sharded_teacher_whole(folder: Path, placement: Placement) -> None:
    size = size_of(folder)
    assert teacher_bytes(size, "bf16", placement, 1) == 2 * size.parameters
