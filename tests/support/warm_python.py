"""Processes that start in milliseconds: forked from a Python that has imported torch, transformers, Lightning and decoct already.

They are real processes: they can be killed, have an exit code, an environment, a working directory and output of their own, and share
nothing with pytest. Only the imports are saved, which cost more than most runs of these tests. What they start themselves is warm too
(``warm_children.py``): workers of torchrun, judges of exports. Tests whose subject is how a process starts use ``subprocess``.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

SERVER = Path(__file__).with_name("warm_server.py")


class WarmProcess:
    """One process, with the methods of ``subprocess.Popen`` that tests need. ``stdout`` and ``stderr`` are text."""

    def __init__(self, channel: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self._channel = channel
        self._answers = channel.makefile()
        self.stdout, self.stderr = stdout, stderr
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with self._channel, self._answers:
            answer = self._answers.readline()
        self.returncode = int(answer) if answer else -signal.SIGKILL
        self._ended.set()

    def poll(self) -> int | None:
        """Its exit code (minus the signal's number where one has ended it); None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended. Raises: TimeoutExpired."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(the rest of stdout, of stderr), once it has ended. Raises: TimeoutExpired."""
        said = ["", ""]

        def read(index: int, stream: IO[str]) -> None:
            with stream:
                said[index] = stream.read()

        streams = [stream for stream in (self.stdout, self.stderr) if stream is not None and not stream.closed]
        readers = [threading.Thread(target=read, args=(index, stream), daemon=True) for index, stream in enumerate(streams)]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said[0], said[1]


class WarmPython:
    """Starts processes at a server that runs already (``place``, its socket), or at one of its own that starts with the first."""

    def __init__(self, place: str | None = None) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._socket = place
        self._starting = threading.Lock()
        """Ranks are started by a thread each, and there is one server for all."""

    def start(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        merged: bool = False,
        into: IO[str] | None = None,
        session: bool = False,
    ) -> WarmProcess:
        """Start ``python *arguments`` without waiting for it.

        Args:
            arguments: ``-m``, a module and its arguments, or a file and its arguments.
            cwd: Its working directory.
            env: Its whole environment; None = this process's.
            merged: stderr goes where stdout goes.
            into: A file for stdout and stderr.
            session: In a session of its own, so that ``os.killpg`` reaches it and what it starts.
        """
        where = self.place()
        request = {"arguments": list(arguments), "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ), "session": session}
        text = json.dumps(request).encode()
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(where)
        out, its_out = os.pipe() if into is None else (None, os.dup(into.fileno()))
        error, its_error = (None, os.dup(its_out)) if merged or into is not None else os.pipe()
        socket.send_fds(channel, [len(text).to_bytes(8, "big")], [its_out, its_error])
        channel.sendall(text)
        os.close(its_out)
        os.close(its_error)
        return WarmProcess(channel, *(None if fd is None else os.fdopen(fd) for fd in (out, error)))

    def run(
        self, arguments: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """``start``, and wait for the end. Raises: TimeoutExpired, after it was killed."""
        process = self.start(arguments, cwd=cwd, env=env)
        try:
            out, error = process.communicate(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(arguments), process.wait(), out, error)

    def run_ranks(
        self,
        count: int,
        arguments: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
        nodes: int = 1,
    ) -> list[subprocess.CompletedProcess[str]]:
        """``run`` in processes that talk to each other, with the variables of torchrun but no agent over them; by rank.

        ``nodes``: the machines that they believe to be on, with equally many on each.
        """
        local = count // nodes
        with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
            probe.bind(("localhost", 0))
            shared = {
                **(os.environ if env is None else env),
                "TORCHELASTIC_RUN_ID": Path(scratch).name,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(probe.getsockname()[1]),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(local),
                "TMPDIR": scratch,
            }
            probe.close()
            own = [
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local)} for rank in range(count)
            ]
            with ThreadPoolExecutor(count) as pool:
                return list(pool.map(lambda its: self.run(arguments, cwd=cwd, env=its, timeout=timeout), own))

    def place(self) -> str:
        """The socket of the server, which runs then."""
        with self._starting:
            if self._server is not None and self._server.poll() is not None:
                # a server that died takes one test with it, not all that follow
                self._socket = None
            if self._socket is None:
                self._socket = self._start_server()
            return self._socket

    def _start_server(self) -> str:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        place = os.path.join(self._folder.name, "socket")
        pipe = subprocess.PIPE
        self._server = subprocess.Popen([sys.executable, str(SERVER), place], stdin=pipe, stdout=pipe, text=True)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n", "the server of warm processes did not start"
        return place

    def close(self) -> None:
        """End the own server and what it has started."""
        if self._server is not None and self._folder is not None:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.close()
            self._server.wait(30)
            self._server.stdout.close()
            self._folder.cleanup()
