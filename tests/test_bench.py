"""What `make bench` has measured is what the README says, and the bench itself measures what it says it does."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from dnslib import DNSRecord
from support.gateway import PROJECT
from tools.bench import paired, report
from tools.bench.load import Call, result, stream, wrk
from tools.bench.measure import Bench, calls_for, latencies
from tools.bench.peers import Contender
from tools.bench.upstream import GOOD_KEY, ROUND_TRIP, WRONG_KEY, Upstream

COMMAND = (sys.executable, "-u", "-m", "tools.bench")
FOLDER = PROJECT / "tests" / "tools" / "bench"
PATH = "/usr/sbin"
MISSING = [tool for tool in ("wrk", "nginx", "openssl") if not (shutil.which(tool) or shutil.which(tool, path=PATH))]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def results() -> dict:
    """The last whole run."""
    return json.loads((FOLDER / "results.json").read_text())


def test_the_readme_has_the_table_of_the_last_run(results):
    assert f"{report.BEGIN}\n{report.readme(results)}\n{report.END}" in report.readme_file().read_text()


def test_the_table_and_the_picture_are_of_the_last_run(results):
    for name, text in report.files(results).items():
        assert (FOLDER / name).read_text() == text


def test_a_call_that_timed_out_took_longer_than_was_waited():
    assert report.shown("storm_worst", report.PATIENCE) == f"over {report.PATIENCE}"


def test_pairs_are_compared_within_a_round_and_with_certainty():
    bench = Bench(1, 1, Path())
    for name, served in {"both-1": 90, "previous": 100}.items():
        bench.contenders[name] = Contender(name, name, {})
        bench.samples[name]["rps@8"] = {round_: served * round_ for round_ in range(1, 11)}  # The machine gets faster and faster.
    (row,) = [line for line in paired.report(bench).splitlines() if line.startswith("| requests/s")]
    assert [cell.strip() for cell in row.split("|")][4:9] == ["495", "550", "0.90x", "0.90 to 0.90", "10"]
    # Of ten, the median lies between the second and the ninth: 1 - 2 * (1 + 10) / 2**10 is 97.9 %.
    assert paired.interval([*range(10)]) == (1, 8)
    assert paired.interval([3, 1, 2]) == (1, 3)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory):
    """The vendor of the bench."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", PATH, prepend=":")
        with Upstream(tmp_path_factory.mktemp("upstream")) as upstream:
            yield upstream


def calls(base: str, key: str = GOOD_KEY) -> Call:
    """Calls to the vendor itself."""
    return Call(f"{base}/v1/chat/completions", {"Authorization": f"Bearer {key}"}, "gpt-4o")


@needs_tools
def test_regular_calls_and_refusals_are_counted(upstream, tmp_path: Path):
    good = result(wrk(calls(upstream.near), 2, 1, tmp_path))
    assert good["requests"] > 100
    assert good["errors"] == good["broken"] == 0
    bad = result(wrk(calls(upstream.near, WRONG_KEY), 2, 1, tmp_path))
    assert bad["errors"] == bad["requests"] > 100


@needs_tools
def test_streams_are_paced_and_timed(upstream):
    seen = stream(calls(upstream.paced), 3, 5, 50, calls=2)
    assert (seen.started, seen.complete, seen.chunks) == (6, 6, 30)
    assert seen.seconds > 2 * 3 * 0.050
    assert 0 < max(seen.delays) < 20


@needs_tools
def test_the_distant_vendor_is_a_round_trip_away_and_counts_connections(upstream):
    before = upstream.opened.value
    seen = stream(calls(upstream.far), 2, 2, 5, calls=3)
    assert seen.complete == 6
    assert upstream.opened.value - before == 2
    assert min(seen.first) > ROUND_TRIP


@needs_tools
def test_an_egress_proxy_finds_each_vendor_by_its_name(upstream):
    found = {}
    for name in ("api.openai.com", "api.anthropic.com", "generativelanguage.googleapis.com", "example.com"):
        answer = DNSRecord.parse(DNSRecord.question(name).send("127.0.0.1", upstream.names, timeout=5))
        found[name] = [str(record.rdata) for record in answer.rr]
    assert found["example.com"] == []
    context = ssl.create_default_context(cafile=upstream.ca)
    before = upstream.opened.value
    for name, addresses in list(found.items())[:3]:
        body = calls("").body("1 chunks, 0 ms apart", stream=name != "api.openai.com")
        head = f"Host: {name}\r\nAuthorization: Bearer {GOOD_KEY}\r\nContent-Length: {len(body)}\r\nConnection: close"
        plain = socket.create_connection((addresses[0], upstream.vendor_port), 10)
        with context.wrap_socket(plain, server_hostname=name) as vendor:
            vendor.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
            answer = b"".join(iter(lambda vendor=vendor: vendor.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert (b"@" in answer) == (name != "api.openai.com")
    assert upstream.opened.value - before == 1  # The far one alone is behind the relay.


@needs_tools
def test_a_call_that_fails_is_not_served(upstream, tmp_path: Path):
    bad = result(wrk(calls(upstream.near, WRONG_KEY), 2, 1, tmp_path))
    assert bad["served"] == bad["per_second"] == 0
    assert latencies(bad) == {}
    answers = list(calls_for(0.2, calls(upstream.near, WRONG_KEY)))
    assert answers
    assert not any(served for _, served in answers)


@needs_tools
def test_a_busy_port_is_one_sentence_and_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", PATH, prepend=":")
    before = set(psutil.Process().children())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"did not start on port {port}. Is the port in use"), Upstream(tmp_path, port):
            pass
    assert set(psutil.Process().children()) == before


def environment(path: str) -> dict[str, str]:
    """For a bench in a process of its own."""
    return {"PATH": path, "HOME": "/nonexistent"}


def test_what_is_missing_is_one_sentence():
    done = subprocess.run(COMMAND, cwd=PROJECT / "tests", env=environment(""), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("make bench needs wrk")
    assert len(done.stderr.splitlines()) == 1


@needs_tools
@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("installing and starting direct", signal.SIGTERM),
        ("regular calls, 8", signal.SIGINT),
        ("40 ms away, 1", signal.SIGTERM),
        ("wrong keys", signal.SIGINT),
    ],
)
def test_stopped_in_any_step_it_says_so_and_leaves_nothing_running(step: str, number: int):
    options = ("--only", "direct", "--rounds", "1", "--seconds", "1")
    bench = subprocess.Popen(
        (*COMMAND, *options),
        cwd=PROJECT / "tests",
        env=environment(os.environ["PATH"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while step not in (line := bench.stdout.readline()):
            assert line, bench.stderr.read()
        started = psutil.Process(bench.pid).children(recursive=True)
        assert started
        # Ctrl-C reaches everything in the terminal's foreground, another signal the one process it is sent to.
        (os.killpg if number == signal.SIGINT else os.kill)(bench.pid, number)
        _, said = bench.communicate(timeout=60)
    finally:
        bench.kill()
    assert said == "Stopped.\n"
    assert bench.returncode == 128 + number
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
