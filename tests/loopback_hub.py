"""A Hub on this machine: the HTTP calls `huggingface_hub` really makes for model repositories, kept on disk, and those
`datasets` makes to read one.

    with LoopbackHub(folder) as hub:   # hub.environment() points a process's client here
        ...

Users are tokens: `hf_<name>` is the token of <name>. A repository is a folder of blobs (named by content), commits
(one JSON file each, written whole or not at all) and references; nothing becomes visible before its commit does.
`hub.refuse = "/tag/"` answers every request whose path has it with 404, as a server that knows no such page.
`hub.cut_uploads = n` breaks the connection in the middle of the next n uploads of large files.
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from warm_python import WarmPython

SMALL_FILE = 10_000  # bytes; larger files and safetensors travel by LFS


class HubError(Exception):
    """An answer that is no success: status, the Hub's error code, words."""

    def __init__(self, status: int, words: str, code: str | None = None, **body):
        super().__init__(words)
        self.status, self.words, self.code, self.body = status, words, code, body


def git_oid(content: bytes) -> str:
    """Git's name of a blob, by which the client skips files that have not changed."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Commits, references and files of one repository, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, private: bool) -> "Repository":
        for name in ("blobs", "commits"):
            (folder / name).mkdir(parents=True)
        self = cls(folder)
        self._write("settings", {"private": private, "gated": False})
        self._write("refs", {})
        self.commit("refs/heads/main", "initial commit", {".gitattributes": self.store(b"")}, [])
        return self

    def _write(self, name: str, value) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(json.dumps(value))
        part.replace(self.folder / f"{name}.json")

    def read(self, name: str):
        return json.loads((self.folder / f"{name}.json").read_text())

    def store(self, content: bytes) -> dict:
        """Keep a blob -> its entry in a commit."""
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / "blobs" / sha256).write_bytes(content)
        return {"sha256": sha256, "size": len(content), "oid": git_oid(content), "lfs": False}

    def resolve(self, revision: str) -> str:
        """Branch, tag, refs/pr/N or commit -> commit."""
        refs = self.read("refs")
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in refs:
                return refs[name]
        if (self.folder / "commits" / f"{revision}.json").is_file():
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, commit: str) -> dict[str, dict]:
        return json.loads((self.folder / "commits" / f"{commit}.json").read_text())["files"]

    def history(self, revision: str) -> list[dict]:
        """Commits from the newest to the first."""
        commits, oid = [], self.resolve(revision)
        while oid:
            commits.append(json.loads((self.folder / "commits" / f"{oid}.json").read_text()) | {"oid": oid})
            oid = commits[-1]["parent"]
        return commits

    def commit(self, ref: str, message: str, added: dict[str, dict], deleted: list[str], parent: str | None = None):
        refs = self.read("refs")
        parent = parent or refs.get(ref)
        files = dict(self.files(parent)) if parent else {}
        for path in deleted:
            files = {name: entry for name, entry in files.items() if name != path and not name.startswith(path)}
        value = {"parent": parent, "message": message, "files": files | added, "time": time.time()}
        oid = hashlib.sha1(json.dumps(value).encode()).hexdigest()
        self._write(f"commits/{oid}", value)
        self._write("refs", refs | {ref: oid})  # the moment it becomes visible
        return oid


class Handler(BaseHTTPRequestHandler):
    """Answers one client."""

    protocol_version = "HTTP/1.1"
    hub: "LoopbackHub"

    def log_message(self, *args):
        pass

    # ---- plumbing

    def _answer(self, status: int, body: bytes = b"", headers: dict | None = None, kind: str = "application/json"):
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status: int = 200):
        self._answer(status, json.dumps(value).encode())

    def _handle(self):
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        path = unquote(split.path)
        self.hub.requests.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        try:
            if self.command == "PUT":
                return self._put_blob(path, size, chunked)
            if self.hub.refuse and self.hub.refuse in path:
                self.rfile.read(size)
                raise HubError(404, f"no such page: {self.command} {path}")
            self.body = self._read_chunks() if chunked else self.rfile.read(size)
            with self.hub.lock:
                for method, pattern, action in ROUTES:
                    if self.command == method and (found := re.fullmatch(pattern, path)):
                        return action(self, *found.groups())
            raise HubError(404, f"no such page: {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": error.words} | ({"X-Error-Code": error.code} if error.code else {})
            body = json.dumps({"error": error.words, **error.body}).encode()
            self._answer(error.status, body, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    # ---- who, and what they may see

    def _user(self) -> str | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        found = re.fullmatch(r"Bearer hf_([A-Za-z0-9]+)", header)
        if not found or found[1] not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return found[1]

    def _repository(self, name: str, write: bool = False) -> Repository:
        repository, user = Repository(self.hub.folder / name), self._user()
        owner = name.split("/")[0]
        exists = (repository.folder / "refs.json").is_file()
        if not exists or (repository.read("settings")["private"] and user != owner):
            # a private repository looks like none
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if repository.read("settings")["gated"] and user != owner:
            raise HubError(403, f"Access to model {name} is restricted", "GatedRepo")
        if write and user != owner and "create_pr" not in self.query and self.query.get("create_pr") is None:
            raise HubError(403 if user else 401, f"You don't have the rights to write to {name}")
        return repository

    # ---- actions

    def whoami(self):
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        self._json({"type": "user", "name": user, "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def create_repo(self):
        user, body = self._user(), json.loads(self.body)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner = body.get("organization") or user
        name = f"{owner}/{body['name']}"
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner}")
        url = f"{self.hub.endpoint}/{name}"
        if (self.hub.folder / name / "refs.json").is_file():
            raise HubError(409, "You already created this model repo", url=url)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        Repository.create(self.hub.folder / name, private)
        self._json({"url": url, "name": name, "id": name})

    def validate_yaml(self):
        self._json({"errors": [], "warnings": []})

    def preupload(self, name, revision):
        repository = self._repository(name, write=True)
        files = repository.files(repository.resolve(revision))
        answer = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > SMALL_FILE
            entry = files.get(file["path"])
            oid = None if entry is None else entry["sha256"] if entry["lfs"] else entry["oid"]
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def lfs_batch(self, name):
        self._repository(name)
        if self._user() is None:
            raise HubError(401, "Invalid username or password.")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.hub.folder / name / "blobs" / wanted["oid"]).is_file():
                base = f"{self.hub.endpoint}/lfs/{name}/{wanted['oid']}"
                token = self.headers.get("Authorization", "")
                entry["actions"] = {
                    "upload": {"href": base},
                    "verify": {"href": f"{base}/verify", "header": {"Authorization": token}},
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _put_blob(self, path: str, size: int, chunked: bool):
        name, oid = re.fullmatch(r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})", path).groups()
        if self.hub.cut_uploads > 0:
            self.hub.cut_uploads -= 1
            self.rfile.read(min(size, 1000))
            self.close_connection = True
            self.connection.close()
            return
        content = self._read_chunks() if chunked else self.rfile.read(size)
        if hashlib.sha256(content).hexdigest() == oid:
            part = self.hub.folder / name / "blobs" / f"{oid}.{threading.get_ident()}.part"
            part.write_bytes(content)
            part.replace(part.with_name(oid))
            self._answer(200)
        else:
            self._answer(400)

    def verify(self, name, oid):
        if not (self.hub.folder / name / "blobs" / oid).is_file():
            raise HubError(404, "the object was not uploaded")
        self._json({})

    def commit(self, name, revision):
        repository = self._repository(name, write=True)
        header, added, deleted = {}, {}, []
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                added[value["path"]] = repository.store(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if not (repository.folder / "blobs" / value["oid"]).is_file():
                    raise HubError(400, f"LFS object {value['oid']} was never uploaded")
                entry = {"sha256": value["oid"], "size": value["size"], "oid": value["oid"][:40], "lfs": True}
                added[value["path"]] = entry
            else:
                deleted.append(value["path"])
        head, number = repository.resolve(revision), None
        if header.get("parentCommit") not in (None, head):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.read("refs"))
            ref = f"refs/pr/{number}"
        oid = repository.commit(ref, header["summary"], added, deleted, parent=head)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"}
        if number:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{number}"
        self._json(answer)

    def merge(self, name, number):
        repository = self._repository(name, write=True)
        ours = repository.files(repository.resolve("main"))
        theirs = repository.files(repository.resolve(f"refs/pr/{number}"))
        added = {path: entry for path, entry in theirs.items() if ours.get(path) != entry}
        repository.commit("refs/heads/main", f"Merge pull request {number}", added, [])
        self._json({})

    def branch(self, name, branch):
        repository = self._repository(name, write=True)
        refs = repository.read("refs")
        if f"refs/heads/{branch}" in refs:
            raise HubError(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository._write("refs", refs | {f"refs/heads/{branch}": repository.resolve(start)})
        self._json({})

    def tag(self, name, revision):
        repository = self._repository(name, write=True)
        tag, refs = json.loads(self.body)["tag"], repository.read("refs")
        if f"refs/tags/{tag}" in refs:
            raise HubError(409, f"Tag already exists: {tag}")
        repository._write("refs", refs | {f"refs/tags/{tag}": repository.resolve(revision)})
        self._json({})

    def refs(self, name):
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/"}
        refs = self._repository(name).read("refs").items()
        answer = {
            kind: [{"name": ref.removeprefix(start), "ref": ref, "targetCommit": oid} for ref, oid in refs
                   if ref.startswith(start)]
            for kind, start in kinds.items()
        }  # fmt: skip
        self._json(answer | {"converts": []})

    def info(self, name, revision=None):
        repository = self._repository(name)
        oid = repository.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in repository.files(oid)]
        answer = {"_id": name, "id": name, "modelId": name, "sha": oid, "tags": [], "downloads": 0, "likes": 0}
        self._json(answer | repository.read("settings") | {"disabled": False, "siblings": siblings})

    def tree(self, name, revision):
        repository = self._repository(name)
        entries = []
        for path, entry in repository.files(repository.resolve(revision)).items():
            item = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
            if entry["lfs"]:
                item["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}
            entries.append(item)
        self._json(entries)

    def download(self, name, revision, path):
        repository = self._repository(name)
        oid = repository.resolve(revision)
        entry = repository.files(oid).get(path)
        if entry is None:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        content = (repository.folder / "blobs" / entry["sha256"]).read_bytes()
        etag = entry["sha256"] if entry["lfs"] else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if entry["lfs"]:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
        self._answer(200, content, headers, "application/octet-stream")


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/lfs/{NAME}/([0-9a-f]+)/verify", Handler.verify),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/api/models/{NAME}/discussions/(\d+)/merge", Handler.merge),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", rf"/api/models/{NAME}/tag/(.+)", Handler.tag),
    ("GET", rf"/api/models/{NAME}/refs", Handler.refs),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/(refs/pr/\d+|[^/]+)(?:/.*)?", Handler.tree),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/{NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.download),
    ("HEAD", rf"/{NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.download),
    ("GET", rf"/api/datasets/{NAME}(?:/revision/(.+))?", Handler.info),
    ("GET", rf"/api/datasets/{NAME}/tree/([^/]+)(?:/.*)?", Handler.tree),
    ("GET", rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", Handler.download),
    ("HEAD", rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", Handler.download),
]


class LoopbackHub:
    """The server, in a thread; a context manager."""

    def __init__(self, folder: Path, users: tuple[str, ...] = ("alice", "bob")):
        self.folder, self.users = Path(folder), users
        self.lock, self.cut_uploads, self.refuse, self.requests = threading.Lock(), 0, None, []
        self.pythons: dict[str, WarmPython] = {}
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()
        for python in self.pythons.values():
            python.close()

    def repository(self, name: str) -> Repository:
        """A repository, to look at from a test."""
        return Repository(self.folder / name)

    def run(
        self, *words: str, home: Path, user: str | None = None, python: str = sys.executable, **environment: str
    ) -> tuple[int, str]:
        """Run an interpreter whose client talks to this Hub and keeps its cache in `home` -> (exit code, printed)."""
        environment = self.environment(home, user) | environment
        token = {}
        if "HF_TOKEN" in environment:  # alone is read when it is needed, not when the client is imported
            token["HF_TOKEN"] = environment.pop("HF_TOKEN")
        key = json.dumps([python, environment], sort_keys=True)
        if key not in self.pythons:
            self.pythons[key] = WarmPython(python, environment)
        return self.pythons[key].run(*words, **token)

    def environment(self, home: Path, user: str | None = None) -> dict[str, str]:
        """Environment of a process whose client talks to this Hub; `home` is its own cache."""
        own = ("HF_", "HUGGING", "PYTEST_CURRENT_TEST")  # the last one would make each test a server of its own
        given = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        given |= {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return given | ({"HF_TOKEN": f"hf_{user}"} if user else {})
