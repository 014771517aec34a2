"""A gateway is whole or gone: whatever of it ends first, in whatever way, nothing of it is left, and no port is left to others.

What needs no call is asked of a start that has just begun. `make faults` runs the long tests too.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest
from support.bare_servers import Accepts
from support.callers import GOOD, Stream, assert_clean, open_stream
from support.calls import ALL_KEYS, CHAT, MODELS, caller, chat
from support.figures import Figure
from support.gateway import (
    ALONE,
    BOTH_DOORS,
    HAPROXY,
    NOWHERE,
    PROJECT,
    START,
    Gateway,
    clean_environ,
    family,
    free_port,
    listening,
    make_environ,
    one_cpu,
    wait_for,
)
from support.haproxy import NEEDS_HAPROXY
from support.parts import can_listen, just_begun, running
from support.terminal import Terminal
from support.vendors import KEYS, Vendors

CTRL_C = b"\x03"
SHELL = " ".join(START)


# --- What is killed, or closed, or leaves ---


@pytest.mark.parametrize("victim", ["start", "server"])
def test_when_a_part_is_killed_nothing_is_left(tmp_path: Path, vendors: Vendors, figures: list[Figure], victim: str) -> None:
    """With two workers, and streams through both. Callers see their connections break."""
    with running(tmp_path, LLAMA_STACK_WORKERS="2", **vendors.environ()) as gateway:
        streams = [Stream(gateway.gateway, "openai/slow", "one two three " * 60) for _ in range(4)]
        start = time.monotonic()
        gateway.named[victim].kill()
        code = gateway.gateway.process.wait(20)
        gateway.assert_gone()
        for stream in streams:
            stream.join(20)
            assert stream.problem, stream.lines[-3:]
    figures.append(
        Figure(f"SIGKILL of the {victim} with 4 streams in flight", "each connection breaks", time.monotonic() - start)
    )
    assert_clean(gateway.gateway)
    if victim == "server":
        assert code == 128 + signal.SIGKILL
        assert "The server has ended, and the gateway with it." in gateway.gateway.log
    # Its port and its store are there for the next one.
    assert Gateway(tmp_path, LLAMA_STACK_PORT=str(gateway.gateway.port)).environ_at_start()


@NEEDS_HAPROXY
def test_when_haproxy_is_killed_nobody_else_gets_the_egress_port_and_nothing_is_left(tmp_path: Path) -> None:
    """The start is kept from noticing for a while: the server, which sends keys there, and the watchdog hold the port."""
    with just_begun(tmp_path) as gateway:
        gateway.named["start"].suspend()
        wait_for(lambda: gateway.named["start"].status() == psutil.STATUS_STOPPED)  # All of its threads.
        gateway.named["HAProxy"].kill()
        wait_for(lambda: gateway.named["HAProxy"].status() == psutil.STATUS_ZOMBIE)
        for address in ("127.0.0.1", ""):
            assert not can_listen(address, gateway.ports[1])
        gateway.named["start"].resume()
        assert gateway.gateway.process.wait(20) == 2
        gateway.assert_gone()
        assert "The HAProxy did not start." in gateway.gateway.log


@NEEDS_HAPROXY
def test_when_haproxy_is_killed_the_exit_code_tells(tmp_path: Path) -> None:
    """So that systemd starts it again."""
    with running(tmp_path, **NOWHERE) as gateway:
        gateway.named["HAProxy"].kill()
        assert gateway.gateway.process.wait(20) == 1
        assert "The HAProxy has ended, and the gateway with it." in gateway.gateway.log


@NEEDS_HAPROXY
def test_a_server_that_is_killed_before_it_is_up_is_no_wrong_setting(tmp_path: Path) -> None:
    """By the kernel, say, when memory is short: systemd tries again after 1, and not after 2."""
    with just_begun(tmp_path) as gateway:
        gateway.named["server"].kill()
        assert gateway.gateway.process.wait(20) == 1
        assert "The server did not start." in gateway.gateway.log


def test_when_the_watchdog_is_killed_nothing_is_left(tmp_path: Path) -> None:
    with just_begun(tmp_path) as gateway:
        gateway.named["watchdog"].kill()
        assert gateway.gateway.process.wait(20) == 2
        gateway.assert_gone()


def test_a_start_that_is_killed_at_any_moment_leaves_nothing(tmp_path: Path) -> None:
    """With one process more each time: the watchdog and its `cat`, HAProxy, the server."""
    for count in range(1, 6 if HAPROXY else 5):
        gateway = Gateway(tmp_path, **BOTH_DOORS)
        gateway.launch()
        wait_for(lambda g=gateway, c=count: len(family(g.process.pid)) >= c, seen=lambda g=gateway: g.log)
        left = family(gateway.process.pid)
        try:
            gateway.process.kill()
            gateway.process.wait()
            _, alive = psutil.wait_procs(left, 20)
            assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE], f"of {count} processes"
        finally:
            gateway.stop(0)


def test_ctrl_c_into_a_pipe_leaves_nothing(tmp_path: Path) -> None:
    """`tee` dies first, so that the start has nobody to speak to."""
    with just_begun(tmp_path, ("sh", "-c", f"{SHELL} 2>&1 | tee {tmp_path / 'log'}")) as gateway:
        gateway.gateway.signal(signal.SIGINT)
        gateway.assert_gone()


def test_a_closed_terminal_leaves_nothing(tmp_path: Path) -> None:
    with Terminal(START, clean_environ(tmp_path, LLAMA_STACK_PORT=str(free_port()), **BOTH_DOORS)) as at:
        wait_for(lambda: len(family(at.process.pid)) >= 4, seen=lambda: at.screen)
        whole = family(at.process.pid)
        at.hang_up()
        _, alive = psutil.wait_procs(whole, 20)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_sigterm_to_make_ends_the_gateway_too(tmp_path: Path) -> None:
    """To its process id alone, as a supervisor sends it."""
    environ = make_environ(tmp_path)
    packages = {name: environ[name] for name in ("PATH", "UV_PROJECT_ENVIRONMENT")}
    with just_begun(tmp_path, ("make", "server"), **packages) as gateway:
        gateway.gateway.process.terminate()
        gateway.gateway.process.wait(20)
        gateway.assert_gone()


def test_nohup_outlives_the_terminal(tmp_path: Path) -> None:
    with just_begun(tmp_path, ("sh", "-c", f"trap '' HUP; exec {SHELL}")) as gateway:
        gateway.named["start"].send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert gateway.named["server"].is_running()
        gateway.named["start"].terminate()
        assert gateway.gateway.process.wait(20) == 0, gateway.gateway.log
        gateway.assert_gone()


# --- Who reads the log ---


def test_a_reader_of_the_log_that_has_gone_stops_nothing(tmp_path: Path, vendors: Vendors) -> None:
    with (
        running(tmp_path, ("sh", "-c", f"{SHELL} 2>&1 | head -2"), **vendors.environ()) as gateway,
        caller(gateway.gateway.url) as client,
    ):
        for model, status in ((MODELS[0], 200), ("openai/status-401", 401)):
            for _ in range(5):
                assert client.post(CHAT, headers=ALL_KEYS, json=chat(model)).status_code == status
        gateway.named["start"].terminate()
        gateway.assert_gone()


def test_a_reader_of_the_log_that_is_stuck_stops_nothing_and_is_told(tmp_path: Path, vendors: Vendors) -> None:
    """A pipe is full after 64 KB. Lines are dropped, and when the reader goes on it is told how many."""
    reading, writing = os.pipe()
    port = str(free_port())
    environ = clean_environ(tmp_path, LLAMA_STACK_PORT=port, **ALONE, **vendors.environ())
    with subprocess.Popen(START, env=environ, stdout=writing, cwd=PROJECT) as start, caller(f"http://127.0.0.1:{port}") as client:
        os.close(writing)
        try:
            read = b""
            while b"The gateway answers" not in read:
                read += os.read(reading, 65536)
            for number in range(2500):
                client.get(f"/v1/{number}/{'x' * 150}")
            assert client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0])).is_success

            def told() -> bool:
                nonlocal read
                client.get("/v1/once-more")
                read += os.read(reading, 65536)
                return b"lines of the log are missing" in read

            wait_for(told, 30, seen=lambda: read[-2000:])
        finally:
            start.terminate()
            os.close(reading)
            assert start.wait(20) == 0


def test_a_gateway_whose_log_nobody_reads_ends(tmp_path: Path) -> None:
    """Its pipe is full from the beginning."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(1024))
    os.set_blocking(writing, True)
    environ = clean_environ(tmp_path, LLAMA_STACK_PORT=str(free_port()), **ALONE, **NOWHERE)
    with subprocess.Popen(START, env=environ, stdout=writing, stderr=subprocess.DEVNULL, cwd=PROJECT) as start:
        try:
            wait_for(lambda: len(family(start.pid)) >= 2)
            start.terminate()
            assert start.wait(20) == 0
        finally:
            start.kill()
            for descriptor in (reading, writing):
                os.close(descriptor)


# --- How it stops ---


def test_a_stop_lets_streams_finish_and_refuses_new_calls(
    tmp_path: Path, vendors: Vendors, egress: dict[str, str], figures: list[Figure]
) -> None:
    """SIGTERM, with two workers and all doors. A stream on a native path finishes too, after the server has ended."""
    workers = "2" if HAPROXY else "1"  # Several, without a front, leave a new call waiting until they have ended.
    with (
        running(tmp_path, LLAMA_STACK_WORKERS=workers, **(egress if HAPROXY else vendors.environ())) as running_,
        caller(running_.gateway.url) as client,
    ):
        gateway = running_.gateway
        streams = [Stream(gateway, "openai/slow", "one two three") for _ in range(4)]
        if HAPROXY:
            native = {
                "headers": {"Authorization": f"Bearer {KEYS['openai']}"},
                "model": "slow",
                "path": "/openai/v1/chat/completions",
            }
            streams.append(Stream(gateway, prompt="one two three " * 4, **native))
        start = time.monotonic()
        gateway.process.terminate()
        if HAPROXY:
            wait_for(lambda: client.get("/v1/health").status_code == 503, 10)
            assert any(stream.is_alive() for stream in streams[:4]), "new calls were taken to the end"
            # As long as a stream lasts: nothing that the server says on its way out opens the front again.
            while any(stream.is_alive() for stream in streams[:4]):
                assert "is stopping" in client.get("/v1/health").text, gateway.log
        else:
            wait_for(lambda: not gateway.answers(), 10)
        assert any(stream.is_alive() for stream in streams)
        for stream in streams:
            stream.join(60)
            assert stream.finished, (stream.problem, stream.lines[-3:])
        assert gateway.process.wait(20) == 0
        running_.assert_gone()
    outcome = "new calls are refused, the streams finish"
    figures.append(Figure("SIGTERM with 4 streams in flight", outcome, time.monotonic() - start))
    assert "The gateway has stopped." in gateway.log.splitlines()[-1]
    assert_clean(gateway)


@NEEDS_HAPROXY
def test_other_signals_let_streams_finish_too(tmp_path: Path, egress: dict[str, str]) -> None:
    """SIGHUP, of a terminal that is closed. Once the server has ended the front refuses, rather than leave callers waiting."""
    with Gateway(tmp_path, **egress) as gateway:
        chat = Stream(gateway, "openai/slow", "one two three")
        key = {"Authorization": f"Bearer {KEYS['openai']}"}
        native = Stream(gateway, "slow", "one two three " * 4, "/openai/v1/chat/completions", key)
        server = psutil.Process(gateway.server)
        gateway.process.send_signal(signal.SIGHUP)
        chat.join(60)
        assert chat.finished, (chat.problem, chat.lines[-3:])
        server.wait(20)
        wait_for(lambda: not listening(gateway.port), 10, seen=lambda: f"{native.is_alive()}: {listening(gateway.port)}")
        assert native.is_alive(), "the port was closed when all was over"
        native.join(60)
        assert native.finished, (native.problem, native.lines[-3:])
        assert gateway.process.wait(20) == 0


def test_ctrl_c_lets_streams_finish_and_a_second_one_ends_them(tmp_path: Path, vendors: Vendors) -> None:
    """Left to itself the stock server would hang, with a stream open that never ends."""
    gateway = Gateway(tmp_path, LLAMA_STACK_WORKERS="2", **vendors.environ())
    with Terminal(START, clean_environ(tmp_path, **gateway.settings)) as at:
        at.wait_for("The gateway answers")
        finite, endless = Stream(gateway, "openai/slow", "one two three"), Stream(gateway, "openai/stall", "one")
        at.press(CTRL_C)
        at.wait_for("The gateway stops when the calls in flight have ended. Ctrl-C ends it at once.")
        finite.join(60)
        assert finite.finished, (finite.problem, finite.lines[-3:])
        assert endless.is_alive()
        at.press(CTRL_C)
        assert at.wait(10) == 130
        endless.join(10)
        assert endless.problem
    assert not listening(gateway.port)


def test_ctrl_c_ends_a_start_that_a_silent_vendor_holds_up(tmp_path: Path) -> None:
    """Asked to end, the stock server looks up when the vendor has answered, which may take half an hour."""
    with Accepts() as silent:
        vendor = {"OPENAI_PASSTHROUGH_URL": f"http://127.0.0.1:{silent.port}"}
        environ = clean_environ(tmp_path, LLAMA_STACK_PORT=str(free_port()), **NOWHERE, **vendor)
        with Terminal(START, environ) as at:
            wait_for(lambda: len(silent.kept) > 1, seen=lambda: at.screen)  # The first one is only to see whether it is there.
            at.press(CTRL_C)
            assert at.wait(10) == 0
            assert at.screen.endswith("The gateway has stopped.\n")


def test_a_server_that_dies_while_it_stops_is_told_by_the_exit_code(tmp_path: Path, vendors: Vendors) -> None:
    with running(tmp_path, **ALONE, **vendors.environ()) as gateway, open_stream(gateway.gateway, "openai/stall"):
        gateway.gateway.process.terminate()
        wait_for(lambda: "The gateway stops" in gateway.gateway.log)
        gateway.named["server"].kill()
        assert gateway.gateway.process.wait(20) == 128 + signal.SIGKILL
        gateway.assert_gone()


@pytest.mark.slow
def test_sigterm_waits_for_a_vendor_that_never_answers(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    """As long as the caller does."""
    with running(tmp_path, **vendors.environ()) as gateway:
        with open_stream(gateway.gateway, "openai/stall"):
            gateway.gateway.signal(signal.SIGTERM)
            time.sleep(5)
            assert gateway.named["server"].is_running()
        start = time.monotonic()
        gateway.assert_gone()
    figures.append(
        Figure("SIGTERM with a vendor that never answers", "waits until the caller hangs up", time.monotonic() - start)
    )


# --- How it fails to start ---


@pytest.mark.parametrize("workers", ["1", "3"])
def test_what_the_server_says_when_it_cannot_start_is_shown(
    project: Path, tmp_path: Path, figures: list[Figure], workers: str
) -> None:
    """Several workers fail one after the other on one CPU. uvicorn would start them again for ever."""
    (project / "run.yaml").write_text((project / "run.yaml").read_text().replace("remote::gemini", "remote::nobody"))
    gateway = Gateway(tmp_path / "home", cwd=project, LLAMA_STACK_WORKERS=workers, **NOWHERE)
    start = time.monotonic()
    with one_cpu():
        gateway.launch()
        try:
            assert gateway.process.wait(60) == 2
        finally:
            gateway.stop()
    fault = f"run.yaml names an unknown provider, {workers} worker{'s' * (workers > '1')}"
    figures.append(Figure(fault, "a sentence, exit code 2", time.monotonic() - start))
    assert "Provider `remote::nobody` is not available" in gateway.log
    assert gateway.log.endswith("The server did not start. What it said last is above.\n")
    assert "Traceback" not in gateway.log
    assert 'File "' not in gateway.log


@NEEDS_HAPROXY
def test_what_haproxy_says_when_it_cannot_start_is_shown(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, EGRESS_CA="/no/such")
    gateway.launch()
    assert gateway.process.wait(60) == 2
    assert "HAProxy: config : 'ca-file' : unable to load /no/such." in gateway.log
    assert "The HAProxy did not start. What it said last is above.\n" in gateway.log


@pytest.mark.slow
def test_a_boot_waits_for_a_vendor_that_accepts_and_never_answers(tmp_path: Path, figures: list[Figure]) -> None:
    """It asks each vendor for its models first, with the 600 s and three attempts of any call; SIGTERM waits as well."""
    with Accepts() as silent:
        gateway = Gateway(tmp_path, OPENAI_PASSTHROUGH_URL=f"http://127.0.0.1:{silent.port}", **NOWHERE)
        with pytest.raises(RuntimeError, match="did not start"):
            gateway.start(40)
        assert len(silent.kept) == 2
    figures.append(Figure("vendor accepts and never answers while the gateway boots", "still not up after 40 s"))


# --- Its workers ---


@pytest.mark.slow
def test_workers_that_are_short_of_cpu_come_up(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    """uvicorn replaces a worker that does not answer for 5 s, also while it starts."""
    gateway = Gateway(tmp_path, LLAMA_STACK_WORKERS="8", **vendors.environ())
    with one_cpu():
        up, replaced, seconds = gateway.start_workers(200)
    assert (up, replaced) == (8, 0)
    figures.append(Figure("8 workers start on one CPU", "all come up, none is replaced", seconds))


@pytest.mark.slow
def test_a_killed_worker_is_replaced(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    with Gateway(tmp_path, LLAMA_STACK_WORKERS="2", **vendors.environ()) as gateway:

        def calls(count: int) -> int:
            """How many of `count` calls were answered."""
            good = 0
            with caller(gateway.url) as client:
                for _ in range(count):
                    with contextlib.suppress(httpx.TransportError):
                        good += client.post(CHAT, headers=ALL_KEYS, json=GOOD).is_success
            return good

        victim = gateway.workers[0]
        os.kill(victim, signal.SIGKILL)
        good = calls(20)
        assert good >= 19
        seconds = wait_for(lambda: gateway.log.count("Application startup complete") == 3, seen=lambda: gateway.log)
        assert len(gateway.workers) == 2
        assert victim not in gateway.workers
        assert gateway.log.count("The gateway answers") == 1
        assert calls(20) == 20
        figures.append(Figure("one of 2 workers killed", f"replaced; {good} of the next 20 calls served", seconds))
