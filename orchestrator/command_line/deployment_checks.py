"""Checks between the sections of a deployment file.

They read the file as it was written, as far as it makes sense, so that a mistake in one section
does not hide that two others do not go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.yaml_config import KeyPath, Problem

MAX_PORT = 65535
MAX_GROUP_NODES = 1000
"""More than any test of a router has seen, and few enough to be looked at one by one."""

_EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class _Listener:
    """A service of the deployment on one machine."""

    location: KeyPath
    """Of the key that gives its port."""

    who: str
    endpoint_id: str | None
    host: str
    port: int | None

    def meets(self, other: _Listener) -> bool:
        """Return whether both want the same port of the same address."""
        is_same_host = self.host == other.host or not {self.host, other.host}.isdisjoint(
            _EVERYWHERE
        )
        return self.port is not None and self.port == other.port and is_same_host


def cross_problems(deployment: object) -> Iterator[Problem]:
    """Return what is wrong between the parts of a deployment, as read or as a model."""
    router = _get(deployment, "router")
    nodes, groups = _items(deployment, "nodes"), _items(deployment, "node_groups")
    if not _get(deployment, "nodes") and not _get(deployment, "node_groups"):
        yield ("nodes",), "there is no node; list some under nodes, or a group under node_groups"
    if _number(_get(router, "port")) == 0:
        yield (
            ("router", "port"),
            "router.port is 0; a deployment needs to know it, choose a free one",
        )
    yield from _unregistered(router, nodes, groups)
    yield from _repeated_names(nodes, groups)
    listeners = [_router(router), *(_node(index, node) for index, node in enumerate(nodes))]
    for index, group in enumerate(groups):
        members = _members(index, group)
        last = members[-1].port if members else None
        if last is not None and last > MAX_PORT:
            yield (
                ("node_groups", index, "first_port"),
                f"the last of {len(members):,} nodes would have port {last:,}, the highest is "
                f"{MAX_PORT:,}; lower first_port or num_nodes",
            )
        listeners += members
    yield from _collisions(listeners)


def _unregistered(
    router: object, nodes: Sequence[object], groups: Sequence[object]
) -> Iterator[Problem]:
    if not _get(router, "registry"):
        return
    for key, sections in (("nodes", nodes), ("node_groups", groups)):
        for index, section in enumerate(sections):
            if not _get(section, "registry"):
                yield (
                    (key, index),
                    "it has no registry, though router.registry says that routers find nodes "
                    "there; give it the same one",
                )


def _repeated_names(nodes: Sequence[object], groups: Sequence[object]) -> Iterator[Problem]:
    endpoint_ids: set[object] = set()
    for index, node in enumerate(nodes):
        endpoint_id = _text(_get(node, "endpoint_id"))
        if endpoint_id is not None and endpoint_id in endpoint_ids:
            location = ("nodes", index, "endpoint_id")
            yield location, f"endpoint_id {endpoint_id!r} is given to another node too"
        endpoint_ids.add(endpoint_id)
    names: set[object] = set()
    for index, group in enumerate(groups):
        name = _text(_get(group, "name"))
        taken = [m.who for m in _members(index, group) if m.endpoint_id in endpoint_ids]
        if name is not None and name in names:
            yield ("node_groups", index, "name"), f"there is another group {name!r}"
        elif taken:
            text = f"its {taken[0]} has the endpoint_id of another one; rename one of them"
            yield ("node_groups", index, "name"), text
        names.add(name)


def _collisions(listeners: Sequence[_Listener]) -> Iterator[Problem]:
    by_port: dict[int | None, list[_Listener]] = {}
    reported: set[KeyPath] = set()  # of a group, the first node that collides is enough
    for listener in listeners:
        others = by_port.setdefault(listener.port, [])
        earlier = next((other for other in others if listener.meets(other)), None)
        if earlier is not None and listener.location not in reported:
            reported.add(listener.location)
            yield (
                listener.location,
                f"address {listener.host}:{listener.port} is given to more than one service: "
                f"{earlier.who} and {listener.who}; choose another port",
            )
        others.append(listener)


def _router(router: object) -> _Listener:
    port = _number(_get(router, "port", 8000))
    return _Listener(("router", "port"), "the router", None, _host(router), port or None)


def _node(index: int, node: object) -> _Listener:
    endpoint_id = _text(_get(node, "endpoint_id"))
    who = f"node {endpoint_id}"
    location = ("nodes", index, "port")
    return _Listener(location, who, endpoint_id, _host(node), _number(_get(node, "port")))


def _members(index: int, group: object) -> list[_Listener]:
    name, first = _get(group, "name"), _number(_get(group, "first_port"))
    num_nodes = min(_number(_get(group, "num_nodes", 1)) or 0, MAX_GROUP_NODES)
    return [
        _Listener(
            ("node_groups", index, "first_port"),
            f"node {name}-{number}",
            f"{name}-{number}",
            _host(group),
            None if first is None else first + number,
        )
        for number in range(num_nodes)
    ]


def _get(section: object, key: str, default: object = None) -> object:
    if isinstance(section, Mapping):
        return section.get(key, default)
    return getattr(section, key, default)


def _items(section: object, key: str) -> Sequence[object]:
    value = _get(section, key)
    return value if isinstance(value, list | tuple) else ()


def _host(section: object) -> str:
    return str(_get(section, "host", "127.0.0.1"))


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
