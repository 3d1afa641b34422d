"""Models by name, from a server in the place of Google Drive, reached through a proxy; and from there to the Hub."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import resource
import ssl
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

import convert_focal_to_hf
import download
import golden_cases
import original
import publish
from conftest import ROOT
from focal_hf import FocalConfig, FocalForImageClassification
from hub_server import ADDRESS, REVISION, serve
from messages import ConversionError

NAME = "focal_tiny_patch4_window7_224"
FILE = f"{NAME}.pdparams"
ID, PAGE = download.PUBLIC_COPIES[NAME].drive_id, download.PUBLIC_COPIES[NAME].page
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
    content = content | {"StructuredToParameterName@@": {"name": "x" * 1_200_000}}
    return pickle.dumps(content, protocol=4)  # as Paddle; Python 3.14 has another default


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
            if self.path == f"/uc?id={ID}" or state.answer == "page again":
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
    sha256 = hashlib.sha256(checkpoint).hexdigest()
    source = {"source": PAGE, "file_id": ID, "file": FILE, "size": len(checkpoint), "sha256": sha256}
    assert json.loads((folder / "conversion.json").read_text()) == source
    text = ModelCard.load(folder / "README.md").text
    assert f"`{FILE}`, downloaded from [Google Drive]({PAGE}): {len(checkpoint):,} bytes, SHA-256 `{sha256}`" in text

    # The second run uses the cache, also offline.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    convert("--overwrite", "--expect-sha256", sha256.upper())
    assert len(drive.requests) == 2


def test_default_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path))
    assert download.cached_checkpoint(NAME, None) == tmp_path / "focal_hf" / "PaddleViT" / "Focal_Transformer" / FILE
    assert list(tmp_path.iterdir()) == []


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


@contextlib.contextmanager
def full_disk():
    """Files of this process cannot grow above 10,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(drive, convert, tmp_path):
    with full_disk(), pytest.raises(ConversionError, match=r"Writing to .*unchecked failed: .* Free some space"):
        convert()
    assert files(tmp_path) == []


def test_no_network(drive, convert, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ConversionError, match=r"Downloading https://drive.* failed: .* Check the network"):
        convert()
    assert files(tmp_path) == []


def test_a_page_that_leads_to_itself(drive, convert, tmp_path, monkeypatch):
    drive.answer = "page again"
    monkeypatch.setattr(download, "FILE_TIMEOUT", 1)
    with pytest.raises(ConversionError, match=r"the file did not begin within 1 seconds\. Check the network.*--checkp"):
        convert()
    assert len(drive.requests) > 2
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
    with pytest.raises(ConversionError, match=rf"my\.yaml cannot be downloaded; expected one of {NAME}.*--checkpoint"):
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


# --- publish.py -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local server in place of the Hub, which has or gets the repository me/focal-tiny.

    `publish` publishes NAME or other models. `files` is the folder of the repository; `uploads` lists what was sent.
    """
    uploads = []
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(FocalConfig, "_auto_class", None)

    def run(*options: str, namespace: str = "me", names: tuple[str, ...] = (NAME,)):
        publish.main([*names, "--namespace", namespace, "--cache-dir", str(tmp_path / "cache"), *options])

    with serve(tmp_path / "hub", "me/focal-tiny", uploads=uploads):
        yield SimpleNamespace(publish=run, files=tmp_path / "hub", uploads=uploads)
    assert list((tmp_path / "temporary").iterdir()) == []


LOAD = """
import torch
from PIL import Image
from transformers import AutoModel, pipeline

model = AutoModel.from_pretrained("me/focal-tiny", trust_remote_code=TRUST).eval()
with torch.no_grad():
    pooled = model(torch.load("pixel_values.pt")).pooler_output
classify = pipeline("image-classification", model="me/focal-tiny", trust_remote_code=TRUST)
torch.save((type(model).__module__, pooled, classify(Image.open("picture.png"))), "answers.pt")
"""


def test_publish(drive, hub, tmp_path, capsys, monkeypatch):
    hub.publish("--dry-run", "--private")
    plan = capsys.readouterr().out
    assert plan.startswith(f"me/focal-tiny, private if it is new\n  checkpoint: {PAGE}, to be downloaded\n")
    assert (files(tmp_path), drive.requests, hub.uploads) == ([], [], [])

    hub.publish("--private")
    printed = capsys.readouterr()
    assert printed.out.endswith(f"On the Hub: {ADDRESS}/me/focal-tiny/commit/{REVISION}\n")
    assert "model.safetensors: 100%" in printed.err
    weights = hashlib.sha256((hub.files / "model.safetensors").read_bytes()).hexdigest()
    assert hub.uploads == ["create private", f"lfs {weights}", "commit"]
    assert files(hub.files) == sorted(re.findall(r"\w+\.(?:json|md|py|safetensors)", plan))
    card = ModelCard.load(hub.files / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-classification")
    assert "focal-transformer" in card.data.tags
    for text in (
        f"downloaded from [Google Drive]({PAGE})",
        "@inproceedings{yang2021focal",
        'from_pretrained("me/focal',
    ):
        assert text in card.text

    # A second run sends nothing.
    hub.publish()
    assert len(hub.uploads) == 3
    hub.publish("--dry-run")
    assert f"  checkpoint: {tmp_path / 'cache' / FILE}, " in capsys.readouterr().out

    # In this process, with the package; and in one where it cannot be imported, with the code in the repository.
    case = golden_cases.case("base")
    torch.save(case.pixel_values, tmp_path / "pixel_values.pt")
    Image.linear_gradient("L").rotate(30).convert("RGB").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(LOAD.replace("TRUST", "False"), {})
    outputs = [torch.load("answers.pt")]
    script = "import sys\nsys.modules['focal_hf'] = None" + LOAD.replace("TRUST", "True")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    outputs.append(torch.load("answers.pt"))
    assert [module.partition(".")[0] for module, *_ in outputs] == ["focal_hf", "transformers_modules"]
    expected = pipeline("image-classification", model=hub.files)(str(tmp_path / "picture.png"))
    for _, pooled, answers in outputs:
        torch.testing.assert_close(pooled, case.answers["pooled"], rtol=0, atol=1e-5)
        assert answers == expected


def test_the_plan_for_all_models(tmp_path, capsys):
    """Without a token and a network."""
    publish.main(["--namespace", "me", "--dry-run", "--cache-dir", str(tmp_path)])
    plans = re.split(r"\n(?=me/)", capsys.readouterr().out)
    assert [plan.partition("\n")[0] for plan in plans] == [
        *("me/focal-tiny", "me/focal-tiny-useconv", "me/focal-small"),
        *("me/focal-small-useconv", "me/focal-base", "me/focal-base-useconv"),
    ]
    assert f"```text\n{plans[0]}\n```" in (ROOT / "docs" / "weights.md").read_text()


@pytest.mark.parametrize(
    ("namespace", "change", "message"),
    [
        ("me", lambda patch: patch.setattr("hub.get_token", lambda: None), "An upload needs a login.*hf auth login"),
        ("me", lambda patch: patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True), "forbids uploads"),
        (
            "me",
            lambda patch: patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9"),
            "Checking the",
        ),
        ("me", lambda patch: patch.setenv("HF_TOKEN", "invalid"), "Checking the login failed: Invalid user token"),
        ("them", lambda patch: None, "may not upload to them.* is that of me, who may upload to me, org"),
    ],
)
def test_publishing_is_refused_before_the_download(drive, hub, tmp_path, monkeypatch, namespace, change, message):
    change(monkeypatch)
    with pytest.raises(ConversionError, match=message):
        hub.publish(namespace=namespace)
    assert (files(tmp_path), drive.requests, hub.uploads) == ([], [], [])


def test_publishing_fails(drive, hub, tmp_path, capsys, monkeypatch):
    # One line for each model that cannot be downloaded.
    drive.answer = "removed"
    with pytest.raises(SystemExit) as caught:
        hub.publish(names=(NAME, "focal_base_patch4_window7_224"))
    assert caught.value.code == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: me/focal-tiny was not published. Google Drive sent a web page")
    assert second.startswith("error: me/focal-base was not published. Google Drive sent a web page")
    assert files(tmp_path) == []

    # The Hub's own refusal, a full disk, and names without a public copy.
    drive.answer = "file"
    with pytest.raises(ConversionError, match=r"(?s)Uploading org/focal-tiny failed: .*403.* run the command again"):
        hub.publish(namespace="org")
    with full_disk(), pytest.raises(ConversionError, match=r"Writing .*focal-tiny failed: "):
        hub.publish()
    for name in ("focalv2_base_useconv_patch4_window7_224", "my.yaml"):
        messages = []
        for script in (hub.publish, convert_focal_to_hf.main):
            with pytest.raises(ConversionError) as error:
                script(names=(name,)) if script is hub.publish else script(["--config", name, "--output", "out"])
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    with pytest.raises(SystemExit):
        hub.publish(namespace="me/focal")
    assert "expected the name of a user or an organization; got 'me/focal'" in capsys.readouterr().err
    assert files(tmp_path) == [f"cache/{FILE}"]
    assert hub.uploads == []
