"""The documents are true: their blocks run as written, their tables say what the files say, their links lead somewhere."""

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
import yaml
from support.calls import ALL_KEYS, CHAT, EMBEDDINGS, MODELS, RUN_YAML, caller, chat, responses, vendor_of
from support.gateway import BOTH_DOORS, HAPROXY, PROJECT, Gateway, clean_environ, free_port, wait_for
from support.haproxy import NEEDS_HAPROXY
from support.services import ISSUER, Services
from support.vendors import KEY_VARIABLES, KEYS, VENDORS, Vendors

USER, OPERATOR, SCEPTIC = "README.md", "deploy/README.md", "tests/README.md"
PROGRAMS, DIFFERENCES = "docs/programs.md", "docs/differences.md"
DOCUMENTS = {name: (PROJECT / name).read_text() for name in (USER, OPERATOR, SCEPTIC, PROGRAMS, DIFFERENCES)}
SHELLS = [shell for shell in ("sh", "bash", "zsh") if shutil.which(shell)]


class Block(NamedTuple):
    """A block of a document: which it is in, its language, its text."""

    document: str
    language: str
    text: str


BLOCKS = [
    Block(name, *found)
    for name, text in DOCUMENTS.items()
    for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]


def blocks(document: str, language: str) -> list[str]:
    """The blocks of a document in a language, in order."""
    return [block.text for block in BLOCKS if block[:2] == (document, language)]


def block(document: str, marker: str) -> str:
    """The one block of a document that has `marker` in it."""
    (found,) = [block.text for block in BLOCKS if block.document == document and marker in block.text]
    return found


# What tells each block of the documents from the rest, but for those of README.md, which are run all at once.
TEAM, DOORS, HEALTH, UPGRADE, ROLLBACK = "AUTH_ISSUER=", "FRONT=1 EGRESS=1", "curl -fsS", "git pull", "git checkout"
MCP, BEHIND, BALANCER, SYSTEMD = "NO_PROXY=", "FRONT=0 LLAMA_STACK_HOST", "GATEWAY_A=", "systemctl"
IMAGE, DOCKER, FRONT_IMAGE, KUSTOMIZE, APPLY = (
    "podman build",
    "docker build",
    "--network container",
    "configMapGenerator",
    "kubectl",
)
SUITE, ONE_TEST, AUDIO = "make test\n", "pytest", "input_audio"
MARKERS = (
    *(TEAM, DOORS, HEALTH, UPGRADE, ROLLBACK, MCP, BEHIND, BALANCER, SYSTEMD, IMAGE, DOCKER, FRONT_IMAGE, KUSTOMIZE, APPLY),
    *(SUITE, ONE_TEST, AUDIO),
)


def test_every_block_is_run_by_a_test() -> None:
    for name, text in DOCUMENTS.items():
        assert text.count("```") == 2 * sum(each.document == name for each in BLOCKS), f"a block of {name} has no end"
    for each in BLOCKS:
        if each.document == PROGRAMS:  # Which `make programs` runs.
            continue
        if each.document == USER:
            assert each.language in ("sh", "yaml", "python", "text"), f"no test runs a block in {each.language} of {USER}"
        else:
            found = [marker for marker in MARKERS if marker in each.text]
            assert len(found) == 1, (
                f"This block of {each.document} needs a marker of its own in MARKERS, and a test that runs it:\n{each.text}"
            )
    unused = [marker for marker in MARKERS if not any(marker in each.text for each in BLOCKS)]
    assert not unused, f"no document has a block with {unused} any more: take the marker and its test away"


def copy_for_a_user(home: Path) -> Path:
    """The project as a new user has it, with no .env, but with this project's packages installed."""
    folder = home / "lls-openai"
    leave_out = shutil.ignore_patterns(".git", ".env", ".venv", ".uv", ".bench", "__pycache__", ".ruff_cache", "node_modules")
    shutil.copytree(PROJECT, folder, ignore=leave_out)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The same for one test, which may write into it and into its home."""
    return copy_for_a_user(tmp_path)


def run(script: str, folder: Path, shell: str = "sh", **settings: str) -> str:
    """What a script prints that must succeed."""
    environ = clean_environ(folder.parent, **settings)
    command = [shell, "-ec", script]
    ended = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-2000:]
    return ended.stdout


# --- README.md, from top to bottom ---


def test_a_user_can_type_every_block(copy: Path, vendors: Vendors) -> None:
    """In order, with other keys and another port than a user has."""
    port = str(free_port())
    settings = {"LLAMA_STACK_PORT": port}
    config = yaml.safe_load((copy / "run.yaml").read_text())
    for text in blocks(USER, "yaml"):
        config["registered_resources"]["models"] += yaml.safe_load(text)
    (copy / "run.yaml").write_text(yaml.safe_dump(config))

    typed = [text.replace("8321", port) for text in blocks(USER, "sh") if not is_native(text)]
    start = typed.index("make server\n")
    for text in typed[:start]:
        run(text, copy)
    assert (copy / ".env").stat().st_mode & 0o777 == 0o600
    file = (copy / ".env").read_text()
    for name, key in KEY_VARIABLES.items():
        assert f"{name}=\n" in file
        file = file.replace(f"{name}=\n", f"{name}={key}\n")
    (copy / ".env").write_text(file)

    with Gateway(copy.parent, ("sh", "-c", typed[start]), copy, **settings, **vendors.environ()) as gateway:
        printed = run("\n".join(typed[start + 1 :]), copy, **settings)
        for shell in SHELLS[1:]:
            printed += run("\n".join(text for text in typed[start + 1 :] if "make" not in text), copy, shell, **settings)
        assert '"error":{' not in printed
        assert "[DONE]" not in printed
        for vendor in VENDORS.values():
            assert printed.count(f"This is a stand-in for {vendor.title}") > len(SHELLS)
        assert printed.count('"embedding":[') == len(EMBEDDINGS) * len(SHELLS)
        assert printed.count('"object":"response"') == len(SHELLS)
        assert "usage: main.py" in printed

        python = f"set -a; . ./.env; exec {sys.executable} - <<'END'\n" + "\n".join(blocks(USER, "python")) + "\nEND\n"
        printed = run(python.replace("8321", port), copy)
        for vendor in VENDORS.values():
            assert f"This is a stand-in for {vendor.title}" in printed

        listed = httpx.get(f"{gateway.url}/v1/models", trust_env=False, timeout=60).json()["data"]
        assert [model["id"] for model in listed] == [
            *MODELS,
            *(each["model_id"] for each in yaml.safe_load(blocks(USER, "yaml")[0])),
        ]


def is_native(text: str) -> bool:
    """Whether a block calls a vendor's own path, which is closed where the stand-ins are reached by HTTPS_PROXY."""
    return bool(re.search(r"/(openai|gemini|anthropic)/v1", text))


@pytest.fixture(scope="module")
def doors(egress: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway with both doors of deploy/README.md."""
    with started(copy_for_a_user(tmp_path_factory.mktemp("doors")), block(OPERATOR, DOORS), **egress) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def bare(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway that deploy/README.md puts behind a balancer, with no door of its own. Here it listens on loopback."""
    command = block(OPERATOR, BEHIND).replace("10.0.0.1", "127.0.0.1")
    with started(copy_for_a_user(tmp_path_factory.mktemp("bare")), command, **vendors.environ()) as gateway:
        yield gateway


@NEEDS_HAPROXY
def test_a_user_can_call_a_vendors_own_path(copy: Path, doors: Gateway) -> None:
    (copy / ".env").write_text("".join(f"{name}={key}\n" for name, key in KEY_VARIABLES.items()))
    native = [text for text in blocks(USER, "sh") if is_native(text)]
    assert native, f"{USER} shows no call on a native path"
    for text in native:
        for shell in SHELLS:
            assert "This is a stand-in for" in run(text, copy, shell, LLAMA_STACK_PORT=str(doors.port))


@pytest.fixture
def ask(copy: Path):
    """The function `ask` of README.md, with a curl that prints the header instead of sending it, on a .env file."""
    bin = copy / "bin"
    bin.mkdir()
    (bin / "curl").write_text("#!/bin/sh\ncat\n")
    (bin / "curl").chmod(0o755)

    def ask(shell: str, env: bytes, script: str = "ask chat/completions '{}'") -> subprocess.CompletedProcess:
        (copy / ".env").write_bytes(env)
        environ = clean_environ(copy)
        environ["PATH"] = f"{bin}:{environ['PATH']}"
        command = [shell, "-c", f"{block(USER, 'ask() {')}\n{script}"]
        return subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, timeout=60, check=False)

    return ask


@pytest.mark.parametrize("missing", KEYS)
@pytest.mark.parametrize("shell", SHELLS)
def test_curl_sends_the_keys_that_are_set_and_no_others(ask, shell: str, missing: str) -> None:
    keys = {name: "" if missing.upper() in name else key for name, key in KEY_VARIABLES.items()}
    given = ask(shell, "".join(f"{name}={key}\n" for name, key in keys.items()).encode())
    name, _, value = given.stdout.partition(": ")
    assert (given.returncode, given.stderr, name) == (0, "", "X-LlamaStack-Provider-Data")
    assert json.loads(value) == {entry: key for entry, key in json.loads(ALL_KEYS[name]).items() if not entry.startswith(missing)}


@pytest.mark.parametrize(
    "env",
    [b"", b"OPENAI_API_KEY=\n", b"OPENAI_API_KEY=sk-fake\r\n", b'OPENAI_API_KEY="sk fake"\n', b"OPENAI_API_KEY = sk-fake\n"],
    ids=["nothing", "empty", "CRLF", "space", "spaces"],
)
@pytest.mark.parametrize("shell", SHELLS)
def test_curl_is_not_called_without_a_key_that_can_be_sent(ask, shell: str, env: bytes) -> None:
    given = ask(shell, env)
    assert (given.returncode, given.stdout) == (1, "")
    assert "Write NAME=key into .env" in given.stderr


def test_in_a_new_terminal_no_call_goes_out_without_a_header() -> None:
    """Every call to /v1 is made by the function, which a new terminal does not have."""
    for text in blocks(USER, "sh"):
        if not is_native(text):
            assert text.count("curl") == text.count("ask() {")


# --- deploy/README.md ---


@pytest.fixture
def certificate(copy: Path) -> Iterator[ssl.SSLContext]:
    """tls.crt, tls.key and tls.pem in the project's folder, and who trusts them."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(copy / "tls.crt")
    issued.private_key_pem.write_to_path(copy / "tls.key")
    issued.private_key_and_cert_chain_pem.write_to_path(copy / "tls.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


# The origin of the team's web page.
PAGE = "https://chat.example.com"


def started(copy: Path, command: str, **settings: str) -> Gateway:
    """A gateway that a block starts."""
    return Gateway(copy.parent, ("sh", "-c", command), copy, **settings)


def test_a_team_s_server_and_its_metrics(copy: Path, vendors: Vendors, certificate: ssl.SSLContext) -> None:
    """As written, but for where the identity provider and the collector are."""
    with Services() as services:
        text = block(OPERATOR, TEAM).replace("https://id.example.com/jwks", f"{services.url}/jwks")
        text = text.replace("http://collector:4318", services.url)
        assert f"AUTH_ISSUER={ISSUER} " in text
        more = {"OTEL_METRIC_EXPORT_INTERVAL": "500", "AUTH_AUDIENCE": "our-gateway", "LLAMA_STACK_CORS_ORIGIN": PAGE}
        gateway = started(copy, text, **more, **vendors.environ())
        gateway.url, gateway.trust = gateway.url.replace("http:", "https:"), certificate
        with gateway, caller(gateway.url, verify=certificate) as client:
            for token, status in ((None, 401), ("lls-openai", 401), ("our-gateway", 200)):
                headers = ALL_KEYS | {"Origin": PAGE}
                headers |= {"Authorization": f"Bearer {services.token(aud=token)}"} if token else {}
                answer = client.post(CHAT, json=chat(MODELS[0]), headers=headers)
                assert answer.status_code == status, f"for {token}: {answer.text}"
                assert answer.headers["access-control-allow-origin"] == PAGE
            if HAPROXY:
                key = {"Authorization": "Bearer sk-fake"}
                assert client.get("/openai/v1/models", headers=key).status_code == 403, "a key was taken where tokens are"
            for stream in (False, True):
                assert client.post(CHAT, json=chat(MODELS[0], stream=stream), headers=headers).is_success
            assert client.post(CHAT, json=chat("openai/status-400"), headers=headers).status_code == 400
            assert client.post("/v1/responses", json=responses(MODELS[0], stream=True), headers=headers).is_success
            shown = {name.strip("`"): {*re.findall(r"`([\w.]+)`", labels)} for name, _, labels in rows(OPERATOR, "metric |")}
            wait_for(lambda: shown.keys() <= services.metrics().keys(), 30, seen=services.metrics)
    found = services.metrics()
    assert found.keys() == shown.keys(), "the table of metrics in deploy/README.md has other names than what is exported"
    for name, points in found.items():
        labels = {label for point in points for label in point} - {"value", *OF_THE_SERVICE}
        assert labels <= shown[name], f"the table of metrics in deploy/README.md lacks labels of {name}: {labels - shown[name]}"


# What every metric has, because it is the service's.
OF_THE_SERVICE = {
    *("service.name", "service.instance.id", "telemetry.sdk.language", "telemetry.sdk.name", "telemetry.sdk.version"),
    "telemetry.auto.version",
}


@NEEDS_HAPROXY
def test_both_doors_are_demanded(doors: Gateway) -> None:
    assert f"Open: the front on port {doors.port}" in doors.log
    assert f"the egress door on port {doors.port + 1}" in doors.log


@NEEDS_HAPROXY
def test_each_kind_of_log_line_has_the_fields_of_the_table(doors: Gateway, bare: Gateway) -> None:
    """With both doors, and without any."""
    shown = {kind: {*re.findall(r"`(\w+)`", fields)} for kind, fields, _ in rows(OPERATOR, "kind |")}
    for gateway in (doors, bare):
        with caller(gateway.url) as client:
            assert client.post(CHAT, headers=ALL_KEYS, json=chat("openai/status-400")).status_code == 400
    wait_for(lambda: '"door": "egress"' in doors.log and '"status": 400' in bare.log, 20, seen=lambda: doors.log + bare.log)
    lines = [json.loads(line) for gateway in (doors, bare) for line in gateway.log.splitlines() if line.startswith("{")]
    kinds = {
        "a call at the front": [line for line in lines if line.get("door") == "front"],
        "a call at the egress door": [line for line in lines if line.get("door") == "egress"],
        "a call at the server": [line for line in lines if "status" in line and "door" not in line],
        "a sentence": [line for line in lines if "event" in line],
    }
    assert kinds.keys() == shown.keys()
    assert sum(map(len, kinds.values())) == len(lines), "there is a kind of line that the table does not have"
    for kind, of_kind in kinds.items():
        found = {name for line in of_kind for name in line}
        assert found == shown[kind], f"the table of deploy/README.md has other fields of {kind} than the log"


def test_its_health_is_asked_for(copy: Path, gateway: Gateway) -> None:
    printed = run(block(OPERATOR, HEALTH).replace("8321", str(gateway.port)), copy)
    assert printed in DOCUMENTS[OPERATOR]
    assert printed


def test_an_upgrade_and_the_way_back(tmp_path: Path) -> None:
    """On a repository with two versions, without starting either."""

    def git(folder: Path, *arguments: str) -> str:
        name = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
        environ = clean_environ(tmp_path)
        return subprocess.run(
            ["git", *name, *arguments], cwd=folder, env=environ, check=True, capture_output=True, text=True
        ).stdout

    def version() -> str:
        return (tmp_path / "clone/Makefile").read_text()

    origin = tmp_path / "origin"
    origin.mkdir()
    git(origin, "init", "--quiet")
    for number in ("one", "two"):
        (origin / "Makefile").write_text(f"server:\n\t@echo {number} is started\n")
        git(origin, "add", "Makefile")
        git(origin, "commit", "--quiet", "-m", number)
        if number == "one":
            git(tmp_path, "clone", "--quiet", str(origin), "clone")
    assert run(block(OPERATOR, UPGRADE), tmp_path / "clone").splitlines()[-1] == "two is started"
    assert run(block(OPERATOR, ROLLBACK), tmp_path / "clone").splitlines()[-1] == "one is started"
    assert "one is" in version()


def test_a_host_is_permitted(copy: Path) -> None:
    environ = started(copy, block(OPERATOR, MCP), **BOTH_DOORS).environ_at_start()
    assert "mcp.example.com" in environ["NO_PROXY"].split(",")


@NEEDS_HAPROXY
def test_a_balancer(copy: Path, bare: Gateway, certificate: ssl.SSLContext) -> None:
    """As written, but for the addresses: both gateways are one and the same here."""
    port, here = free_port(), f"127.0.0.1:{bare.port}"
    text = block(OPERATOR, BALANCER).replace("10.0.0.1:8321", here).replace("10.0.0.2:8321", here)
    text = text.replace("FRONT_BIND=:8443", f"FRONT_BIND=127.0.0.1:{port}").replace("haproxy -db", f"exec {HAPROXY} -db")
    assert text.count(here) == 2
    assert_serves(text, copy, f"https://127.0.0.1:{port}", certificate)


@NEEDS_HAPROXY
def test_a_front_beside_the_image(copy: Path, bare: Gateway, certificate: ssl.SSLContext) -> None:
    """The second container's command, with the folder that it mounts; the stand-in for the first is a gateway of this machine."""
    first, second = block(OPERATOR, FRONT_IMAGE).split("podman run ")[1:]
    assert re.search(r"-p 127\.0\.0\.1:8321:(\d+)", first)[1] == re.search(r"FRONT_BIND=:(\d+)", second)[1]
    assert "LLAMA_STACK_HOST=127.0.0.1" in first
    mounted, inside = re.search(r"-v (\S+):(\S+):ro", second).groups()
    command = (
        second[second.index("haproxy -db") :].replace(f"-f {inside}/", f"-f {mounted}/").replace("haproxy -db", f"{HAPROXY} -db")
    )
    port = free_port()
    settings = f"FRONT_BIND=127.0.0.1:{port} GATEWAY_A=127.0.0.1:{bare.port}"
    assert_serves(f"{settings} exec {command}", copy, f"http://127.0.0.1:{port}", certificate)


def assert_serves(command: str, folder: Path, url: str, trust: ssl.SSLContext) -> None:
    """A front that a command starts answers a call, some time after, and knows the vendors, though it finds none here."""
    environ = clean_environ(folder, **BOTH_DOORS)
    with subprocess.Popen(["sh", "-c", command], cwd=folder, env=environ, start_new_session=True) as haproxy:
        try:
            with caller(url, verify=trust) as client:
                said: list[str] = []

                def served() -> bool:
                    try:
                        said.append(client.post(CHAT, json=chat(MODELS[0]), headers=ALL_KEYS).text)
                    except httpx.TransportError as error:
                        said.append(repr(error))
                    return "stand-in for OpenAI" in said[-1]

                wait_for(served, 60, seen=lambda: said[-1])
                key = {"Authorization": f"Bearer {KEYS['openai']}"}
                assert "No connection to the vendor" in client.post("/openai/v1/responses", headers=key, json={}).text
        finally:
            os.killpg(haproxy.pid, signal.SIGKILL)


def test_docker_is_told_the_same_as_podman() -> None:
    """But for the format, of which docker has one."""
    as_docker = block(OPERATOR, IMAGE).replace("podman", "docker").replace(" --format docker", "")
    assert block(OPERATOR, DOCKER) == as_docker


@pytest.mark.parametrize(
    ("marker", "file"),
    [
        (SYSTEMD, "deploy/lls-openai.service"),
        (IMAGE, "deploy/Containerfile"),
        (APPLY, "deploy/kubernetes/kustomization.yaml"),
    ],
)
def test_what_is_typed_is_what_the_file_says_of_itself(marker: str, file: str) -> None:
    """The other tests of these files take the commands from there: test_systemd.py, test_image.py, test_kubernetes.py."""
    comments = [line.lstrip("# ") for line in (PROJECT / file).read_text().splitlines() if line.startswith("#")]
    shown = block(OPERATOR, marker).splitlines()
    assert [line for line in shown if line not in comments] == [], (
        f"{file} has other commands in its comment than deploy/README.md"
    )


def test_the_cluster_s_settings_can_be_rendered(copy: Path) -> None:
    """The lines of the block replace or join those that are there, and kustomize makes manifests of the outcome."""
    file = copy / "deploy/kubernetes/kustomization.yaml"
    config, shown = yaml.safe_load(file.read_text()), yaml.safe_load(block(OPERATOR, KUSTOMIZE))
    (settings,) = shown.pop("configMapGenerator")
    names = [each["name"] for each in config["configMapGenerator"]]
    config["configMapGenerator"][names.index(settings["name"])] = settings
    assert {each["name"] for each in shown["images"]} == {each["name"] for each in config["images"]}
    file.write_text(yaml.safe_dump(config | shown))
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed (Debian: kubernetes-client)")
    rendered = [*yaml.safe_load_all(run(block(OPERATOR, APPLY).partition("|")[0], copy))]
    (pod,) = [each["spec"]["template"]["spec"] for each in rendered if each["kind"] == "Deployment"]
    assert pod["containers"][0]["image"] == "registry.example.com/lls-openai:1"
    assert {each["name"] for each in pod["initContainers"]} == {"egress", "front"}
    assert any(each["kind"] == "Ingress" for each in rendered)
    (data,) = [each["data"] for each in rendered if each["metadata"]["name"].startswith(settings["name"])]
    assert [f"{name}={value}" for name, value in data.items()] == sorted(settings["literals"])


# --- docs/differences.md ---


def test_the_audio_arrives(gateway: Gateway, vendors: Vendors, copy: Path) -> None:
    program = f"{sys.executable} - <<'END'\n{block(DIFFERENCES, AUDIO)}\nEND\n"
    printed = run(program.replace("8321", str(gateway.port)), copy, OPENAI_API_KEY=KEYS["openai"])
    assert "This is a stand-in for OpenAI" in printed
    assert vendors.seen_with("UklGRg==")[-1].headers["openai-beta"] == "some-beta"


# --- tests/README.md ---


def test_the_suite_is_run_as_ci_runs_it() -> None:
    assert (PROJECT / ".ci/run").read_text().splitlines()[-1] == f"exec {block(SCEPTIC, SUITE).strip()}"


def test_one_test_can_be_run(copy: Path) -> None:
    assert re.search("[1-9] passed", run(block(SCEPTIC, ONE_TEST), copy))


def test_every_target_is_in_a_document() -> None:
    shown = subprocess.run(
        ["make", "help"], cwd=PROJECT, env=clean_environ(PROJECT), capture_output=True, text=True, check=True
    ).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[1] for line in shown.splitlines()] == targets, "give each target of the Makefile a ## comment, in order"
    named = {name for text in DOCUMENTS.values() for name in re.findall(r"`?make ([a-z]+)\b", text)}
    for target in set(targets) - {"help"}:
        assert target in named, f"make {target} is in no document: add it to the table of tools in {SCEPTIC}"


# --- tables ---


def rows(document: str, head: str) -> list[list[str]]:
    """The cells of every table of a document whose head begins with `head`."""
    found: list[list[str]] = []
    for table in re.findall(rf"^\| {re.escape(head)}.*\n\|[-:|]+\n((?:\|.*\n)+)", DOCUMENTS[document], re.MULTILINE):
        found += [[cell.strip() for cell in re.split(r"(?<!\S)\|(?!\S)", line)[1:-1]] for line in table.splitlines()]
    return found


def test_the_models_are_those_of_run_yaml() -> None:
    titles = {vendor.name: vendor.title for vendor in VENDORS.values()}
    names = {model["model_id"]: model["metadata"]["display_name"] for model in RUN_YAML["registered_resources"]["models"]}
    wanted = [[f"`{model}`", titles.get(vendor_of(model), vendor_of(model)), names[model]] for model in MODELS]
    assert rows(USER, "model |") == wanted, f"the table of models in {USER} and run.yaml differ: change the one that is wrong"


def test_a_key_goes_where_the_table_says() -> None:
    """As run.yaml says: each entry that a provider forwards goes to the host of its URL. The native one's is Gemini's too."""
    providers = {each["provider_id"]: each.get("config", {}) for each in RUN_YAML["providers"]["inference"]}
    goes = {
        entry: urlsplit(re.sub(r"^\$\{env\.\w+:=(.*)}$", r"\1", config["base_url"])).hostname
        for config in providers.values()
        for entry in config.get("forward_headers", {})
    }
    goes["gemini_api_key"] = goes["gemini_authorization"]
    shown = {entry.strip("`"): re.match("`(.*?)`", to)[1] for entry, _, to in rows(USER, "entry |")}
    assert shown == goes, f"the table of the header's entries in {USER} and run.yaml differ"
    sent = set(json.loads(next(iter(ALL_KEYS.values()))))
    assert set(shown) == sent, "the tests send other entries (ALL_KEYS): the stand-ins in tests/support/vendors lack a vendor"


# Read by HAProxy's configuration, and not for anybody to set: its own words, and what the start alone tells it.
INTERNAL = {"START", "START_WORKERS", "KEY_LIST", "BARE_KEY", "DEAD_CONNECTIONS"}


class Setting(NamedTuple):
    """A variable, where it is read, and its default there."""

    name: str
    file: str
    default: str


def read_by_the_start() -> list[Setting]:
    """What deploy/start checks, takes from run.yaml, and sets where it is not set, asked from itself."""
    program = """if True:
        import json, sys
        sys.path.insert(0, "deploy/start")
        import environment, run_yaml, settings
        defaults = run_yaml.read().defaults
        collector = settings.Settings({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector"}, defaults)
        telemetry = environment.telemetry(collector)
        del telemetry["OTEL_EXPORTER_OTLP_ENDPOINT"], telemetry["OTEL_LOGS_EXPORTER"]
        names = [*settings.CHECKS, *settings.OF_THE_CLIENT, *(name.upper() for name in environment.PROXIES)]
        print(json.dumps(dict.fromkeys(names, "") | defaults | telemetry))
    """
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    # Plain HTTP is closed whatever it says.
    return [Setting(name, "deploy/start", value) for name, value in json.loads(done.stdout).items() if name not in NO_SETTING]


NO_SETTING = {"HTTP_PROXY", "no_proxy"}


def read_by_haproxy() -> list[Setting]:
    found = []
    for file in sorted((PROJECT / "deploy/haproxy").glob("*.cfg")):
        for name, default in re.findall(r"\$\{([A-Z_]+)(?:\[\*\])?(?:-([^}]*))?}", file.read_text()):
            found.append(Setting(name, str(file.relative_to(PROJECT)), "" if default.startswith("@") else default))
        for name, default in re.findall(r"^    setenv ([A-Z_]+) (\S+)$", file.read_text(), re.MULTILINE):
            found.append(Setting(name, str(file.relative_to(PROJECT)), default))
    return [setting for setting in found if setting.name not in INTERNAL]


def settings() -> list[Setting]:
    """All that can be set, with the client's. The start's word on a default goes before HAProxy's."""
    main, start = (PROJECT / "main.py").read_text(), read_by_the_start()
    names = [*re.findall(r"environ\.get\([\"'](\w+)", main), *re.findall(r'"([A-Z]+_API_KEY)"', main)]
    certificates = re.findall(r'"(SSL_CERT_\w+)"', (PROJECT / "deploy/start/environment.py").read_text())
    named = {each.name for each in start}
    haproxys = [each for each in read_by_haproxy() if each.name not in named or each.default]
    return [
        *haproxys,
        *start,
        *(Setting(name, "main.py", "") for name in names if name not in named),
        *(Setting(name, "deploy/start/environment.py", "") for name in certificates),
    ]


def test_every_setting_is_in_one_table_once() -> None:
    shown = Counter(
        name for document in DOCUMENTS for row in rows(document, "variable |") for name in re.findall(r"`(\w+)`", row[0])
    )
    for setting in settings():
        assert setting.name in shown, (
            f"{setting.file} reads {setting.name}, and no document says so: "
            f"add a row to a table of settings in {USER} or {OPERATOR}"
        )
    named = {setting.name for setting in settings()}
    for name, count in shown.items():
        assert name in named, f"a table of settings has {name}, and nothing reads it: take the row away"
        assert count == 1, f"{name} is in {count} tables of settings: leave it in one"


def test_a_setting_has_the_default_that_the_table_says() -> None:
    defaults = {setting.name: setting.default for setting in settings() if setting.default}
    # The first of both is one more than the other; the second is the start's own.
    defaults |= {"EGRESS_PORT": "LLAMA_STACK_PORT", "LLAMA_STACK_LOG_FORMAT": "json"}
    # These stand in the configuration where what is set is known not to be empty, or where a list must not be.
    for name in ("EGRESS_BIND", "EGRESS_NAMESERVER", "LLAMA_STACK_HOSTS"):
        defaults.pop(name, None)
    for document in DOCUMENTS:
        for names, default, _ in rows(document, "variable |"):
            name, *_ = re.findall(r"`(\w+)`", names)
            said = [*re.findall(r"`([^`]+)`", default), ""][0]
            assert said == defaults.get(name, ""), (
                f"{document} says that {name} is {said!r} by default; it is {defaults.get(name)!r}"
            )


def test_the_log_s_reasons_are_explained() -> None:
    """Those that deploy/start/log.py has are in the table of 500s, and what the table quotes is in the files."""
    program = """if True:
        import json, sys
        sys.path.insert(0, "deploy/start")
        import log
        print(json.dumps([*(reason for _, reason in log.REASONS), *log.KINDS.values()]))
    """
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    table = " ".join(cell for row in rows(OPERATOR, "callers see |") for cell in row)
    for reason in json.loads(done.stdout):
        assert reason in table, f"add “{reason}”, which the log may say, to the table “500: look where?” in {OPERATOR}"
    files = [*(PROJECT / "deploy/start").glob("*.py"), *(PROJECT / "deploy/haproxy").glob("*.cfg")]
    text = "".join(file.read_text() for file in files)
    for _, said, _ in rows(OPERATOR, "callers see |"):
        for words in re.findall(r"`([^`]+)`", said):
            words = words.removeprefix("A call failed: ")
            if not re.match(r"(door|to): ", words):
                assert words in text, f"nothing in deploy/start or deploy/haproxy says “{words}”, which {OPERATOR} quotes"


# --- links ---


def prose(text: str) -> str:
    """A document without its blocks and what tools have written into it."""
    return re.sub(r"^```.*?^```$|<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What the headings of a document can be called by, as GitHub does it."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(DOCUMENTS[document]) + DOCUMENTS[document]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = PROJECT / document if not path else (PROJECT / document).parent / path
        assert target.exists(), f"{document} links to {link}, and there is no such file"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{document} links to {link}, and there is no such heading"


def test_the_documents_name_files_that_are_there() -> None:
    for document, text in DOCUMENTS.items():
        for path in re.findall(r"`((?:deploy|tests)/[\w./-]+)`", text):
            assert (PROJECT / path).exists(), f"{document} names {path}, which is not there"


def test_each_says_first_whom_it_is_for() -> None:
    for text in DOCUMENTS.values():
        assert "This page is for the person who " in " ".join(text[: text.index("\n## ")].split())


def test_nothing_is_left_to_do() -> None:
    assert [line for text in DOCUMENTS.values() for line in text.splitlines() if "TODO" in line] == []


def test_the_port_is_the_same_everywhere() -> None:
    """run.yaml has it. What else names it cannot read it there."""
    port = re.search(r"env\.LLAMA_STACK_PORT:=(\d+)", (PROJECT / "run.yaml").read_text())[1]
    named = re.compile(
        r"(?:127\.0\.0\.1|localhost|host\.docker\.internal):|PORT[\"')]*\)? or |PORT:-|EXPOSE |LLAMA_STACK_PORT=|containerPort: "
    )
    for name in (USER, PROGRAMS, DIFFERENCES, "main.py", "Makefile", "deploy/Containerfile", "deploy/kubernetes/deployment.yaml"):
        text = (PROJECT / name).read_text()
        others = {found for found in re.findall(rf"(?:{named.pattern})(\d+)", text) if found != port}
        assert not others, (
            f"run.yaml has port {port} by default, and {name} says {', '.join(sorted(others))}: change it there too"
        )
