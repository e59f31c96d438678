"""The floor: what FastAPI, uvicorn and aiohttp cost when nothing is done but passing on.

    python -m benchmarks.peers.passthrough PORT WORKER_URL...

No keys, no limits, no metrics, no parsing; workers in turn.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle

import aiohttp
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse


def create_app(worker_urls: list[str]) -> FastAPI:
    """Return the application."""
    workers = cycle(worker_urls)
    sessions: list[aiohttp.ClientSession] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            sessions.append(session)
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        upstream = await sessions[0].post(
            f"{next(workers)}/v1/chat/completions",
            data=await request.body(),
            headers={"content-type": "application/json"},
        )
        if upstream.content_type != "text/event-stream":
            return Response(await upstream.read(), media_type=upstream.content_type)

        async def passed_on() -> AsyncIterator[bytes]:
            async with upstream:
                async for data in upstream.content.iter_any():
                    yield data

        return StreamingResponse(passed_on(), media_type="text/event-stream")

    return app


def main() -> None:
    """Serve until killed."""
    port, *worker_urls = sys.argv[1:]
    uvicorn.run(
        create_app(worker_urls),
        port=int(port),
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
