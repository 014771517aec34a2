"""The container file and the Kubernetes manifests are well formed and agree, and the image's parts work without an engine."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from world.calls import ALL_KEYS, MODELS, RUN_YAML, chat
from world.gateway import PROJECT, Gateway, free_port
from world.vendors import Vendors

DEPLOY = PROJECT / "deploy"
MANIFESTS = sorted(file for file in (DEPLOY / "kubernetes").glob("*.yaml") if file.stem != "kustomization")
RENDER = ["kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", "deploy/kubernetes"]


def run(*command: str) -> str:
    """Run a checker in the project's folder and return what it prints. Its complaints fail the test."""
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def containerfile() -> list[list[tuple[str, str]]]:
    """The Containerfile's instructions as (word, rest), a list for each stage."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: list[list[tuple[str, str]]] = []
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stages.append([])
        stages[-1].append((word, rest))
    return stages


def values(stage: list[tuple[str, str]], word: str) -> list[str]:
    """What a stage says after each `word`."""
    return [rest for each, rest in stage if each == word]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifests as `kubectl kustomize` puts them together."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed (Debian: kubernetes-client)")
    if "--load-restrictor" not in run("kubectl", "kustomize", "--help"):
        pytest.skip("this kubectl is older than 1.21, and its kustomize cannot read run.yaml from two folders up")
    file = tmp_path_factory.mktemp("kubernetes") / "all.yaml"
    file.write_text(run(*RENDER))
    return file


@pytest.fixture(scope="module")
def objects() -> dict[str, dict]:
    """The manifests by kind, before kustomize."""
    return {each["kind"]: each for file in MANIFESTS for each in yaml.safe_load_all(file.read_text())}


def test_hadolint_has_no_complaint() -> None:
    run("hadolint", "deploy/Containerfile")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda file: file.name)
def test_every_manifest_is_valid(manifest: Path) -> None:
    run("kubernetes-validate", "--strict", str(manifest))


def pod_that_carries(file: Path, manifests: Path) -> tuple[dict, list[dict]]:
    """The pods in rendered manifests that are valid and mount a ConfigMap of `file` as it is, and all of the objects."""
    run("kubernetes-validate", "--strict", str(manifests))
    kinds = list(yaml.safe_load_all(manifests.read_text()))
    config = next(each for each in kinds if file.name in each.get("data", {}))
    assert config["data"][file.name] == file.read_text()
    pod = next(each for each in kinds if each["kind"] == "Deployment")["spec"]["template"]["spec"]
    assert config["metadata"]["name"] in [volume.get("configMap", {}).get("name") for volume in pod["volumes"]]
    return pod, kinds


def test_what_kustomize_renders_is_valid_and_carries_this_run_yaml(rendered: Path) -> None:
    pod, kinds = pod_that_carries(PROJECT / "run.yaml", rendered)
    assert pod["containers"][0]["envFrom"][0]["configMapRef"]["name"] in [each["metadata"]["name"] for each in kinds]


def test_the_egress_proxy_is_a_component(rendered: Path, tmp_path: Path) -> None:
    """With it, the pods' gateways reach the vendors as `make server EGRESS=1` does, through the same configuration."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copy(PROJECT / "run.yaml", tmp_path)
    with (tmp_path / "deploy/kubernetes/kustomization.yaml").open("a") as file:
        file.write("components:\n- egress\n")
    everything = tmp_path / "all.yaml"
    everything.write_text(run(*RENDER[:-1], str(tmp_path / RENDER[-1])))
    pod, _ = pod_that_carries(DEPLOY / "egress/haproxy.cfg", everything)
    script = (DEPLOY / "egress/serve.sh").read_text().replace("$through", "http://127.0.0.1:8322")
    for setting in pod["containers"][0]["env"]:
        assert f'{setting["name"]}="${{{setting["name"]}:-{setting["value"]}}}"' in script


def test_every_object_means_the_same_pods(objects: dict[str, dict]) -> None:
    pods = objects["Deployment"]["spec"]
    labels = pods["template"]["metadata"]["labels"]
    assert pods["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]


def test_pods_and_image_agree(objects: dict[str, dict]) -> None:
    """User, port, the path of run.yaml and the one writable folder are written in both."""
    stage = containerfile()[-1]
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert values(stage, "USER") == [f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"]
    port = container["ports"][0]["containerPort"]
    assert values(stage, "EXPOSE") == [str(port)]
    assert f":{port}/" in values(stage, "HEALTHCHECK")[0]
    assert RUN_YAML["server"]["port"] == f"${{env.LLAMA_STACK_PORT:={port}}}"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["run"] == values(stage, "WORKDIR")[0] + "/run.yaml"
    assert f"SQLITE_STORE_DIR={mounts['tmp']}/lls-openai " in values(stage, "ENV")[0]
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_a_pod_is_given_the_time_that_streams_take(objects: dict[str, dict]) -> None:
    """The stock provider waits 600 s for a vendor, after the seconds in which the Service learns that the pod leaves."""
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    before = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + 600
    assert objects["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


# --- the image, without a container engine ---


# What the base image brings, made of this machine's parts: its libraries, its CA certificates, and the Python of these
# tests where the image has its own. ldconfig because that Python's library is at home elsewhere.
BASE_IMAGE = """
base_image() {
  mkdir "$1"
  mount -t tmpfs -o mode=755 tmpfs "$1"
  mkdir -p "$1/usr" "$1/dev" "$1/proc" "$1/tmp" "$1/etc/ssl/certs"
  ln -s usr/bin usr/sbin usr/lib "$1"
  if [ -e /usr/lib64 ]; then ln -s usr/lib64 "$1"; fi
  mount --bind -o ro /usr "$1/usr"
  mount --bind -o ro "$PYTHON" "$1/usr/local"
  mount --bind -o ro /etc/ssl/certs "$1/etc/ssl/certs"
  mount --rbind /dev "$1/dev"
  mount -t proc proc "$1/proc"
  echo /usr/local/lib > "$1/etc/ld.so.conf"
  ldconfig -r "$1"
}
"""


def as_shell(roots: Path, uv: str, podman_run: dict[str, str]) -> str:
    """The Containerfile as a shell script: each stage in a scratch root, then the image's command.

    It differs from a builder in three things: uv is this machine's and offline, the base image is `BASE_IMAGE`, and what
    `podman run -e` would set comes from `podman_run`.
    """
    lines = [BASE_IMAGE]
    for number, stage in enumerate(containerfile()):
        root, workdir, environ = roots / str(number), "/", "PATH=/usr/local/bin:/usr/bin:/bin"
        lines.append(f"base_image {root}")
        for word, rest in stage:
            if word == "WORKDIR":
                workdir = rest
                lines.append(f"mkdir -p {root}{workdir}")
            elif word == "COPY":
                *sources, target = rest.split()
                if sources[0].startswith("--from="):
                    lines.append(f"cp -a {roots / '0'}{sources[1]} {root}{workdir}/{target}")
                else:
                    lines.append(f"mkdir -p {root}{workdir}/{target}")
                    lines.append(f"cp {shlex.join(sources)} {root}{workdir}/{target}")
            elif word == "ENV":
                environ = f"{environ} {rest.replace('$PATH', '/usr/local/bin:/usr/bin:/bin')}"
            elif word == "RUN" and not rest.startswith("pip install"):
                lines.append(f"mkdir {root}/uv {root}/cache")
                lines.append(f"mount --bind {Path(uv).parent} {root}/uv")
                lines.append(f'mount --bind "$UV_CACHE" {root}/cache')
                offline = "UV_OFFLINE=1 UV_CACHE_DIR=/cache UV_LINK_MODE=copy"
                lines.append(f"chroot {root} env -i -C {workdir} {environ}:/uv {offline} sh -c {shlex.quote(rest)}")
    lines.append(f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp")
    lines.append(f'cp "$SSL_CERT_FILE" {root}/etc/stand-ins.pem')
    lines.append(f"mount -o remount,ro,bind {root}")
    lines.append(f"umount {roots / '0'}/uv {roots / '0'}/cache")
    settings = shlex.join(f"{name}={value}" for name, value in podman_run.items())
    user, command = values(stage, "USER")[0], shlex.join(json.loads(values(stage, "CMD")[0]))
    lines.append(f"exec chroot --userspec={user} {root} env -i -C {workdir} {environ} {settings} {command}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def image(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway as the image's own commands install and start it, in a scratch root."""
    uv = os.environ.get("UV")
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("making a scratch root takes root and unshare")
    if not uv or not (Path(sys.base_prefix) / "bin/python3").exists() or sys.base_prefix == "/usr":
        pytest.skip("takes uv run, and a Python that can stand where the image has its own")
    folder = tmp_path_factory.mktemp("image")
    port = str(free_port())
    podman_run = vendors.environ() | {"LLAMA_STACK_PORT": port, "SSL_CERT_FILE": "/etc/stand-ins.pem"}
    script = as_shell(folder, uv, podman_run)
    isolated = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private")
    cache = run(uv, "cache", "dir").strip()
    settings = vendors.environ() | {"LLAMA_STACK_PORT": port, "PYTHON": sys.base_prefix, "UV_CACHE": cache}
    gateway = Gateway(folder / "home", command=(*isolated, "sh", "-euc", script), **settings)
    try:
        gateway.start()
    except RuntimeError as error:
        if "connectivity is disabled" in str(error):
            pytest.skip("uv's cache has lost packages that this project is installed from")
        raise
    yield gateway
    gateway.stop()


@pytest.fixture
def contained(image: Gateway) -> Path:
    """The /proc folder of the process that is number 1 in the scratch root."""
    pid = image.process.pid
    return Path("/proc", Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_the_image_answers(image: Gateway) -> None:
    for model in MODELS:
        call = httpx.post(f"{image.url}/v1/chat/completions", headers=ALL_KEYS, json=chat(model), trust_env=False, timeout=30)
        assert call.json()["choices"][0]["finish_reason"] == "stop"


def test_the_image_runs_as_nobody_in_particular(contained: Path) -> None:
    status = dict(line.split(":\t") for line in (contained / "status").read_text().splitlines() if ":\t" in line)
    assert set(status["Uid"].split() + status["Gid"].split()) == {"10001"}
    assert int(status["CapEff"], 16) == 0


def test_the_image_writes_to_its_tmpfs_alone(contained: Path) -> None:
    mounts = [line.split() for line in (contained / "mountinfo").read_text().splitlines()]
    root = next(mount for mount in reversed(mounts) if mount[4] == "/")
    assert "ro" in root[5].split(",")
    written = {file.name for file in (contained / "root/tmp/lls-openai").iterdir()}
    assert written <= {"keeps-nothing.db", "keeps-nothing.db-shm", "keeps-nothing.db-wal", "files"}


def test_the_image_holds_what_it_runs_and_no_more(contained: Path) -> None:
    app = contained / "root/app"
    assert {entry.name for entry in app.iterdir()} == {".venv", "run.yaml", "deploy"}
    assert {entry.name for entry in (app / "deploy").iterdir()} == {"serve.sh", "keeps-nothing.sql"}
    assert not {"uv", "pip", "ruff", "pytest"} & {tool.name for tool in (app / ".venv/bin").iterdir()}


def test_the_image_stops_when_asked(image: Gateway, contained: Path) -> None:
    """As process 1 it gets no default handling of SIGTERM: it has to have its own."""
    os.kill(int(contained.name), signal.SIGTERM)
    assert image.process.wait(20) in (0, 143)
