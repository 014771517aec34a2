"""What somebody sees who types `make server` at a terminal: each line, from the first to the last."""

import re
from pathlib import Path

import pytest
from support.calls import ALL_KEYS, CHAT, MODELS, caller, chat
from support.gateway import ALONE, HAPROXY, free_port, make_environ
from support.terminal import Terminal
from support.vendors import Vendors

CTRL_C = b"\x03"
A_CALL = r"\d\d:\d\d:\d\d  "


@pytest.mark.parametrize("doors", ["all doors", "none"])
def test_plain_words_and_a_short_line_a_call(vendors: Vendors, egress: dict[str, str], tmp_path: Path, doors: str) -> None:
    """No line that is meant for programs, and nothing of what the start brings about itself."""
    if doors == "all doors" and not HAPROXY:
        pytest.skip("HAProxy is not installed (apt-get install haproxy)")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = egress if doors == "all doors" else ALONE | vendors.environ()
    environ = make_environ(tmp_path, LLAMA_STACK_PORT=str(port), **settings)
    with Terminal(("make", "server"), environ) as at, caller(url) as client:
        at.wait_for(f"The gateway answers, until Ctrl-C, at {url}/v1")
        client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0]))
        client.post(CHAT, headers=ALL_KEYS, json=chat("openai/status-429"))
        client.get("/v1/prompts?key=sk-fake-in-a-url")
        at.wait_for("/v1/prompts")
        at.press(CTRL_C)
        assert at.wait() in (0, -2), "make ends by the Ctrl-C that it gets as well"
    of_doors = (
        f"Open: the front on port {port} (API keys, native paths, the page at {url}/), and the egress door on port {port + 1}."
        if doors == "all doors"
        else "Calls go straight to the vendors."
    )
    expected = [
        re.escape("The gateway starts. It asks each vendor for its models first, and waits for one that is silent."),
        re.escape(of_doors),
        re.escape(f"The gateway answers, until Ctrl-C, at {url}/v1"),
        rf"{A_CALL}200  POST /v1/chat/completions",
        rf"{A_CALL}429  POST /v1/chat/completions",
        rf"{A_CALL}A call failed: the vendor answered with an error.*",
        rf"{A_CALL}403  GET /v1/prompts",
        r"(\^C)?The gateway stops when the calls in flight have ended\. Ctrl-C ends it at once\.",
        r"The gateway has stopped\.",
    ]
    # HAProxy and the server tell of a failed call at about the same time. One vendor has no way to the stand-ins past the egress door.
    lines = [line for line in at.screen.splitlines() if not line.startswith("Calls to generativelanguage.")]
    assert len(lines) == len(expected), at.screen
    for pattern in expected:
        assert any(re.fullmatch(pattern, line) for line in lines), f"{pattern} is not on the screen:\n{at.screen}"
    for number in (0, 1, 2, -2, -1):
        assert re.fullmatch(expected[number], lines[number]), at.screen
