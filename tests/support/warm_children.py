"""Processes that a warm process starts are warm too: what it starts as ``python -m MODULE`` or ``python FILE`` is forked, not executed.

They are its children in every respect: it waits for them, signals them, and its death reaches those that ask for a word of it. Only a
process without threads can be forked safely, and an agent of torchrun has many; so every warm process forks a spare before it does anything
else. The spare forks a middle process for each request, and that one the new process, and ends: the kernel gives an orphan to the nearest
ancestor that adopts (PR_SET_CHILD_SUBREAPER), which is the process that asked. On other systems what a warm process starts is cold.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

_ADOPT = 36  # PR_SET_CHILD_SUBREAPER
_STREAMS = 3
Become = Callable[[dict[str, Any], list[int]], NoReturn]
"""Turns a forked process into the one of a request, with these file descriptors as standard input, output and error."""


def install(become: Become) -> None:
    """Fork the spare of this process, which has no threads yet, and let ``subprocess`` ask it; nothing but on Linux."""
    if sys.platform != "linux":
        return
    ours, its = socket.socketpair()
    if not os.fork():
        ours.close()
        _wait_for_requests(its, become)
    its.close()
    cold, lock = subprocess.Popen._execute_child, threading.Lock()  # pyright: ignore[reportAttributeAccessIssue]

    def start(self: Any, args: Any, *rest: Any) -> None:
        """As ``Popen._execute_child``: the order of its parameters is that of Python 3.11 to 3.13."""
        executable, preexec, _, pass_fds, cwd, env, _, _, shell, stdin, _, _, stdout, _, stderr, _, *identity, session, group = rest
        command = [] if isinstance(args, (str, bytes, os.PathLike)) else [os.fspath(part) for part in args]
        arguments = python_arguments(command)
        plain = executable is None and preexec is None and not pass_fds and not shell and group == -1
        if arguments is None or not plain or identity != [None, None, None, -1]:
            return cold(self, args, *rest)
        place, variables = os.fspath(cwd or os.getcwd()), dict(os.environ if env is None else env)
        if "-u" in command[1 : -len(arguments)]:
            variables["PYTHONUNBUFFERED"] = "1"
        request = {"arguments": arguments, "cwd": place, "env": variables, "session": session, "group": os.getpgrp()}
        fds = [standard if fd == -1 else fd for standard, fd in enumerate((stdin, stdout, stderr))]
        with lock:
            self.pid = _ask(ours, request, fds)
        self._child_created = True
        self._close_pipe_fds(*rest[9:15])

    subprocess.Popen._execute_child = start  # pyright: ignore[reportAttributeAccessIssue]


def python_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows ``python`` in a command that a warm process can stand in for: ``-m`` and a module, or a file; None of any other."""
    if not command or command[0] != sys.executable:
        return None
    rest = list(command[1:])
    while rest and rest[0] in ("-u", "-P"):
        del rest[0]
    return rest if (len(rest) > 1 and rest[0] == "-m") or (rest and rest[0].endswith(".py")) else None


def _ask(spare: socket.socket, request: dict[str, Any], fds: Sequence[int]) -> int:
    """The id of a new child of this process."""
    adopt = ctypes.CDLL(None).prctl
    text = json.dumps(request).encode()
    adopt(_ADOPT, 1)
    try:
        socket.send_fds(spare, [len(text).to_bytes(8, "big")], fds)
        spare.sendall(text)
        pid = int.from_bytes(spare.recv(8), "big")
    finally:
        adopt(_ADOPT, 0)
    assert pid, "the spare of a warm process has died"
    return pid


def receive(client: socket.socket, streams: int) -> tuple[dict[str, Any], list[int]]:
    """(request, file descriptors of standard streams). Raises: ValueError, the request was cut short."""
    data, fds, _, _ = socket.recv_fds(client, 8, streams)
    size, text = int.from_bytes(data, "big"), b""
    while len(text) < size or not data:
        part = client.recv(size - len(text)) if data else b""
        if not part:
            raise ValueError("the request was cut short")
        text += part
    return json.loads(text), fds


def _wait_for_requests(channel: socket.socket, become: Become) -> NoReturn:
    """The life of a spare: it ends with the process that it is for, and not by a signal to that one's group."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(_STREAMS):
        os.dup2(nothing, stream)
    while True:
        try:
            request, fds = receive(channel, _STREAMS)
        except (OSError, ValueError):
            os._exit(0)
        middle = os.fork()
        if not middle:
            middle = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == middle:
                time.sleep(0.0005)
            channel.sendall(os.getpid().to_bytes(8, "big"))
            channel.close()
            os.close(nothing)
            os.setpgid(0, request["group"])
            become(request, fds)
        for fd in fds:
            os.close(fd)
        os.waitpid(middle, 0)
