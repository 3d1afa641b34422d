"""convert/download.py: models by name, from a server in the place of Google Drive, reached through a proxy."""

import hashlib
import json
import pickle
import re
import resource
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

import convert_focal_to_hf
import download
import golden_cases
import original
from focal_hf import FocalConfig, FocalForImageClassification
from messages import ConversionError

NAME = "focal_tiny_patch4_window7_224"
FILE = f"{NAME}.pdparams"
ID = download.PUBLIC_COPIES[NAME].drive_id
HOSTS = ("drive.google.com", "drive.usercontent.google.com", "accounts.google.com")
VIRUS_PAGE = (  # of a large file; on one line, as Google writes it
    '<html><form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="hidden" name="id" value="{id}"><input type="hidden" name="confirm" value="t"></form></html>'
)
QUOTA_PAGE = '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>'


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate for Google's hosts, with its key in the same file."""
    file = tmp_path_factory.mktemp("certificate") / "google.pem"
    names = ",".join(f"DNS:{host}" for host in HOSTS)
    usage = "keyUsage=critical,digitalSignature,keyCertSign"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=Google", "-addext", f"subjectAltName={names}", "-addext", usage]
    subprocess.run([*command, "-keyout", file, "-out", f"{file}.crt"], check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    """A checkpoint in Paddle's format: that of the golden case `base`, with 1000 classes."""
    state = dict(golden_cases.case("base").state_dict)
    state["head.weight"], state["head.bias"] = golden_cases.draw("head", (1000, 32)), torch.zeros(1000)
    is_matrix = {name: name.endswith(".weight") and tensor.ndim == 2 for name, tensor in state.items()}
    content = {name: (tensor.T if is_matrix[name] else tensor).numpy() for name, tensor in state.items()}
    # An entry of Paddle's, which makes half the file larger than the 512 KiB that gdown writes at once.
    return pickle.dumps(content | {"StructuredToParameterName@@": {"name": "x" * 1_200_000}})


@pytest.fixture
def drive(certificate, checkpoint, monkeypatch):
    """A proxy that answers for Google's hosts. `answer` chooses the answer; `requests` lists paths and ranges.

    The settings of the model NAME become those of the checkpoint.
    """
    state = SimpleNamespace(answer="file", requests=[])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_CONNECT(self):
            assert self.path.removesuffix(":443") in HOSTS
            self.send_response(200)
            self.end_headers()
            self.connection = tls.wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)
            self.close_connection = False

        def send(self, status, body, **headers):
            self.send_response(status)
            for header, value in ({"Content_Length": str(len(body)), "Content_Type": "text/html"} | headers).items():
                self.send_header(header.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(
                body[: len(body) // 2] if state.answer == "truncated" and "/download" in self.path else body
            )

        def do_GET(self):
            state.requests.append((self.path, self.headers["Range"]))
            if self.path == "/ServiceLogin":
                return self.send(200, b"<html>Sign in</html>")
            if state.answer == "removed":
                return self.send(404, b"<html>Not found</html>")
            if state.answer == "sign-in":
                return self.send(302, b"", Location="https://accounts.google.com/ServiceLogin")
            if state.answer == "quota":
                return self.send(200, QUOTA_PAGE.encode())
            if self.path == f"/uc?id={ID}":
                return self.send(200, VIRUS_PAGE.format(id=ID).encode())
            assert self.path == f"/download?id={ID}&confirm=t"
            file = b"<html>" if state.answer == "page as file" else checkpoint
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            headers = {"Content_Range": f"bytes {start}-{len(file) - 1}/{len(file)}"} if start else {}
            headers |= {"Content_Disposition": f'attachment; filename="{FILE}"', "ETag": '"1"'}
            self.send(206 if start else 200, file[start:], Content_Type="application/octet-stream", **headers)
            self.close_connection = state.answer == "truncated"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{server.server_port}")
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    model = golden_cases.case("base").config
    model = model | {"MODEL": model["MODEL"] | {"NUM_CLASSES": 1000}}
    monkeypatch.setitem(original.RELEASED, NAME, model)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def convert(tmp_path):
    """Converts NAME with the cache folder `tmp_path / "cache"`."""

    def convert(*options: str, name: str = NAME, cache: tuple[str, ...] = ("--cache-dir", str(tmp_path / "cache"))):
        convert_focal_to_hf.main(["--config", name, "--output", str(tmp_path / "out"), *cache, *options])
        return tmp_path / "out"

    return convert


def files(folder: Path) -> list[str]:
    """The files in a folder, without the lock and the random part in the name of an unfinished download."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(re.sub(r"\.pdparams.{8}\.part$", ".part", name) for name in names if not name.endswith(".lock"))


def test_a_model_by_name(drive, convert, checkpoint, tmp_path, capsys, monkeypatch):
    folder = convert()
    assert files(tmp_path / "cache") == [FILE]
    assert (tmp_path / "cache" / FILE).read_bytes() == checkpoint
    assert [path for path, _ in drive.requests] == [f"/uc?id={ID}", f"/download?id={ID}&confirm=t"]
    assert "100%" in capsys.readouterr().err  # the progress bar

    weight = FocalForImageClassification.from_pretrained(folder).classifier.weight
    assert torch.equal(weight, golden_cases.draw("head", (1000, 32)))
    assert FocalConfig.from_pretrained(folder).id2label[0] == "tench, Tinca tinca"
    sha256, page = hashlib.sha256(checkpoint).hexdigest(), f"https://drive.google.com/file/d/{ID}/view"
    source = {"source": page, "file_id": ID, "file": FILE, "size": len(checkpoint), "sha256": sha256}
    assert json.loads((folder / "conversion.json").read_text()) == source
    text = ModelCard.load(folder / "README.md").text
    assert f"`{FILE}`, downloaded from [Google Drive]({page}): {len(checkpoint):,} bytes, SHA-256 `{sha256}`" in text

    # The second run uses the cache, also offline.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    convert("--overwrite", "--expect-sha256", sha256.upper())
    assert len(drive.requests) == 2


def test_default_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._cache_assets, "HF_ASSETS_CACHE", str(tmp_path))
    assert download.cached_checkpoint(NAME, None) == tmp_path / "focal_hf" / "PaddleViT" / "Focal_Transformer" / FILE


def test_a_truncated_download_is_resumed(drive, convert, checkpoint, tmp_path):
    drive.answer = "truncated"
    with pytest.raises(ConversionError, match=r"524,288 bytes are kept\. To resume, run the command again"):
        convert()
    assert files(tmp_path) == [f"cache/unchecked/{NAME}.part"]

    drive.answer = "file"
    convert()
    assert drive.requests[-1] == (f"/download?id={ID}&confirm=t", "bytes=524288-")
    assert files(tmp_path / "cache") == [FILE]
    assert (tmp_path / "cache" / FILE).read_bytes() == checkpoint


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("removed", "sent a web page instead of"),
        ("sign-in", "sent a web page instead of"),
        ("quota", "sent a web page instead of"),
        ("page as file", "is not a Paddle checkpoint.* The file was deleted"),
    ],
)
def test_no_checkpoint_is_sent(drive, convert, tmp_path, answer, message):
    drive.answer = answer
    with pytest.raises(ConversionError, match=message) as caught:
        convert()
    places = (f"drive.google.com/file/d/{ID}/view", "pan.baidu.com/s/1JCr2qIA-SZvTqbTO-m2OwA (password i8c2)")
    for place in (*places, "focal-tiny-is224-ws7.pth", "--checkpoint"):
        assert place in str(caught.value)
    assert files(tmp_path) == []


def test_hashes(drive, convert, checkpoint, tmp_path, monkeypatch):
    sha256, wrong = hashlib.sha256(checkpoint).hexdigest(), "0" * 64
    with pytest.raises(ConversionError, match=f"has the SHA-256 {sha256}; expected {wrong}.* The file was deleted"):
        convert("--expect-sha256", wrong)
    assert files(tmp_path) == []
    monkeypatch.setitem(download.KNOWN_SHA256, NAME, wrong)
    with pytest.raises(ConversionError, match=f"expected {wrong}"):
        convert()
    assert files(tmp_path) == []

    # In the cache, and of a local file.
    (tmp_path / "cache" / FILE).write_bytes(checkpoint)
    with pytest.raises(ConversionError, match=f"expected {wrong}.* To download it again, delete"):
        convert()
    local = ("--checkpoint", str(tmp_path / "cache" / FILE))
    with pytest.raises(ConversionError, match=f"expected {wrong}"):
        convert(*local, "--expect-sha256", wrong, cache=())
    assert files(tmp_path) == [f"cache/{FILE}"]
    folder = convert(*local, "--expect-sha256", sha256, cache=())
    source = {"source": "local file", "file": FILE, "size": len(checkpoint), "sha256": sha256}
    assert json.loads((folder / "conversion.json").read_text()) == source


def test_two_downloads_at_once(drive, checkpoint, tmp_path):
    with ThreadPoolExecutor() as threads:
        for _ in range(2):
            threads.submit(download.download_checkpoint, NAME, tmp_path / FILE, None)
    assert files(tmp_path) == [FILE]
    assert (tmp_path / FILE).read_bytes() == checkpoint
    assert len(drive.requests) == 2  # of one download


def test_a_full_disk(drive, convert, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ConversionError, match=r"Writing to .*unchecked failed: .* Free some space"):
            convert()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == []


def test_no_network(drive, convert, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ConversionError, match=r"Downloading https://drive.* failed: .* Check the network"):
        convert()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("requirement", "found"), [("gdown>=1000", "found gdown=="), ("gdown-not-installed", "was not found")]
)
def test_gdown_is_missing_or_old(drive, convert, tmp_path, monkeypatch, requirement, found):
    monkeypatch.setattr(download, "GDOWN", requirement)
    with pytest.raises(ConversionError, match=rf"pip install '{requirement}'.*{found}"):
        convert()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_downloaded(drive, convert, tmp_path, monkeypatch, capsys):
    with pytest.raises(ConversionError, match=r"No public copy .*focalv2-base-useconv-is224-ws7\.pth.*--checkpoint"):
        convert(name="focalv2_base_useconv_patch4_window7_224")
    with pytest.raises(ConversionError, match=rf"Without --checkpoint.*got my\.yaml.*{NAME}"):
        convert(name="my.yaml")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConversionError, match=r"HF_HUB_OFFLINE=1 forbids downloads.*--checkpoint"):
        convert()
    with pytest.raises(ConversionError, match=r"--output .*out holds the input .*pdparams"):
        convert(cache=("--cache-dir", str(tmp_path / "out")))
    for options in (["--expect-sha256", "12"], ["--checkpoint", "a.pth"]):
        with pytest.raises(SystemExit):
            convert(*options)
        assert f"argument {'--expect-sha256' if '12' in options else '--cache-dir'}: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert drive.requests == []
