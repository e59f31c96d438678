"""`proserve render kubernetes`: the shipped deployments as manifests, judged by Kubernetes' own
schemas, and by whether what refers to something refers to what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import kubernetes_validate
import pytest
import yaml
from fastapi import FastAPI
from fastapi.routing import APIRoute
from typer.testing import CliRunner

from orchestrator.command_line.config_reference import fields_of, models_in
from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.command_line.kubernetes.nodes import WAITING_METRIC
from orchestrator.command_line.kubernetes.objects import CONFIG_ANNOTATION, quantity, resources
from orchestrator.command_line.kubernetes.render import render, write
from orchestrator.command_line.main import app
from orchestrator.command_line.service import STOP_GRACE_S
from orchestrator.config import NodeConfig, NodeSettings
from orchestrator.core.errors import ConfigError
from orchestrator.metrics import NodeMetrics
from orchestrator.node_api import NodeService, create_node_app
from orchestrator.yaml_config import parse_yaml_model
from router.app import create_app
from router.config import RouterConfig, RouterSettings
from router.tokenizer import Tokenizer
from tests.tiny_tokenizer import write_tiny_tokenizer

ROOT = Path(__file__).parents[3]
DEPLOYMENTS = sorted((ROOT / "configs/deployments").glob("*.yaml"))
VERSIONS = ("1.33", "1.37")
"""The oldest with all that we use, which are images as volumes, and the newest that we know."""

Object = dict[str, Any]

GROUP = """\
model: tiny
node_groups:
  - name: chat
    num_nodes: 2
    first_port: 8101
    engine: {directory: here, device_kv_bytes: 64MiB}
"""


def deployment(text: str) -> DeploymentConfig:
    return parse_yaml_model(text.encode(), DeploymentConfig, path=Path("deployment.yaml"))


def objects_of(files: Mapping[str, str]) -> list[Object]:
    return [found for text in files.values() for found in yaml.safe_load_all(text)]


def rendered(text: str) -> list[Object]:
    return objects_of(render(deployment(text)))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


def one(objects: list[Object], kind: str, name: str) -> Object:
    [found] = [o for o in of_kind(objects, kind) if o["metadata"]["name"] == name]
    return found


def pods_of(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Yield the template of each controller and its container."""
    for found in of_kind(objects, "Deployment", "StatefulSet"):
        template = found["spec"]["template"]
        [container] = template["spec"]["containers"]
        yield template, container


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


@pytest.fixture(scope="module", params=DEPLOYMENTS, ids=lambda path: str(path.stem))
def objects(request: pytest.FixtureRequest) -> list[Object]:
    """What a shipped deployment becomes."""
    config = deployment(request.param.read_text())
    return objects_of(render(config.model_copy(update={"model": "named-here"})))


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_own_schemas_accept_every_object(objects: list[Object], version: str) -> None:
    judged = [o for o in objects if o["kind"] != "ServiceMonitor"]  # not one of Kubernetes' own
    for found in judged:
        kubernetes_validate.validate(found, version, strict=True)

    assert len(judged) >= 10


def test_the_validator_would_notice_a_mistake(objects: list[Object]) -> None:
    found = one(objects, "Deployment", "proserve-router")
    wrong = found | {"spec": found["spec"] | {"replica": 2}}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_selectors_match_the_pods_that_they_are_for(objects: list[Object]) -> None:
    templates = {o["metadata"]["name"]: o["spec"]["template"]["metadata"]["labels"]
                 for o in of_kind(objects, "Deployment", "StatefulSet")}  # fmt: skip
    for found in objects:
        name, spec = found["metadata"]["name"], found.get("spec", {})
        match found["kind"]:
            case "Service":
                selector = spec["selector"]
            case "NetworkPolicy":
                selector = spec["podSelector"]["matchLabels"]
            case "Deployment" | "StatefulSet" | "PodDisruptionBudget":
                selector = spec["selector"]["matchLabels"]
            case _:
                continue
        # Objects of one part have one name, and no other part's pods.
        assert [other for other in templates if matches(selector, templates[other])] == [name]


def test_what_is_referred_to_is_there(objects: list[Object]) -> None:
    names = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for template, container in pods_of(objects):
        spec = template["spec"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
    for found in of_kind(objects, "StatefulSet"):
        assert ("Service", found["spec"]["serviceName"]) in names
    for found in of_kind(objects, "HorizontalPodAutoscaler"):
        target = found["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in names
        assert "replicas" not in one(objects, target["kind"], target["name"])["spec"]


def test_every_port_that_is_named_is_one_of_a_container(objects: list[Object]) -> None:
    by_part = {o["metadata"]["name"]: o for o in of_kind(objects, "Deployment", "StatefulSet")}
    for found in of_kind(objects, "Service", "NetworkPolicy"):
        [container] = by_part[found["metadata"]["name"]]["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        if found["kind"] == "Service":
            [port] = found["spec"]["ports"]
            assert ports[port["targetPort"]] == port["port"]
        else:
            [rule] = found["spec"]["ingress"]
            assert [port["port"] for port in rule["ports"]] == list(ports)
        probes = [container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
        assert {probe["httpGet"]["port"] for probe in probes} <= ports.keys()


def test_the_configurations_are_valid_and_lead_routers_to_the_nodes(objects: list[Object]) -> None:
    router = router_config(objects)
    addresses = {}
    for found in of_kind(objects, "StatefulSet"):
        name = found["metadata"]["name"]
        [container] = found["spec"]["template"]["spec"]["containers"]
        files = one(objects, "ConfigMap", name)["data"]
        assert container["args"] == ["node", "/etc/proserve/$(POD_NAME).yaml"]
        assert [f"{name}-{number}.yaml" for number in range(len(files))] == list(files)
        for file, text in files.items():
            node = parse_yaml_model(text.encode(), NodeConfig, path=Path(file))
            assert node.host == "0.0.0.0"
            assert [{"name": "http", "containerPort": node.port}] == container["ports"]
            pod, service = Path(file).stem, found["spec"]["serviceName"]
            addresses[node.endpoint_id] = f"http://{pod}.{service}:{node.port}"

    assert {node.endpoint_id: node.url for node in router.nodes} == addresses


def router_config(objects: list[Object]) -> RouterConfig:
    text = one(objects, "ConfigMap", "proserve-router")["data"]["router.yaml"]
    return parse_yaml_model(text.encode(), RouterConfig, path=Path("router.yaml"))


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, FastAPI]:
    """A router and a node, not started."""
    engine_dir = write_tiny_tokenizer(tmp_path_factory.mktemp("engine"))
    router = create_app(
        router_config(rendered(GROUP)), tokenizer=Tokenizer.from_engine_dir(engine_dir)
    )
    node = create_node_app(NodeService("n", ("true",), stall_timeout_s=1.0))
    return {"router": router, "node": node}


def test_what_pods_are_asked_is_a_route_of_their_services(
    objects: list[Object], services: Mapping[str, FastAPI]
) -> None:
    for template, container in pods_of(objects):
        service = services[container["name"]]
        for name in ("startup", "readiness", "liveness"):
            assert ("GET", container[f"{name}Probe"]["httpGet"]["path"]) in routes(service)
        hook = container["lifecycle"]["preStop"]
        if container["name"] == "node":
            command = hook["exec"]["command"]
            assert command[:2] == ["proserve", "drain"]
            assert command[2].endswith(f":{container['ports'][0]['containerPort']}")
            assert ("POST", "/v1/drain") in routes(service)
            before_s = int(command[-1])
        else:
            before_s = hook["sleep"]["seconds"]
        assert template["spec"]["terminationGracePeriodSeconds"] >= before_s + STOP_GRACE_S
    for found in of_kind(objects, "ServiceMonitor"):
        [endpoint] = found["spec"]["endpoints"]
        assert all(("GET", endpoint["path"]) in routes(service) for service in services.values())


def routes(service: FastAPI) -> set[tuple[str, str]]:
    return {
        (method, route.path)
        for route in service.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }


def test_a_service_monitor_scrapes_every_service(objects: list[Object]) -> None:
    for found in of_kind(objects, "ServiceMonitor"):
        selector = found["spec"]["selector"]["matchLabels"]
        services = of_kind(objects, "Service")

        assert all(matches(selector, service["metadata"]["labels"]) for service in services)
        [endpoint] = found["spec"]["endpoints"]
        ports = {port["name"] for service in services for port in service["spec"]["ports"]}
        assert ports == {endpoint["port"]}


def test_pods_have_no_more_rights_than_they_need(objects: list[Object]) -> None:
    for template, container in pods_of(objects):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_only_routers_and_monitoring_reach_nodes() -> None:
    def sources(text: str) -> list[Object]:
        policy = one(rendered(text), "NetworkPolicy", "proserve-chat")
        return list(policy["spec"]["ingress"][0]["from"])

    [router] = sources(GROUP)
    template = one(rendered(GROUP), "Deployment", "proserve-router")["spec"]["template"]
    assert matches(router["podSelector"]["matchLabels"], template["metadata"]["labels"])

    _, monitoring = sources(GROUP + "kubernetes: {monitoring: {namespace: watch}}\n")
    assert monitoring["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "watch"
    }


@pytest.mark.parametrize(("address", "port"), [("http://c:4318", 4318), ("https://c", 443)])
def test_pods_that_make_spans_reach_their_collector(address: str, port: int) -> None:
    def egress(text: str, name: str) -> list[Object]:
        policy = one(rendered(text), "NetworkPolicy", f"proserve-{name}")
        return list(policy["spec"]["egress"])

    tracing = f"tracing: {{endpoint: '{address}'}}"
    to_collector = {"ports": [{"protocol": "TCP", "port": port}]}
    traced = GROUP.replace("name: chat", f"name: chat\n    {tracing}")

    assert to_collector in egress(traced, "chat")
    assert to_collector in egress(GROUP + f"router: {{{tracing}}}", "router")
    assert egress(GROUP, "chat") == []
    assert to_collector not in egress(traced, "router")


def test_nodes_with_addresses_of_their_own_do_not_run_out_of_ports() -> None:
    text = GROUP.replace("8101", "65534") + "    kubernetes: {autoscaling: {max_nodes: 9}}\n"

    urls = [node.url for node in router_config(rendered(text)).nodes]

    assert urls[8] == "http://proserve-chat-8.proserve-chat:65534"


AUTOSCALED = GROUP + "    kubernetes: {autoscaling: {max_nodes: 5, waiting_per_node: 2.5}}\n"


def test_an_autoscaler_works_between_the_two_numbers_by_a_metric_of_nodes() -> None:
    objects = rendered(AUTOSCALED)

    spec = one(objects, "HorizontalPodAutoscaler", "proserve-chat")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 5)
    [metric] = spec["metrics"]
    assert metric["pods"]["target"]["averageValue"] == "2500m"
    assert len(router_config(objects).nodes) == 5
    assert f'{WAITING_METRIC}{{state="waiting"}} ' in NodeMetrics().render(None).decode()
    assert metric["pods"]["metric"] == {
        "name": WAITING_METRIC,
        "selector": {"matchLabels": {"state": "waiting"}},
    }


def test_another_number_of_nodes_restarts_routers_but_no_node() -> None:
    def digest(text: str, kind: str, name: str) -> str:
        template = one(rendered(text), kind, name)["spec"]["template"]
        return str(template["metadata"]["annotations"][CONFIG_ANNOTATION])

    more, other = GROUP.replace("num_nodes: 2", "num_nodes: 3"), GROUP + "    max_num_seqs: 8\n"

    node, router = ("StatefulSet", "proserve-chat"), ("Deployment", "proserve-router")
    assert digest(more, *node) == digest(GROUP, *node) != digest(other, *node)
    assert digest(more, *router) != digest(GROUP, *router) == digest(other, *router)


def test_a_secret_is_mounted_by_name_and_its_content_is_nowhere() -> None:
    path = ROOT / "configs/deployments/two-groups.yaml"
    files = render(deployment(path.read_text()))
    keys = yaml.safe_load((ROOT / "configs/clients/example.yaml").read_text())["clients"][0]["keys"]

    assert keys[0]["sha256"] not in "".join(files.values())
    template, container = next(pods_of(objects_of(files)))
    assert {"name": "clients", "secret": {"secretName": "proserve-clients"}} in (
        template["spec"]["volumes"]
    )
    config = router_config(objects_of(files))
    [mount] = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "clients"]
    assert config.clients_file == Path(mount) / "example.yaml"


def test_files_that_are_named_are_mounted() -> None:
    """A setting that names another file needs a mount, and if that is a secret, its name alone."""

    def files_of(model: type) -> set[str]:
        fields = fields_of(model).items()
        named = {f"{model.__name__}.{name}" for name, field in fields if is_file(field.annotation)}
        return named.union(*(files_of(m) for _, f in fields for m in models_in(f.annotation)))

    def shown(model: type) -> set[str]:
        """Those of sections that are not refused."""
        sections = (
            "RegistrationConfig.", "RegistryConfig.", "NodeRegistryConfig.", "TlsConfig.",
            "SecretConfig.",
        )  # fmt: skip
        return {name for name in files_of(model) if not name.startswith(sections)}

    assert shown(RouterSettings) == {"RouterSettings.clients_file"}
    assert {name.partition(".")[2] for name in shown(NodeSettings)} == {"directory"}


def is_file(annotation: object) -> bool:
    return annotation is Path or any(is_file(part) for part in get_args(annotation))


def test_an_engine_in_a_volume_is_read_from_there_by_nodes_and_routers() -> None:
    objects = rendered(GROUP + "kubernetes: {engine_volume: {claim: disk, sub_path: tiny}}\n")

    for template, container in pods_of(objects):
        [volume] = [v for v in template["spec"]["volumes"] if v["name"] == "engine"]
        [mount] = [m for m in container["volumeMounts"] if m["name"] == "engine"]
        assert volume["persistentVolumeClaim"] == {"claimName": "disk", "readOnly": True}
        assert mount == {
            "name": "engine", "mountPath": "/engine", "readOnly": True, "subPath": "tiny"
        }  # fmt: skip
    assert router_config(objects).engine_dir == Path("/engine")
    assert (
        "directory: /engine"
        in one(objects, "ConfigMap", "proserve-chat")["data"]["proserve-chat-1.yaml"]
    )


def test_without_a_volume_the_engine_is_in_the_image() -> None:
    assert router_config(rendered(GROUP)).engine_dir == Path("here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GROUP + "router: {clients_file: c.yaml}", "kubectl create secret generic NAME --from-f"),
        (GROUP + "kubernetes: {clients_secret: c}", "there is no router.clients_file"),
        (GROUP + "router: {registration: {secret_env: S}}", "router has a registration"),
        (GROUP + "router: {tls: {cert_file: c, key_file: k}}", "an Ingress or Gateway before"),
        (GROUP.rstrip() + "\n    registry: {endpoints: ['http://e:2379']}\n", "chat has a registr"),
        (GROUP.replace("name: chat", "name: router"), "cannot be told from the routers"),
        (GROUP.replace("model: tiny", ""), "here: no such engine directory.*as `model`"),
        (
            GROUP.replace("name: chat", f"name: {'g' * 30}") + f"kubernetes: {{name: {'n' * 30}}}",
            "has 61 characters, a StatefulSet's name may have 52",
        ),
        (
            "model: t\nnodes: [{endpoint_id: a.b, port: 1, engine: {directory: x, device: cuda}}]",
            "'a.b' cannot be part of a name in Kubernetes",
        ),
    ],
)
def test_what_cannot_run_there_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        render(deployment(text))


def test_the_same_file_gives_the_same_text(tmp_path: Path) -> None:
    path = ROOT / "configs/deployments/two-groups.yaml"

    result = CliRunner().invoke(
        app, ["render", "kubernetes", str(path), "--output-dir", str(tmp_path)]
    )

    files = render(deployment(path.read_text()))
    assert result.exit_code == 0, result.output
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == files


def test_what_is_not_part_of_it_any_more_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: Namespace\n")
    write(render(deployment(GROUP)), tmp_path)

    removed = write(render(deployment(GROUP.replace("name: chat", "name: talk"))), tmp_path)

    assert removed == [tmp_path / "nodes-chat.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine.yaml",
        "nodes-talk.yaml",
        "router.yaml",
    ]


def test_a_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(
        ConfigError, match=r"file: cannot be written: (File exists|Not a directory)"
    ):
        write({}, tmp_path / "file")


def test_amounts_are_written_as_kubernetes_does() -> None:
    assert [quantity(n) for n in (2 * 1024**3, 1536 * 1024**2, 1024, 1000)] == [
        "2Gi", "1536Mi", "1Ki", "1000"
    ]  # fmt: skip
    assert resources(0.5, 1024**3, 2) == {
        "requests": {"cpu": "500m", "memory": "1Gi", "nvidia.com/gpu": 2},
        "limits": {"memory": "1Gi", "nvidia.com/gpu": 2},
    }
    assert resources(None, None) == {}
