"""`remoe serve`: OpenAI's own client gets what `generate` writes."""

import json
import logging
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tiny_run import FLAGS
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import remoe
from remoe.lab.cli import serve
from remoe.lab.cli.main import main
from remoe.lab.export import export_model
from remoe.lab.generation import SamplingOptions, generate_text
from remoe.lab.serving import server
from remoe.lab.serving.server import CPU_BATCHING, serving
from remoe.lab.training.load import load_model

GREEDY = {"max_tokens": 12, "temperature": 0}
ENDLESS = {"model": "mine", "prompt": "cow", "max_tokens": 20_000, "temperature": 0}
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
def url(folder):
    with serving(folder, port=0) as (url, name):
        assert name == "mine"
        yield url


@pytest.fixture(scope="module")
def client(url):
    return connect(url)


@pytest.fixture(scope="module")
def together(folder):
    """Address of a server with continuous batching."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CPU_BATCHING, "max_memory_percent", 0.01)
        with serving(folder, port=0, continuous_batching=True) as (url, _):
            yield url


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
def test_requests_at_the_same_time_do_not_change_each_other(client, together, written):
    def all_of(client):
        same = {"X-Request-ID": "1"}  # as clients may send it

        def one(prompt):
            return complete(client, prompt, max_tokens=6, extra_headers=same).choices[0].text

        with ThreadPoolExecutor(32) as pool:
            return list(pool.map(one, PROMPTS))

    expected = [written(prompt, max_new_tokens=6) for prompt in PROMPTS]
    assert len(set(expected)) > 4
    assert all_of(client) == expected
    assert complete(connect(together), "").choices[0].text == written("")
    assert all_of(connect(together)) == expected


def send(url, path="/v1/completions", body=None, host=None, origin=None):
    """A connection on which a request was sent, by hand, so that a test can close it."""
    address = url.split("/")[2]
    connection = socket.create_connection(address.rsplit(":", 1), timeout=60)
    text = json.dumps(body)
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: {host or address}\r\nConnection: close\r\n"
    if origin:
        head += f"Origin: {origin}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}"
    connection.sendall(f"{head}\r\n".encode())
    return connection


def load(url):
    """What the server is busy with."""
    with send(url, "/load") as connection:
        return json.loads(connection.makefile().read().split("\n\n")[-1])


def wait_for_load(url, number):
    end = time.monotonic() + 60
    while (now := load(url)) != {"requests": number, "generating": number}:
        assert time.monotonic() < end, now
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["url", "together"])
def test_a_client_that_goes_away_frees_its_place(kind, stream, written, request):
    url = request.getfixturevalue(kind)
    waiting = [send(url, body={**ENDLESS, "stream": stream}) for _ in range(3)]
    wait_for_load(url, 3)
    for connection in waiting:
        connection.close()
    wait_for_load(url, 0)
    assert complete(connect(url), "cow").choices[0].text == written("cow")


@pytest.mark.slow
def test_a_text_that_is_written_before_the_server_listens_for_it_arrives(together, monkeypatch):
    from transformers.cli.serving import utils

    class Late(utils.CBStreamer):
        def __init__(self, *args, **options):
            time.sleep(0.3)
            super().__init__(*args, **options)

    monkeypatch.setattr(utils, "CBStreamer", Late)
    pieces = list(complete(connect(together).with_options(timeout=60), "cow", max_tokens=1, stream=True))
    assert pieces[-1].usage.completion_tokens == 1


@pytest.mark.slow
@pytest.mark.parametrize("batching", [False, True])
def test_the_end_does_not_wait_for_what_is_being_written(batching, folder, monkeypatch, caplog, capfd):
    monkeypatch.setitem(CPU_BATCHING, "max_memory_percent", 0.01)
    monkeypatch.setattr(server, "GRACE", 0.1)
    level, threads = logging.getLogger("transformers").level, set(threading.enumerate())
    with serving(folder, port=0, continuous_batching=batching) as (url, _):
        connections = [send(url, body={**ENDLESS, "stream": stream}) for stream in (False, True)]
        wait_for_load(url, 2)
    for connection in connections:
        assert not connection.makefile().read().endswith("[DONE]")
    assert not {thread for thread in threading.enumerate() if not thread.daemon} - threads
    assert logging.getLogger("transformers").level == level
    assert "Traceback" not in caplog.text + capfd.readouterr().err


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def capped(run):
    model = load_model(run)[0]
    model.set_max_experts(1)
    model.config.max_experts = 1
    return model


def upcycled(_):
    return remoe.upcycle(LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)), num_experts=4)


def relufied(_):
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=4))
    remoe.relufy(model, [torch.arange(120).view(2, 60)])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [capped, upcycled, relufied])
def test_exports_and_converted_models_are_served(make, run, tmp_path, monkeypatch):
    model = make(run)
    model.save_pretrained(tmp_path / "mine")
    load_model(run)[1].save_pretrained(tmp_path / "mine")
    loaded, tokenizer, _ = load_model(tmp_path / "mine")
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    expected = [generate_text(loaded, tokenizer, prompt, options) for prompt in PROMPTS[:3]]
    assert len(set(expected)) > 1
    monkeypatch.setitem(CPU_BATCHING, "max_memory_percent", 0.01)
    monkeypatch.setattr(server, "GRACE", 0.1)
    with serving(tmp_path / "mine", port=0, continuous_batching=True) as (url, _), ThreadPoolExecutor(3) as pool:
        client = connect(url)
        assert list(pool.map(lambda prompt: complete(client, prompt).choices[0].text, PROMPTS[:3])) == expected


@pytest.mark.slow
def test_a_page_of_another_site_is_refused(url):
    status = {}
    for host in ("evil.example", "evil.example:80", "localhost:1", "127.0.0.1", "[::1]:8000", "127.0.0.1.evil.example"):
        with send(url, "/v1/models", host=host) as connection:
            status[host] = int(connection.makefile().readline().split()[1])
    for origin in ("http://evil.example", "null", "http://localhost:3000", url.removesuffix("/v1")):
        with send(url, "/v1/models", origin=origin) as connection:
            status[origin] = int(connection.makefile().readline().split()[1])
    assert list(status.values()) == [403, 403, 200, 200, 200, 403, 403, 403, 200, 200]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["url", "together"])
def test_a_stop_word_ends_the_text(kind, written, request):
    client = connect(request.getfixturevalue(kind))
    whole = written("cow 1. sheep")
    word = whole[2:5]
    answer = complete(client, "cow 1. sheep", stop=[word, "never"])
    assert answer.choices[0].finish_reason == "stop"
    text = answer.choices[0].text
    assert whole.startswith(text)
    assert word in text
    assert 5 <= len(text) < len(whole)
    assert answer.usage.completion_tokens < 12
    pieces = list(complete(client, "cow 1. sheep", stop=word, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == text
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert pieces[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert complete(client, "cow 1. sheep", stop="never").choices[0].text == whole
    wait_for_load(str(client.base_url), 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["url", "together"])
def test_a_prompt_longer_than_the_window_is_continued_as_by_generate(kind, written, request):
    client = connect(request.getfixturevalue(kind))
    prompt = " ".join(3 * PROMPTS)  # the window is 32 tokens, and a forward pass of the batch at most 512
    answer = complete(client, prompt, max_tokens=4)
    assert answer.usage.prompt_tokens > 512
    assert answer.choices[0].text == written(prompt, max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["url", "together"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_an_error_of_one_line(kind, stream, request):
    import openai

    client = connect(request.getfixturevalue(kind))
    wrong = {
        "the prompt has 60,000 tokens; this model takes at most 16,384": {"prompt": "\u00a7" * 30_000},
        "max_tokens must be from 1 to 1,000,000, but is 0": {"prompt": "cow", "max_tokens": 0},
    }
    if kind == "together":
        wrong["all requests have the sampling settings of the first one: temperature"] = {
            "prompt": "cow",
            "temperature": 1,
        }
        wrong["tokens; the server has room for "] = {"prompt": "cow", "max_tokens": 1_000_000}
    complete(client, "cow")
    for message, options in wrong.items():
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, stream=stream, **options)
        assert message in caught.value.body["message"]
        assert "\n" not in caught.value.body["message"]
    assert load(str(client.base_url)) == {"requests": 0, "generating": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"n": 2, "logprobs": 3, "echo": True}, {}),
        ({"frequency_penalty": 0.5}, {"repetition_penalty": 1.5}),
        ({"temperature": None, "seed": 3}, {"temperature": 1, "top_k": 50, "seed": 3}),
    ],
)
def test_options_mean_what_the_documentation_says(asked, meant, client, written):
    (choice,) = complete(client, "cow 1. sheep", **asked).choices
    assert choice.text == written("cow 1. sheep", **meant)
    assert choice.logprobs is None
    assert (choice.text != written("cow 1. sheep")) == bool(meant)


@pytest.mark.slow
def test_a_text_has_at_most_1024_tokens_unless_the_request_says_otherwise(client):
    answer = client.completions.create(model="mine", prompt="cow", temperature=0)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (1024, "length")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["url", "together"])
def test_a_chat_without_a_template_is_an_error_of_one_line(kind, request):
    import openai

    client, messages = connect(request.getfixturevalue(kind)), [{"role": "user", "content": "cow"}]
    for ask in (
        lambda: client.chat.completions.create(model="mine", messages=messages),
        lambda: client.responses.create(model="mine", input=messages),
    ):
        with pytest.raises(openai.BadRequestError, match="a chat needs a tokenizer with a chat template"):
            ask()


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
    from transformers.cli.serving import server

    monkeypatch.setattr(server, "build_server", lambda model_manager: None)
    assert main(["serve", str(folder), "--device", "cpu"]) == 2
    assert "remoe serve needs the server of transformers 5.24" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    assert main(["serve", str(tmp_path), "--port", "70000"]) == 2
    assert "--port must be between 0 and 65535" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith("remoe serve needs fastapi: pip install 'remoe[serve]'\n")
