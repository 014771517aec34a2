"""Small bodies that keep a worker busy: what stays open, behind the front too. The figures of deploy/README.md come from here.

`make faults` measures all of them.
"""

import json
import time
from pathlib import Path

import pytest
from support.callers import Others
from support.calls import ALL_KEYS, CHAT, MODELS, caller, chat, responses
from support.figures import Figure
from support.gateway import START, Gateway
from support.vendors import Vendors

NAMES = [f"tool_{number}" for number in range(1_000)]

# The server lists what is wrong with each part for each shape that it could have, compares each tool with all others, and makes
# all headers anew for each header.
HEAVY = {
    "5,000 numbers as the input of a response": ("/v1/responses", responses(MODELS[0], [1] * 5_000)),
    "20,000 numbers as the input of a response": ("/v1/responses", responses(MODELS[0], [1] * 20_000)),
    "1,000 valid tools": (CHAT, chat(MODELS[0], tools=[{"type": "function", "function": {"name": name}} for name in NAMES])),
    "12,000 `extra_headers`": (CHAT, chat(MODELS[0], extra_headers={f"x-{number}": "" for number in range(12_000)})),
}


@pytest.mark.slow
@pytest.mark.parametrize("heavy", HEAVY)
def test_a_small_body_that_keeps_a_worker_busy(vendors: Vendors, tmp_path: Path, figures: list[Figure], heavy: str) -> None:
    """Nothing that can be set bounds this, so all that is asked is that the gateway comes back."""
    path, body = HEAVY[heavy]
    size = len(json.dumps(body, separators=(",", ":"))) / 1000
    with Gateway(tmp_path, START, **vendors.environ()) as gateway, caller(gateway.url, timeout=300) as client:
        before = gateway.resident()
        start = time.monotonic()
        with Others(gateway) as others:
            answer = client.post(path, headers=ALL_KEYS, json=body)
        seconds, more = time.monotonic() - start, (gateway.resident() - before) / 1e6
    outcome = f"{answer.status_code} in {len(answer.content) / 1e6:.0f} MB; {more:.0f} MB more memory"
    figures.append(Figure(f"caller sends {heavy} ({size:.0f} KB)", outcome, seconds, others.worst))
