"""`proserve render kubernetes`: a deployment file as manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.command_line.kubernetes.nodes import node_objects, node_sets
from orchestrator.command_line.kubernetes.objects import Frame, Object, dump_yaml
from orchestrator.command_line.kubernetes.routers import monitoring_objects, router_objects
from orchestrator.core.errors import ConfigError, EngineDirectoryError

HEADER = "# Rendered by `proserve render kubernetes`; change the deployment file instead.\n"


def render(config: DeploymentConfig) -> dict[str, str]:
    """Return the manifests of a deployment by file name; the same file gives the same text.

    Raises:
        ConfigError: the deployment cannot run on Kubernetes as it is described, or the name of
            its model is neither in the file nor in its engine directories.
    """
    _check_registration(config)
    key = config.router.dashboard.key
    if key is not None and key.secret_file is not None:
        raise ConfigError(
            f"router.dashboard.key.secret_file is {key.secret_file}, which is not rendered: set "
            "key.secret_env, and that variable from a Secret in a patch of the router's Deployment"
        )
    if config.router.tls is not None:
        raise ConfigError(
            "router.tls is set, which is not rendered: on Kubernetes an Ingress or Gateway before "
            "the routers ends TLS; leave it out"
        )
    frame = Frame(config.kubernetes)
    sets = node_sets(config)
    files = {"router.yaml": router_objects(frame, config, sets, _model(config))}
    for node_set in sets:
        objects = node_objects(frame, node_set, config.restarts.max_unhealthy_s)
        files[f"nodes-{node_set.name}.yaml"] = objects
    files["monitoring.yaml"] = monitoring_objects(frame)
    return {name: _text(objects) for name, objects in files.items() if objects}


def write(files: Mapping[str, str], directory: Path) -> list[Path]:
    """Write manifests, and remove those of an earlier rendering that are not among them any more;
    return what was removed.

    Raises:
        ConfigError: the directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        left = [
            path
            for path in sorted(directory.glob("*.yaml"))
            if path.name not in files and path.read_text(encoding="utf-8").startswith(HEADER)
        ]
        for path in left:
            path.unlink()
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return left


def _check_registration(config: DeploymentConfig) -> None:
    router = config.router
    found: dict[str, object] = {"router": router.registration or router.registry}
    found |= {node.endpoint_id: node.registration or node.registry for node in config.nodes}
    found |= {group.name: group.registry for group in config.node_groups}
    for name, section in found.items():
        if section is not None:
            raise ConfigError(
                f"{name} has a registration or registry, which is not rendered: on Kubernetes "
                "routers know every node by its name, those of autoscaling too; leave it out"
            )


def _model(config: DeploymentConfig) -> str:
    if config.model is not None:
        return config.model
    try:
        return config.served_model()
    except EngineDirectoryError as error:
        raise ConfigError(
            f"{error}; or write the model's name into the deployment file, as `model`: then its "
            "manifests can be rendered without engine directories"
        ) from error


def _text(objects: Sequence[Object]) -> str:
    return HEADER + "---\n".join(map(dump_yaml, objects))
