"""A server on loopback that simulates W&B's server and its failures."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from starting import STDOUT, Started

HANGS = 600.0  # seconds without a response
EPOCHS = 6  # of ``reporting_run``
KEY = "0" * 40

BUCKET: dict[str, Any] = {
    "id": "QnVja2V0", "name": "run", "displayName": "run", "description": "", "config": "{}",
    "sweepName": None, "historyLineCount": 0, "summaryMetrics": "{}", "eventsLineCount": 0,
    "logLineCount": 0, "historyTail": "[]", "eventsTail": "[]", "wandbConfig": "{}", "tags": [],
    "project": {"id": "UA==", "name": "sskd", "entity": {"id": "RQ==", "name": "me"}},
    "files": {"edges": []}, "uploadHeaders": [],
}  # fmt: skip
ANSWERS: dict[str, Any] = {
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "viewer": {
        "id": "VQ==", "entity": "me", "username": "me", "flags": "{}", "email": "me@example.org",
        "teams": {"edges": []}, "apiKeys": {"edges": []}, "admin": False, "name": "me",
    },
    "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []},
    "model": {"bucket": None},
    "project": None,
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Responds as its server's ``fault`` demands."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        stand_in = self.server
        stand_in.requests[self.path] += 1
        if stand_in.fault == "hangs":
            stand_in.closing.wait(HANGS)
            self.close_connection = True
            return
        if stand_in.fault == "wrong key":
            self._answer(401, {"error": "api_key not found"})
        elif stand_in.fault == "answers 500":
            self._answer(500, {"error": "internal error"})
        elif self.path.endswith("/file_stream"):
            for name, content in json.loads(body).get("files", {}).items():
                stand_in.lines[name] += len(content["content"])
            self._answer(200, {})
        elif self.command == "HEAD":
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/graphql":
            asked = json.loads(body)
            found = {key: answer for key, answer in ANSWERS.items() if key in asked["query"]}
            if "createRunFiles" in asked["query"]:
                url = f"{stand_in.url}/upload"
                files = [{"name": name, "uploadUrl": url} for name in asked["variables"]["files"]]
                found["createRunFiles"] = {"runID": "run", "uploadHeaders": [], "files": files}
            self._answer(200, {"data": found})
        else:
            self._answer(200, {})

    do_GET = do_PUT = do_HEAD = do_POST  # noqa: N815

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class StandIn(ThreadingHTTPServer):
    """Serves inside of its ``with`` block.

    Attributes:
        fault: how it fails; may be changed at any time.
        lines: how many lines it has received of each file of a run.
        requests: how many requests it has received for each path.
    """

    daemon_threads = True

    def __init__(self, fault: str = "none") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = fault
        self.requests: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.closing = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Print nothing about a client that disconnected."""

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop the server, so that connections are refused."""
        self.closing.set()
        self.shutdown()
        self.server_close()

    def __exit__(self, *_: object) -> None:
        if not self.closing.is_set():
            self.close()


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def reporting_run(url: str, runs: Path, *more: str, at_start: int = 5, at_end: int = 5) -> Started:
    """Start a run that reports to the server at ``url``.

    At its start and at its end, it waits at most so many seconds for the server.
    """
    environment = os.environ | {
        "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online",
        "WANDB_INIT_TIMEOUT": str(at_start), "WANDB_FINISH_TIMEOUT": str(at_end),
    }  # fmt: skip
    environment.pop("WANDB_SERVICE", None)  # set if a test in this process used W&B
    words = ["train_teacher.py", "arch=resnet8", "dataset=digits", "dataset.fraction=0.05"]
    words += [f"schedule.epochs={EPOCHS}", "checkpoint_seconds=0", f"runs={runs}", *more]
    return Started(*words, env=environment, stderr=STDOUT)
