"""Nodes that register themselves: each is there for a lease, which it renews.

This is one way in which a router learns who its nodes are. Any other one, such as a registry that
several routers share, does the same at its end: `EndpointPool.add` when a node comes and `remove`
when it goes. Whether a node can be used is the pool's business: it asks the node itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
import structlog
from fastapi import FastAPI, Request, Response

from orchestrator.core.errors import ConfigError
from orchestrator.core.ports import Clock
from orchestrator.peers import Secret
from orchestrator.wire import NodeLease, NodeRegistration
from orchestrator.yaml_config import validate_model
from router.bodies import read_body
from router.config import EndpointConfig, RegistrationConfig
from router.endpoints import EndpointPool
from router.errors import Refused, cut
from router.metrics import RouterMetrics

MAX_BODY_BYTES = 8192
"""Several times the largest registration."""

BODY_TIMEOUT_S = 5.0

SWEEPS_PER_LEASE = 20
"""So a node that is silent is forgotten at most a twentieth of its lease too late."""

_decoder = msgspec.json.Decoder(NodeRegistration)
_encoder = msgspec.json.Encoder()
_log = structlog.get_logger("router")


@dataclass(slots=True)
class _Tenant:
    """A registered node."""

    node: EndpointConfig
    instance_id: str
    until_s: float
    """When its lease ends."""


class Registrations:
    """The nodes of a pool that have registered themselves. Belongs to one event loop."""

    def __init__(
        self, config: RegistrationConfig, pool: EndpointPool, clock: Clock, metrics: RouterMetrics
    ) -> None:
        """Raises ConfigError if the nodes' secret is not where the configuration says."""
        self.secret = config.read_secret()
        self._config = config
        self._pool = pool
        self._clock = clock
        self._metrics = metrics
        self._tenants: dict[str, _Tenant] = {}
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look for leases that have ended until `stop`."""
        self._sweeping = asyncio.create_task(self._keep_sweeping(), name="sweep registrations")

    async def stop(self) -> None:
        """End that."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)

    def register(self, registration: NodeRegistration) -> NodeLease:
        """Have the pool follow a node, or go on with it, until the end of the lease returned.

        A process that is started anew may come from another address at once if the one before
        does not answer any more.

        Raises:
            Refused: something about it is wrong, another node has its id, or there are too many.
        """
        node = _checked(registration)
        now_s = self._clock.now_s()
        self.expire()
        tenant = self._tenants.get(node.endpoint_id)
        if tenant is None:
            self._check_place(node)
        elif tenant.node.url != node.url and tenant.instance_id != registration.instance_id:
            self._check_silent(tenant, now_s)
        if tenant is None or tenant.node.url != node.url:
            if tenant is not None:
                self._forget(tenant, "it has moved")
                self._metrics.registrations("left").inc()
            self._pool.add(node)
            _log.info("node_joined", endpoint_id=node.endpoint_id, url=node.url)
            self._metrics.registrations("joined").inc()
        lease_s = self._config.lease_s
        self._tenants[node.endpoint_id] = _Tenant(node, registration.instance_id, now_s + lease_s)
        self._metrics.registered_nodes.set(len(self._tenants))
        return NodeLease(lease_s)

    def leave(self, endpoint_id: str, instance_id: str) -> None:
        """Forget a node, if it is there and still the same process."""
        tenant = self._tenants.get(endpoint_id)
        if tenant is not None and tenant.instance_id == instance_id:
            self._forget(tenant, "it has left")
            self._metrics.registrations("left").inc()

    def expire(self, *, unheard_s: float = 0.0) -> None:
        """Forget the nodes whose leases have ended, not counting the last `unheard_s`, in which the
        router could hear nobody."""
        now_s = self._clock.now_s()
        for tenant in self._tenants.values():
            tenant.until_s += unheard_s
        for tenant in [t for t in self._tenants.values() if t.until_s <= now_s]:
            self._forget(tenant, f"it was silent for {self._config.lease_s:g} s")
            self._metrics.registrations("expired").inc()

    def _check_place(self, node: EndpointConfig) -> None:
        if node.endpoint_id in self._pool:
            raise Refused(
                f"node {node.endpoint_id!r} is one of the router's configuration and cannot "
                "register; give this one another endpoint_id, or take the other one out there",
                field="endpoint_id",
                status=409,
                code="endpoint_id_taken",
            )
        if len(self._tenants) >= self._config.max_nodes:
            raise Refused(
                f"{len(self._tenants):,} nodes are registered, as many as the router takes "
                "(registration.max_nodes); stop some, or raise that",
                status=503,
                code="too_many_nodes",
            )

    def _check_silent(self, tenant: _Tenant, now_s: float) -> None:
        if self._pool.is_reachable(tenant.node.endpoint_id):
            raise Refused(
                f"node {tenant.node.endpoint_id!r} is registered at {tenant.node.url}, answers "
                f"there, and its lease lasts for another {tenant.until_s - now_s:.1f} s; give this "
                "one another endpoint_id, or stop the other one",
                field="endpoint_id",
                status=409,
                code="endpoint_id_taken",
            )

    def _forget(self, tenant: _Tenant, reason: str) -> None:
        endpoint_id = tenant.node.endpoint_id
        del self._tenants[endpoint_id]
        self._pool.remove(endpoint_id)
        self._metrics.registered_nodes.set(len(self._tenants))
        _log.info("node_left", endpoint_id=endpoint_id, url=tenant.node.url, reason=reason)

    async def _keep_sweeping(self) -> None:
        loop, pause_s = asyncio.get_running_loop(), self._config.lease_s / SWEEPS_PER_LEASE
        while True:
            due_s = loop.time() + pause_s
            await asyncio.sleep(pause_s)
            # A router that was stopped for a while would else forget all nodes at once, whose
            # renewals wait in its sockets.
            late_s = loop.time() - due_s
            self.expire(unheard_s=late_s if late_s > pause_s else 0.0)


def add_registration_routes(app: FastAPI, registrations: Registrations) -> None:
    """Let nodes that know the secret register over HTTP, as `orchestrator.wire` says."""
    secret = registrations.secret

    @app.post("/internal/v1/nodes")
    async def register(request: Request) -> Response:
        _check_secret(request, secret)
        content = await read_body(request, max_bytes=MAX_BODY_BYTES, timeout_s=BODY_TIMEOUT_S)
        try:
            registration = _decoder.decode(content)
        except msgspec.DecodeError as error:
            raise Refused(f"unreadable registration: {error}", code="invalid_json") from error
        lease = registrations.register(registration)
        return Response(_encoder.encode(lease), media_type="application/json")

    @app.delete("/internal/v1/nodes/{endpoint_id}")
    async def leave(request: Request, endpoint_id: str, instance_id: str = "") -> Response:
        _check_secret(request, secret)
        registrations.leave(endpoint_id, instance_id)
        return Response(status_code=204)


def _checked(registration: NodeRegistration) -> EndpointConfig:
    data = {"endpoint_id": registration.endpoint_id, "url": registration.url}
    try:
        return validate_model(data, EndpointConfig, source="registration")
    except ConfigError as error:
        raise Refused(cut(str(error), 500), code="invalid_value") from error


def _check_secret(request: Request, secret: Secret) -> None:
    values = request.headers.getlist("authorization")
    if len(values) != 1 or not secret.is_proved_by(values[0]):
        raise Refused(
            "the secret of the nodes is missing or wrong; nodes and routers must be given the same",
            status=401,
            code="invalid_secret",
        )
