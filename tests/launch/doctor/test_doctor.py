"""The doctor names what is known to be bad, and leaves the rest alone."""

import json
import subprocess
import sys
import time
from typing import Any

import pytest

from decoct.launch.doctor.doctor import installed
from decoct.launch.doctor.known_bad import judge

GOOD = {"python": "3.11.7", "torch": "2.13.0+cpu", "triton": "3.7.1", "lightning": "2.6.6", "transformers": "5.23.0"}


def test_a_good_machine_has_no_findings() -> None:
    assert judge(GOOD) == []
    assert judge(dict.fromkeys(GOOD)) == [], "what is missing is not bad"


@pytest.mark.parametrize(
    ("change", "named", "fatal"),
    [
        ({"lightning": "2.6.3"}, "steals credentials", True),
        ({"lightning": "2.5.5"}, "CVE-2026-58659", True),
        ({"torch": "2.9.1"}, "CVE-2026-24747", True),
        ({"torch": "2.10.0", "triton": "3.6.0"}, "older than any", False),
        ({"transformers": "4.57.1"}, "another interface", True),
        ({"triton": "3.9.0"}, "is not what torch 2.13.0+cpu needs", False),
        ({"pytorch-lightning": "2.5.0"}, "and pytorch-lightning 2.5.0 are both installed", False),
        ({"python": "3.10.4"}, "outside 3.11 to 3.13", True),
    ],
)
def test_known_bad_versions_are_named_with_a_remedy(change: dict[str, str], named: str, fatal: bool) -> None:
    findings = judge({**GOOD, **change})
    assert any(named in finding.what and finding.fatal == fatal and finding.remedy for finding in findings), findings


def test_the_verb_tells_versions_devices_and_what_is_missing(verb: Any) -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "decoct.launch.cli", "doctor", "--json"], capture_output=True, text=True, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["usable"] else 2), done.stderr
    assert found["versions"]["torch"] == installed()["torch"]
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory"] > 10**8
    assert time.monotonic() - started < 60
    people = verb("doctor", code=None)
    assert "transformers" in people.stdout
    for what in found["missing"]:
        assert what in people.stdout
