"""Fetching tokenizers from a stand-in for the Hugging Face hub: an HTTP server with its few answers."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, Tokenizer, trainers
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from nitp_titan.data.hub import repository, TOKENIZERS
from nitp_titan.data.sources import how_to_make
from nitp_titan.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET, CACHED_SECRET = "hf_secretOfTheEnvironment", "hf_secretOfAnOldLogin"
# The settings of Qwen2's tokenizer_config.json that TorchTitan reads.
QWEN2_CONFIG = {
    "add_prefix_space": False,
    "bos_token": None,
    "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def _qwen2_like() -> dict[str, bytes]:
    """Files of a byte-level tokenizer whose special tokens follow its vocabulary, as Qwen2's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat, the hat on the cat. " * 50], trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    added = {str(tokenizer.token_to_id(token)): {"content": token, "special": True} for token in special}
    config = {**QWEN2_CONFIG, "added_tokens_decoder": added}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


class Hub(ThreadingHTTPServer):
    """Repositories by name; gated ones want SECRET; a file of None breaks off in the middle."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        good = _qwen2_like()
        llama = {**good, "special_tokens_map.json": b"{}", "config.json": b"{}", "model.safetensors": b"weights"}
        self.repositories = {
            "Qwen/Qwen2-7B": good,
            "someone/llama-like": llama,
            "meta-llama/Meta-Llama-3-8B": good,
            "someone/no-config": {"tokenizer.json": good["tokenizer.json"]},
            "someone/broken": {**good, "tokenizer.json": b"{}"},
            "someone/no-eos": {**good, "tokenizer_config.json": b'{"bos_token": "the"}'},
            "someone/breaks-off": {**good, "tokenizer_config.json": None},
        }
        self.requests: list[tuple[str, str, str | None]] = []


class _Answers(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def log_message(self, *arguments):
        pass

    def _answer(self, with_body: bool) -> None:
        authorization = self.headers.get("Authorization")
        self.server.requests.append((self.command, self.path, authorization))
        if "/resolve/" not in self.path:
            return self._refuse(404, "")
        owner, name, _, _revision, file = self.path.lstrip("/").split("/")
        files = self.server.repositories.get(f"{owner}/{name}")
        if files is None:
            return self._refuse(401, "RepoNotFound")
        if owner == "meta-llama" and authorization != f"Bearer {SECRET}":
            return self._refuse(403 if authorization else 401, "GatedRepo")
        if file not in files:
            return self._refuse(404, "EntryNotFound")
        content = files[file]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}-{file}"')
        self.send_header("Content-Length", str(1000 if content is None else len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(b"{" if content is None else content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(hub, tmp_path, project_folder):
    """Run the script against the stand-in; returns the process and the requests it made."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(CACHED_SECRET)

    def run(*arguments, out=tmp_path / "assets", token=None, endpoint=None):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": endpoint or f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home)}
        if token:
            environment["HF_TOKEN"] = token
        before = len(hub.requests)
        command = [sys.executable, "scripts/download_assets.py", *arguments, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=project_folder)
        return done, hub.requests[before:]

    return run


def _files(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_a_tokenizer_is_fetched_once_with_nothing_else_and_without_a_cached_login(download, tmp_path):
    done, requests = download("qwen2")
    folder = tmp_path / "assets/qwen2"
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {folder}  273 tokens, end of document <|endoftext|> (270), from Qwen/Qwen2-7B\n"
    assert _files(tmp_path / "assets") == ["origin.json", "qwen2", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((folder / "origin.json").read_text()) == {"repository": "Qwen/Qwen2-7B", "commit": COMMIT}
    assert requests and {sent for _, _, sent in requests} == {None}
    done, requests = download("qwen2")
    assert done.returncode == 0 and requests == []
    assert done.stdout.startswith(f"already there: {folder}  273 tokens")


def test_any_repository_is_fetched_into_a_folder_of_its_name_without_its_weights(download, hub, tmp_path):
    done, requests = download("someone/llama-like")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "assets/llama-like"
    fetched = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert _files(folder) == ["origin.json", *fetched]
    assert all((folder / file).read_bytes() == hub.repositories["someone/llama-like"][file] for file in fetched)
    got = [path for method, path, _ in requests if method == "GET" and "/resolve/" in path]
    assert sorted(got) == [f"/someone/llama-like/resolve/{COMMIT}/{file}" for file in fetched]


def test_a_token_is_sent_from_the_environment_alone_and_shown_nowhere(download, tmp_path):
    done, requests = download("llama3")
    assert done.returncode == 1 and _files(tmp_path / "assets") == []
    assert done.stderr == (
        "error: llama3: meta-llama/Meta-Llama-3-8B is gated and needs HF_TOKEN in the environment; access is "
        "granted on https://huggingface.co/meta-llama/Meta-Llama-3-8B.\n"
    )
    assert {sent for _, _, sent in requests} == {None}
    refused, _ = download("llama3", token="hf_without_access")
    assert refused.returncode == 1 and "this HF_TOKEN has no access" in refused.stderr
    done, requests = download("llama3", token=SECRET)
    assert done.returncode == 0, done.stderr
    assert {sent for _, path, sent in requests if "/resolve/" in path} == {f"Bearer {SECRET}"}
    assert SECRET not in done.stdout + done.stderr and "hf_without_access" not in refused.stdout + refused.stderr
    assert not any(SECRET in path.read_text() for path in (tmp_path / "assets/llama3").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/missing", "there is no public repository someone/missing on the Hugging Face hub"),
        ("someone/no-config", "someone/no-config holds no tokenizer.json with a tokenizer_config.json"),
        ("someone/broken", "broken holds no tokenizer that loads: "),
        ("someone/no-eos", "no-eos has no token that ends a document"),
        ("someone/breaks-off", "someone/breaks-off could not be fetched: "),
        ("qwen3", "neither a registered tokenizer nor a repository 'owner/name'. Did you mean 'qwen2'?"),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(download, tmp_path, name, message):
    done, _ = download(name)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert _files(tmp_path / "assets") == []


def test_no_network_and_no_folder_are_one_line(download, tmp_path):
    from processes import free_port

    done, _ = download("qwen2", endpoint=f"http://127.0.0.1:{free_port()}")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: qwen2: Qwen/Qwen2-7B could not be fetched: ConnectError: ")
    assert _files(tmp_path / "assets") == []
    (tmp_path / "a_file").touch()
    done, requests = download("qwen2", out=tmp_path / "a_file")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "FileExistsError" in line and requests == []


def test_a_folder_from_elsewhere_is_kept_as_it_is(download, tmp_path):
    folder = tmp_path / "assets/qwen2"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("mine")
    done, requests = download("qwen2")
    assert done.returncode == 1 and requests == []
    assert done.stderr == (
        f"error: {folder} exists and was not fetched from Qwen/Qwen2-7B; remove it, or choose another --out.\n"
    )
    assert (folder / "tokenizer.json").read_text() == "mine"


def test_the_registered_tokenizers_are_listed_without_a_request(download):
    done, requests = download("--list")
    assert done.returncode == 0 and requests == []
    assert [line.split() for line in done.stdout.splitlines()] == [[name, repo] for name, repo in TOKENIZERS.items()]
    assert repository("qwen2") == TOKENIZERS["qwen2"] and repository("a/b") == "a/b"
    with pytest.raises(UserError, match="Did you mean 'llama3'"):
        repository("lama3")
    assert how_to_make("assets/qwen2") == " Run `python scripts/download_assets.py qwen2` to fetch it."


def test_a_document_of_qwen2_has_no_bos_and_ends_with_its_eos(tmp_path):
    for file, content in _qwen2_like().items():
        (tmp_path / file).write_bytes(content)
    tokenizer = HuggingFaceTokenizer(HuggingFaceTokenizer.Config(), tokenizer_path=str(tmp_path))
    ids = tokenizer.encode("the cat", add_bos=True, add_eos=True)
    assert tokenizer.bos_id is None
    assert ids[-1] == tokenizer.eos_id == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == "the cat"
