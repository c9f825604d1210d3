"""`remoe export --push` against a local stand-in of the Hub's API."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from tiny_run import FLAGS
from transformers import AutoTokenizer

import remoe
from remoe.errors import ConfigError, HubError
from remoe.lab.cli.main import main
from remoe.lab.export.push import push_folder
from remoe.lab.training.load import load_run

FILES = {"config.json": b"{}\n", "README.md": b"# A model\n", "model.safetensors": bytes(range(256)), "sub/a.txt": b"a"}


class Hub(ThreadingHTTPServer):
    """Answers the calls of an upload and of a download; keeps the calls and the files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Call)
        self.calls, self.files, self.large = [], {}, {}  # large files by sha256, until the commit names them
        self.limit = None  # bytes from which on a file is large; None for no large ones
        self.refusals = {}  # last part of a path: status and message
        self.visibility = "public"  # of a repository that is there already


class Call(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.body().decode()
        lines = [json.loads(line) for line in body.splitlines()]
        kind = self.path.split("?")[0].split("/")
        self.server.calls.append((self.path, lines[0], self.headers["Authorization"]))
        address = f"http://127.0.0.1:{self.server.server_port}/me/model"
        if "create" in kind:
            self.answer("create", {"url": address})
        elif "validate-yaml" in kind:
            errors = [{"message": said} for _, said in [self.server.refusals.get("validate-yaml", (400, ""))] if said]
            self.answer("validate-yaml", {"errors": errors, "warnings": []})
        elif "preupload" in kind:
            files = [{"path": f["path"], "uploadMode": self.mode(f), "shouldIgnore": False} for f in lines[0]["files"]]
            self.answer("preupload", {"files": files})
        elif kind[-2:] == ["objects", "batch"]:
            objects = [
                {**one, "actions": {"upload": {"href": f"{address}/{one['oid']}"}}} for one in lines[0]["objects"]
            ]
            self.answer("batch", {"transfer": "basic", "objects": objects})
        elif "commit" in kind:
            for line in lines:
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.large.pop(line["value"]["oid"])
            self.answer("commit", {"commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}"})

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def mode(self, file):
        return "lfs" if self.server.limit is not None and file["size"] >= self.server.limit else "regular"

    def do_PUT(self):
        content = self.body()
        assert self.path.split("/")[-1] == hashlib.sha256(content).hexdigest()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer("upload", {})

    def do_HEAD(self):
        self.send_file(with_body=False)

    def send_file(self, with_body=True):
        content = self.server.files.get(self.path.removeprefix("/me/model/resolve/").partition("/")[2])
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if with_body:
            self.wfile.write(content or b"")

    def do_GET(self):
        if self.path.startswith("/me/model/resolve/"):
            self.send_file()
            return
        if not self.path.startswith("/api/models/"):  # once a day the client asks for a list that has no model in it
            self.send_error(404)
            return
        self.server.calls.append((self.path, None, self.headers["Authorization"]))
        if "/tree/" in self.path:  # folders of templates
            self.answer("tree", [])
            return
        private = self.server.visibility == "private"
        self.answer("info", {"id": "me/model", "private": private, "tags": [], "siblings": []})

    def answer(self, kind, content):
        status, said = self.server.refusals.get(kind, (200, None))
        text = json.dumps(content if said is None else {"error": said, **content}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    # huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE once, when it is imported
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    files = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # of an earlier test, with its address
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


def fill(folder):
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def export(tmp_path, monkeypatch):
    """The command with a folder of small files in the place of a trained model's."""
    out = tmp_path / "out"
    monkeypatch.setattr("remoe.lab.export.export_run", lambda *args, **more: fill(out))
    return lambda *flags: main(["export", "run", str(out), *flags])


def test_the_hub_receives_the_files_of_the_folder(hub, export, tmp_path, capsys):
    assert export("--push", "me/model") == 0
    assert hub.files == FILES == {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    paths = [path.split("?")[0] for path, _, _ in hub.calls]
    assert paths[0] == "/api/repos/create"
    assert paths[-2:] == ["/api/models/me/model/preupload/main", "/api/models/me/model/commit/main"]
    assert paths.count("/api/validate-yaml") == 1
    assert hub.calls[0][1] == {"name": "model", "organization": "me"}
    assert {token for _, _, token in hub.calls} == {"Bearer hf_secret"}
    assert f"pushed to http://127.0.0.1:{hub.server_port}/me/model" in capsys.readouterr().out


def test_private_is_asked_for_and_made_sure_of(hub, export, capsys):
    hub.visibility = "private"
    assert export("--push", "me/model", "--private") == 0
    assert hub.calls[0][1]["visibility"] == "private"
    assert hub.files == FILES
    hub.files.clear()
    hub.visibility, hub.refusals = "public", {"create": (409, "You already created this model repo")}
    assert export("--push", "me/model", "--private") == 2
    assert "/me/model exists and is public" in capsys.readouterr().err
    assert not hub.files


@pytest.mark.parametrize(
    ("refusals", "words"),
    [
        ({"create": (401, "Invalid username or password."), "info": (401, "no")}, "401, Invalid username or password."),
        ({"create": (403, "You don't have the rights"), "info": (404, "no")}, "403, You don't have the rights"),
        ({"create": (403, "You don't have the rights"), "preupload": (403, "Not yours")}, "403, Not yours"),  # taken
        ({"commit": (400, "No such branch")}, "400, No such branch"),
        ({"validate-yaml": (400, "no such license")}, "Invalid metadata in README.md. - no such license"),
    ],
    ids=["token", "owner", "taken", "commit", "card"],
)
def test_a_refusal_is_one_line_and_the_folder_stays(hub, export, tmp_path, capsys, refusals, words):
    hub.refusals = refusals
    assert export("--push", "me/model") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"refused me/model: {words}" in line
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == FILES


def test_without_a_token_nothing_is_sent(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none either"))
    with pytest.raises(HubError, match="no token of the Hugging Face Hub"):
        push_folder(fill(tmp_path / "out"), "me/model")
    assert not hub.calls


def test_a_hub_that_is_not_there(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"at http://127\.0\.0\.1:1 cannot be reached"):
        push_folder(fill(tmp_path / "out"), "me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_folder(fill(tmp_path / "out"), "me/model")


@pytest.mark.parametrize("flags", [["--push", "model"], ["--push", "me/mo del"], ["--push", "a/b/c"], ["--private"]])
def test_flags_that_cannot_work_are_refused_before_the_export(export, tmp_path, capsys, flags):
    assert export(*flags) == 2
    assert "--push" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if len(flags) == 2:
        with pytest.raises(ConfigError):
            push_folder(tmp_path, flags[1])


@pytest.mark.slow
def test_an_export_that_was_pushed_is_loaded_from_the_hub_with_the_same_logits(hub, corpus, tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", "--data", str(corpus), *FLAGS, "--steps", "2", "--out", str(run)]) == 0
    assert main(["export", str(run), str(out), "--push", "me/model"]) == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.files == files
    hub.files.clear()
    hub.limit = 50_000  # of the weights alone: they go by LFS, as hf_xet has a service of its own
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    push_folder(out, "me/model")
    assert hub.files == files
    assert [call for call, *_ in hub.calls if "/lfs/" in call] == ["/me/model.git/info/lfs/objects/batch"]
    cache = {"cache_dir": tmp_path / "cache"}
    model, tokenizer, _ = load_run(run)
    ids = torch.tensor([tokenizer("def cow(): return 1")["input_ids"]])
    assert AutoTokenizer.from_pretrained("me/model", **cache)("def cow(): return 1")["input_ids"] == ids[0].tolist()
    loaded = remoe.RemoeForCausalLM.from_pretrained("me/model", **cache)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
