"""A Hugging Face hub on this computer: the part of its web interface that the real huggingface_hub client uses here.

Files above a few kilobytes are listed by SHA-256 and served with it as ETag, as the real hub does with large files; smaller ones by
git's blob name.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 4096


@dataclass
class Hub:
    """Repositories in memory: name -> commit -> file -> content. The newest commit is the main branch."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    served_instead: dict[str, bytes] = field(default_factory=dict)  # file -> what a bad line makes of it
    seen: list[str] = field(default_factory=list)

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(repository, {})
        oid = hashlib.sha1(json.dumps([repository, len(commits)]).encode()).hexdigest()
        commits[oid] = {**(list(commits.values())[-1] if commits else {}), **files}
        return oid

    def at(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(repository, {})
        oid = list(commits)[-1] if revision == "main" and commits else revision
        return (oid, commits[oid]) if oid in commits else None


def serve(hub: Hub) -> ThreadingHTTPServer:
    """The server, not yet running; its address is ``server.server_port``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            parts = self._parts()
            if parts[:2] == ["api", "models"]:
                found = hub.at("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
                return self._missing() if found is None else self._json(listing("/".join(parts[2:4]), *found))
            return self._file(parts)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            parts, body = self._parts(), self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if parts == ["api", "validate-yaml"]:
                return self._json({"warnings": [], "errors": []})
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                hub.repositories.setdefault(name, {})
                private = asked.get("private") or asked.get("visibility") == "private"  # by the client's version
                hub.seen.append(f"create {name} private={private}")
                return self._json({"url": f"http://{self.headers['Host']}/{name}"})
            repository = "/".join(parts[2:4])
            if parts[4] == "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                return self._json({"files": modes})
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            oid = hub.commit(repository, {path: base64.b64decode(content) for path, content in files.items()})
            return self._json(
                {"commitUrl": f"http://{self.headers['Host']}/{repository}/commit/{oid}", "commitOid": oid}
            )

        def _file(self, parts: list[str]) -> None:
            repository, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            found = hub.at(repository, revision)
            if found is None or name not in found[1]:
                return self._missing()
            content = hub.served_instead.get(name, found[1][name])
            self._send(content, {"ETag": f'"{etag(found[1][name])}"', "X-Repo-Commit": found[0]})

        def _json(self, answer: object) -> None:
            self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _missing(self) -> None:
            self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

        def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _parts(self) -> list[str]:
            hub.seen.append(f"{self.command} {self.path}")
            return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if len(content) > LARGE else blob_id(content)


def blob_id(content: bytes) -> str:
    """As ``git hash-object`` names a file."""
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


def listing(repository: str, oid: str, files: dict[str, bytes]) -> dict[str, object]:
    siblings = []
    for name, content in files.items():
        entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
        if len(content) > LARGE:
            entry["lfs"] = {"sha256": etag(content), "size": len(content), "pointerSize": 100}
        siblings.append(entry)
    return {"id": repository, "modelId": repository, "sha": oid, "siblings": siblings, "tags": [], "private": False}
