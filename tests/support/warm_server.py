"""A Python that has imported what decoct needs, and forks one process for each request: the server of ``warm_python``.

Started as ``python warm_server.py SOCKET``; ends, with everything that it has started, when its standard input closes.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from warm_python import WarmPython  # pyright: ignore[reportImplicitRelativeImport, reportMissingImports] - this file runs as a script

JUDGE = "decoct.qat.runtimes.transformers_process"
PRELOADED = (
    "decoct.launch.cli.app",
    "decoct.launch.cli.plan_verb",
    "decoct.launch.cli.single_stage",
    "decoct.launch.plan.before_run",
    "decoct.launch.plan.ladder",
    "decoct.launch.plan.show",
    "decoct.launch.report.build",
    "decoct.launch.report.tables",
    "decoct.launch.run.publish",
    "decoct.launch.run.runner",
    "decoct.launch.run.start",
    "decoct.qat.export.export",
    "decoct.qat.runtimes.check",
    "decoct.qat.verify.verify",
    "decoct.trainer.loop.fit",
    "training_case",
    # what they import only when they use it
    "compressed_tensors",
    "datasets",
    "decoct.configs.loader",
    "decoct.configs.recipe",
    JUDGE,
    "matplotlib.pyplot",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.tokenization_utils_tokenizers",
)


def serve(place: str) -> None:
    """Fork for each request until standard input closes."""
    for name in PRELOADED:
        importlib.import_module(name)
    from decoct.trainer.stages.registry import STAGE_KINDS

    for kind in STAGE_KINDS.values():
        kind.load()
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page in every child
    assert threading.active_count() == 1, "a process with threads cannot be forked safely"
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for pytest
    signal.set_wakeup_fd(wake)
    children: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as ready:
        listener.bind(place)
        listener.listen()
        for source in (listener, woken, 0):
            ready.register(source, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            sources = {key.fileobj for key, _ in ready.select()}
            if 0 in sources and not os.read(0, 1):
                break
            if woken in sources:
                os.read(woken, 4096)
                _tell_ended(children)
            if listener in sources:
                client, _ = listener.accept()
                try:
                    request, fds = _receive(client)
                except (OSError, ValueError):  # whoever asked was killed while it asked
                    client.close()
                    continue
                child = os.fork()
                if not child:
                    signal.set_wakeup_fd(-1)
                    ready.close()
                    for other in (listener, client, *children.values()):
                        other.close()
                    _become(request, fds, place)
                for fd in fds:
                    os.close(fd)
                children[child] = client
                with suppress(OSError):
                    client.sendall(f"{child}\n".encode())
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _tell_ended(children: dict[int, socket.socket]) -> None:
    """Send the exit codes of the children that have ended to those who asked for them."""
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        with children.pop(child, None) or socket.socket() as client, suppress(OSError):
            client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """(request, file descriptors of stdout and stderr)."""
    data, fds, _, _ = socket.recv_fds(client, 8, 2)
    size = int.from_bytes(data, "big")
    text = b""
    while len(text) < size:
        part = client.recv(size - len(text))
        if not part:
            raise ValueError("the request was cut short")
        text += part
    return json.loads(text), fds


def _judge_at(place: str) -> None:
    """Let the judge of an export that this process will ask for start at the server as well."""
    started = subprocess.run

    def run(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[Any]":
        if list(command[:4]) != [sys.executable, "-P", "-m", JUDGE]:
            return started(command, **options)
        return WarmPython(place).run(command[2:], env=options["env"], timeout=options["timeout"])

    subprocess.run = run  # pyright: ignore[reportAttributeAccessIssue]


def _become(request: dict[str, Any], fds: list[int], place: str) -> NoReturn:
    """Be the process that was asked for: a fresh ``python -m MODULE ...`` or ``python FILE ...`` but for what is imported already.

    The judge of an export that it runs in a process of its own is asked for at ``place`` as well.
    """
    code = 1
    try:
        if request["session"]:
            os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, target in zip((nothing, *fds), (0, 1, 2), strict=True):
            os.dup2(fd, target)
            os.close(fd)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        # new streams: the server's remember what kind of file they were opened on
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout.reconfigure(write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        _judge_at(place)
        first, *rest = request["arguments"]
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            code = -signal.SIGINT
    # as an interpreter ends
    with suppress(BaseException):
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
