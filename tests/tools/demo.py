"""`make demo`: the gateway and `main.py` at work without a key and without the internet, on stand-in vendors.

With `--stay` the stand-ins and the gateway run on until Ctrl-C, with the page for a person to look at.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from support.gateway import HAPROXY, PROJECT, Gateway, clean_environ
from support.haproxy import BALANCER, HAProxy
from support.network import NameServer
from support.vendors import KEY_VARIABLES, KEYS, Vendors


def main(stay: bool) -> int:
    """Start the stand-ins and the gateway, run `main.py` against them, wait for Ctrl-C if told to stay, and stop everything.

    Returns the exit code of `main.py`, or 1 if the gateway did not start.
    """
    print("Stand-ins answer here for OpenAI, Google and Anthropic: no key is used, and nothing leaves this machine.")
    print("Starting the gateway with the run.yaml that ships ...", flush=True)
    with tempfile.TemporaryDirectory() as home, Vendors() as vendors:
        # The page gets a front of its own below: this gateway's could not lead the native paths to the stand-ins.
        gateway = Gateway(Path(home), **vendors.environ(), **({"FRONT": "0"} if stay else {}))
        try:
            with gateway:
                # By its whole address, because a user's .env may name another gateway.
                environ = clean_environ(home, LLAMA_STACK_BASE_URL=gateway.url, **KEY_VARIABLES)
                code = subprocess.run([sys.executable, "main.py"], cwd=PROJECT, env=environ, check=False).returncode
                if stay:
                    wait_for_ctrl_c(gateway, vendors, Path(home))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    if code == 0 and not stay:
        print("\nThose were stand-ins. For the models themselves, put your keys in .env, then: make server, make client.")
        print("To look around first, with a page in your browser: make demo STAY=1.")
    return code


def wait_for_ctrl_c(gateway: Gateway, vendors: Vendors, folder: Path) -> None:
    """Serve the page, say where it is or what is missing for it, and wait for Ctrl-C. Raises RuntimeError if the gateway ends."""
    with contextlib.ExitStack() as opened:
        if HAPROXY:
            names = opened.enter_context(NameServer())
            settings = {
                "GATEWAY_A": f"127.0.0.1:{gateway.port}",
                "EGRESS_CA": str(vendors.ca_file),
                "EGRESS_NAMESERVER": f"127.0.0.1:{names.port}",
                "EGRESS_VENDOR_PORT": str(vendors.tls_port),
            }
            front = opened.enter_context(HAProxy(folder, BALANCER, **settings))
            print(f"\nOpen {front.url} in your browser.")
        else:
            print("\nThe page, native paths and API keys without the header need HAProxy 2.6 or later, which is not installed.")
            print(f"The gateway answers at {gateway.url}/v1.")
        print(f"The stand-ins take these keys: {', '.join(KEYS.values())}. Ctrl-C ends all of it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            gateway.process.wait()
            raise RuntimeError(f"The gateway has ended. The end of its log:\n{gateway.log[-3000:]}")


if __name__ == "__main__":
    # So that a SIGTERM, like Ctrl-C, leaves nothing running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main("--stay" in sys.argv))
    except KeyboardInterrupt:
        sys.exit(130)
