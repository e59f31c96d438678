"""The supervisor of a deployment on this machine: a process in the background, told what to do over
a Unix socket."""

from __future__ import annotations

import asyncio
import signal
from http import HTTPStatus

import msgspec
import structlog
import uvicorn
from fastapi import FastAPI, Request, Response

from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.command_line.launch.reconciler import Reconciler
from orchestrator.command_line.launch.state_dir import StateDir
from orchestrator.core.errors import ProServeError
from orchestrator.yaml_config import validate_model

_log = structlog.get_logger("supervisor")


class Up(msgspec.Struct, frozen=True):
    """Make the deployment this."""

    deployment: dict[str, object]
    directory: str
    """Working directory of who asks, from which relative paths count."""

    start_timeout_s: float
    are_nodes_elsewhere: bool = False
    """Only routers are this supervisor's business."""


class Restart(msgspec.Struct, frozen=True):
    """Replace these processes, or all."""

    names: tuple[str, ...]


class Accepted(msgspec.Struct, frozen=True):
    """What was asked for is being done."""

    goal: int


class Failure(msgspec.Struct, frozen=True):
    """It is not."""

    message: str


def run_supervisor(directory: StateDir, working_directory: str) -> int:
    """Supervise a deployment until told to stop; return an exit status."""
    lock = directory.lock()
    if lock is None:
        _log.info("superfluous", reason="another supervisor has this deployment")
        return 0
    # uvicorn raises the signal again when it has shut down; by then it has been obeyed.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    asyncio.run(_supervise(directory, working_directory))
    return 0


async def _supervise(directory: StateDir, working_directory: str) -> None:
    reconciler = Reconciler(directory)
    app = create_control_app(reconciler, working_directory)
    try:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                uds=str(directory.control_socket),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )
        app.state.stop = lambda: setattr(server, "should_exit", True)
        await server.serve()
    finally:
        _log.info("closing")
        await reconciler.close()
        directory.control_socket.unlink(missing_ok=True)


def create_control_app(reconciler: Reconciler, working_directory: str) -> FastAPI:
    """Return what the supervisor answers; `app.state.stop` has it end."""
    app = FastAPI(title="ProServe supervisor", docs_url=None, redoc_url=None)

    @app.exception_handler(ProServeError)
    async def refused(_: Request, error: ProServeError) -> Response:
        return _answer(Failure(str(error)), HTTPStatus.BAD_REQUEST)

    @app.put("/deployment")
    async def up(request: Request) -> Response:
        asked = msgspec.json.decode(await request.body(), type=Up)
        if asked.directory != working_directory:
            return _answer(
                Failure(
                    f"the deployment was started from {working_directory}, from where the paths in "
                    f"its file count, not from {asked.directory}; go there, or give it another name"
                ),
                HTTPStatus.BAD_REQUEST,
            )
        config = validate_model(asked.deployment, DeploymentConfig, source="deployment")
        goal = reconciler.pursue(
            config,
            start_timeout_s=asked.start_timeout_s,
            are_nodes_elsewhere=asked.are_nodes_elsewhere,
        )
        return _answer(Accepted(goal))

    @app.post("/restart")
    async def restart(request: Request) -> Response:
        asked = msgspec.json.decode(await request.body(), type=Restart)
        return _answer(Accepted(reconciler.restart(asked.names)))

    @app.get("/status")
    async def status() -> Response:
        return _answer(reconciler.status())

    @app.post("/down")
    async def down() -> Response:
        app.state.stop()
        return Response(status_code=HTTPStatus.ACCEPTED)

    return app


def _answer(message: msgspec.Struct, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(message), status, media_type="application/json")
