"""The fixtures that most tests share: the stand-in vendors, the gateway as `make server` starts it, and a caller."""

import signal
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from support.both_ends import BothEnds
from support.calls import ALL_KEYS, MODELS, caller, vendor_of
from support.figures import Figure, write
from support.gateway import Gateway, copy_project
from support.network import NameServer, Wire
from support.services import Services
from support.vendors import KEYS, Vendors

# The client libraries that the tests use, which may be other releases than those in uv.lock.
LIBRARIES = ("openai", "openai-agents", "langchain-openai", "llama-stack-client")

# Files that would keep one process busy when the others have ended, because the alphabet puts them last.
LONG = ("test_start_lifetime", "test_vendor_faults")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, help="write what the tests of faults measured to this file, as a table")


def pytest_configure() -> None:
    """Let Ctrl-C and hanging up work in what the tests start: a shell or nohup that put the suite aside has them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    if strangers := {vendor_of(model) for model in MODELS} - KEYS.keys():
        raise pytest.UsageError(
            f"run.yaml has models of {', '.join(sorted(strangers))}, for which there is no stand-in: write one as the others in "
            "tests/support/vendors/ are, and name it in VENDORS of tests/support/vendors/__init__.py."
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, and give the tests that take minutes half an hour."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))


def pytest_report_header() -> str:
    """Name the releases of the client libraries."""
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Iterator[list[Figure]]:
    """What the tests of faults measured, written to the file of `--figures` in the end."""
    figures: list[Figure] = []
    yield figures
    if path := pytestconfig.getoption("figures"):
        write(path, figures)


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    """A team's identity provider and collector."""
    with Services() as services:
        yield services


@pytest.fixture(scope="session")
def vendors() -> Iterator[Vendors]:
    """The stand-in vendors."""
    with Vendors() as vendors:
        yield vendors


@pytest.fixture(scope="session")
def egress(vendors: Vendors) -> Iterator[dict[str, str]]:
    """The settings with which an egress door finds the stand-ins: by a name server, and with their CA."""
    with NameServer() as names:
        yield {
            "EGRESS_NAMESERVER": f"127.0.0.1:{names.port}",
            "EGRESS_VENDOR_PORT": str(vendors.tls_port),
            "SSL_CERT_FILE": str(vendors.ca_file),
        }


@pytest.fixture(scope="module")
def names() -> Iterator[NameServer]:
    """A name server for an egress door to ask, where a test moves the vendors."""
    with NameServer() as names:
        yield names


@pytest.fixture(scope="module")
def wire(vendors: Vendors) -> Iterator[Wire]:
    """The wire between an egress door and the stand-in vendors, where a test counts or cuts connections."""
    with Wire(vendors.tls_port) as wire:
        yield wire


@pytest.fixture(scope="session")
def gateway(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway as `make server` starts it, in an environment with no key: with the front where HAProxy is installed."""
    with Gateway(tmp_path_factory.mktemp("gateway"), **vendors.environ()) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def server(gateway: Gateway) -> Iterator[httpx.Client]:
    """A caller of that gateway's stock server, past the front, for what it promises by itself."""
    with caller(f"http://127.0.0.1:{gateway.server_port}") as client:
        yield client


@pytest.fixture(scope="session")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    """A caller of the gateway."""
    with caller(gateway.url) as client:
        yield client


@pytest.fixture
def ends(vendors: Vendors) -> Iterator[BothEnds]:
    """Both ends of a library's calls."""
    ends = BothEnds(vendors)
    yield ends
    ends.client.close()


@pytest.fixture
def settings(gateway: Gateway) -> dict:
    """How an OpenAI client is pointed at the gateway. It insists on a key of its own, which goes nowhere."""
    return {"base_url": f"{gateway.url}/v1", "api_key": "sk-fake-unused", "default_headers": ALL_KEYS}


@pytest.fixture
def sdk(ends: BothEnds, settings: dict) -> OpenAI:
    """The OpenAI SDK with its retries switched off: the server has its own."""
    return OpenAI(**settings, http_client=ends.client, max_retries=0)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what a server needs, for tests that change run.yaml."""
    return copy_project(tmp_path / "project")
