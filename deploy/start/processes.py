"""The processes of a gateway: a server, perhaps HAProxy, and a watchdog. There are all of them or none, whatever ends first.

All are in one process group, which is not the terminal's: Ctrl-C reaches the start alone. The watchdog kills the group when the
start is gone, in whatever way, because its standard input is a pipe whose other end only the start has. When any other of them
ends, the start kills the group.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# `cat` ends with the pipe. Signals for the group are not for it: SIGKILL alone ends it, and then the others are killed too.
WATCHDOG = "trap '' INT TERM HUP QUIT; cat > /dev/null; kill -KILL 0"

# More than one process says at once: what is beyond is dropped, because a traceback may quote a caller's megabytes.
LONGEST = 1 << 19


class Signal(NamedTuple):
    """The start was sent a signal."""

    number: int


class Ended(NamedTuple):
    """A process has ended, with this exit code: negative for a signal."""

    name: str
    code: int


class Gateway:
    """The processes of one gateway. `events` has what happens to them and to the start, in order."""

    def __init__(self, held: Sequence[int]) -> None:
        """`held` are descriptors that the watchdog keeps open as long as anything of the gateway lives."""
        self.events: queue.SimpleQueue[Signal | Ended | str] = queue.SimpleQueue()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.spawning = threading.Lock()
        self.readers: list[threading.Thread] = []
        reading, self.lifeline = os.pipe()
        self.group = 0
        self.group = self.spawn("watchdog", ["/bin/sh", "-c", WATCHDOG], {}, held, stdin=reading)
        os.close(reading)

    def spawn(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        descriptors: Sequence[int] = (),
        *,
        cwd: Path | None = None,
        take: Callable[[str], None] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> int:
        """Start a process of the group. Its output goes to `take`, line by line, or nowhere. Returns its process id."""
        ours, theirs = output_of(name) if take else (None, None)
        with self.spawning:  # So that it is known before it can have ended.
            process = self.processes[name] = subprocess.Popen(
                command,
                env=environ,
                cwd=cwd,
                stdin=stdin,
                stdout=theirs or subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                process_group=self.group,
            )
        if ours and theirs and take:
            theirs.close()
            self.readers.append(threading.Thread(target=read, args=(ours, take), daemon=True))
            self.readers[-1].start()
        return process.pid

    def watch(self, *signals: int) -> None:
        """From now on `events` has these signals, and the end of each process.

        What is ignored stays so: `nohup` does it, for a start that is to outlive its terminal.
        """
        for number in signals:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: self.events.put(Signal(number)))
        threading.Thread(target=self.reap, daemon=True).start()

    def reap(self) -> None:
        """Wait for whatever ends: as the first process of a container the start has to, also for those that it does not know."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, 0)
                with self.spawning:
                    for name, process in self.processes.items():
                        if process.pid == pid:
                            process.returncode = os.waitstatus_to_exitcode(status)
                            self.events.put(Ended(name, process.returncode))

    def lives(self, name: str) -> bool:
        """Whether a process was started and has not ended."""
        return name in self.processes and self.processes[name].returncode is None

    def signal(self, name: str, number: int) -> None:
        """Send one process a signal, if it still lives."""
        if self.lives(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[name].pid, number)

    def kill(self) -> None:
        """End all that is left, at once, and wait until all that they said is read."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where only the dead are left.
            os.killpg(self.group, signal.SIGKILL)
        for reader in self.readers:
            reader.join(2)


def output_of(name: str) -> tuple[socket.socket, socket.socket]:
    """A connection for what a process says: our end, and the one that it is given.

    The server's tracebacks quote callers, who would write lines of its log into them. So each of its writes is a message of its
    own, which tells where a line is its own. macOS has no such sockets, and HAProxy would drop lines, because only ten fit.
    """
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET if name == "server" else socket.SOCK_STREAM)
    except OSError:
        ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
    return ours, theirs


def read(connection: socket.socket, take: Callable[[str], None]) -> None:
    """Hand over what a process says until it ends, so that it never waits for a reader: its writes, or else its lines."""
    with connection, connection.makefile("rb") as lines:
        if connection.type == socket.SOCK_SEQPACKET:
            room = bytearray(LONGEST)  # Once, and not for each line.
            said = iter(lambda: bytes(room[: connection.recv_into(room)]), b"")
        else:
            said = iter(lambda: lines.readline(LONGEST), b"")
        for each in said:
            take(each.decode(errors="replace").rstrip("\n"))
