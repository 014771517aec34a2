"""Runs pytest in one folder after the other, each time in a fork of this process, which has imported what takes 4 s of CPU time.

It is a program by itself, so that nothing of the project has been imported: a changed copy brings its own. It reads lines of JSON,
`{"folder": …, "arguments": […], "output": …}`, and for each prints the process id of the fork and, when that has ended, its exit code.
"""

import json
import os
import signal
import sys

import anthropic  # noqa: F401
import hypothesis  # noqa: F401
import jwt  # noqa: F401
import openai  # noqa: F401
import psutil  # noqa: F401
import pytest
import starlette.applications  # noqa: F401
import trustme  # noqa: F401
import uvicorn  # noqa: F401
import yaml  # noqa: F401


def main() -> None:
    """Serve until the input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            os.chdir(job["folder"])
            code = 1
            try:
                code = int(pytest.main(job["arguments"]))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
