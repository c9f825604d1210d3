"""`remoe serve`: OpenAI's own client gets what `generate` writes."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from tiny_run import FLAGS

from remoe.lab import serving
from remoe.lab.cli import serve
from remoe.lab.cli.main import main
from remoe.lab.export import export_model
from remoe.lab.generation import SamplingOptions, generate_text
from remoe.lab.training.load import load_model

GREEDY = {"max_tokens": 12, "temperature": 0}
PROMPTS = [f"cow {i % 7}. sheep" + " goat" * (i % 5) for i in range(32)]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("served") / "run"
    assert main(["train", "--data", str(corpus), *FLAGS, "--steps", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def folder(run):
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    model, tokenizer, _ = load_model(run)
    (run.parent / "mine").mkdir()
    export_model(model, run.parent / "mine")
    tokenizer.save_pretrained(run.parent / "mine")
    return run.parent / "mine"


@pytest.fixture(scope="module")
def client(folder):
    with serving.serving(folder, port=0) as (url, name):
        assert name == "mine"
        yield connect(url)


@pytest.fixture(scope="module")
def written(folder):
    model, tokenizer, _ = load_model(folder)

    def write(prompt, **options):
        options = {"temperature": 0, "max_new_tokens": 12, **options}
        return generate_text(model, tokenizer, prompt, SamplingOptions(**options))

    return write


def connect(url):
    import openai

    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def complete(client, prompt, **options):
    return client.completions.create(model="mine", prompt=prompt, **{**GREEDY, **options})


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["cow 1. sheep", "lamp", ""])
def test_a_completion_is_the_text_of_generate(client, written, prompt):
    answer = complete(client, prompt)
    assert answer.choices[0].text == written(prompt) != ""
    assert answer.usage.completion_tokens == 12
    pieces = [piece.choices[0].text for piece in complete(client, prompt, stream=True)]
    assert "".join(pieces) == answer.choices[0].text.rstrip("\ufffd")  # an incomplete character at the end is left out
    assert len(pieces) > 2


@pytest.mark.slow
def test_a_sample_is_the_one_that_generate_draws_with_the_seed(client, written):
    sampled = [complete(client, "cow", temperature=0.8, seed=seed).choices[0].text for seed in (1, 2)]
    assert sampled == [written("cow", temperature=0.8, seed=seed) for seed in (1, 2)]
    assert sampled[0] != sampled[1]


@pytest.mark.slow
def test_requests_at_the_same_time_do_not_change_each_other(client, folder, written, monkeypatch):
    def all_of(client):
        with ThreadPoolExecutor(32) as pool:
            return list(pool.map(lambda prompt: complete(client, prompt, max_tokens=6).choices[0].text, PROMPTS))

    expected = [written(prompt, max_new_tokens=6) for prompt in PROMPTS]
    assert len(set(expected)) > 4
    assert all_of(client) == expected
    monkeypatch.setitem(serving.CPU_BATCHING, "cb_max_memory_percent", 0.01)
    with serving.serving(folder, port=0, continuous_batching=True) as (url, _):
        together = connect(url)
        assert complete(together, "").choices[0].text == written("")
        assert all_of(together) == expected


@pytest.mark.slow
def test_a_stop_word_ends_the_text(client, written):
    whole = written("cow 1. sheep")
    word = whole[2:5]
    answer = complete(client, "cow 1. sheep", stop=[word])
    assert answer.choices[0].finish_reason == "stop"
    text = answer.choices[0].text
    assert whole.startswith(text)
    assert 5 <= len(text) < len(whole)
    assert answer.usage.completion_tokens < 12


@pytest.mark.slow
def test_another_model_is_an_error_and_is_not_loaded(client):
    import openai

    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="other", prompt="cow", **GREEDY)
    assert [model.id for model in client.models.list()] == ["mine"]
    loaded = client.post("../load_model", body={"model": "other"}, cast_to=str)
    assert "this server has the model 'mine' alone, not 'other'" in loaded


@pytest.mark.slow
def test_the_command_serves_a_run_until_it_is_interrupted(run, folder, written, capsys, monkeypatch):
    said = []

    def wait():
        said.append(capsys.readouterr().out)
        client = connect(said[0].split()[1])
        answer = client.completions.create(model="run", prompt="cow", **GREEDY)
        assert answer.choices[0].text == written("cow")
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=wait)))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(run), "--port", str(port), "--device", "cpu"]) == 130
    assert f"(port {port} is taken)" in said[0]


@pytest.mark.slow
def test_another_server_of_transformers_is_one_line(folder, capsys, monkeypatch):
    from transformers.cli import serve

    monkeypatch.setattr(serve, "Serve", lambda force_model, host, port: None)
    assert main(["serve", str(folder), "--device", "cpu"]) == 2
    assert "remoe serve needs the server of transformers 5.24" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    assert main(["serve", str(tmp_path), "--port", "70000"]) == 2
    assert "--port must be between 0 and 65535" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith("remoe serve needs fastapi: pip install 'remoe[serve]'\n")
