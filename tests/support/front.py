"""The front alone, as a balancer runs it: HAProxy with the configuration that ships, before gateways that run already."""

import subprocess
from pathlib import Path
from typing import Self

import httpx

from .gateway import HAPROXY, PROJECT, clean_environ, eventually, free_port

FOLDER = PROJECT / "deploy" / "haproxy"


class Front:
    """One front, in an environment of `settings` alone. A context manager that leaves nothing running."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = {"FRONT_BIND": f"127.0.0.1:{self.port}"} | settings
        self.folder, self.log_file = folder, folder / f"front-{self.port}.log"

    @property
    def log(self) -> str:
        """All that it has printed so far."""
        return self.log_file.read_text()

    def answers(self) -> bool:
        """Whether it serves its page."""
        try:
            return httpx.get(self.url, trust_env=False, timeout=30).is_success
        except httpx.HTTPError:
            return False

    def __enter__(self) -> Self:
        assert HAPROXY
        command = [HAPROXY, "-db", *(word for part in ("global", "vendors", "front") for word in ("-f", f"{part}.cfg"))]
        environ = clean_environ(self.folder, **self.settings)
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(command, cwd=FOLDER, env=environ, stdout=log, stderr=log)
        if not eventually(lambda: self.process.poll() is not None or self.answers()) or self.process.poll() is not None:
            self.__exit__()
            raise RuntimeError(f"The front did not start. Its log:\n{self.log[-3000:]}")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
