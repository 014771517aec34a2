"""How the gateway stops, dies and comes back: signals with streams in flight, a killed worker, a boot that waits.

`make faults` runs the long tests too.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from support.bare_servers import Accepts
from support.callers import GOOD, Stream, assert_clean, open_stream
from support.calls import ALL_KEYS, CHAT, caller
from support.figures import Figure
from support.gateway import Gateway, processes, wait_for
from support.vendors import Vendors

# Words for 6 s, of which one comes every 0.3 s.
WORDS = "one two three four five six seven eight nine ten "


def test_sigkill_restart_and_sigterm(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    gateway = Gateway(tmp_path, **vendors.environ()).start()
    try:
        streams = [Stream(gateway, "openai/slow", WORDS * 20) for _ in range(5)]
        start = time.monotonic()
        os.kill(gateway.server, signal.SIGKILL)
        for stream in streams:
            stream.join(60)
            assert stream.problem
            assert not stream.finished
        figures.append(Figure("SIGKILL with 5 streams in flight", "each caller's connection breaks", time.monotonic() - start))
        assert gateway.process.wait(60) != 0
        wait_for(lambda: processes(gateway.process.pid) == [])
        start = time.monotonic()
        gateway.start()
        with caller(gateway.url) as client:
            assert client.post(CHAT, headers=ALL_KEYS, json=GOOD).is_success
        figures.append(Figure("restart after that", "boots and serves", time.monotonic() - start))

        streams = [Stream(gateway, "openai/slow", WORDS) for _ in range(5)]
        start = time.monotonic()
        gateway.signal(signal.SIGTERM)
        wait_for(lambda: not gateway.answers())
        assert any(stream.is_alive() for stream in streams)
        for stream in streams:
            stream.join(60)
            assert stream.finished
        gateway.process.wait(60)
        outcome = "new calls are refused, the streams finish"
        figures.append(Figure("SIGTERM with 5 streams in flight", outcome, time.monotonic() - start))
        wait_for(lambda: processes(gateway.process.pid) == [])
        assert gateway.log.count('"Finished server process [') == 1, "The log ends before the server."
        assert_clean(gateway)
        left = [path.name for path in (tmp_path / ".llama").rglob("*") if not path.is_dir()]
        assert left == ["keeps-nothing.db"]
    finally:
        gateway.stop()


@pytest.mark.slow
def test_sigterm_waits_for_a_vendor_that_never_answers(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    """As long as the caller does."""
    with Gateway(tmp_path, **vendors.environ()) as gateway:
        with open_stream(gateway, "openai/stall"):
            gateway.signal(signal.SIGTERM)
            wait_for(lambda: not gateway.answers())
            time.sleep(5)
            assert processes(gateway.process.pid)
        seconds = wait_for(lambda: processes(gateway.process.pid) == [])
    outcome = "waits until the caller hangs up"
    figures.append(Figure("SIGTERM with a vendor that never answers", outcome, seconds))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_with_a_stream_in_flight(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    """Left alone, the stock server would skip its own end, and the threads of its in-memory database keep the process."""
    with Gateway(tmp_path, **vendors.environ()) as gateway, open_stream(gateway, "openai/stall"):
        gateway.signal(signal.SIGINT)
        wait_for(lambda: not gateway.answers())
        gateway.signal(signal.SIGINT)
        seconds = wait_for(lambda: processes(gateway.process.pid) == [])
    figures.append(Figure("Ctrl-C twice with a stream in flight", "ends at once", seconds))


@pytest.mark.slow
def test_a_boot_waits_for_a_vendor_that_accepts_and_never_answers(tmp_path: Path, figures: list[Figure]) -> None:
    """It asks each vendor for its models first, with the 600 s and three attempts of any call; SIGTERM waits as well."""
    with Accepts() as silent:
        gateway = Gateway(tmp_path, OPENAI_PASSTHROUGH_URL=f"http://127.0.0.1:{silent.port}", HTTPS_PROXY="http://127.0.0.1:9")
        with pytest.raises(RuntimeError, match="did not start"):
            gateway.start(40)
        assert len(silent.kept) == 1
    figures.append(Figure("vendor accepts and never answers while the gateway boots", "still not up after 40 s"))


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

        wait_for(lambda: len(gateway.workers) == 2)
        wait_for(lambda: gateway.log.count("Application startup complete") == 2)
        victim = gateway.workers[0]
        os.kill(victim, signal.SIGKILL)
        good = calls(20)
        assert good >= 19
        seconds = wait_for(lambda: gateway.log.count("Application startup complete") == 3)
        assert len(gateway.workers) == 2
        assert victim not in gateway.workers
        assert calls(20) == 20
        figures.append(Figure("one of 2 workers killed", f"replaced; {good} of the next 20 calls served", seconds))
