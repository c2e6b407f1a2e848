"""Hostile names in generated files: each comes out of the shell, sbatch and the cluster as it went in, or is refused."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from decoct.launch.jobs.job import Job, Kubernetes, Slurm, parse_secret
from decoct.launch.jobs.kubernetes import manifest
from decoct.launch.jobs.slurm import sbatch_script
from decoct.launch.jobs.torchrun import endpoint_of, shell_line, torchrun_command
from decoct.models.common.errors import UserError

NASTY = [
    "x\ntouch pwned\n",
    "x\n#SBATCH --uid=0",
    "x\r#SBATCH --uid=0",
    "$(touch pwned)",
    "`touch pwned`",
    "a'b\"c",
    "a\\b",
    "a\\",
    "100%j %% %u",
    "#x",
    "a #x",
    ";reboot&|<>(){}*?[!x]~",
    "$HOME ${HOME} $$ $(HOME) $$(HOME) $",
    "{folder} {line}",
    "[red]x[/red]",
    "- : {} &a *a !!python/object:os.system",
    "ünï 日本 \U0001f600",
    "\x1b[2J",
    "\u2028",
    "\udcff",
    "-rf",
    "packjob",
    " x ",
]
words = st.text(max_size=20) | st.text(" $()`'\"\\%#\n{}-a", max_size=12)


def job_of(text: str) -> Job:
    return Job(recipe=f"r{text}.yaml", name="big", overrides=(f"name={text}",), out=Path(f"runs/o{text}"), gpus=2, nodes=2, job_id="big-1")


def run_arguments(command: list[str]) -> list[str]:
    return command[command.index("run") :]


def hostile(test: Any) -> Any:
    test = settings(max_examples=150, deadline=None)(given(words)(test))
    for text in NASTY:
        test = example(text)(test)
    return test


def sbatch_reads(line: str) -> str:
    """An option as Slurm's sbatch reads it: quotes group, a backslash keeps what follows, an open # ends the line."""
    found, at, quote = "", 0, ""
    while at < len(line) and (quote or not line[at].isspace()):
        character = line[at]
        if character == "\\":
            at += 1
            found += line[at]
        elif quote:
            quote, found = ("", found) if character == quote else (quote, found + character)
        elif character in "\"'":
            quote = character
        elif character == "#":
            break
        else:
            found += character
        at += 1
    return found


@hostile
def test_a_word_comes_out_of_the_sbatch_file_as_it_went_in(text: str) -> None:
    try:
        job = job_of(text)
        script = sbatch_script(job, Slurm(partition=text, account=text), python="python")
    except UserError:
        assert not text.isprintable() or re.search(r"\\|packjob|hetjob", text, re.IGNORECASE)
        return
    lines = script.splitlines()
    read = [sbatch_reads(line.removeprefix("#SBATCH --")).partition("=") for line in lines if line.startswith("#SBATCH")]
    options = {name: value for name, _, value in read}
    assert options["output"].replace("%%", "\0").replace("%j", "7").replace("\0", "%") == f"{job.out}/slurm-7.log"
    assert options["partition"] == options["account"] == text
    expected = ("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "partition", "account", "signal", "output", "open-mode", "requeue")
    assert sorted(options) == sorted(expected)
    (made,) = [line for line in lines if line.startswith("mkdir")]
    assert shlex.split(made) == ["mkdir", "-p", "--", str(job.out)]
    (run,) = [line for line in lines if line.startswith("srun")]
    assert run_arguments(shlex.split(run.removesuffix(" &"))) == job.arguments()


@hostile
def test_a_word_comes_out_of_a_manifest_as_it_went_in(text: str) -> None:
    for kind in ("trainjob", "jobset"):
        try:
            job = job_of(text)
            made = yaml.safe_load(manifest(job, Kubernetes(image=f"i{text}", volume_claim="runs"), kind))
        except UserError:
            assert not text.isprintable()
            continue
        spec = made["spec"]
        if kind == "trainjob":
            given_words, image = spec["trainer"]["args"], spec["trainer"]["image"]
        else:
            (container,) = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
            given_words, image = container["command"], container["image"]
        # a container's own: $(NAME) is filled in, $$ is $
        assert not any(re.search(r"(?<!\$)(\$\$)*\$(?!\$)", word) for word in given_words)
        assert run_arguments([word.replace("$$", "$") for word in given_words]) == job.arguments()
        assert image == f"i{text}"


@hostile
def test_a_word_comes_out_of_the_printed_command_as_it_went_in(text: str) -> None:
    try:
        job = job_of(text)
    except UserError:
        assert not text.isprintable()
        return
    line = shell_line(torchrun_command(job, endpoint="localhost:0"))
    assert len(line.splitlines()) == 1
    assert run_arguments(shlex.split(line)) == job.arguments()


def test_bash_itself_reads_the_names_back(tmp_path: Path) -> None:
    texts = [text for text in NASTY if text.isprintable() and "\\" not in text and text != "packjob"]
    heads = "srun() { shift; printf '%s\\0' \"$@\" >> arguments; }\nscontrol() { echo node1; }\nSLURM_JOB_NODELIST=x SLURM_JOB_ID=7\n"
    parts = [sbatch_script(job_of(text), Slurm(), python="python").split("# Time is nearly over")[0] + "wait\n" for text in texts]
    subprocess.run(["bash", "-c", heads + "".join(parts)], cwd=tmp_path, check=True, timeout=60)
    found = (tmp_path / "arguments").read_text().split("\0")
    for text in texts:
        assert f"name={text}" in found
        assert (tmp_path / "runs" / f"o{text}").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"arguments", "runs"}


@pytest.mark.parametrize("text", ["a/b c", "a/$(x)", "a b/c", "a/b\n"])
def test_a_secret_has_a_name_that_clusters_have(text: str) -> None:
    with pytest.raises(UserError, match="reference to a key"):
        parse_secret(f"HF_TOKEN={text}")


@pytest.mark.parametrize("given_names", [{"namespace": "a b"}, {"namespace": "A"}, {"volume_claim": "x\ny"}, {"volume_claim": "-x"}])
def test_names_in_a_cluster_are_checked(given_names: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot name anything in a cluster"):
        Kubernetes(**{"image": "i", "volume_claim": "runs", **given_names})


@pytest.mark.parametrize("text", ["a b:1", "$(x):1", "a\n:1", "a:\uff11"])
def test_a_meeting_place_is_a_plain_host(text: str) -> None:
    with pytest.raises(UserError, match="HOST:PORT"):
        endpoint_of(text, 2)


def test_what_begins_with_a_dash_is_refused() -> None:
    for changes in ({"recipe": "-x"}, {"out": Path("-x")}, {"job_id": "-x"}, {"overrides": ("--out=x",)}):
        with pytest.raises(UserError, match="begins with '-'"):
            Job(**{"recipe": "r", "name": "n", "out": Path("o"), "job_id": "j", **changes})
