"""A small local server in place of the Hub, for transformers and datasets to load from and upload to.

huggingface_hub reads the Hub's address only when it is imported. So the server has the same address in all tests, and
conftest.py sets HF_ENDPOINT before the import.
"""

import base64
import contextlib
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from ports import reserve_port

REVISION = "0" * 40
USER = {"type": "user", "name": "me", "orgs": [{"name": "org"}]}

PORT = reserve_port()
ADDRESS = f"http://127.0.0.1:{PORT}"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve(folder: Path, repository: str, kind: str = "models", uploads: list[str] | None = None):
    """Serves `folder` as `repository`, and uploads go there. Meanwhile, this process is online, with an empty cache.

    As on the Hub, `.safetensors` files are uploaded by Git LFS. This server has no Xet.
    Every token but "invalid" belongs to USER, who may create no repository but this one.

    Args:
        folder: Need not exist before an upload creates the repository.
        kind: "models" or "datasets".
        uploads: Gets one line for each repository that is created, each LFS file that is sent and each commit.
    """
    from huggingface_hub import constants  # conftest.py imports this module before it sets HF_ENDPOINT

    api = f"api/{kind}/{repository}"
    files_at = f"{repository}/resolve" if kind == "models" else f"{kind}/{repository}/resolve"
    uploads = [] if uploads is None else uploads
    lfs_files = folder.with_name(f"{folder.name}.lfs")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer_json(self, content, status=200):
            self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

        def do_GET(self):
            path = self.path.split("?")[0].strip("/")
            if path == "api/whoami-v2":
                return self.answer(401) if self.headers["Authorization"] == "Bearer invalid" else self.answer_json(USER)
            if not folder.exists():
                return self.answer(404, X_Error_Code="RepoNotFound")
            if path in (api, f"{api}/revision/main", f"{api}/revision/{REVISION}"):
                files = [{"rfilename": str(file.relative_to(folder))} for file in folder.rglob("*") if file.is_file()]
                return self.answer_json({"id": repository, "sha": REVISION, "siblings": files, "tags": []})
            for revision in ("main", REVISION):
                tree, files = f"{api}/tree/{revision}", f"{files_at}/{revision}/"
                listed = folder / path.removeprefix(tree).strip("/")
                if path.startswith(tree) and listed.is_dir():
                    return self.answer_json([self.entry(item) for item in listed.iterdir()])
                file = folder / path.removeprefix(files)
                if path.startswith(files) and file.is_file():
                    body = file.read_bytes()
                    etag = f'"{hashlib.sha1(body).hexdigest()}"'
                    return self.answer(200, body, ETag=etag, X_Repo_Commit=REVISION)
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=REVISION)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            path = self.path.split("?")[0].strip("/")
            if not self.headers["Authorization"]:
                return self.answer(401)
            if path == "api/repos/create":
                asked = json.loads(body)
                if f"{asked['organization'] or USER['name']}/{asked['name']}" != repository:
                    return self.answer(403, X_Error_Message="You may not create this repository")
                if folder.exists():
                    return self.answer_json({"url": f"{ADDRESS}/{repository}"}, status=409)
                folder.mkdir()
                uploads.append(f"create {asked.get('visibility', 'default')}")
                return self.answer_json({"url": f"{ADDRESS}/{repository}"})
            if path == "api/validate-yaml":
                return self.answer_json({"errors": [], "warnings": []})
            if path == f"{api}/preupload/main":
                return self.answer_json(
                    {"files": [self.upload_mode(file["path"]) for file in json.loads(body)["files"]]}
                )
            if path == f"{repository}.git/info/lfs/objects/batch":
                objects = json.loads(body)["objects"]
                for file in objects:
                    if not (lfs_files / file["oid"]).exists():
                        file["actions"] = {"upload": {"href": f"{ADDRESS}/lfs/{file['oid']}"}}
                return self.answer_json({"transfer": "basic", "objects": objects})
            if path == f"{api}/commit/main":
                for line in map(json.loads, body.splitlines()):
                    self.commit(line["key"], line["value"])
                uploads.append("commit")
                return self.answer_json(
                    {"commitUrl": f"{ADDRESS}/{repository}/commit/{REVISION}", "commitOid": REVISION}
                )
            return self.answer(404)

        def do_PUT(self):
            digest = self.path.removeprefix("/lfs/")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if hashlib.sha256(body).hexdigest() != digest:
                return self.answer(400)
            lfs_files.mkdir(exist_ok=True)
            (lfs_files / digest).write_bytes(body)
            uploads.append(f"lfs {digest}")
            return self.answer(200)

        def upload_mode(self, path):
            is_lfs = path.endswith(".safetensors")
            mode = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if (folder / path).is_file():
                content = (folder / path).read_bytes()
                mode["oid"] = hashlib.sha256(content).hexdigest() if is_lfs else git_hash(content)
            return mode

        def commit(self, key, value):
            if key in ("file", "lfsFile"):
                file = folder / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                if key == "file":
                    file.write_bytes(base64.b64decode(value["content"]))
                else:
                    shutil.copyfile(lfs_files / value["oid"], file)

        def entry(self, item):
            size, content = (0, item.name.encode()) if item.is_dir() else (item.stat().st_size, item.read_bytes())
            return {
                "type": "directory" if item.is_dir() else "file",
                "path": str(item.relative_to(folder)),
                "oid": git_hash(content),
                "size": size,
            }

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with mock.patch.multiple(
            constants, HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(folder.with_name(f"{folder.name}.cache"))
        ):
            yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
