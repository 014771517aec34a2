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
import llama_stack
import pytest
import trustme
import yaml
from support.calls import ALL_KEYS, EMBEDDINGS, MODELS, RUN_YAML, chat, vendor_of
from support.gateway import HAPROXY, PROJECT, Gateway, clean_environ, eventually, free_port
from support.services import ISSUER, Services
from support.vendors import KEY_VARIABLES, KEYS, VENDORS, Vendors

USER, OPERATOR, SCEPTIC = "README.md", "deploy/README.md", "tests/README.md"
DIFFERENCES, PROGRAMS = "docs/differences.md", "docs/programs.md"
DOCUMENTS = {name: (PROJECT / name).read_text() for name in (USER, OPERATOR, SCEPTIC, DIFFERENCES, PROGRAMS)}
SHELLS = [shell for shell in ("sh", "bash", "zsh") if shutil.which(shell)]
PACKAGES = Path(llama_stack.__file__).parent.parent


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


def test_every_block_is_proven_somewhere() -> None:
    """Those of README.md are run all at once, those of docs/programs.md by `make programs`. The others are named by a test below."""
    assert all(text.count("```") == 2 * sum(block.document == name for block in BLOCKS) for name, text in DOCUMENTS.items())
    assert {block.language for block in BLOCKS if block.document == USER} == {"sh", "yaml", "python", "text"}
    others = [block.text for block in BLOCKS if block.document not in (USER, PROGRAMS)]
    assert [sum(marker in text for marker in ELSEWHERE) for text in others] == [1] * len(others)
    assert len(others) == len(ELSEWHERE)


# What tells each block of the other documents from the rest.
TEAM, EGRESS, MCP, BALANCER = "AUTH_ISSUER=", "EGRESS=1", "NO_PROXY=", "balancer.cfg"
SYSTEMD, IMAGE, APPLY, KUSTOMIZE = "systemctl", "podman", "kubectl", "configMapGenerator"
SUITE, ONE_TEST, AUDIO = "make test\n", "pytest", "input_audio"
ELSEWHERE = (TEAM, EGRESS, MCP, BALANCER, SYSTEMD, IMAGE, APPLY, KUSTOMIZE, SUITE, ONE_TEST, AUDIO)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project as a new user has it, with no .env, but with this project's packages installed."""
    folder = tmp_path / "lls-openai"
    leave_out = shutil.ignore_patterns(".git", ".env", ".venv", ".uv", ".bench", "__pycache__", ".ruff_cache", "node_modules")
    shutil.copytree(PROJECT, folder, ignore=leave_out)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


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

    typed = [text.replace("8321", port) for text in blocks(USER, "sh")]
    start = typed.index("make server\n")
    for text in typed[:start]:
        # This suite is what `make test` runs.
        run("\n".join(line for line in text.splitlines() if not line.startswith("make test")), copy)
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
    """Every call of the page is made by the function, which a new terminal does not have."""
    for text in blocks(USER, "sh"):
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


def started(copy: Path, command: str, **settings: str) -> Gateway:
    """A gateway that a block starts."""
    return Gateway(copy.parent, ("sh", "-c", command), copy, **settings)


def test_a_team_s_server(copy: Path, vendors: Vendors, certificate: ssl.SSLContext) -> None:
    """As written, but for where the identity provider and the collector are."""
    with Services() as services:
        text = block(OPERATOR, TEAM).replace("https://id.example.com/jwks", f"{services.url}/jwks")
        text = text.replace("http://collector:4318", services.url)
        assert f"AUTH_ISSUER={ISSUER} " in text
        assert all(f"{name}=" in text for name in ("LLAMA_STACK_HOST", "LLAMA_STACK_WORKERS"))
        gateway = started(copy, text, OTEL_METRIC_EXPORT_INTERVAL="500", **vendors.environ())
        gateway.url, gateway.trust = gateway.url.replace("http:", "https:"), certificate
        with gateway, httpx.Client(base_url=gateway.url, verify=certificate, trust_env=False, timeout=60) as client:
            call = {"url": "/v1/chat/completions", "json": chat(MODELS[0])}
            assert client.post(**call, headers=ALL_KEYS).status_code == 401
            token = {"Authorization": f"Bearer {services.token()}"}
            assert client.post(**call, headers=ALL_KEYS | token).is_success
            assert eventually(services.metrics, 60)


def test_the_egress_proxy_is_demanded(copy: Path) -> None:
    if not HAPROXY:
        pytest.skip("HAProxy is not installed")
    nowhere = {"EGRESS_NAMESERVER": f"127.0.0.1:{free_port()}", "EGRESS_PORT": str(free_port())}
    with started(copy, block(OPERATOR, EGRESS), **nowhere) as gateway:
        assert f"through the egress proxy on port {nowhere['EGRESS_PORT']}" in gateway.log


def test_a_host_is_permitted(copy: Path, vendors: Vendors) -> None:
    with started(copy, block(OPERATOR, MCP), **vendors.environ()) as gateway:
        assert "mcp.example.com" in gateway.environ["NO_PROXY"].split(",")


def test_a_balancer(copy: Path, gateway: Gateway, certificate: ssl.SSLContext) -> None:
    """As written, but for the addresses: both gateways are one and the same here."""
    if not HAPROXY:
        pytest.skip("HAProxy is not installed")
    port, here = free_port(), f"127.0.0.1:{gateway.port}"
    text = block(OPERATOR, BALANCER).replace("10.0.0.1:8321", here).replace("10.0.0.2:8321", here)
    text = text.replace("HAPROXY_BIND=:8443", f"HAPROXY_BIND=127.0.0.1:{port}").replace(" haproxy ", f" {HAPROXY} -db ")
    assert text.count(here) == 2
    environ = clean_environ(copy)
    with subprocess.Popen(["sh", "-c", text], cwd=copy, env=environ, start_new_session=True) as haproxy:
        try:
            call = {"url": f"https://127.0.0.1:{port}/v1/chat/completions", "json": chat(MODELS[0]), "headers": ALL_KEYS}
            with httpx.Client(verify=certificate, trust_env=False, timeout=60) as client:
                said: list[str] = []

                def served() -> bool:
                    try:
                        said.append(client.post(**call).text)
                    except httpx.TransportError as error:
                        said.append(repr(error))
                    return "stand-in for OpenAI" in said[-1]

                assert eventually(served, 60), said[-1]
        finally:
            os.killpg(haproxy.pid, signal.SIGKILL)


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
    first = comments.index(block(OPERATOR, marker).splitlines()[0])
    assert comments[first:][: block(OPERATOR, marker).count("\n")] == block(OPERATOR, marker).splitlines()


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
    assert pod["initContainers"][0]["name"] == "egress"
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


def test_a_command_has_a_row_and_writes_what_it_says() -> None:
    shown = subprocess.run(
        ["make", "help"], cwd=PROJECT, env=clean_environ(PROJECT), capture_output=True, text=True, check=True
    ).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[1] for line in shown.splitlines()] == targets
    named = {name for text in DOCUMENTS.values() for name in re.findall(r"`?make ([a-z]+)\b", text)} & {*targets}
    assert named == {*targets}
    for path in re.findall(r"^\| `(\S+?)` \| ", DOCUMENTS[SCEPTIC], re.MULTILINE):
        if path.endswith(".py"):
            assert (PROJECT / "tests" / path).exists(), path


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
    assert rows(USER, "model |") == [[f"`{model}`", titles[vendor_of(model)], names[model]] for model in MODELS]


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
    assert shown == goes
    assert set(shown) == set(json.loads(next(iter(ALL_KEYS.values()))))
    assert set(goes.values()) == set(VENDORS)


# Read by the files, and not for anybody to set: a shell's own, and words between the scripts.
INTERNAL = {"PATH", "HOME", "CURDIR", "EGRESS_WAY", "DEAD_CONNECTIONS"}


def read() -> set[str]:
    """The variables that the files read."""
    text = {name: (PROJECT / name).read_text() for name in ("run.yaml", "main.py", "deploy/settings.sed")}
    names = {*re.findall(r"\$\{env\.(\w+)", text["run.yaml"])}
    names |= {*re.findall(r"environ\.get\([\"'](\w+)", text["main.py"]), *re.findall(r'"([A-Z]+_API_KEY)"', text["main.py"])}
    names |= {*re.findall(r"/\^?([A-Z_]{4,})=", text["deploy/settings.sed"])}
    for script in ("deploy/serve.sh", "deploy/egress/serve.sh"):
        names |= {*re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", (PROJECT / script).read_text())}
    for config in ("deploy/egress/haproxy.cfg", "deploy/balancer.cfg"):
        names |= {*re.findall(r"\$\{([A-Z_]+)", (PROJECT / config).read_text())}
    return names - INTERNAL


def test_every_setting_is_in_one_table_once() -> None:
    shown = Counter(
        name for document in DOCUMENTS for row in rows(document, "variable |") for name in re.findall(r"`(\w+)`", row[0])
    )
    assert [name for name, count in shown.items() if count > 1] == []
    assert set(shown) == read()


def test_a_setting_has_the_default_that_the_table_says() -> None:
    defaults = dict(re.findall(r"\$\{env\.(\w+):=([^}]+)}", (PROJECT / "run.yaml").read_text()))
    for config in ("deploy/egress/haproxy.cfg", "deploy/balancer.cfg"):
        defaults |= dict(re.findall(r"\$\{(?!EGRESS_CA)([A-Z_]+)-([^}]+)}", (PROJECT / config).read_text()))
    defaults |= dict(re.findall(r'(OTEL_\w+)="\$\{\w+:-([^}]+)}', (PROJECT / "deploy/serve.sh").read_text()))
    defaults |= {"EGRESS_PORT": "LLAMA_STACK_PORT", "LLAMA_STACK_LOG_FORMAT": "json"}  # The first and one more; serve.sh's own.
    for document in DOCUMENTS:
        for names, default, _ in rows(document, "variable |"):
            name, *_ = re.findall(r"`(\w+)`", names)
            assert [*re.findall(r"`([^`]+)`", default), ""][0] == defaults.get(name, ""), name


# --- figures, links, size ---

# Each figure of the documents' prose, with a file and what is in it: whoever changes one changes the other.
FIGURES = {
    "35 MB": ("Makefile", "$(call first,35)"),
    "70 MB": ("Makefile", "$(call first,70)"),
    "160 MB": ("Makefile", "$(call first,160)"),
    "17 MB": ("Makefile", "(17 MB)"),
    "5 minutes": ("Makefile", "about 5 minutes"),
    "40 ms": ("tests/tools/bench/results.md", "A vendor 40 ms away"),
    "600 s": ("deploy/kubernetes/deployment.yaml", "600 s that the stock provider gives a vendor"),
    "20 MB": ("deploy/balancer.cfg", "gt 20000000 }"),
    "3 MB": ("tests/exchanges/chat.yaml", "a chunk of 3 MB"),
    "1 MB": ("deploy/balancer.cfg", "For 1 MB of wrong messages"),
    "5 s": (PACKAGES / "uvicorn/config.py", "timeout_worker_healthcheck: int = 5"),
    "30 s": (PACKAGES / "jwt/jwks_client.py", "cooldown_duration: float = 30,"),
}


def prose(text: str) -> str:
    """A document without its blocks and what tools have written into it."""
    return re.sub(r"^```.*?^```$|<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_figure_has_a_source(document: str) -> None:
    figures = re.findall(
        r"(?<![\w.,:/-])(\d[\d.,]*) ?(ms|s|[KMG]B|minutes?|hours?|seconds|x|%)(?!\w)", prose(DOCUMENTS[document])
    )
    for number, unit in figures:
        file, words = FIGURES[f"{number} {unit}"]
        assert words in (PROJECT / file).read_text(), (number, unit)


def test_no_figure_is_left_over() -> None:
    everything = " ".join(map(prose, DOCUMENTS.values()))
    assert [figure for figure in FIGURES if figure not in everything] == []


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
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_documents_name_files_that_are_there() -> None:
    for document, text in DOCUMENTS.items():
        for path in re.findall(r"`((?:deploy|tests)/[\w./-]+)`", text):
            assert (PROJECT / path).exists(), (document, path)


def test_one_sitting_is_enough() -> None:
    assert len(DOCUMENTS[USER].splitlines()) <= 220


def test_each_says_first_whom_it_is_for() -> None:
    for text in DOCUMENTS.values():
        assert "This page is for the person who " in " ".join(text[: text.index("\n## ")].split())


def test_nothing_is_left_to_do() -> None:
    assert [line for text in DOCUMENTS.values() for line in text.splitlines() if "TODO" in line] == []
