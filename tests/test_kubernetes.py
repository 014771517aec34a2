"""What the Kubernetes manifests promise, read from the manifests as kustomize puts them together. No cluster has run them."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from support.gateway import PROJECT, Gateway
from support.haproxy import CONFIGURATION
from support.haproxy import SIDECAR as FILES
from support.image import environ, stages, values
from support.vendors import VENDORS, Vendors

DEPLOY = PROJECT / "deploy"
MANIFESTS = sorted(file for file in (DEPLOY / "kubernetes").glob("*.yaml") if file.stem != "kustomization")
SIDECAR = yaml.safe_load((DEPLOY / "kubernetes/egress/sidecar.yaml").read_text())["spec"]["template"]["spec"]
OBJECTS = {each["kind"]: each for file in MANIFESTS for each in yaml.safe_load_all(file.read_text())}
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(GATEWAY,) = POD["containers"]
(PROXY,) = SIDECAR["initContainers"]
PROBES = ["startupProbe", "readinessProbe", "livenessProbe"]


def run(*command: str) -> str:
    """Run a checker in the project's folder and return what it prints. Its complaints fail the test."""
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def at(thing: Any, path: str) -> Any:
    """What is at a path such as spec.rules.0.host, or None."""
    for step in filter(None, path.split(".")):
        thing = thing[int(step)] if isinstance(thing, list) else (thing or {}).get(step)
    return thing


# --- what a pod may do ---

# A container that cannot become root, has no capability, and can change nothing of its image. With what is said of the pod,
# this is more than the Pod Security Standard `restricted` asks for. Nothing may be added to it, `privileged` least of all.
CONFINED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}

# What is promised, of which object, where it is written, and as what.
PROMISES = {
    "no process is root, and all are under the engine's filter of system calls": (
        POD,
        "securityContext",
        {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
    ),
    "the gateway is confined": (GATEWAY, "securityContext", CONFINED),
    "the egress proxy is confined": (PROXY, "securityContext", CONFINED),
    "a pod has no token for the cluster's API": (POD, "automountServiceAccountToken", False),
    "a pod has a network of its own": (POD, "hostNetwork", None),
    "a pod sees no process of its node": (POD, "hostPID", None),
    "a pod shares no memory with its node": (POD, "hostIPC", None),
    "no other Service's address becomes a setting": (POD, "enableServiceLinks", False),
    "what is written is in memory, and ends with the pod": (
        {volume["name"]: volume for volume in POD["volumes"]},
        "tmp.emptyDir",
        {"medium": "Memory", "sizeLimit": "64Mi"},
    ),
    "a pod is ready before the one that it replaces leaves": (
        OBJECTS["Deployment"],
        "spec.strategy.rollingUpdate",
        {"maxSurge": 1, "maxUnavailable": 0},
    ),
    "the autoscaler's number of pods is not undone": (OBJECTS["Deployment"], "spec.replicas", None),
    "one node can be lost": (OBJECTS["HorizontalPodAutoscaler"], "spec.minReplicas", 2),
    "pods spread over the nodes": (POD, "topologySpreadConstraints.0.topologyKey", "kubernetes.io/hostname"),
    "nodes are emptied one pod at a time": (OBJECTS["PodDisruptionBudget"], "spec.maxUnavailable", 1),
    "the egress proxy starts first and ends last": (PROXY, "restartPolicy", "Always"),
    "the gateway's memory has a limit": (GATEWAY, "resources.limits.memory", "768Mi"),
    "the egress proxy's memory has a limit": (PROXY, "resources.limits.memory", "256Mi"),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise: str) -> None:
    thing, path, value = PROMISES[promise]
    assert at(thing, path) == value


def test_a_pod_mounts_nothing_but_its_settings_and_its_tmp() -> None:
    """No folder of the node, and nothing that can be written to but /tmp."""
    for volume in POD["volumes"] + SIDECAR["volumes"]:
        assert set(volume) - {"name"} <= {"configMap", "emptyDir"}
    mounts = [mount for container in (GATEWAY, PROXY) for mount in container["volumeMounts"]]
    assert [mount["mountPath"] for mount in mounts if not mount.get("readOnly")] == ["/tmp"]


# --- who reaches whom ---


def let_through(rules: list[dict]) -> list[tuple[str, str | int]]:
    """The protocols and ports of a NetworkPolicy's rules. A rule without ports means all of them."""
    return sorted((port.get("protocol", "TCP"), port.get("port", "all")) for rule in rules for port in rule.get("ports", [{}]))


def test_a_pod_is_reached_at_its_port_and_reaches_names_and_https() -> None:
    """What is in neither list is refused, because both directions are named."""
    policy = OBJECTS["NetworkPolicy"]["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert let_through(policy["ingress"]) == [("TCP", "http")]
    assert let_through(policy["egress"]) == [("TCP", 53), ("TCP", 443), ("UDP", 53)]


def test_a_call_to_the_service_arrives_at_the_gateway() -> None:
    (port,) = OBJECTS["Service"]["spec"]["ports"]
    ports = {each["name"]: each["containerPort"] for each in GATEWAY["ports"]}
    assert ports[port["targetPort"]] == port["port"] == int(environ()["LLAMA_STACK_PORT"])
    assert OBJECTS["Service"]["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_every_object_means_the_same_pods() -> None:
    deployment = OBJECTS["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] == labels
    target = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"]}


def test_a_front_that_ends_tls_is_not_answered_with_plain_http(vendors: Vendors, tmp_path: Path) -> None:
    """Where its address is in FORWARDED_ALLOW_IPS. A redirect to http:// would be followed with the keys."""
    says = re.search(r"\((FORWARDED_ALLOW_IPS)=[\d./]+\)", (DEPLOY / "kubernetes/kustomization.yaml").read_text())
    assert says
    with Gateway(tmp_path, **{says[1]: "127.0.0.0/8"}, **vendors.environ()) as gateway:
        call = httpx.post(
            f"{gateway.url}/v1/chat/completions/", headers={"X-Forwarded-Proto": "https"}, trust_env=False, timeout=30
        )
    assert call.headers["location"].startswith("https://")


# --- how a pod starts, lives and ends ---


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_asks_what_the_gateway_answers(gateway: Gateway, probe: str) -> None:
    """Without a token, which a probe does not have."""
    asked = GATEWAY[probe]["httpGet"]
    assert asked["port"] in [port["name"] for port in GATEWAY["ports"]]
    assert httpx.get(f"{gateway.url}{asked['path']}", trust_env=False, timeout=30).is_success
    assert asked["path"] == Gateway.health


def test_probes_have_patience() -> None:
    """Two minutes for a boot, which takes 10 s where the vendors are not reached, and one for a gateway that is busy."""
    startup, readiness, liveness = (GATEWAY[probe] for probe in PROBES)
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 120
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60
    assert min(readiness["timeoutSeconds"], liveness["timeoutSeconds"]) >= 5
    assert readiness["periodSeconds"] <= 5


def test_a_pod_is_given_the_time_that_streams_take() -> None:
    """The stock provider waits 600 s for a vendor, after the seconds in which the Service learns that the pod leaves."""
    command, before = GATEWAY["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert int(before) >= 5
    assert POD["terminationGracePeriodSeconds"] > int(before) + 600


def test_a_worker_has_the_core_that_it_can_use() -> None:
    """One each: the settings ask for one worker, and more would share it."""
    settings = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())["configMapGenerator"][1]["literals"]
    assert f"LLAMA_STACK_WORKERS={GATEWAY['resources']['limits']['cpu']}" in settings


def test_pods_and_image_agree() -> None:
    """User, port, the path of run.yaml and the one writable folder are written in both."""
    stage = stages()[-1]
    assert values(stage, "USER") == [f"{POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}"]
    assert GATEWAY["ports"][0]["containerPort"] == int(environ()["LLAMA_STACK_PORT"])
    mounts = {mount["name"]: mount["mountPath"] for mount in GATEWAY["volumeMounts"]}
    assert mounts["run"] == values(stage, "WORKDIR")[0] + "/run.yaml"
    assert environ()["SQLITE_STORE_DIR"].startswith(f"{mounts['tmp']}/")


# --- the manifests as kustomize puts them together ---


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda file: file.name)
def test_every_manifest_is_valid(manifest: Path) -> None:
    run("kubernetes-validate", "--strict", str(manifest))


def render(folder: Path, changes: str = "", run_yaml: str = "") -> dict[str, dict]:
    """All objects by kind and name, from a copy of the project whose kustomization and run.yaml have got these lines more."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed (Debian: kubernetes-client)")
    command = (DEPLOY / "kubernetes/kustomization.yaml").read_text().splitlines()[0].removeprefix("# ").split(" | ")[0].split()
    if "--load-restrictor" not in run("kubectl", "kustomize", "--help"):
        pytest.skip("this kubectl is older than 1.21, and its kustomize cannot read run.yaml from two folders up")
    shutil.copytree(DEPLOY, folder / "deploy")
    (folder / "run.yaml").write_text((PROJECT / "run.yaml").read_text() + run_yaml)
    with (folder / "deploy/kubernetes/kustomization.yaml").open("a") as file:
        file.write(changes)
    rendered = folder / "all.yaml"
    rendered.write_text(run(*command[:-1], str(folder / command[-1])))
    run("kubernetes-validate", "--strict", str(rendered))
    return {f"{each['kind']} {each['metadata']['name']}": each for each in yaml.safe_load_all(rendered.read_text())}


def mounted(objects: dict[str, dict], container: dict, name: str) -> tuple[str, str]:
    """The name and the text of the file `name` in the ConfigMap that a container mounts."""
    pod = objects["Deployment lls-openai"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume.get("configMap", {}).get("name") for volume in pod["volumes"]}
    names = [volumes[mount["name"]] for mount in container["volumeMounts"]]
    (found,) = [each for each in names if each and name in objects[f"ConfigMap {each}"]["data"]]
    return found, objects[f"ConfigMap {found}"]["data"][name]


def test_pods_get_this_run_yaml_and_the_settings_and_a_change_of_it_replaces_them(tmp_path: Path) -> None:
    objects = render(tmp_path / "a")
    kinds = ["Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"]
    assert {f"{kind} lls-openai" for kind in kinds} == {name for name in objects if not name.startswith("ConfigMap ")}
    (gateway,) = objects["Deployment lls-openai"]["spec"]["template"]["spec"]["containers"]
    assert mounted(objects, gateway, "run.yaml")[1] == (PROJECT / "run.yaml").read_text()
    (settings,) = gateway["envFrom"]
    assert f"ConfigMap {settings['configMapRef']['name']}" in objects
    changed = render(tmp_path / "b", run_yaml="# more\n")
    (later,) = changed["Deployment lls-openai"]["spec"]["template"]["spec"]["containers"]
    assert mounted(changed, later, "run.yaml")[0] != mounted(objects, gateway, "run.yaml")[0]


def test_the_egress_proxy_is_a_component(tmp_path: Path) -> None:
    """With it, each vendor is reached through the proxy, at the URL that run.yaml has for it."""
    objects = render(tmp_path, changes="components:\n- egress\n")
    pod = objects["Deployment lls-openai"]["spec"]["template"]["spec"]
    (gateway,), (proxy,) = pod["containers"], pod["initContainers"]
    for name in FILES:
        assert mounted(objects, proxy, f"{name}.cfg")[1] == (CONFIGURATION / f"{name}.cfg").read_text()
    folder = proxy["volumeMounts"][0]["mountPath"]
    assert proxy["command"] == ["haproxy", "-db", *(word for name in FILES for word in ("-f", f"{folder}/{name}.cfg"))]
    assert gateway["securityContext"] == CONFINED
    assert leads_to({each["name"]: each["value"] for each in gateway["env"]}) == vendors_of_run_yaml()


def vendors_of_run_yaml() -> dict[str, str]:
    """The vendors' URLs by the settings that replace them."""
    found = dict(re.findall(r"\$\{env\.(\w+_PASSTHROUGH_URL):=([^}]+)\}", (PROJECT / "run.yaml").read_text()))
    assert {urlsplit(url).hostname for url in found.values()} == set(VENDORS)
    return found


def leads_to(settings: dict[str, str]) -> dict[str, str]:
    """Where the proxy takes the calls for each URL among a gateway's settings, by what its configuration says."""
    vendors = (CONFIGURATION / "vendors.cfg").read_text()
    hosts = dict(
        re.findall(r"^backend vendor-(\w+) .*\n(?:.*\n)*?    http-request set-header Host (\S+)$", vendors, flags=re.MULTILINE)
    )
    port = re.search(r'bind "127\.0\.0\.1:\$\{EGRESS_PORT-(\d+)\}"', (CONFIGURATION / "egress.cfg").read_text())
    found = {}
    for name, value in settings.items():
        url = urlsplit(value)
        assert port
        assert (url.scheme, url.netloc) == ("http", f"127.0.0.1:{port[1]}")
        _, vendor, *path = url.path.split("/")
        found[name] = "/".join([f"https://{hosts[vendor]}", *path])
    return found


def test_the_egress_proxy_needs_no_setting() -> None:
    """The sidecar gives it none: what it starts without is in test_front_hosts_and_limits.py."""
    assert "env" not in PROXY
