"""Several processes give what one gives: two ranks (gloo), DDP and FSDP2, under torchrun's agent where they are killed and restarted."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decoct.trainer.data.order import StepBatches

from ...support.warm_python import WarmPython

pytestmark = pytest.mark.slow
STRATEGIES = ["ddp", "fsdp2"]
Start = Callable[..., str]


def _command(script: str, work: Path, *options: str, restarts: int = 0) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return [*launcher, script, str(work), *options]


@pytest.fixture
def torchrun(warm: WarmPython, training_command: list[str]) -> Start:
    """``torchrun(work, *options, restarts=0)``: the stage on two ranks of torchrun's agent; what all of them print."""

    def start(work: Path, *options: str, restarts: int = 0) -> str:
        done = warm.run(_command(training_command[-1], work, *options, restarts=restarts))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return start


@pytest.fixture
def alone(warm: WarmPython, training_command: list[str]) -> Start:
    """``alone(work, *options, code=0)``: the stage in one process; what it prints."""

    def start(work: Path, *options: str, code: int = 0) -> str:
        done = warm.run([*training_command, str(work), *options])
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return start


@pytest.fixture
def pair(warm: WarmPython, training_command: list[str]) -> Start:
    """``pair(work, *options, code=0)``: the stage on two ranks that no agent watches over; what both print."""

    def start(work: Path, *options: str, code: int = 0) -> str:
        done = warm.run_ranks(2, [*training_command, str(work), *options])
        text = "".join(rank.stdout + rank.stderr for rank in done)
        assert [rank.returncode for rank in done] == [code, code], text
        return text

    return start


def _rows(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def _differences(one: Path, other: Path, name: str) -> list[float]:
    return [abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(_rows(one), _rows(other), strict=True)]


def _hooks(work: Path) -> dict[str, torch.Tensor]:
    """Tensors of hooks in the last checkpoint; ranks share the work of writing them."""
    files = (work / "stage/checkpoints/step-00000020").glob("hooks-*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _ranges(work: Path) -> dict[str, torch.Tensor]:
    """Ranges of inputs, and of keys and values, in the last checkpoint."""
    return {name: tensor for name, tensor in _hooks(work).items() if name.endswith("ranges")}


def _same_bits(one: Path, other: Path) -> None:
    """The checkpoints of the last step agree in every file but the times in state.json."""
    last = sorted((one / "stage/checkpoints").glob("step-*"))[-1]
    twin = other / "stage/checkpoints" / last.name
    files = sorted(path.name for path in last.glob("*.safetensors"))
    assert files == sorted(path.name for path in twin.glob("*.safetensors"))
    for name in files:
        assert (last / name).read_bytes() == (twin / name).read_bytes(), name
    assert (one / "student.safetensors").read_bytes() == (other / "student.safetensors").read_bytes()


@pytest.mark.parametrize(("strategy", "kind"), [("ddp", "distill"), ("fsdp2", "distill"), ("fsdp2", "learned")])
def test_evaluating_meanwhile_changes_no_bit_on_two_ranks(alone: Start, pair: Start, tmp_path: Path, strategy: str, kind: str) -> None:
    common = [kind, "steps=12", "windows=8", "micro=2", "ranks=2", "every=5", f"strategy={strategy}"]
    pair(tmp_path / "plain", *common)
    pair(tmp_path / "watched", *common, "watch=3")
    _same_bits(tmp_path / "plain", tmp_path / "watched")
    watched = [row for row in _rows(tmp_path / "watched") if "held_out_kl" in row]
    assert [row["step"] for row in watched] == [0, 3, 6, 9, 12]
    alone(tmp_path / "one", kind, "steps=12", "windows=8", "micro=2", "every=5", "watch=3")
    first = _rows(tmp_path / "one")[0]
    assert (watched[0]["held_out_kl"], watched[0]["held_out_perplexity"]) == pytest.approx(
        (first["held_out_kl"], first["held_out_perplexity"]), rel=1e-5
    ), "before any step all hold the same student"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["pretrain", "prune"])
def test_two_ranks_decide_as_one_and_resume_to_it(alone: Start, pair: Start, tmp_path: Path, strategy: str, kind: str) -> None:
    """The best weights and an early end: held-out windows that two ranks cannot share evenly, and a last checkpoint that is lost."""
    common = [kind, "steps=40", "windows=6", "dropout=0.0", "every=5", "watch=3", "text=3", "result=best", "patience=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone(one, *common, "micro=3")
    out = pair(two, *common, "micro=3", "ranks=2", f"strategy={strategy}")
    assert out.count("ends early, after step") == 1
    assert [row["step"] for row in _rows(two)] == [row["step"] for row in _rows(one)]
    figure = "held_out_perplexity"
    seen, wanted = ([row[figure] for row in _rows(work) if figure in row] for work in (two, one))
    assert seen == pytest.approx(wanted, rel=1e-5)
    assert _rows(two)[-1]["ended_early"] == 1
    gathered, expected = load_file(two / "student.safetensors"), load_file(one / "student.safetensors")
    assert all((gathered[name] - expected[name]).abs().median() < 1e-6 for name in expected)
    again = tmp_path / "again"
    shutil.copytree(two, again)
    ended = _rows(two)[-1]["step"]
    shutil.rmtree(again / f"stage/checkpoints/step-{ended:08d}")
    out = pair(again, *common, "micro=3", "ranks=2", f"strategy={strategy}")
    assert out.count("ends early, after step") == 1
    _same_bits(two, again)


def test_two_ranks_sample_as_one_and_resume_to_it(alone: Start, pair: Start, tmp_path: Path) -> None:
    """Each rank draws its part. One rank goes on with the samples that two have drawn."""
    common = ["distill", "windows=8", "dropout=0.0", "every=4", "samples=mix", "refresh=3"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone(one, *common, "micro=4", "steps=8")
    pair(two, *common, "micro=4", "steps=8", "ranks=2")
    for name in ("loss", "kl", "own_kl", "given_kl", "grad_norm"):
        assert max(_differences(one, two, name)) < 1e-5, name
    for name in ("tokens", "own_tokens", "samples", "sample_tokens", "samples_cut"):
        assert [row.get(name) for row in _rows(one)] == [row.get(name) for row in _rows(two)], name
    first, second = (json.loads((work / "stage/samples/step-00000003.json").read_text())["rows"] for work in (one, two))
    assert first == second
    # step 4 is in the middle of a refresh
    shutil.rmtree(two / "stage/checkpoints/step-00000008")
    alone(two, *common, "micro=4", "steps=8")
    assert max(_differences(one, two, "own_kl")) < 1e-5


@pytest.mark.parametrize("kind", ["distill", "features", "prune", "nm", "movement", "qat", "learned", "lattices"])
def test_ddp_and_fsdp2_give_the_curve_of_one_process(alone: Start, pair: Start, tmp_path: Path, kind: str) -> None:
    common = [kind, "steps=20", "windows=8", "dropout=0.0", "every=100"]
    alone(tmp_path / "one", *common, "micro=4")
    expected_weights = load_file(tmp_path / "one/student.safetensors")
    for strategy in STRATEGIES:
        work = tmp_path / strategy
        out = pair(work, *common, "micro=2", "ranks=2", f"strategy={strategy}")
        assert len(_rows(work)) == 20
        for name in ("loss", "kl", "cross_entropy", "grad_norm"):
            differences = _differences(tmp_path / "one", work, name)
            # a rounding may jump, where depends on the processor: all are held to 1e-5 in their first step, qat to 1e-3 over all, and to
            # 3e-3 where inputs, keys and values jump as well; what one scale for a matrix or a zero point moves is a multiple of that
            assert differences[0] < 1e-5, (strategy, name)
            if kind == "lattices":
                assert max(differences[:2]) < 1e-5 and max(differences) < 0.2, (strategy, name)
            else:
                assert max(differences) < {"qat": 1e-3, "learned": 3e-3}.get(kind, 1e-5), (strategy, name)
        assert [row["tokens"] for row in _rows(tmp_path / "one")] == [row["tokens"] for row in _rows(work)]
        assert out.count("step 20/20") == 1, "rank 0 alone shows progress"
        gathered = load_file(work / "student.safetensors")
        assert gathered.keys() == expected_weights.keys(), "tied tensors stay tied"
        for name, tensor in gathered.items():
            # weights whose gradient is all but zero take AdamW steps of either sign; the others agree to rounding, but where inputs
            # are rounded too, and keys and values to fp8, jumps reach every weight
            limit = {"learned": 5e-5, "lattices": 1e-4}.get(kind, 1e-6)
            assert (tensor - expected_weights[name]).abs().median() < limit, (strategy, name)
            if kind in ("prune", "nm", "movement"):
                assert (tensor == 0).float().mean() == (expected_weights[name] == 0).float().mean(), (strategy, name)
        if kind == "features":
            assert max(_differences(tmp_path / "one", work, "loss_hidden") + _differences(tmp_path / "one", work, "loss_relations")) < 1e-4
            kept, expected = _hooks(work), _hooks(tmp_path / "one")
            assert kept.keys() == expected.keys(), strategy
            for name, tensor in expected.items():
                assert (kept[name] - tensor).abs().max() < 1e-4, (strategy, name)
        if kind == "learned":
            kept, expected = _ranges(work), _ranges(tmp_path / "one")
            assert kept.keys() == expected.keys() == {"quantizers/ranges", "quantizers/cache_ranges"}
            # equal to the last bit until the first jump; a rank's own range would differ in most of its numbers
            assert all((kept[name] / expected[name] - 1).abs().median() < 2e-3 for name in kept), strategy


def test_fsdp2_ranks_hold_and_write_about_half_each(torchrun: Start, tmp_path: Path) -> None:
    torchrun(tmp_path, "prune", "steps=4", "micro=2", "ranks=2", "strategy=fsdp2")
    last = tmp_path / "stage/checkpoints/step-00000004"
    for group in ("student", "optimizer", "hooks"):
        sizes = [sum(t.numel() for t in load_file(last / f"{group}-{rank}.safetensors").values()) for rank in (0, 1)]
        assert min(sizes) > 0.45 * sum(sizes), (group, sizes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_resume_in_the_same_bits(pair: Start, tmp_path: Path, strategy: str) -> None:
    options = ["prune", "steps=12", "windows=8", "every=4", "micro=2", "ranks=2", f"strategy={strategy}"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pair(straight, *options)
    shutil.copytree(straight, stopped)
    (stopped / "stage/checkpoints/step-00000012/state.json").write_text("{}")
    out = pair(stopped, *options)
    assert out.count("step-00000012 is damaged") == 1
    assert out.count("continues from the checkpoint of step 8") == 1
    _same_bits(straight, stopped)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_rank_is_restarted_and_ends_in_the_same_bits(torchrun: Start, tmp_path: Path, strategy: str) -> None:
    options = ["distill", "steps=12", "every=4", "micro=2", "ranks=2", f"strategy={strategy}"]
    torchrun(tmp_path / "straight", *options, "strike=99:0:SIGKILL")
    out = torchrun(tmp_path / "struck", *options, "strike=6:1:SIGKILL", restarts=1)
    assert "continues from the checkpoint of step 4" in out
    _same_bits(tmp_path / "straight", tmp_path / "struck")


def test_linears_gathered_as_bf16_give_the_curve_of_an_fp32_gather(pair: Start, tmp_path: Path) -> None:
    """Dropout, a tied table, activation checkpointing and evaluations included. Norms in bf16 would move the loss much farther."""
    options = ["distill", "steps=6", "micro=2", "ranks=2", "strategy=fsdp2", "precision=bf16-mixed", "watch=3", "checkpointing=1"]
    pair(tmp_path / "bf16", *options)
    pair(tmp_path / "fp32", *options, "gather=fp32")
    for name, limit in (("loss", 1e-6), ("grad_norm", 1e-5), ("held_out_kl", 1e-5)):
        bf16, fp32 = ([row[name] for row in _rows(tmp_path / work) if row.get(name) is not None] for work in ("bf16", "fp32"))
        assert bf16, name
        assert bf16 == pytest.approx(fp32, rel=limit), name
    one, other = (load_file(tmp_path / work / "student.safetensors") for work in ("bf16", "fp32"))
    assert all((one[name] - other[name]).abs().median() < 1e-7 for name in one)


def test_two_machines_of_two_ranks_give_the_curve_of_one_process(
    alone: Start, pair: Start, warm: WarmPython, training_command: list[str], tmp_path: Path
) -> None:
    """hsdp: each row is written once, a lost checkpoint changes no bit, and two ranks of one machine go on with what four have written."""
    common = ["prune", "steps=12", "windows=8", "every=4", "dropout=0.0", "watch=4"]

    def machines(work: Path) -> str:
        options = [*common, "micro=1", "ranks=4", "strategy=hsdp"]
        done = warm.run_ranks(4, [*training_command, str(work), *options], nodes=2)
        assert [rank.returncode for rank in done] == [0] * 4, "".join(rank.stdout + rank.stderr for rank in done)
        return done[0].stdout

    alone(tmp_path / "one", *common, "micro=4")
    machines(tmp_path / "four")
    for name in ("loss", "grad_norm"):
        rows = [[row[name] for row in _rows(tmp_path / work) if row["step"]] for work in ("one", "four")]
        assert rows[1] == pytest.approx(rows[0], rel=1e-5), name
    last = tmp_path / "four/stage/checkpoints/step-00000012"
    for group in ("student", "optimizer", "hooks"):
        for name, entry in json.loads((last / "pieces.json").read_text())[group].items():
            rows = [piece[1:] for piece in entry["pieces"]]
            assert rows == [[None, None]] or [row for first, stop in rows for row in range(first, stop)] == list(
                range(entry["shape"][0])
            ), name
    for again in ("again", "moved"):
        shutil.copytree(tmp_path / "four", tmp_path / again)
        (tmp_path / again / "stage/checkpoints/step-00000012/state.json").write_text("{}")
    assert "continues from the checkpoint of step 8" in machines(tmp_path / "again")
    _same_bits(tmp_path / "four", tmp_path / "again")
    out = pair(tmp_path / "moved", *common, "micro=2", "ranks=2", "strategy=fsdp2")
    assert "continues from the checkpoint of step 8" in out
    gathered, expected = (load_file(tmp_path / work / "student.safetensors") for work in ("moved", "one"))
    assert all((gathered[name] - expected[name]).abs().median() < 1e-6 for name in expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_world_size_goes_on_without_losing_or_repeating_a_window(alone: Start, pair: Start, tmp_path: Path, strategy: str) -> None:
    """2 -> 1 -> 2 ranks, each stopped by a SIGTERM to one rank."""
    common = ["distill", "steps=12", "windows=8", "every=100", "dropout=0.0", "ledger=1", f"strategy={strategy}"]
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    alone(straight, *common, "micro=4", "strike=99:0:SIGTERM")
    pair(moved, *common, "micro=2", "ranks=2", "strike=3:1:SIGTERM", code=143)
    out = alone(moved, *common, "micro=4", "strike=7:0:SIGTERM", code=143)
    assert "continues from the checkpoint of step 4" in out
    out = pair(moved, *common, "micro=2", "ranks=2", "strike=99:1:SIGTERM")
    assert "continues from the checkpoint of step 8" in out
    assert max(_differences(straight, moved, "loss")) < 1e-5
    assert [row["tokens"] for row in _rows(straight)] == [row["tokens"] for row in _rows(moved)]
    order = StepBatches(range(40), global_batch=8, micro_batch=8, rank=0, world=1, seed=3, start_step=0, total_steps=12)
    wanted = sorted(order.positions(0, 12 * 8))
    for work in (straight, moved):
        seen = [int(index) for path in work.glob("ledger-*.txt") for index in path.read_text().split()]
        assert sorted(seen) == wanted
    one, other = (load_file(work / "student.safetensors") for work in (straight, moved))
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sigterm_to_the_agent_saves_at_a_step_boundary(
    warm: WarmPython, training_command: list[str], tmp_path: Path, strategy: str
) -> None:
    options = ["distill", "steps=4000", "every=4000", "micro=2", "ranks=2", "pause=0.05", f"strategy={strategy}"]
    agent = warm.start(_command(training_command[-1], tmp_path, *options), merged=True)
    try:
        started = time.monotonic()
        while not (tmp_path / "metrics.jsonl").exists() or len(_rows(tmp_path)) < 3:
            assert time.monotonic() - started < 120
            time.sleep(0.1)
        agent.send_signal(signal.SIGTERM)
        stopping = time.monotonic()
        out, _ = agent.communicate(timeout=60)
    finally:
        agent.kill()
    assert time.monotonic() - stopping < 25, "within the 30 seconds that the agent gives its workers"
    saved = [path.name for path in (tmp_path / "stage/checkpoints").glob("step-*")]
    steps = len(_rows(tmp_path))
    assert saved == [f"step-{steps:08d}"]
    assert f"stopped after step {steps}" in out


def test_activation_checkpointing_and_compiled_layers_change_no_curve(
    alone: Start, torchrun: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    common = ["qat", "steps=6", "windows=8", "dropout=0.0", "every=100", "micro=2"]
    alone(tmp_path / "plain", *common)
    alone(tmp_path / "checkpointed", *common, "checkpointing=1")
    _same_bits(tmp_path / "plain", tmp_path / "checkpointed")
    torchrun(tmp_path / "both", *common, "ranks=2", "checkpointing=1", "compile=1", "strategy=fsdp2")
    assert max(_differences(tmp_path / "plain", tmp_path / "both", "loss")) < 1e-4
    names = load_file(tmp_path / "both/student.safetensors").keys()
    assert names == load_file(tmp_path / "plain/student.safetensors").keys(), "compiling renames nothing"


def test_moments_of_8_bits_survive_a_kill_and_another_strategy(alone: Start, torchrun: Start, tmp_path: Path) -> None:
    """Masked, sharded, 8 bits: the same bits after a kill; and one process goes on with what two have sharded."""
    common = ["prune", "steps=12", "windows=8", "every=4", "dropout=0.0", "hidden=96", "optimizer=adamw-8bit"]
    two = ["micro=2", "ranks=2", "strategy=fsdp2"]
    torchrun(tmp_path / "straight", *common, *two, "strike=99:0:SIGKILL")
    torchrun(tmp_path / "struck", *common, *two, "strike=6:1:SIGKILL", restarts=1)
    _same_bits(tmp_path / "straight", tmp_path / "struck")
    shutil.copytree(tmp_path / "straight", tmp_path / "moved")
    (tmp_path / "moved/stage/checkpoints/step-00000012/state.json").write_text("{}")
    out = alone(tmp_path / "moved", *common, "micro=4", "strike=99:0:SIGKILL")
    assert "continues from the checkpoint of step 8" in out
    assert max(_differences(tmp_path / "straight", tmp_path / "moved", "loss")) < 1e-3
    weights = load_file(tmp_path / "moved/student.safetensors")
    zeros = [float((t == 0).float().mean()) for name, t in weights.items() if name.endswith("proj.weight")]
    assert zeros == pytest.approx([0.6] * len(zeros), abs=1e-3)
