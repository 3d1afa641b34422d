"""A small server in the Hub's place: answers what transformers asks when it loads a model by name."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0" * 40


@contextlib.contextmanager
def serve(folder: Path, repository: str):
    """Serves `folder` as `repository`; gives the address for the environment variable HF_ENDPOINT."""

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

        def do_GET(self):
            path = self.path.split("?")[0].strip("/")
            if path in (f"api/models/{repository}", f"api/models/{repository}/revision/main"):
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                info = {"id": repository, "modelId": repository, "sha": REVISION, "siblings": files, "tags": []}
                return self.answer(200, json.dumps(info | {"private": False}).encode(), Content_Type="application/json")
            for revision in ("main", REVISION):
                file = folder / path.removeprefix(f"{repository}/resolve/{revision}/")
                if path.startswith(f"{repository}/resolve/{revision}/") and file.is_file():
                    body = file.read_bytes()
                    etag = f'"{hashlib.sha1(body).hexdigest()}"'
                    return self.answer(200, body, ETag=etag, X_Repo_Commit=REVISION)
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=REVISION)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
