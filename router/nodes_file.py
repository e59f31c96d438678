"""A router's nodes as a file lists them, which may change while the router runs."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import AfterValidator, BaseModel, ConfigDict

from orchestrator.core.errors import ConfigError
from orchestrator.yaml_config import parse_yaml_model
from router.config import EndpointConfig, check_unique_nodes
from router.endpoints import EndpointPool
from router.followed_file import FollowedFile

POLL_INTERVAL_S = 0.2
"""Pause between two looks at the file."""

_log = structlog.get_logger("router")


class NodesFile(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    nodes: Annotated[tuple[EndpointConfig, ...], AfterValidator(check_unique_nodes)]
    """Every node that may be used. One that is taken out gets nothing new; what it works on goes
    on until it ends."""


class FollowedNodes:
    """Keeps a pool's nodes those of a file. Belongs to one event loop."""

    def __init__(self, path: Path, pool: EndpointPool) -> None:
        """Take the nodes that the file lists now.

        Raises:
            ConfigError: it cannot be read, or has mistakes.
        """
        self._file = FollowedFile(path, partial(parse_yaml_model, model=NodesFile, path=path))
        self._pool = pool
        self._task: asyncio.Task[None] | None = None
        self._nodes: dict[str, EndpointConfig] = {}
        self._apply(self._file.read())

    async def start(self) -> None:
        """Follow the file until `stop`."""
        self._task = asyncio.create_task(self._keep_looking(), name="follow the nodes file")

    async def stop(self) -> None:
        """End that."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def refresh(self) -> None:
        """Look at the file once; if it has changed and has no mistakes, it counts from now on."""
        news = await asyncio.to_thread(self._file.news)
        if isinstance(news, ConfigError):
            _log.error("nodes_file_invalid", reason=str(news), in_force="the one before")
        elif news is not None:
            self._apply(news)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            await self.refresh()

    def _apply(self, file: NodesFile) -> None:
        listed = {node.endpoint_id: node for node in file.nodes}
        for endpoint_id, node in list(self._nodes.items()):
            if listed.get(endpoint_id) != node:
                self._pool.remove(endpoint_id)
                del self._nodes[endpoint_id]
                _log.info("node_left", endpoint_id=endpoint_id, url=node.url, reason="not listed")
        for endpoint_id, node in listed.items():
            if endpoint_id not in self._nodes:
                self._pool.add(node)
                self._nodes[endpoint_id] = node
                _log.info("node_joined", endpoint_id=endpoint_id, url=node.url)
