"""The Kubernetes manifests as kustomize puts them together: what a pod may do, and a pod run as processes. No cluster has run them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import pytest
import yaml
from support.calls import ALL_KEYS, CHAT, MODELS, chat, vendor_of
from support.gateway import HAPROXY, PROJECT, Gateway, clean_environ, free_port, listening, wait_for
from support.image import environ, lay_out, stages, values
from support.network import NameServer
from support.vendors import KEYS, VENDORS, Vendors

# Stands for a pod's address: what listens on 127.0.0.1 alone is not reached there.
POD = "127.0.0.2"

WHOLE = "  - LLAMA_STACK_HOSTS=llm.example.com\ncomponents: [egress, front, ingress]\n"
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


class Manifests(NamedTuple):
    """What kustomize makes: all objects by kind and name, and their text."""

    objects: dict[str, dict]
    text: str

    def of(self, kind: str) -> dict:
        """The one object of a kind that is not a ConfigMap."""
        return self.objects[f"{kind} lls-openai"]

    @property
    def pod(self) -> dict:
        return self.of("Deployment")["spec"]["template"]["spec"]

    @property
    def containers(self) -> dict[str, dict]:
        """All containers of a pod by name, in the order in which they start."""
        return {each["name"]: each for each in self.pod.get("initContainers", []) + self.pod["containers"]}

    def data(self, config_map: str) -> dict[str, str]:
        return self.objects[f"ConfigMap {config_map}"]["data"]

    def mounts(self, container: str) -> Iterator[tuple[str, str, str]]:
        """The path, the name and the text of each file that a container mounts from a ConfigMap."""
        config_maps = {volume["name"]: volume["configMap"]["name"] for volume in self.pod["volumes"]}
        for mount in self.containers[container]["volumeMounts"]:
            for name, text in self.data(config_maps[mount["name"]]).items():
                if mount.get("subPath", name) == name:
                    path = mount["mountPath"]
                    yield (path if "subPath" in mount else f"{path}/{name}"), name, text


def run(*command: str) -> str:
    """Run a checker in the project's folder and return what it prints. Its complaints fail the test."""
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def parse(text: str) -> Manifests:
    objects = {f"{each['kind']} {each['metadata']['name']}": each for each in yaml.safe_load_all(text)}
    return Manifests(objects, text)


def render(folder: Path, changes: str = "") -> Manifests:
    """The manifests of a copy of the project whose kustomization has got these lines more. The command is the one that it names."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed (Debian: kubernetes-client)")
    if "--load-restrictor" not in run("kubectl", "kustomize", "--help"):
        pytest.skip("this kubectl is older than 1.21, and its kustomize cannot read run.yaml from two folders up")
    shutil.copytree(PROJECT / "deploy", folder / "deploy")
    shutil.copy(PROJECT / "run.yaml", folder)
    kustomization = folder / "deploy/kubernetes/kustomization.yaml"
    lines = kustomization.read_text()
    kustomization.write_text(f"{lines.rstrip()}\n{changes}")
    command = lines.splitlines()[0].removeprefix("# ").split(" | ")[0].split()
    return parse(run(*command[:-1], str(folder / command[-1])))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """The manifests as they are."""
    return render(tmp_path_factory.mktemp("plain") / "project")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """The manifests with all components, for callers who come by a name of their own."""
    return render(tmp_path_factory.mktemp("whole") / "project", WHOLE)


@pytest.fixture(params=["plain", "whole"])
def manifests(request: pytest.FixtureRequest) -> Manifests:
    """Both."""
    return request.getfixturevalue(request.param)


# --- what they say ---


def test_they_are_valid(manifests: Manifests, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(manifests.text)
    run(str(Path(sys.executable).with_name("kubernetes-validate")), "--strict", str(tmp_path / "all.yaml"))


def test_a_pod_can_change_nothing_and_become_nothing(whole: Manifests) -> None:
    """More than the Pod Security Standard `restricted` asks for: nothing of the node, no token, nothing that can be written to."""
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    for name, container in whole.containers.items():
        assert container["securityContext"] == confined, name
        assert all(mount["readOnly"] for mount in container["volumeMounts"]), name
        assert container["resources"]["limits"]["memory"], name
    context = whole.pod["securityContext"]
    assert context.pop("runAsUser") == context.pop("runAsGroup") > 0
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert whole.pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(whole.pod)
    assert {kind for volume in whole.pod["volumes"] for kind in volume} == {"name", "configMap"}


def test_every_object_means_the_same_pods(whole: Manifests) -> None:
    deployment, service = whole.of("Deployment"), whole.of("Service")
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        whole.of("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        whole.of("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        whole.pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    assert selectors == [deployment["spec"]["template"]["metadata"]["labels"]] * 5
    target = whole.of("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"], "each apply would undo the autoscaler's number"
    (path,) = whole.of("Ingress")["spec"]["rules"][0]["http"]["paths"]
    (port,) = service["spec"]["ports"]
    assert path["backend"]["service"] == {"name": service["metadata"]["name"], "port": {"name": port["name"]}}


def port_of(container: dict, port: str | int) -> int:
    """The number of a port, which may be the name of one of a container's."""
    return {each["name"]: each["containerPort"] for each in container["ports"]}.get(port, port)


def target_port(manifests: Manifests) -> int:
    """The port of a pod to which the Service leads."""
    (port,) = manifests.of("Service")["spec"]["ports"]
    return port_of(manifests.containers["gateway"], port["targetPort"])


def test_a_pod_is_reached_at_one_port_and_reaches_names_and_https(manifests: Manifests) -> None:
    """What is in neither list is refused, because both directions are named. A rule without ports would mean all of them."""
    policy = manifests.of("NetworkPolicy")["spec"]
    gateway = manifests.containers["gateway"]

    def let_through(rules: list[dict]) -> list[tuple[str, int]]:
        ports = [port for rule in rules for port in rule.get("ports", [{"port": "all"}])]
        return sorted((each.get("protocol", "TCP"), port_of(gateway, each["port"])) for each in ports)

    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert let_through(policy["ingress"]) == [("TCP", target_port(manifests))]
    assert let_through(policy["egress"]) == [("TCP", 53), ("TCP", 443), ("UDP", 53)]
    assert manifests.of("Service")["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_probes_ask_what_a_gateway_answers_and_have_patience(plain: Manifests) -> None:
    """Two minutes for a boot, which takes 10 s where the vendors are not reached, and one for a gateway that is busy."""
    container = plain.containers["gateway"]
    startup, readiness, liveness = (container[probe] for probe in PROBES)
    for probe in (startup, readiness, liveness):
        assert probe["httpGet"]["path"] == Gateway.health, "this path is open with tokens, and no other is"
        assert port_of(container, probe["httpGet"]["port"]) == target_port(plain)
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 120
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60
    assert min(readiness["timeoutSeconds"], liveness["timeoutSeconds"]) >= 5


def test_a_pod_is_given_the_time_that_streams_take(whole: Manifests) -> None:
    """The stock provider waits 600 s for a vendor, after the seconds in which the Service learns that the pod leaves."""
    command, before = whole.containers["gateway"]["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert int(before) >= 5
    assert whole.pod["terminationGracePeriodSeconds"] > int(before) + 600
    for name in ("egress", "front"):
        assert whole.containers[name]["restartPolicy"] == "Always", f"{name} has to outlive the gateway's last stream"


def test_run_yaml_and_settings_reach_the_gateway_and_replace_the_pods(plain: Manifests, whole: Manifests) -> None:
    """The name of a ConfigMap changes with what is in it, and with it the pods."""
    assert {name: text for _, name, text in plain.mounts("gateway")} == {"run.yaml": (PROJECT / "run.yaml").read_text()}
    assert re.fullmatch(r"lls-openai-run-\w{10}", plain.pod["volumes"][0]["configMap"]["name"])
    before, after = (each.containers["gateway"]["envFrom"][0]["configMapRef"]["name"] for each in (plain, whole))
    assert before != after
    assert whole.data(after)["LLAMA_STACK_HOSTS"] == "llm.example.com"


# --- a pod, run as processes ---


class Pod:
    """The containers of a pod as processes of this machine, with free ports instead of those of the manifests. A context manager.

    `port` is where the Service leads.
    """

    def __init__(self, manifests: Manifests, folder: Path, vendors: Vendors, names: NameServer) -> None:
        self.ports = {number: free_port() for number in ("8320", "8321", "8322")}
        text = re.sub("832[012]", lambda found: str(self.ports[found[0]]), manifests.text)
        self.manifests, self.folder = parse(text), folder
        self.port = target_port(self.manifests)
        self.of_stand_ins = vendors.environ() | {
            "EGRESS_NAMESERVER": f"127.0.0.1:{names.port}",
            "EGRESS_CA": str(vendors.ca_file),
            "EGRESS_VENDOR_PORT": str(vendors.tls_port),
        }

    def environ(self, name: str) -> dict[str, str]:
        """The variables of a container as Kubernetes would set them."""
        container = self.manifests.containers[name]
        found, named = {}, {}
        for each in container.get("envFrom", []):
            found |= self.manifests.data(each["configMapRef"]["name"])
        for each in container.get("env", []):
            source = each.get("valueFrom", {})
            if key := source.get("configMapKeyRef"):
                value = self.manifests.data(key["name"]).get(key["key"])
                assert value or key.get("optional"), f"Kubernetes would not start {name}: {each['name']}"
            else:
                value = "a-namespace" if "fieldRef" in source else each["value"]
            if value is not None:
                named[each["name"]] = re.sub(r"\$\((\w+)\)", lambda found: named.get(found[1], found[0]), value)
        return found | named

    def sidecar(self, name: str) -> subprocess.Popen:
        """Start HAProxy as a container does: with the files that it mounts, in the folder that it names."""
        for path, _, text in self.manifests.mounts(name):
            file = self.folder / name / path[1:]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        container = self.manifests.containers[name]
        environ = clean_environ(self.folder, **self.environ(name), **self.of_stand_ins)
        cwd = self.folder / name / container["workingDir"][1:]
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen([HAPROXY, *container["command"][1:]], cwd=cwd, env=environ, stdout=log, stderr=log)

    def log(self, name: str) -> list[dict]:
        """The calls that a sidecar has logged."""
        return [json.loads(line) for line in (self.folder / f"{name}.log").read_text().splitlines() if line.startswith("{")]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for name in ("egress", "front"):
                process = self.sidecar(name)
                stack.callback(process.wait)
                stack.callback(process.kill)
            of_image = {name: value for name, value in environ().items() if name in ("FRONT", "EGRESS", "LLAMA_STACK_HOST")}
            port = {"LLAMA_STACK_PORT": str(self.ports[environ()["LLAMA_STACK_PORT"]])}
            settings = of_image | self.environ("gateway") | port | self.of_stand_ins
            (command,) = values(stages()[-1], "CMD")
            app = lay_out(self.folder / "app")
            stack.enter_context(Gateway(self.folder / "home", tuple(json.loads(command)), app, **settings))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def probe(self, name: str, probe: str) -> httpx.Response:
        """What a probe of a container is answered."""
        container = self.manifests.containers[name]
        asked = container[probe]["httpGet"]
        url = f"http://{POD}:{port_of(container, asked['port'])}{asked['path']}"
        return httpx.get(url, trust_env=False, timeout=30)

    def call(self, path: str, host: str = "lls-openai", **more: Any) -> httpx.Response:
        """A call to the Service by one of its names."""
        headers = {"Host": host} | more.pop("headers", {})
        with httpx.Client(base_url=f"http://{POD}:{self.port}", trust_env=False, timeout=60) as client:
            return client.request("POST" if "json" in more else "GET", path, headers=headers, **more)


@pytest.fixture(scope="module")
def pod(whole: Manifests, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """A pod with all components, and its gateway found well by the front."""
    if not HAPROXY:
        pytest.skip("HAProxy is not installed (Debian: apt-get install haproxy)")
    with NameServer() as names, Pod(whole, tmp_path_factory.mktemp("pod"), vendors, names) as pod:
        wait_for(lambda: pod.probe("gateway", PROBES[1]).is_success, 30, seen=lambda: pod.log("front")[-3:])
        yield pod


def test_probes_are_answered(pod: Pod) -> None:
    """Without a token, which a probe does not have, and by the pod's address."""
    containers = pod.manifests.containers.items()
    answers = [pod.probe(name, probe) for name, container in containers for probe in PROBES if probe in container]
    assert [answer.status_code for answer in answers] == [200] * 5, "three of the gateway's and two of the front's"


@pytest.mark.parametrize(("vendor", "title"), sorted({(each.name, each.title) for each in VENDORS.values()}))
def test_a_call_to_the_service_goes_through_both_doors(pod: Pod, vendor: str, title: str) -> None:
    for model in filter(lambda model: vendor_of(model) == vendor, MODELS):
        assert f"stand-in for {title}" in pod.call(CHAT, headers=ALL_KEYS, json=chat(model)).text
    # The egress door logs only what failed.
    assert pod.call(CHAT, headers=ALL_KEYS, json=chat(f"{vendor}/status-500")).status_code == 500
    wanted = {"egress": f"vendor-{vendor}", "front": "gateways"}

    def logged() -> bool:
        return all(any(line["to"] == to and line["status"] == 500 for line in pod.log(door)) for door, to in wanted.items())

    wait_for(logged, 10, seen=lambda: [pod.log(door)[-3:] for door in wanted])


def test_the_front_has_its_native_paths_its_page_and_the_services_names(pod: Pod) -> None:
    key = {"Authorization": f"Bearer {KEYS['openai']}"}
    assert "stand-in for OpenAI" in pod.call("/openai/v1/chat/completions", headers=key, json=chat("gpt-4o")).text
    assert pod.call("/").headers["content-type"].startswith("text/html")
    hosts = [f"lls-openai{more}" for more in (":8321", ".a-namespace", ".a-namespace.svc", ".a-namespace.svc.cluster.local:8321")]
    hosts += ["llm.example.com", "rebound.example"]
    assert [pod.call(Gateway.health, host).status_code for host in hosts] == [200] * 5 + [421]


def test_nobody_comes_past_the_front(pod: Pod) -> None:
    for number in ("8321", "8322"):
        assert listening(pod.ports[number]) == ["127.0.0.1"]


def test_pods_and_image_agree(plain: Manifests) -> None:
    """User, port and the path of run.yaml are written in both."""
    stage, context = stages()[-1], plain.pod["securityContext"]
    assert values(stage, "USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    assert target_port(plain) == int(environ()["LLAMA_STACK_PORT"])
    assert [path for path, *_ in plain.mounts("gateway")] == [f"{values(stage, 'WORKDIR')[0]}/run.yaml"]
    assert os.path.dirname(environ()["SQLITE_STORE_DIR"]) == "/dev/shm", "the one place that can be written to"
