"""OpenAI's protocol on loopback: in a thread (`serve`) or a process (`python -m tests.servers.api`). Fast.

Refuses streaming and more than one choice: potstill asks for neither.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.servers.answers import answer_to, body_key, models
from tests.servers.batches import Batches
from tests.servers.faults import Bucket, Settings, pick_fault

__all__ = ["Server", "main", "serve"]

_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    429: "Too Many Requests",
}
_CODES = {"http_429_after": 429, "no_quota": 429, "http_401": 401}


class Server:
    """What one server has seen. Counts by name; `answered` maps a body's key to how often it was answered."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.url = ""
        self.batches = Batches(self)
        self.active = 0
        rate = settings.rate
        self.bucket = None if rate is None else Bucket(rate, settings.burst or rate, time.monotonic())
        self.log = None if settings.log is None else Path(settings.log).open("a", buffering=1)  # noqa: SIM115

    def stats(self) -> dict[str, Any]:
        """What GET /stats gives."""
        again = sum(count - 1 for count in self.answered.values())
        return {"counts": dict(self.counts), "answered": sum(self.answered.values()), "answered_again": again}

    def note(self, body: dict[str, Any]) -> None:
        """An answer has gone out whole."""
        key = body_key(body)
        self.answered[key] += 1
        if self.log is not None:
            self.log.write(key + "\n")

    def admits(self) -> bool:
        """Whether the server's own limits let a request in."""
        if self.settings.parallel is not None and self.active >= self.settings.parallel:
            return False
        return self.bucket is None or self.bucket.take(time.monotonic())


class _Connection(asyncio.Protocol):
    """One client: reads requests one after another, answers each."""

    def __init__(self, server: Server) -> None:
        self.server, self.buffer, self.task = server, b"", None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.server.counts["connections"] += 1

    def connection_lost(self, _error: Exception | None) -> None:
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.buffer[:1] == b"\x16":  # TLS
            self.transport.write(_head(400, 0))
            return self.transport.close()
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if headers.get("transfer-encoding") == "chunked":
            if not rest.endswith(b"0\r\n\r\n"):
                return None
            rest, length = _unchunked(rest), -1
        elif len(rest) < length:
            return None
        self.buffer = b"" if length < 0 else rest[length:]
        method, path, _ = line.split(" ", 2)
        return self.route(method, path, (headers, rest if length < 0 else rest[:length]))

    def route(self, method: str, path: str, sent: tuple[dict[str, str], bytes]) -> None:
        server, (headers, content) = self.server, sent
        path = path.partition("?")[0]
        if path == "/stats":
            return self.send(200, server.stats())
        server.headers = [*server.headers[-99:], headers]
        server.bodies = [*server.bodies[-99:], content] if len(content) < 100_000 else server.bodies
        if server.settings.key is not None and headers.get("authorization") != f"Bearer {server.settings.key}":
            message = f"Incorrect API key provided: {headers.get('authorization', '')}"
            return self.send(401, {"error": {"message": message, "code": "invalid_api_key"}})
        if (method, path) == ("GET", "/v1/models") and server.settings.models is not None:
            return self.send(200, models(server.settings.models))
        if path.startswith(("/v1/files", "/v1/batches")):
            return self.send(*server.batches.route(method, path.removeprefix("/v1"), (headers, content)))
        if method == "POST" and path in ("/v1/chat/completions", "/v1/completions"):
            return self.complete(path.endswith("chat/completions"), content)
        return self.send(404, {"error": {"message": f"no such path: {path}"}})

    def complete(self, chat: bool, content: bytes) -> None:
        server = self.server
        body, number = json.loads(content), server.counts["received"]
        server.counts["received"] += 1
        if server.settings.models is not None and body.get("model") not in server.settings.models:
            error = {"message": f"The model `{body.get('model')}` does not exist.", "code": "model_not_found"}
            return self.send(404, {"error": error})
        if not {"messages", "prompt"} & set(body):
            return self.refuse(400)
        if not server.admits():
            server.counts["limited"] += 1
            return self.refuse(429, server.settings.retry_after)
        fault = pick_fault(server.settings, number, body)
        if fault is None and not server.settings.delay_s:
            return self.answer(body, chat, None)
        self.task = asyncio.get_running_loop().create_task(self.work(body, chat, fault))
        return None

    async def work(self, body: dict[str, Any], chat: bool, fault: str | None) -> None:
        self.server.active += 1
        try:
            if self.server.settings.delay_s:
                await asyncio.sleep(self.server.settings.delay_s)
            if fault is None:
                self.answer(body, chat, None)
            else:
                self.server.counts[fault] += 1
                await self.misbehave(body, chat, fault)
        finally:
            self.server.active -= 1

    def answer(self, body: dict[str, Any], chat: bool, model: str | None) -> None:
        self.send(200, answer_to(body, chat=chat, write=self.server.settings.answer, model=model))
        if model is None:
            self.server.note(body)

    def refuse(self, status: int, retry_after: str | None = None, **error: str) -> None:
        extra = {} if retry_after is None else {"Retry-After": retry_after}
        self.send(status, {"error": {"message": f"fault {status}", **error}}, extra)

    async def misbehave(self, body: dict[str, Any], chat: bool, fault: str) -> None:
        whole = answer_to(body, chat=chat)
        raw = json.dumps(whole).encode()
        match fault:
            case "no_quota":
                self.refuse(429, code="insufficient_quota", type="insufficient_quota")
            case "http_429_after":
                self.refuse(429, "1")
            case _ if fault.startswith("http_"):
                self.refuse(int(fault.removeprefix("http_")))
            case "hang":
                await asyncio.sleep(3600)
            case "reset":
                self.transport.write(_head(200, len(raw)) + raw[: len(raw) // 2])
                self.transport.abort()
            case "slow_drip":
                await self.drip(raw)
            case "truncated_json":
                self.send(200, raw[: len(raw) // 2])
            case "no_choices":
                self.send(200, whole | {"choices": []})
            case "wrong_model":
                self.send(200, whole | {"model": "another-7b"})
            case "error_in_200":
                self.send(200, {"error": {"message": "upstream failed", "code": 502}})
            case "invalid_utf8":
                self.send(200, raw.replace(b"answer number", b"answer \xff\xfe number"))
            case "too_large":
                self.send(200, answer_to(body, chat=chat, write=lambda _: "x" * 10_500_000))
            case "empty":
                self.send(200, answer_to(body, chat=chat, write=lambda _: ""))
            case "content_filter":
                whole["choices"][0] |= {"finish_reason": "content_filter"}
                whole["choices"][0] |= {"message": {"role": "assistant", "content": ""}} if chat else {"text": ""}
                self.send(200, whole)
            case "gzip":
                self.send(200, gzip.compress(b" " * 50_000_000 + raw), {"Content-Encoding": "gzip"})
            case "endless_error":
                await self.flood()

    async def drip(self, raw: bytes) -> None:
        self.transport.write(_head(200, len(raw)))
        for place in range(len(raw)):
            self.transport.write(raw[place : place + 1])
            await asyncio.sleep(0.2)

    async def flood(self) -> None:
        self.transport.write(b"HTTP/1.1 500 Failed\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not self.transport.is_closing():
            self.transport.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            await asyncio.sleep(0.001)

    def send(self, status: int, content: Any, extra: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.server.counts[f"sent_{status}"] += 1
        self.transport.write(_head(status, len(raw), extra) + raw)


def _head(status: int, length: int, extra: dict[str, str] | None = None) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in (extra or {}).items())
    reason = _REASONS.get(status, "Failed")
    told = f"Content-Type: application/json\r\nContent-Length: {length}\r\n{lines}"
    return f"HTTP/1.1 {status} {reason}\r\n{told}\r\n".encode()


def _unchunked(rest: bytes) -> bytes:
    parts = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return b"".join(parts)


async def _listen(server: Server, port: int) -> asyncio.Server:
    listener = await asyncio.get_running_loop().create_server(
        lambda: _Connection(server), "127.0.0.1", port, backlog=1024
    )
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    return listener


@contextlib.contextmanager
def serve(settings: Settings | None = None) -> Iterator[Server]:
    """A server in a thread of its own, on a free port, until the block ends."""
    server, loop = Server(settings or Settings()), asyncio.new_event_loop()
    listener = loop.run_until_complete(_listen(server, 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_shut(listener), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
        if server.log is not None:
            server.log.close()


async def _shut(listener: asyncio.Server) -> None:
    listener.close()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _settings() -> tuple[Settings, int]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--burst", type=float)
    parser.add_argument("--retry-after")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--parallel", type=int)
    parser.add_argument("--fault", action="append", default=[], metavar="NAME=SHARE")
    parser.add_argument("--key")
    parser.add_argument("--model", action="append")
    parser.add_argument("--log")
    parser.add_argument("--seed", type=int, default=0)
    got = parser.parse_args()
    faults = {name: float(share) for name, _, share in (fault.partition("=") for fault in got.fault)}
    names = tuple(got.model or ["teacher"])
    rules = {"rate": got.rate, "burst": got.burst, "retry_after": got.retry_after, "parallel": got.parallel}
    rest = {"key": got.key, "log": got.log, "seed": got.seed, "delay_s": got.delay_ms / 1000.0}
    return Settings(**rules, **rest, faults=faults, models=names), got.port


async def _run() -> None:
    settings, port = _settings()
    server = Server(settings)
    listener = await _listen(server, port)
    print(json.dumps({"url": server.url, "port": int(server.url.split(":")[2].split("/")[0])}), flush=True)  # noqa: T201
    await listener.serve_forever()


def main() -> None:
    """Serve as the command line says; the first line printed is JSON with `url` and `port`."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run())


if __name__ == "__main__":
    main()
