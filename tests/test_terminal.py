"""What somebody sees who starts the gateway at a terminal, and how Ctrl-C ends it."""

import re
import threading
from pathlib import Path

import httpx
import pytest
from support.bare_servers import Accepts
from support.calls import ALL_KEYS, MODELS, caller, chat
from support.gateway import clean_environ, eventually, free_port, listening
from support.terminal import Terminal
from support.vendors import Vendors

CTRL_C = b"\x03"


def terminal(home: Path, vendors: Vendors, **settings: str) -> Terminal:
    """`make server` at a terminal."""
    return Terminal(("make", "server"), clean_environ(home, **settings, **vendors.environ()))


class Stream(threading.Thread):
    """A caller of a stream. `started` is set with its first line, `whole` says whether it came to its end."""

    def __init__(self, url: str, model: str) -> None:
        super().__init__(daemon=True)
        self.url, self.model, self.started, self.whole = url, model, threading.Event(), False
        self.start()
        assert self.started.wait(60)

    def run(self) -> None:
        body = chat(self.model, "count to ten", stream=True)
        try:
            with caller(self.url) as client, client.stream("POST", "/v1/chat/completions", headers=ALL_KEYS, json=body) as answer:
                for line in answer.iter_lines():
                    self.started.set()
                    self.whole = self.whole or '"finish_reason":"stop"' in line
        except httpx.HTTPError:
            self.whole = False


def test_plain_words_and_a_short_line_a_call(vendors: Vendors, tmp_path: Path) -> None:
    port = free_port()
    with terminal(tmp_path, vendors, LLAMA_STACK_PORT=str(port)) as at, caller(f"http://127.0.0.1:{port}") as client:
        at.wait_for(f"The gateway answers at http://127.0.0.1:{port}. Ctrl-C stops it.")
        assert "Calls go straight to the vendors." in at.screen
        client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0]))
        client.get("/v1/prompts?key=sk-fake-in-a-url")
        at.wait_for("/v1/prompts")
        at.press(CTRL_C)
        assert at.wait() in (0, -2), "make ends by the Ctrl-C that it gets as well"
    lines = at.screen.splitlines()
    assert [line for line in lines if re.fullmatch(r"\d\d:\d\d:\d\d  200  POST /v1/chat/completions", line)]
    assert [line for line in lines if re.fullmatch(r"\d\d:\d\d:\d\d  403  GET /v1/prompts", line)]
    assert "{" not in at.screen, "a line meant for programs is shown to a person"
    assert lines[-1] == "The gateway has stopped."
    assert "make:" not in at.screen


def test_ctrl_c_lets_streams_finish(vendors: Vendors, tmp_path: Path) -> None:
    port = free_port()
    with terminal(tmp_path, vendors, LLAMA_STACK_PORT=str(port)) as at:
        at.wait_for("The gateway answers")
        stream = Stream(f"http://127.0.0.1:{port}", "openai/slow")
        at.press(CTRL_C)
        at.wait_for("when the calls in flight have ended")
        at.wait(120)
        stream.join(10)
        assert stream.whole


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_ctrl_c_ends_it_at_once(vendors: Vendors, tmp_path: Path, workers: str) -> None:
    """Left to itself the stock server would hang, with a stream open that never ends."""
    port = free_port()
    with terminal(tmp_path, vendors, LLAMA_STACK_PORT=str(port), LLAMA_STACK_WORKERS=workers) as at:
        at.wait_for("The gateway answers")
        stream = Stream(f"http://127.0.0.1:{port}", "openai/stall")
        at.press(CTRL_C)
        at.wait_for("Ctrl-C ends it at once")
        at.press(CTRL_C)
        at.wait(30)
        stream.join(10)
        assert not stream.is_alive()
    assert eventually(lambda: not listening(port), 10), "something still answers"


def test_a_second_ctrl_c_ends_a_start_that_a_silent_vendor_holds_up(tmp_path: Path) -> None:
    """Asked once, the stock server looks up when the vendor has answered, which may take half an hour."""
    with Accepts() as silent:
        nowhere = {"OPENAI_PASSTHROUGH_URL": f"http://127.0.0.1:{silent.port}", "HTTPS_PROXY": "http://127.0.0.1:9"}
        environ = clean_environ(tmp_path, LLAMA_STACK_PORT=str(free_port()), **nowhere)
        with Terminal(("make", "server"), environ) as at:
            assert eventually(lambda: silent.kept)
            at.press(CTRL_C)
            at.wait_for("Ctrl-C ends it at once")
            at.press(CTRL_C)
            at.wait(30)
