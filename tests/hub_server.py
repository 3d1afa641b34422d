"""A small local server in place of the Hub, for transformers and datasets to load from and upload to."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0" * 40


@contextlib.contextmanager
def serve(folder: Path, repository: str, kind: str = "models"):
    """Serves `folder` as `repository`, and uploads go there; gives the address for the variable HF_ENDPOINT.

    `kind` is "models" or "datasets".
    """
    api = f"api/{kind}/{repository}"
    files_at = f"{repository}/resolve" if kind == "models" else f"{kind}/{repository}/resolve"

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

        def answer_json(self, content):
            self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

        def do_GET(self):
            path = self.path.split("?")[0].strip("/")
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
            if path == "api/repos/create":
                return self.answer_json({"url": f"{address}/{repository}"})
            if path == "api/validate-yaml":
                return self.answer_json({"errors": [], "warnings": []})
            if path == f"{api}/preupload/main":
                files = json.loads(body)["files"]
                return self.answer_json(
                    {"files": [file | {"uploadMode": "regular", "shouldIgnore": False} for file in files]}
                )
            if path == f"{api}/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        file = folder / line["value"]["path"]
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(base64.b64decode(line["value"]["content"]))
                return self.answer_json(
                    {"commitUrl": f"{address}/{repository}/commit/{REVISION}", "commitOid": REVISION}
                )
            return self.answer(404)

        def entry(self, item):
            size, digest = (0, "") if item.is_dir() else (item.stat().st_size, item.read_bytes())
            return {
                "type": "directory" if item.is_dir() else "file",
                "path": str(item.relative_to(folder)),
                "oid": hashlib.sha1(digest or item.name.encode()).hexdigest(),
                "size": size,
            }

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
