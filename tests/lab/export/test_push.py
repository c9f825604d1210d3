"""`remoe export --push` against a local stand-in of the Hub's API."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from remoe.errors import ConfigError, HubError
from remoe.lab.cli.main import main
from remoe.lab.export.push import push_folder

FILES = {"config.json": b"{}\n", "README.md": b"# A model\n", "model.safetensors": bytes(range(256)), "sub/a.txt": b"a"}


class Hub(ThreadingHTTPServer):
    """Answers the calls of an upload, in which no file is large; keeps them and the files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Call)
        self.calls, self.files = [], {}
        self.refusals = {}  # last part of a path: status and message
        self.visibility = "public"  # of a repository that is there already


class Call(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
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
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            self.answer("preupload", {"files": files})
        elif "commit" in kind:
            for line in lines:
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer("commit", {"commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}"})

    def do_GET(self):
        if not self.path.startswith("/api/models/"):  # once a day the client asks for a list that has no model in it
            self.send_error(404)
            return
        self.server.calls.append((self.path, None, self.headers["Authorization"]))
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
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
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
