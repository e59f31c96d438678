"""A service for tests of what watches services: answers GET /health and obeys.

    python stub_service.py PORT STATE_FILE

Each line of the state file tells one start what to do, the last one all further starts:
"healthy", "ill" (503), "hopeless" (503 that will not go away), or "exit N" (ends at once).
POST /exit ends the process with status 3.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    behaviour = "healthy"

    def do_GET(self) -> None:
        status = 200 if self.behaviour == "healthy" else 503
        body = {"message": f"{self.behaviour}, as told", "is_final": self.behaviour == "hopeless"}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_POST(self) -> None:
        os._exit(3)

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> None:
    state_file = Path(sys.argv[2])
    behaviour, *rest = state_file.read_text().splitlines()
    state_file.write_text("\n".join(rest or [behaviour]))
    if behaviour.startswith("exit"):
        sys.exit(int(behaviour.split()[1]))
    Handler.behaviour = behaviour
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
