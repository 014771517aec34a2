"""Two gateways behind HAProxy: what callers notice of a rolling restart, and of a machine that is lost."""

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from support.calls import ALL_KEYS, MODELS, caller, chat, one_by_one, one_key
from support.gateway import HAPROXY, PROJECT, START, Gateway, listening, wait_for
from support.haproxy import BALANCER, HAProxy
from support.load import Load
from support.vendors import Vendors

# A streamed answer of about 4 s beside regular ones.
BODIES = (chat("openai/slow", "count to four", stream=True), chat(MODELS[0]))


@pytest.fixture(scope="module")
def gateways(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Gateway]]:
    """Two gateways, each with a home of its own, and without a front: the balancer is theirs."""
    if not HAPROXY:
        pytest.skip("HAProxy is not installed (Debian: apt-get install haproxy)")
    folder = tmp_path_factory.mktemp("replicas")
    pair = {name: Gateway(folder / name, command=START, FRONT="0", **vendors.environ()) for name in "ab"}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        for gateway in pair.values():
            stack.callback(gateway.stop)
        list(pool.map(Gateway.start, pair.values()))
        yield pair


@pytest.fixture(scope="module")
def haproxy(gateways: dict[str, Gateway], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HAProxy]:
    """HAProxy in front of the two."""
    addresses = {f"GATEWAY_{name.upper()}": f"127.0.0.1:{gateway.port}" for name, gateway in gateways.items()}
    with HAProxy(tmp_path_factory.mktemp("balancer"), BALANCER, **addresses) as balancer:
        yield balancer


@pytest.fixture
def balancer(haproxy: HAProxy, gateways: dict[str, Gateway]) -> HAProxy:
    """HAProxy with both gateways up, whatever the test before has done to them."""
    for gateway in gateways.values():
        if gateway.process.poll() is not None:
            gateway.start()
    haproxy.wait_until_up(*gateways)
    return haproxy


def restart(balancer: HAProxy, name: str, gateway: Gateway, announced: bool) -> None:
    """Take one gateway through a restart: SIGTERM, its streams finish, a new process, HAProxy finds it well.

    `announced` tells HAProxy beforehand, as Kubernetes tells a Service. Otherwise it learns from the refused connections.
    """
    if announced:
        balancer.admin(f"set server gateways/{name} state drain")
    gateway.stop()
    gateway.start()
    balancer.admin(f"set server gateways/{name} state ready")
    balancer.wait_until_up(name)


def kill(balancer: HAProxy, gateways: dict[str, Gateway], name: str, callers: int, calls: int) -> None:
    """End one gateway without warning, with a load before and for some calls after, and check who noticed.

    One stream is led to it and would never end. Its socket takes calls that nobody will answer until the last of its threads is
    gone, some time after the process looks dead.
    """
    stall = {"headers": ALL_KEYS, "json": chat("openai/stall", stream=True)}
    others = [other for other in gateways if other != name]
    for other in others:
        balancer.admin(f"set server gateways/{other} state drain")
    with caller(balancer.url, timeout=60) as client, client.stream("POST", "/v1/chat/completions", **stall) as stream:
        lines = stream.iter_lines()
        assert next(lines)
        for other in others:
            balancer.admin(f"set server gateways/{other} state ready")
        with Load(balancer.url, BODIES, callers) as load:
            load.wait_for_calls()
            killed = time.monotonic()
            gateways[name].signal(signal.SIGKILL)
            wait_for(lambda: not listening(gateways[name].port))
            gone = time.monotonic()
            load.wait_for_calls(calls)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    in_hand = [call for call in load.calls if call.began < gone and call.ended > killed]
    print(f"One of two gateways killed, with {len(in_hand)} calls open at the two: {load}, all of them of those.")
    assert [call for call in load.lost if call not in in_hand] == []
    assert any(call.began > gone for call in load.calls)


@pytest.fixture
def client(balancer: HAProxy) -> Iterator[httpx.Client]:
    """A caller of the two gateways."""
    with caller(balancer.url, timeout=60) as client:
        yield client


def test_one_key_for_one_call_is_not_handed_to_every_vendor(client: httpx.Client, vendors: Vendors) -> None:
    seen = len(vendors.seen)
    for path in ("/v1/models", "/v1/models/"):
        listed = client.get(path, headers=one_key(MODELS[0])).json()["data"]
        assert sorted(model["id"] for model in listed) == sorted(MODELS)
    assert len(vendors.seen) == seen
    assert client.post("/v1/chat/completions", headers=one_key(MODELS[0]), json=chat(MODELS[0])).is_success


def test_each_vendors_own_key_lists_its_models(client: httpx.Client) -> None:
    listed = [model["id"] for model in client.get("/v1/models", headers=ALL_KEYS).json()["data"]]
    assert "anthropic/anthropic-other" in listed


def test_tokens_arrive_as_the_gateway_sends_them(client: httpx.Client) -> None:
    wait_for(lambda: one_by_one(client))


def test_one_gateway_alone_is_not_checked(tmp_path: Path) -> None:
    """A check could only turn a wait for a busy one into an error: there is no other that could be asked."""
    if not HAPROXY:
        pytest.skip("HAProxy is not installed (Debian: apt-get install haproxy)")
    with HAProxy(tmp_path, BALANCER, GATEWAY_A="127.0.0.1:9") as balancer:
        (line,) = [line for line in balancer.admin("show stat").splitlines() if line.startswith("gateways,a,")]
    assert ",no check," in line


@pytest.mark.parametrize("announced", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["announced", "unannounced"])
def test_a_restart_loses_no_call(balancer: HAProxy, gateways: dict[str, Gateway], announced: bool) -> None:
    before = gateways["a"].process.pid
    with Load(balancer.url, BODIES, callers=4) as load:
        load.wait_for_calls()
        restart(balancer, "a", gateways["a"], announced)
    assert gateways["a"].process.pid != before
    assert {call.stream for call in load.calls} == {True, False}
    assert load.lost == []


def test_memory_under_load_is_less_than_a_pod_asks_for(balancer: HAProxy, gateways: dict[str, Gateway]) -> None:
    pod = yaml.safe_load((PROJECT / "deploy/kubernetes/deployment.yaml").read_text())["spec"]["template"]["spec"]
    requested = int(pod["containers"][0]["resources"]["requests"]["memory"].removesuffix("Mi"))
    status = Path(f"/proc/{gateways['b'].server}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024 < requested


def test_a_killed_gateway_loses_what_it_had_in_hand_and_no_more(balancer: HAProxy, gateways: dict[str, Gateway]) -> None:
    kill(balancer, gateways, "b", callers=4, calls=2)


@pytest.mark.slow
def test_three_rolling_restarts_and_two_kills(balancer: HAProxy, gateways: dict[str, Gateway]) -> None:
    """`make rolling` prints what callers noticed."""
    with Load(balancer.url, BODIES, callers=8) as load:
        load.wait_for_calls()
        for _ in range(3):
            for name, gateway in gateways.items():
                restart(balancer, name, gateway, announced=True)
    print(f"\nThree rolling restarts of two gateways: {load}.")
    assert load.lost == []
    for name, victim in gateways.items():
        kill(balancer, gateways, name, callers=8, calls=3)
        victim.start()
        balancer.wait_until_up(*gateways)
