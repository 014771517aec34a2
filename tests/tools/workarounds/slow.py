"""What slows the server down."""

import re
import shutil
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import certifi
import httpx
from support.calls import ALL_KEYS, WRONG_KEY
from support.gateway import HAPROXY, Gateway, one_cpu
from support.network import NameServer
from support.vendors import Scripted

from . import Bench, Edit, Row, Skipped, ask, ask_many, patient


def console_logs(bench: Bench) -> Row:
    """A wrong key, alone; then a good call that is sent a tenth of a second after a wrong one."""

    def seconds(client: httpx.Client, header: dict[str, str]) -> float:
        start = time.monotonic()
        ask(client, header=header)
        return time.monotonic() - start

    def measure(gateway: Gateway) -> str:
        with patient(gateway) as client, ThreadPoolExecutor(1) as other:
            alone = statistics.median(seconds(client, WRONG_KEY) for _ in range(3))
            other.submit(seconds, client, WRONG_KEY)
            time.sleep(0.1)
            beside = seconds(client, ALL_KEYS)
        return f"a wrong key takes {alone:.2f} s, a good call beside one {beside:.2f} s"

    return bench.compare(
        "`LLAMA_STACK_LOG_FORMAT=json`",
        "every error is rendered as a rich traceback, and nobody is served meanwhile",
        measure,
        Edit("deploy/start/environment.py", '["LLAMA_STACK_LOG_FORMAT"] = "json"', '["LLAMA_STACK_LOG_FORMAT"] = "console"'),
    )


def hashed_cas(bench: Bench) -> Row:
    """The CAs that httpx trusts by default and the stand-ins' own, once as one file and once as a hashed directory."""
    count = 200
    if not shutil.which("openssl"):
        raise Skipped("There is no openssl command to hash the CAs with.")
    roots = Path(certifi.where()).read_text() + bench.vendors.ca_file.read_text()
    bundle, hashed = bench.folder / "bundle.pem", bench.folder / "hashed"
    bundle.write_text(roots)
    hashed.mkdir()
    certificates = re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", roots, re.DOTALL)
    for number, certificate in enumerate(certificates):
        (hashed / f"{number}.pem").write_text(certificate)
    subprocess.run(["openssl", "rehash", hashed], check=True, capture_output=True)

    def measure(gateway: Gateway) -> str:
        # As on a user's machine: the start chooses, so the variable that leads to the stand-ins' CA has to go.
        with gateway:
            ask_many(gateway, 20, prompt="Hello")
            before, start = gateway.cpu(), time.monotonic()
            if failed := ask_many(gateway, count, prompt="Hello"):
                raise RuntimeError(f"{failed} of {count} calls failed")
            spent, took = gateway.cpu() - before, time.monotonic() - start
        return f"{spent * 1000 / count:.1f} ms of CPU a call, {count / took:.0f} calls/s from one caller"

    return Row(
        "`SSL_CERT_DIR`, a directory of hashed CAs",
        f"the server loads a bundle of {len(certificates)} CAs for every call",
        measure(bench.gateway(SSL_CERT_FILE=str(bundle))),
        measure(
            bench.gateway(
                Edit("deploy/start/environment.py", 'HASHED_CAS = ("/etc/ssl/certs"', f'HASHED_CAS = ("{hashed}"'),
                SSL_CERT_FILE="",
            )
        ),
    )


def imported_command(bench: Bench) -> Row:
    """8 workers that share one CPU, for at most two minutes."""

    def measure(*edits: Edit) -> str:
        with one_cpu():
            up, replaced, seconds = bench.gateway(*edits, LLAMA_STACK_WORKERS="8").start_workers(120)
        return f"{up} of 8 workers up after {seconds:.0f} s, {replaced} replaced"

    return Row(
        "the command of `llama stack run`, called from no file",
        "each worker imports that file before it answers uvicorn, which replaces one that is silent for 5 s (on one CPU)",
        measure(
            Edit(
                "deploy/start/__main__.py",
                "SERVER = [",
                'SERVER = [os.path.join(os.path.dirname(sys.executable), "llama"), "stack", "run", "run.yaml"]\nNOT_USED = [',
            )
        ),
        measure(),
    )


def one_attempt(bench: Bench) -> Row:
    """A vendor's 429 that says when to come back, through the egress door."""
    model = "openai/busy"
    if not HAPROXY:
        raise Skipped("HAProxy is not installed.")
    bench.vendors.scripted["busy"] = Scripted(429, {"retry-after-ms": "3000", "content-type": "application/json"}, [b"{}"])

    def measure(gateway: Gateway) -> str:
        with gateway, patient(gateway) as client:
            bench.vendors.seen.clear()
            start = time.monotonic()
            status = ask(client, model).status_code
            took = time.monotonic() - start
        attempts = sum(call.path.endswith("/chat/completions") for call in bench.vendors.seen)
        return f"{status} after {took:.2f} s and {attempts} attempt{'s' * (attempts != 1)}"

    with NameServer() as names:
        door = {
            "EGRESS": "1",
            "EGRESS_NAMESERVER": f"127.0.0.1:{names.port}",
            "EGRESS_VENDOR_PORT": str(bench.vendors.tls_port),
            "HTTPS_PROXY": "",
        }
        header = Edit("deploy/haproxy/egress.cfg", "http-response set-header x-should-retry false if { status ge 400 }", "")
        without = measure(bench.gateway(header, **door))
        return Row(
            "`x-should-retry: false` on errors, in the egress door",
            "the server's SDK tries a 429 three times, and sleeps in between as long as the vendor says (3 s)",
            without,
            measure(bench.gateway(**door)),
        )
