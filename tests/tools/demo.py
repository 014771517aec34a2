"""`make demo`: the gateway and `main.py` at work without a key and without the internet, on stand-in vendors."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from support.gateway import PROJECT, Gateway, clean_environ
from support.vendors import KEY_VARIABLES, Vendors


def main() -> int:
    """Start the stand-ins and the gateway, run `main.py` against them, and stop everything.

    Returns the exit code of `main.py`, or 1 if the gateway did not start.
    """
    print("Stand-ins answer here for OpenAI, Google and Anthropic: no key is used, and nothing leaves this machine.")
    print("Starting the gateway with the run.yaml that ships ...", flush=True)
    with tempfile.TemporaryDirectory() as home, Vendors() as vendors:
        gateway = Gateway(Path(home), **vendors.environ())
        try:
            with gateway:
                # By its whole address, because a user's .env may name another gateway.
                environ = clean_environ(home, LLAMA_STACK_BASE_URL=gateway.url, **KEY_VARIABLES)
                code = subprocess.run([sys.executable, "main.py"], cwd=PROJECT, env=environ, check=False).returncode
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    if code == 0:
        print("\nThose were stand-ins. For the models themselves, put your keys in .env, then: make server, make client.")
    return code


if __name__ == "__main__":
    # So that a SIGTERM, like Ctrl-C, leaves nothing running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
