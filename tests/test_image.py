"""The container image: what its file says, done without an engine. `make image` has podman build and run it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.calls import ALL_KEYS, CHAT, MODELS, chat, events
from support.gateway import PROJECT, Gateway, free_port, wait_for
from support.image import commands, copied, environ, handed, lay_out, matches, stages, values
from support.vendors import Vendors

# Some machines do not let podman set limits as high as it would by itself.
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")


def podman(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run podman in the project's folder. Its complaints fail the test, unless `check` is false."""
    done = subprocess.run(["podman", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


# --- what the file says ---


def test_hadolint_has_no_complaint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "deploy/Containerfile"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_its_files_and_variables_are_enough_for_a_gateway(tmp_path: Path, vendors: Vendors) -> None:
    """They are all that the start has here, with no HAProxy's configuration. On 127.0.0.1 alone, no engine would reach it."""
    folder, image = lay_out(tmp_path / "app"), environ()
    port = image.pop("LLAMA_STACK_PORT")
    assert values(stages()[-1], "EXPOSE") == [port]
    assert f"127.0.0.1:{port}:{port}" in commands()[1]
    store = image.pop("SQLITE_STORE_DIR")
    image = {name: value for name, value in image.items() if name not in ("PATH", "HOME", "TMPDIR")}
    (command,) = values(stages()[-1], "CMD")
    with tempfile.TemporaryDirectory(dir=Path(store).parent) as folder_of_store:
        settings = image | {"SQLITE_STORE_DIR": folder_of_store} | vendors.environ()
        with Gateway(tmp_path, tuple(json.loads(command)), folder, **settings) as gateway:
            call = {"headers": ALL_KEYS, "json": chat(MODELS[0]), "trust_env": False, "timeout": 60}
            answer = httpx.post(f"http://127.0.0.2:{gateway.port}{CHAT}", **call)
            assert answer.is_success, answer.text
            assert [file.name for file in Path(folder_of_store).iterdir() if file.is_file()] == ["keeps-nothing.db"]


def test_the_builder_is_handed_what_it_installs_from_and_nothing_else() -> None:
    """What is in a layer of the image is read by everyone who pulls it."""
    for file in ("pyproject.toml", "uv.lock"):
        assert matches(file, handed()), f"add !{file} to deploy/Containerfile.dockerignore"
    assert "*" in (PROJECT / "deploy/Containerfile.dockerignore").read_text().splitlines(), "all that is not named is handed over"
    for file in (".env", ".git", "deploy/tls.key", "deploy/kubernetes/deployment.yaml", "tests/conftest.py"):
        assert not matches(file, handed()), file


# --- the image itself ---


@pytest.fixture(scope="module")
def engine() -> None:
    """Skip where podman cannot run the base image, with its reason."""
    if not shutil.which("podman"):
        pytest.skip("podman is not installed")
    base = values(stages()[-1], "FROM")[0]
    if podman("image", "exists", base, check=False).returncode and (pull := podman("pull", base, check=False)).returncode:
        pytest.skip(f"podman cannot pull {base}: {pull.stderr[-500:]}")
    if (tried := podman("run", "--rm", "--network", "host", *LIMITS, base, "true", check=False)).returncode:
        pytest.skip(f"podman cannot run {base}: {tried.stderr[-500:]}")


@pytest.fixture(scope="module")
def built(engine: None) -> dict:
    """The image, built by the command that the Containerfile names: what podman tells of it, and the seconds that it took."""
    began = time.monotonic()
    build = commands()[0]
    podman(*build[1:-1], "--no-cache", build[-1])
    seconds = time.monotonic() - began
    (image,) = json.loads(podman("image", "inspect", "lls-openai").stdout)
    (base,) = json.loads(podman("image", "inspect", values(stages()[-1], "FROM")[0]).stdout)
    size, ours = image["Size"] / 1e6, (image["Size"] - base["Size"]) / 1e6
    print(f"\nThe image was built in {seconds:.0f} s. It has {size:.0f} MB, {ours:.0f} MB of them on top of its base.")
    return image | {"ours": ours}


@contextlib.contextmanager
def container(name: str, folder: Path, vendors: Vendors) -> Iterator[Gateway]:
    """The gateway, run by the command that the Containerfile names, in the host's network because the stand-ins are there.

    Without --read-only-tmpfs=false, podman would let /run, /tmp and /var/tmp be written to, which docker does not.
    """
    name, port = f"lls-openai-{name}-{os.getpid()}", str(free_port())
    _, _, *options, image = commands()[1]
    options = options[: options.index("-p")]
    given = {"LLAMA_STACK_PORT": port, "HTTPS_PROXY": vendors.environ()["HTTPS_PROXY"], "SSL_CERT_FILE": "/etc/stand-ins.pem"}
    command = [
        *("podman", "run", "--rm", "--name", name, *options, *LIMITS, "--network", "host", "--read-only-tmpfs=false"),
        *("--volume", f"{vendors.ca_file}:/etc/stand-ins.pem:ro,z"),
        *(word for setting in given.items() for word in ("--env", "=".join(setting))),
        image,
    ]
    podmans = {key: value for key, value in os.environ.items() if key.startswith(("CONTAINERS_", "XDG_", "DBUS_", "HOME"))}
    gateway = Gateway(folder, tuple(command), LLAMA_STACK_PORT=port, **podmans)
    gateway.name = name
    try:
        yield gateway.start(120)
    finally:
        podman("rm", "--force", "--time", "0", name, check=False)


@pytest.fixture(scope="module")
def image(built: dict, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A container that is up."""
    began = time.monotonic()
    with container("shared", tmp_path_factory.mktemp("image"), vendors) as gateway:
        print(f"It was up after {time.monotonic() - began:.0f} s.")
        yield gateway


def inside(image: Gateway, *command: str, check: bool = True) -> str:
    """What a command prints in the container."""
    return podman("exec", image.name, *command, check=check).stdout


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_it_answers(image: Gateway, model: str) -> None:
    """Chats and the Responses API. 127.0.0.2 is where a server on 127.0.0.1 alone is not reached."""
    with httpx.Client(base_url=f"http://127.0.0.2:{image.port}", headers=ALL_KEYS, trust_env=False, timeout=60) as client:
        call = client.post("/v1/chat/completions", json=chat(model))
        assert call.json()["choices"][0]["finish_reason"] == "stop"
        stream = client.post("/v1/chat/completions", json=chat(model, stream=True))
        assert events(stream)[-1]["choices"][0]["finish_reason"] == "stop"
        response = client.post("/v1/responses", json={"model": model, "input": "Hello"})
        assert response.json()["status"] == "completed"


@pytest.mark.slow
def test_it_runs_as_uid_10001_without_capabilities(image: Gateway) -> None:
    status = dict(line.split(":\t") for line in inside(image, "cat", "/proc/1/status").splitlines() if ":\t" in line)
    assert set(status["Uid"].split() + status["Gid"].split()) == {"10001"}
    assert int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"


@pytest.mark.slow
def test_it_writes_to_memory_alone(image: Gateway) -> None:
    """A few KB, in a folder that is closed to others."""
    prune = ["-path", "/proc", "-prune", "-o", "-path", "/sys", "-prune", "-o"]
    writable = inside(image, "find", "/", *prune, "-writable", "-type", "d", "-print", check=False).split()
    # Some engines mount a file system of message queues as well, which is memory too.
    assert {"/".join(folder.split("/")[:3]) for folder in writable} - {"/dev/mqueue"} == {"/dev/shm"}, writable
    assert inside(image, "ls", "/dev/shm").split() == ["lls-openai"]
    assert inside(image, "stat", "-c", "%a", "/dev/shm/lls-openai").strip() == "700"
    files = inside(image, "find", "/dev/shm/lls-openai", "-type", "f").split()
    assert {Path(file).name.removesuffix("-wal").removesuffix("-shm") for file in files} == {"keeps-nothing.db"}
    assert int(inside(image, "du", "-sk", "/dev/shm").split()[0]) < 1024


@pytest.mark.slow
def test_as_the_first_process_it_reaps_what_others_leave(image: Gateway) -> None:
    """A health check that is cut short, say. What nobody reaps stays in the list of processes for ever."""
    for seconds in ("0.5", "1.5"):
        inside(image, "sh", "-c", f"sleep {seconds} & exit 0")

    def left() -> list[str]:
        names = inside(image, "sh", "-c", "grep -h ^Name: /proc/[0-9]*/status", check=False).split()[1::2]
        return [name for name in names if name == "sleep"]

    wait_for(lambda: not left(), 20, seen=left)


@pytest.mark.slow
def test_it_holds_what_it_runs_and_no_more(built: dict, image: Gateway) -> None:
    added = podman("diff", "lls-openai", values(stages()[-1], "FROM")[0]).stdout.splitlines()
    assert {line.split("/")[1] for line in added} == {"app"}
    ours = set(inside(image, "find", "/app", "-type", "f", "-not", "-path", "/app/.venv/*").split())
    assert ours == {f"/app/{file.relative_to(PROJECT)}" for each in copied(stages()[-1]) for file in PROJECT.glob(each)}
    assert not inside(image, "sh", "-c", "for tool in cc gcc uv git; do command -v $tool; done", check=False)
    export = [os.environ.get("UV", "uv"), "export", "--quiet", "--frozen", "--no-hashes", "--no-emit-project"]
    needed = subprocess.run(export, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    folders = inside(image, "sh", "-c", "ls -d /app/.venv/lib/python*/site-packages/*.dist-info").split()
    names = {folder.rpartition("/")[2].split("-")[0].lower().replace("_", "-").replace(".", "-") for folder in folders}
    assert "llama-stack" in names
    assert names <= set(re.findall(r"^([\w.-]+)==", needed, flags=re.MULTILINE))
    assert built["ours"] < 250


@pytest.mark.slow
def test_its_health_is_checked(built: dict, image: Gateway) -> None:
    """It is well while the server answers, and not when nothing answers."""
    podman("healthcheck", "run", image.name)
    check = built["HealthCheck" if "HealthCheck" in built else "Healthcheck"]["Test"][1:]
    elsewhere = podman("exec", "--env", f"LLAMA_STACK_PORT={free_port()}", image.name, *check, check=False)
    assert "Connection refused" in elsewhere.stderr


@pytest.mark.slow
def test_it_lets_a_stream_finish_when_it_is_stopped(built: dict, vendors: Vendors, tmp_path: Path) -> None:
    """One that takes longer than the 10 s after which podman would kill it by itself."""
    call = {"headers": ALL_KEYS, "json": chat("openai/every-1", stream=True), "timeout": 60, "trust_env": False}
    with container("stopped", tmp_path, vendors) as gateway, httpx.stream("POST", f"{gateway.url}{CHAT}", **call) as stream:
        lines = stream.iter_lines()
        next(lines)
        began = time.monotonic()
        stop = subprocess.Popen(["podman", "stop", gateway.name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        rest = list(lines)
        assert any(re.search(r'"finish_reason": ?"stop"', line) for line in rest), f"the stream was cut after {len(rest)} lines"
        assert time.monotonic() - began > 10
        assert stop.wait(60) == 0
        assert gateway.process.wait(60) == 0
