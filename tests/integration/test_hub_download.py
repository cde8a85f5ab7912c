"""Downloads with the real clients of ModelScope and Hugging Face, from a small hub on loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch

DIT = "org/model:transformer/diffusion_pytorch_model*.safetensors"
TEXT_ENCODER = "org/model:text_encoder/model*.safetensors"
COMMIT = "c" * 40

RESOLVE = """
import json, sys
from diffsynth_pipe.config import RunConfig
from diffsynth_pipe.contracts import load_family
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.hub import resolve_components
named = {"model_id_with_origin_paths": sys.argv[2]}
if sys.argv[1] == "template_model":
    named = {"template_model_id_or_path": sys.argv[2], "trust_remote_code": True, "extra_inputs": "template_inputs"}
named |= dict(text.split("=") for text in sys.argv[3:])
config = RunConfig(dataset_base_path=".", **named)
try:
    found = resolve_components(config, load_family("qwen_image"), [sys.argv[1]])
    print(json.dumps({"weights": [file.name for file in found[sys.argv[1]].weights]}))
except ModelError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(ThreadingHTTPServer):
    """One repository, ``org/model``, in the dialects of ModelScope and Hugging Face.

    Attributes:
        requests: The files that were asked for, each with its Range header.
        listings: How often the list of files was asked for.
        cut: Path -> number of bytes after which the connection breaks.
        corrupt: Paths whose last byte is sent wrong.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests, self.listings, self.cut, self.corrupt = [], 0, {}, set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, root=""):
        return sorted(file for file in (self.folder / root).rglob("*") if file.is_file())

    def name(self, file):
        return file.relative_to(self.folder).as_posix()

    def requested(self):
        return {path for path, _ in self.requests}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        hub = self.server
        routes = {
            "/api/v1/models/org/model/repo/files": self.modelscope_list,
            "/api/v1/models/org/model/repo": self.modelscope_file,
            "/api/models/org/model/revision/main": self.huggingface_revision,
            f"/api/models/org/model/tree/{COMMIT}": self.huggingface_list,
            "/api/models/org/model/tree/main": self.huggingface_list,
        }
        resolve = f"/org/model/resolve/{COMMIT}/"
        if url.path.startswith(resolve):
            self.send_file(unquote(url.path.removeprefix(resolve)))
        elif url.path in routes:
            hub.listings += "files" in url.path or "tree" in url.path
            routes[url.path](query)
        else:
            self.send_json({"Code": 404, "Message": "no such thing", "Success": False}, status=404)

    def send_json(self, value, status=200):
        self.send_bytes(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def send_bytes(self, data, headers, status=200, length=None):
        self.send_response(status)
        for name, value in ({"Content-Length": length or len(data)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def modelscope_list(self, query):
        files = [
            {
                "Path": self.server.name(file),
                "Type": "blob",
                "Size": file.stat().st_size,
                "Sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in self.server.files(query.get("Root", ""))
        ]
        self.send_json({"Code": 200, "Success": True, "Data": {"Files": files}})

    def modelscope_file(self, query):
        self.send_file(query["FilePath"])

    def huggingface_revision(self, _):
        self.send_json({"id": "org/model", "sha": COMMIT})

    def huggingface_list(self, _):
        self.send_json(
            [
                {
                    "type": "file",
                    "path": self.server.name(file),
                    "size": file.stat().st_size,
                    "oid": "0" * 40,
                    "lfs": {
                        "oid": hashlib.sha256(file.read_bytes()).hexdigest(),
                        "size": file.stat().st_size,
                        "pointerSize": 128,
                    },
                }
                for file in self.server.files()
            ]
        )

    def send_file(self, path):
        hub = self.server
        if self.command == "GET":
            hub.requests.append((path, self.headers["Range"]))
        data = (hub.folder / path).read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if path in hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, end = 200, hub.cut.get(path)
        if self.headers["Range"]:
            first = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[first:]
        self.send_bytes(data[:end], headers, status, length=len(data))
        self.close_connection = end is not None


@pytest.fixture
def hub(tiny_repo, tmp_path):
    """A hub with the tiny repository, its denoiser sharded."""
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path / "hub"
    for name in ("text_encoder", "tokenizer", "vae"):
        (folder / name).mkdir(parents=True)
        for file in (tiny_repo / name).iterdir():
            (folder / name / file.name).symlink_to(file)
    dit = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer")
    dit.save_pretrained(folder / "transformer", max_shard_size="2MB")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"other weights")
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def resolve(hub, tmp_path):
    """Find a component in a process of its own, as a user's run would, and return what came of it."""
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "MODELSCOPE_CACHE": str(home / "modelscope"),
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path / "models"),
        "DIFFSYNTH_SKIP_DOWNLOAD": "false",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def run(name, entries, *parameters, **variables):
        hub.requests, hub.listings = [], 0
        command = [sys.executable, "-c", RESOLVE, name, entries, *parameters]
        ended = subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    return run


@pytest.fixture
def models(tmp_path):
    """Return the names of the files that were downloaded."""
    folder = tmp_path / "models" / "org" / "model"
    return lambda: {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and ".cache" not in file.relative_to(folder).parts
    }


@pytest.fixture
def dit_files(hub):
    """The files that the pattern of the denoiser names, and the JSON beside them."""
    return {hub.name(file) for file in hub.files("transformer") if file.suffix != ".bin"}


@pytest.fixture
def shard(hub):
    """The largest shard of the denoiser."""
    return hub.name(max(hub.files("transformer"), key=lambda file: file.stat().st_size))


def test_only_what_the_patterns_name_is_fetched_and_loads(hub, resolve, models, dit_files, tmp_path, tiny_repo):
    from diffusers import QwenImageTransformer2DModel

    found = resolve("dit", DIT)
    assert len(found["weights"]) > 2, "the denoiser is sharded"
    assert models() == hub.requested() == dit_files
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "models/org/model/transformer").state_dict()
    original = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer").state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], original[name]) for name in loaded)

    assert resolve("dit", DIT) == found
    assert (hub.requests, hub.listings) == ([], 0), "all is here and whole"


def test_two_ranks_that_start_at_once_fetch_each_file_once(hub, resolve, models, dit_files):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: resolve("dit", DIT), range(2))
    assert first == second
    assert "weights" in first
    assert models() == hub.requested() == dit_files
    assert len(hub.requests) == len(dit_files)


def test_a_download_that_was_cut_off_is_resumed(hub, resolve, models, dit_files, shard):
    hub.cut = {shard: 1_500_000}
    error = resolve("dit", DIT)["error"]
    assert error.startswith(f"{DIT}: download from modelscope failed: 1 of {len(dit_files)} files, {shard}: ")
    assert "IncompleteRead" in error
    assert "\n" not in error
    assert shard not in models()

    hub.cut = {}
    assert "weights" in resolve("dit", DIT)
    assert hub.requests == [(shard, "bytes=1500000-")]
    assert models() == dit_files


def test_a_tokenizer_that_was_cut_off_is_not_taken_for_whole(hub, resolve, models):
    path = "tokenizer/tokenizer.json"
    hub.cut = {path: 10}
    assert path in resolve("text_encoder", TEXT_ENCODER)["error"]
    assert "text_encoder/model.safetensors" in models()
    hub.cut = {}
    skipped = resolve("text_encoder", TEXT_ENCODER, DIFFSYNTH_SKIP_DOWNLOAD="true")
    assert "an earlier download was cut off" in skipped["error"]
    assert "weights" in resolve("text_encoder", TEXT_ENCODER)
    assert hub.requested() == {path}
    assert models() == {hub.name(file) for folder in ("text_encoder", "tokenizer") for file in hub.files(folder)}


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_what_differs_from_the_hubs_digest_is_refused(hub, resolve, models, shard, source):
    hub.corrupt = {shard}
    error = resolve("dit", DIT, DIFFSYNTH_DOWNLOAD_SOURCE=source)["error"]
    assert shard in error
    assert "Hash mismatch" in error if source == "modelscope" else "another sha256 than on the hub; delete it" in error
    assert "error" in resolve("dit", DIT, DIFFSYNTH_SKIP_DOWNLOAD="true")


def test_a_truncated_copy_is_replaced(hub, resolve, models, dit_files, shard, tmp_path):
    resolve("dit", DIT)
    copy = tmp_path / "models" / "org" / "model" / shard
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size - 1)
    error = resolve("dit", DIT, DIFFSYNTH_SKIP_DOWNLOAD="true")["error"]
    assert f"{copy} is damaged" in error
    assert hub.requests == []
    assert "weights" in resolve("dit", DIT)
    assert hub.requests == [(shard, None)]
    assert copy.read_bytes() == (hub.folder / shard).read_bytes()


def test_a_repository_that_is_not_there(hub, resolve):
    entry = DIT.replace("org/model", "org/other")
    error = resolve("dit", entry)["error"]
    assert error.startswith(f"{entry}: download from modelscope failed: ")
    assert "404" in error
    assert "\n" not in error


def test_skip_download_asks_nobody_and_says_what_is_missing(hub, resolve, tmp_path):
    error = resolve("dit", DIT, DIFFSYNTH_SKIP_DOWNLOAD="true")["error"]
    assert f"no .safetensors file matches 'diffusion_pytorch_model*.safetensors' in {tmp_path / 'models'}" in error
    assert "unset DIFFSYNTH_SKIP_DOWNLOAD" in error
    assert (hub.requests, hub.listings) == ([], 0)
    assert not (tmp_path / "models").exists()


def test_a_template_model_is_fetched_as_a_whole_and_nothing_else(hub, resolve, models):
    folder = hub.folder / "templates" / "brightness"
    (folder / "data").mkdir(parents=True)
    for name in ("model.py", "model.safetensors", "data/table.npy"):
        (folder / name).write_bytes(name.encode())
    expected = {hub.name(file) for file in hub.files("templates")}
    assert len(expected) == 3
    assert resolve("template_model", "org/model:templates/brightness/") == {"weights": ["model.safetensors"]}
    assert models() == hub.requested() == expected
    resolve("template_model", "org/model:templates/brightness/")
    assert (hub.requests, hub.listings) == ([], 0), "all is here"


def test_from_hugging_face(hub, resolve, models, dit_files):
    assert len(resolve("dit", DIT, DIFFSYNTH_DOWNLOAD_SOURCE="huggingface")["weights"]) > 2
    assert models() == hub.requested() == dit_files


def test_a_tokenizer_named_by_its_id_is_fetched(hub, resolve, models):
    """As the reference's commands for FLUX.2 name it."""
    (hub.folder / "tokenizer").rename(hub.folder / "words")
    named = "tokenizer_path=org/model:words/"
    expected = {hub.name(file) for folder in ("text_encoder", "words") for file in hub.files(folder)}
    assert "weights" in resolve("text_encoder", TEXT_ENCODER, named)
    assert models() == hub.requested() == expected
    assert "weights" in resolve("text_encoder", TEXT_ENCODER, named)
    assert (hub.requests, hub.listings) == ([], 0), "all is here and whole"
