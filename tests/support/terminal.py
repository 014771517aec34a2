"""A terminal, for what people see and type: a pseudo-terminal whose screen is read on the side, so that nothing can hang on it."""

import contextlib
import os
import pty
import select
import subprocess
import threading
from pathlib import Path
from typing import Self

from .gateway import PROJECT, wait_for


class Terminal:
    """`command` on a terminal of its own, with `environ`. A context manager that leaves nothing running."""

    def __init__(self, command: tuple[str, ...], environ: dict[str, str], cwd: Path = PROJECT) -> None:
        self.command, self.environ, self.cwd = command, environ, cwd
        self.shown, self.closed = b"", False

    @property
    def screen(self) -> str:
        """All that has been shown so far."""
        return self.shown.decode(errors="replace").replace("\r\n", "\n")

    def press(self, keys: bytes) -> None:
        """Type; `b"\\x03"` is Ctrl-C."""
        os.write(self.controller, keys)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until `text` is on the screen. Raises AssertionError with the screen after `seconds`."""
        wait_for(lambda: text in self.screen, seconds, seen=lambda: f"{text!r} is not on the screen:\n{self.screen}")

    def wait(self, seconds: float = 60) -> int:
        """Wait for the end of the command, and of what it shows. Returns its exit code, negative for a signal."""
        code = self.process.wait(seconds)
        self.reader.join(5)
        return code

    def hang_up(self) -> None:
        """Close the terminal, as whoever closes its window does."""
        self.closed = True
        self.reader.join(5)
        os.close(self.controller)

    def read(self) -> None:
        with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error.
            while not self.closed:  # A terminal from which somebody still reads would not be closed.
                if select.select([self.controller], [], [], 0.1)[0]:
                    self.shown += os.read(self.controller, 4096)

    def __enter__(self) -> Self:
        self.controller, terminal = pty.openpty()
        # setsid makes the terminal the one whose Ctrl-C the command gets.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *self.command],
            cwd=self.cwd,
            env=self.environ,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.closed:
            self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.process.kill()
        self.process.wait()
