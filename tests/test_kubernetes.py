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

COMPONENTS = "components: [egress, front, ingress]\n"
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


def render(folder: Path, changes: str = "", settings: str = "", run_yaml: str = "") -> Manifests:
    """The manifests of a copy of the project whose kustomization, settings and run.yaml have got these lines more.

    The command is the one that the kustomization names.
    """
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed (Debian: kubernetes-client)")
    kustomization = PROJECT / "deploy/kubernetes/kustomization.yaml"
    command = kustomization.read_text().splitlines()[0].removeprefix("# ").split(" | ")[0].split()
    if "--load-restrictor" not in run("kubectl", "kustomize", "--help"):
        pytest.skip("this kubectl is older than 1.21, and its kustomize cannot read run.yaml from two folders up")
    shutil.copytree(PROJECT / "deploy", folder / "deploy")
    (folder / "run.yaml").write_text((PROJECT / "run.yaml").read_text() + run_yaml)
    (folder / "deploy/kubernetes/kustomization.yaml").write_text(f"{kustomization.read_text().rstrip()}\n{settings}{changes}")
    return parse(run(*command[:-1], str(folder / command[-1])))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """The manifests as they are."""
    return render(tmp_path_factory.mktemp("plain") / "project")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """The manifests with all components, for callers who come by a name of their own."""
    return render(tmp_path_factory.mktemp("whole") / "project", COMPONENTS, "  - LLAMA_STACK_HOSTS=llm.example.com\n")


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
    for name, container in whole.containers.items():
        confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == confined, name
        assert all(mount["readOnly"] for mount in container["volumeMounts"]), name
        assert container["resources"]["limits"]["memory"], name
    pod = whole.pod
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {kind for volume in pod["volumes"] for kind in volume} == {"name", "configMap"}


def test_every_object_means_the_same_pods(whole: Manifests) -> None:
    deployment = whole.of("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = {
        "Deployment": deployment["spec"]["selector"]["matchLabels"],
        "Service": whole.of("Service")["spec"]["selector"],
        "PodDisruptionBudget": whole.of("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        "NetworkPolicy": whole.of("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        "the spread over nodes": whole.pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    }
    assert {name: each for name, each in selectors.items() if each != labels} == {}
    target = whole.of("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"], "each apply would undo the autoscaler's number"
    (path,) = whole.of("Ingress")["spec"]["rules"][0]["http"]["paths"]
    port = path["backend"]["service"]["port"]["name"]
    assert path["backend"]["service"]["name"] == whole.of("Service")["metadata"]["name"]
    assert port in [each["name"] for each in whole.of("Service")["spec"]["ports"]]


def target_port(manifests: Manifests) -> int:
    """The port of a pod to which the Service leads."""
    (port,) = manifests.of("Service")["spec"]["ports"]
    named = {each["name"]: each["containerPort"] for each in manifests.containers["gateway"]["ports"]}
    return named.get(port["targetPort"], port["targetPort"])


def test_a_pod_is_reached_at_one_port_and_reaches_names_and_https(manifests: Manifests) -> None:
    """What is in neither list is refused, because both directions are named. A rule without ports would mean all of them."""
    policy = manifests.of("NetworkPolicy")["spec"]
    named = {each["name"]: each["containerPort"] for each in manifests.containers["gateway"]["ports"]}

    def let_through(rules: list[dict]) -> list[tuple[str, int]]:
        ports = [port for rule in rules for port in rule.get("ports", [{"port": "all"}])]
        return sorted((each.get("protocol", "TCP"), named.get(each["port"], each["port"])) for each in ports)

    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert let_through(policy["ingress"]) == [("TCP", target_port(manifests))]
    assert let_through(policy["egress"]) == [("TCP", 53), ("TCP", 443), ("UDP", 53)]
    assert manifests.of("Service")["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_probes_have_patience(plain: Manifests) -> None:
    """Two minutes for a boot, which takes 10 s where the vendors are not reached, and one for a gateway that is busy."""
    startup, readiness, liveness = (plain.containers["gateway"][probe] for probe in PROBES)
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


def test_a_changed_run_yaml_replaces_the_pods(plain: Manifests, tmp_path: Path) -> None:
    """The ConfigMap's name changes with what is in it."""
    changed = render(tmp_path / "project", run_yaml="# more\n")
    volumes = [{each["name"]: each["configMap"]["name"] for each in manifests.pod["volumes"]} for manifests in (plain, changed)]
    assert volumes[0]["run"] != volumes[1]["run"]
    texts = {name: text for _, name, text in plain.mounts("gateway")}
    assert texts == {"run.yaml": (PROJECT / "run.yaml").read_text()}


def test_settings_reach_the_gateway(whole: Manifests) -> None:
    (source,) = whole.containers["gateway"]["envFrom"]
    assert whole.data(source["configMapRef"]["name"])["LLAMA_STACK_HOSTS"] == "llm.example.com"


# --- a pod, run as processes ---


class Pod:
    """The containers of a pod as processes of this machine, with free ports instead of those of the manifests. A context manager.

    `port` is where the Service leads.
    """

    def __init__(self, manifests: Manifests, folder: Path, vendors: Vendors, names: NameServer) -> None:
        text, self.ports = manifests.text, {}
        for number in ("8320", "8321", "8322"):
            self.ports[number] = free_port()
            text = text.replace(number, f"<{number}>")
        for number, port in self.ports.items():
            text = text.replace(f"<{number}>", str(port))
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
        found: dict[str, str] = {}
        for each in container.get("envFrom", []):
            found |= self.manifests.data(each["configMapRef"]["name"])
        named: dict[str, str] = {}
        for each in container.get("env", []):
            of = each.get("valueFrom", {})
            if "configMapKeyRef" in of:
                value = self.manifests.data(of["configMapKeyRef"]["name"]).get(of["configMapKeyRef"]["key"])
                assert value or of["configMapKeyRef"].get("optional"), f"Kubernetes would not start {name}: {each['name']}"
            else:
                value = "a-namespace" if "fieldRef" in of else each["value"]
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
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        return httpx.get(f"http://{POD}:{ports.get(asked['port'], asked['port'])}{asked['path']}", trust_env=False, timeout=30)

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
        wait_for(lambda: pod.probe("gateway", "readinessProbe").is_success, 30)
        yield pod


@pytest.mark.parametrize(
    ("container", "probe"), [*(("gateway", probe) for probe in PROBES), ("front", "startupProbe"), ("front", "livenessProbe")]
)
def test_a_probe_is_answered(pod: Pod, container: str, probe: str) -> None:
    """Without a token, which a probe does not have, and by the pod's address."""
    answer = pod.probe(container, probe)
    assert answer.is_success, answer.text


def test_a_probe_asks_what_the_gateway_answers_without_a_front(plain: Manifests, gateway: Gateway) -> None:
    container = plain.containers["gateway"]
    for probe in PROBES:
        asked = container[probe]["httpGet"]
        assert asked["port"] in [port["name"] for port in container["ports"]]
        assert httpx.get(f"{gateway.url}{asked['path']}", trust_env=False, timeout=30).is_success
        assert asked["path"] == Gateway.health, "this path is open with tokens, and no other is"


@pytest.mark.parametrize("model", MODELS)
def test_a_call_to_the_service_goes_through_both_doors(pod: Pod, model: str) -> None:
    title = {vendor.name: vendor.title for vendor in VENDORS.values()}[vendor_of(model)]
    assert f"stand-in for {title}" in pod.call(CHAT, headers=ALL_KEYS, json=chat(model)).text
    # The egress door logs only what failed.
    failing = pod.call(CHAT, headers=ALL_KEYS, json=chat(f"{vendor_of(model)}/status-500"))
    assert failing.status_code == 500
    wait_for(lambda: f"vendor-{vendor_of(model)}" in [line["to"] for line in pod.log("egress")], seen=lambda: pod.log("egress"))
    wait_for(
        lambda: ("gateways", 500) in [(line["to"], line["status"]) for line in pod.log("front")], seen=lambda: pod.log("front")
    )


def test_a_native_path_and_the_page_are_there(pod: Pod) -> None:
    key = {"Authorization": f"Bearer {KEYS['openai']}"}
    assert "stand-in for OpenAI" in pod.call("/openai/v1/chat/completions", headers=key, json=chat("gpt-4o")).text
    assert pod.call("/").headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("lls-openai:8321", 200),
        ("lls-openai.a-namespace", 200),
        ("lls-openai.a-namespace.svc", 200),
        ("lls-openai.a-namespace.svc.cluster.local:8321", 200),
        ("llm.example.com", 200),
        ("rebound.example", 421),
    ],
)
def test_the_front_knows_the_services_names(pod: Pod, host: str, status: int) -> None:
    assert pod.call("/v1/health", host).status_code == status


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
