"""Hugging Face Hub models: the real client library against a local server with the Hub's protocol."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from llama_jax import cli
from llama_jax.adapters import lora
from llama_jax.errors import CheckpointError
from llama_jax.hub import huggingface
from llama_jax.text.pretrained import open_model
from llama_jax.weights.tensors import ParamsTensors
from llama_jax.weights.write.adapters import save_adapter
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.random_models import random_model

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

TEMPLATES = "additional_chat_templates"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "model"
    tensors = ParamsTensors(*random_model(2))
    write(plan_hf(tensors, None, Vocabulary(), shard_bytes=40_000), tensors, target)
    return target


@contextlib.contextmanager
def serving(repositories):
    """A server of repositories, each a dict from file name to bytes, or an error (status, code)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            requests.append(self.path)
            path = self.path.partition("?")[0].strip("/").split("/")
            if path[:2] == ["api", "models"]:
                self.describe("/".join(path[2:4]), path[4:])
            elif len(path) < 5:
                self.fail(404, "EntryNotFound")
            else:
                self.send_file("/".join(path[:2]), path[3], "/".join(path[4:]))

        def describe(self, repo, rest):
            contents = repositories.get(repo, (401, "RepoNotFound"))
            if isinstance(contents, tuple):
                self.fail(*contents)
            elif rest[:1] == ["tree"]:
                rows = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in contents.items()
                ]
                self.reply(json.dumps(rows).encode())
            elif rest[1:2] not in ([], ["main"], [COMMIT]):
                self.fail(404, "RevisionNotFound")
            else:
                files = [{"rfilename": name} for name in contents]
                self.reply(json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode())

        def send_file(self, repo, revision, name):
            data = repositories[repo][name]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.reply(data, headers)

        def fail(self, status, code):
            self.reply(b"{}", {"X-Error-Code": code}, status)

        def reply(self, data, headers=(), status=200):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def inspect(name, endpoint, home):
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "llama_jax.cli", "inspect", name, "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)


@pytest.fixture
def inspect_here(monkeypatch, capsys):
    """The same command in this process: its exit status and output."""

    def run(name, endpoint, home):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        constants = {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": True,
        }
        for constant, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
        status = cli.main(["inspect", name, "--json"])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    return run


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_the_models_files_are_downloaded_and_only_once(model, tmp_path, inspect_here):
    extra = {"pytorch_model.bin": b"x" * 1000, "onnx/model.onnx": b"y" * 1000, "README.md": b"hello"}
    with serving({"someone/tiny": read_files(model) | extra}) as (endpoint, requests):
        first = inspect("someone/tiny", endpoint, tmp_path)
        assert first.returncode == 0, first.stderr
        report = json.loads(first.stdout)
        assert report["format"] == "hf"
        assert report["parameters"] == random_model(2)[0].num_params
        assert not [
            path for path in requests if "pytorch_model" in path or "onnx" in path or "README" in path
        ]
        files = len([path for path in requests if "/resolve/" in path])
        again = inspect_here("someone/tiny@main", endpoint, tmp_path)
        assert json.loads(again.stdout) == report
        # Cached files are at most revalidated.
        assert len([path for path in requests if "/resolve/" in path]) < 2 * files
    offline = inspect_here("someone/tiny", "http://127.0.0.1:9", tmp_path)
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout) == report


def test_an_adapter_is_fetched_beside_a_local_model(model, tmp_path, monkeypatch):
    settings = lora.Lora(2)
    config, params = random_model(2)
    save_adapter(tmp_path / "a", settings, lora.init(settings, params, jax.random.key(0)), config)
    files = read_files(tmp_path / "a")
    with serving({"someone/lora": files | {"optimizer.pt": b"x"}}) as (endpoint, requests):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        (found,) = open_model(model, "someone/lora").adapters
    assert read_files(found) == files
    assert not [path for path in requests if "optimizer" in path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/nothing", "neither a local path nor a readable repository"),
        ("someone/gated", "access is gated"),
        ("someone/tiny@other", "the revision does not exist"),
        ("someone/pickles", "has no weights in a supported format"),
        ("someone/many", "has several GGUF files: a.gguf, b.gguf; name one: someone/many:a.gguf"),
        ("someone/many:c.gguf", "there is no such file; the GGUF files are: a.gguf, b.gguf"),
    ],
)
def test_errors_are_one_line(model, monkeypatch, name, message):
    repositories = {
        "someone/tiny": read_files(model),
        "someone/gated": (403, "GatedRepo"),
        "someone/pickles": {"config.json": b"{}", "weights.pkl": b"x"},
        "someone/many": {"a.gguf": b"GGUF", "b.gguf": b"GGUF"},
    }
    with serving(repositories) as (endpoint, _):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
            huggingface.fetch(name)
    assert "\n" not in str(raised.value)


def test_no_network_and_no_cache(tmp_path, inspect_here):
    done = inspect_here("someone/tiny", "http://127.0.0.1:9", tmp_path)
    assert done.returncode == 2
    assert "is not a local path, and the Hub cannot be reached" in done.stderr


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"to load it from the Hub: pip install 'llama-jax\[hub\]'"):
        huggingface.fetch("someone/tiny")


@pytest.mark.parametrize(
    ("files", "expected", "model"),
    [
        (
            ["config.json", "model.safetensors", "original/params.json"],
            ["config.json", "model.safetensors"],
            "",
        ),
        (
            ["original/params.json", "original/consolidated.00.pth", "original/tokenizer.model", "LICENSE"],
            ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"],
            "original/",
        ),
        (["a.gguf", "README.md"], ["a.gguf"], "a.gguf"),
        (
            ["q/a-00002-of-00002.gguf", "q/a-00001-of-00002.gguf"],
            ["q/a-00001-of-00002.gguf", "q/a-00002-of-00002.gguf"],
            "q/a-00001-of-00002.gguf",
        ),
        (
            [
                "config.json",
                "pytorch_model-00001-of-00001.bin",
                "pytorch_model.bin.index.json",
                "optimizer.bin",
            ],
            ["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
            "",
        ),
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["config.json", "model.safetensors"], ""),
        (
            ["config.json", "model.safetensors", f"{TEMPLATES}/tool_use.jinja", f"{TEMPLATES}/rag.jinja"],
            [f"{TEMPLATES}/tool_use.jinja", "config.json", "model.safetensors"],
            "",
        ),
        (
            [
                "config.json",
                "model.safetensors",
                "model-00001-of-00002.safetensors",
                "consolidated.safetensors",
            ],
            ["config.json", "model-00001-of-00002.safetensors", "model.safetensors"],
            "",
        ),
        (
            ["README.md", "adapter_config.json", "adapter_model.bin", "tokenizer.json", "optimizer.pt"],
            ["adapter_config.json", "adapter_model.bin", "tokenizer.json"],
            "",
        ),
    ],
)
def test_one_format_of_the_model_is_selected(files, expected, model):
    selection = huggingface._select("a/b", files, None)
    assert (sorted(selection.files), selection.model) == (expected, model)


def test_a_path_in_a_local_directory_is_not_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert huggingface.is_repository("runs/tiny")
    (tmp_path / "runs").mkdir()
    assert not huggingface.is_repository("runs/tiny")


@pytest.mark.parametrize(
    "name", ["../up", "/root/x", "a", "a/b/c", "a/b.gguf/", "-a/b", "a/b:model.bin", "a//b"]
)
def test_names_that_are_not_repositories(name):
    assert not huggingface.is_repository(name)
