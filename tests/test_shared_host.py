"""Several gateways on one machine: side by side, and with ports that collide."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.calls import ALL_KEYS, CHAT, MODELS, caller, chat, responses
from support.gateway import START, Gateway, listening, refused
from support.haproxy import NEEDS_HAPROXY

pytestmark = NEEDS_HAPROXY


@pytest.fixture(scope="module")
def first(egress: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that is up."""
    with Gateway(tmp_path_factory.mktemp("home"), START, **egress) as gateway:
        yield gateway


def serves(gateway: Gateway) -> bool:
    """Whether calls are answered, by the vendor, with the help of the store, and by the page."""
    with caller(gateway.url) as client:
        answers = [
            client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0])),
            client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0], store=True)),
            client.get("/"),
        ]
    return all(answer.is_success for answer in answers)


def test_two_side_by_side_share_a_folder_and_nothing_else(first: Gateway, egress: dict[str, str]) -> None:
    """As two of one user's do, with one store: the one that stops takes nothing from the other."""
    with Gateway(first.home, START, **egress) as second:
        assert serves(second)
        assert serves(first)
        for gateway in (first, second):
            assert listening(gateway.port) == ["127.0.0.1"]
            assert listening(gateway.port + 1) == ["127.0.0.1"]
    assert not listening(second.port)
    assert serves(first)


def test_the_next_port_is_another_gateways_egress_door(first: Gateway, egress: dict[str, str], tmp_path: Path) -> None:
    said = refused(tmp_path, LLAMA_STACK_PORT=str(first.port + 1), **egress)
    assert said == f"Port {first.port + 1} is in use. Stop what listens there, or choose another with LLAMA_STACK_PORT.\n"


def test_an_egress_door_does_not_take_another_gateways_port(first: Gateway, egress: dict[str, str], tmp_path: Path) -> None:
    said = refused(tmp_path, EGRESS_PORT=str(first.port), **egress)
    assert said == f"Port {first.port}, where the egress door is to listen, is in use. Choose another with EGRESS_PORT.\n"
