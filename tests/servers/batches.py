"""Files and batches of the test server: the second poll finds a batch answered. Refuses to wait a day."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from tests.servers.answers import answer_to
from tests.servers.faults import pick_fault

if TYPE_CHECKING:
    from tests.servers.api import Server

__all__ = ["Batches"]

Sent = tuple[dict[str, str], bytes]
_ABSENT = (404, {"error": {"message": "no such file or batch"}})


class Batches:
    """What was uploaded, and what became of it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}

    def route(self, method: str, path: str, sent: Sent) -> tuple[int, Any]:
        match method, path.strip("/").split("/"):
            case "POST", ["files"]:
                return 200, self._file(_uploaded(*sent))
            case "GET", ["files", name, "content"] if name in self.files:
                return 200, self.files[name]
            case "POST", ["batches"]:
                return self._create(json.loads(sent[1]))
            case "GET", ["batches"]:
                return 200, {"object": "list", "data": [*self.batches.values()][::-1], "has_more": False}
            case "GET", ["batches", name] if name in self.batches:
                return 200, self._advance(self.batches[name])
            case "POST", ["batches", name, "cancel"] if name in self.batches:
                return 200, self._stop(self.batches[name])
        return _ABSENT

    def _file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        rest = {"purpose": "batch", "filename": "batch.jsonl", "status": "processed"}
        return {"id": name, "object": "file", "bytes": len(content), "created_at": 0, **rest}

    def _create(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("input_file_id") not in self.files:
            return _ABSENT
        name = f"batch-{len(self.batches)}"
        total = len(self.files[body["input_file_id"]].splitlines())
        counts = {"total": total, "completed": 0, "failed": 0}
        self.batches[name] = {
            "id": name, "object": "batch", "status": "validating", "created_at": 0, "completion_window": "24h",
            "endpoint": body["endpoint"], "input_file_id": body["input_file_id"], "request_counts": counts,
            "metadata": body.get("metadata"),
        }  # fmt: skip
        return 200, self.batches[name]

    def _advance(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch["status"] == "validating":
            batch["status"] = "in_progress"
        elif batch["status"] == "in_progress":
            self._finish(batch)
        return batch

    def _stop(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["status"] = "cancelled"
        return batch

    def _finish(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for number, line in enumerate(self.files[batch["input_file_id"]].splitlines()):
            item = json.loads(line)
            answer = {"custom_id": item["custom_id"], "id": f"line-{number}", "error": None}
            if pick_fault(self.server.settings, number, item["body"]) is not None:
                bad.append(answer | {"response": {"status_code": 500, "body": {"error": {"message": "failed"}}}})
                continue
            said = answer_to(item["body"], chat="chat" in item["url"], write=self.server.settings.answer)
            self.server.note(item["body"])
            good.append(answer | {"response": {"status_code": 200, "request_id": "r", "body": said}})
        for field, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[field] = self._file("".join(json.dumps(line) + "\n" for line in lines).encode())["id"]
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        batch["status"] = "completed"


def _uploaded(headers: dict[str, str], content: bytes) -> bytes:
    """The file in a form."""
    found = re.search(r'boundary="?([^";]+)', headers["content-type"])
    assert found is not None
    for part in content.split(b"--" + found[1].encode()):
        head, _, rest = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return rest.removesuffix(b"\r\n")
    raise ValueError("the form has no file")
