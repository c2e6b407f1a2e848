"""A Python that has imported what decoct needs, and forks one process for each request: the server of ``warm_python``.

Started as ``python warm_server.py SOCKET``; ends, with everything that it has started, when its standard input closes.
"""

import atexit
import ctypes
import gc
import importlib
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from warm_children import (  # pyright: ignore[reportImplicitRelativeImport, reportMissingImports] - this file runs as a script
    install,
    python_arguments,
    receive,
)

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
    "decoct.qat.runtimes.transformers_process",
    "matplotlib.backends.backend_svg",
    "matplotlib.pyplot",
    "rich.status",
    "torch._dynamo",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
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
                    request, fds = receive(client, 2)
                except (OSError, ValueError):  # whoever asked was killed while it asked
                    client.close()
                    continue
                child = os.fork()
                if not child:
                    signal.set_wakeup_fd(-1)
                    ready.close()
                    for other in (listener, client, *children.values()):
                        other.close()
                    _become(request, [os.open(os.devnull, os.O_RDONLY), *fds])
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


def _become(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Be the process that was asked for: a fresh ``python -m MODULE ...`` or ``python FILE ...`` but for what is imported already."""
    try:
        if request["session"]:
            os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
            os.close(fd)
        install(_become)
        os.execvp = _take_over  # pyright: ignore[reportAttributeAccessIssue]
        _show_environment(request["env"])
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        # new streams: the server's remember what kind of file they were opened on
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout.reconfigure(write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        _run(request["arguments"])
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _show_environment(variables: dict[str, str]) -> None:
    """Write a new environment where /proc shows it: what the server has not comes first, as the room is that of its own environment."""
    if sys.platform != "linux":
        return
    with open("/proc/self/stat", encoding="utf-8") as stat:
        begin, end = map(int, stat.read().rpartition(")")[2].split()[47:49])
    ordered = sorted(variables.items(), key=lambda item: os.environ.get(item[0]) == item[1])
    text = b"".join(f"{name}={value}\0".encode(errors="surrogateescape") for name, value in ordered)
    ctypes.memmove(begin, text[: end - begin].ljust(end - begin, b"\0"), end - begin)


def _take_over(file: str, command: Sequence[str], cold: Callable[..., NoReturn] = os.execvp) -> NoReturn:
    """As ``os.execvp``: this process becomes another warm one."""
    arguments = python_arguments(command)
    if arguments is None:
        cold(file, command)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _run(arguments)


def _run(arguments: Sequence[str]) -> NoReturn:
    """Run ``-m MODULE ...`` or ``FILE ...`` and end as an interpreter does."""
    code = 1
    try:
        first, *rest = arguments
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
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
