"""`remoe serve` takes gate threshold and cap with each request, also where requests share a batch."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import small_writer
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import remoe
from remoe.lab.cli.main import main
from remoe.lab.generation import SamplingOptions, generate_text
from remoe.lab.serving import server
from remoe.lab.serving.server import CPU_BATCHING, serving
from remoe.lab.training.load import load_model

DIALS = [{}, {"max_experts": 1}, {"gate_threshold": 0.3}, {"gate_threshold": 0.1, "max_experts": 2}]
PROMPTS = ["cow 1. sheep", "lamp"]
LONG = "cow 3. barn road " * 43  # 259 tokens, of which a page of the cache has 256

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("fastapi")
    return small_writer.save(tmp_path_factory.mktemp("dial") / "mine", small_writer.CHAT)


@pytest.fixture(scope="module", params=[False, True], ids=["one by one", "together"])
def client(request, folder):
    with quick_server(folder, continuous_batching=request.param) as url:
        yield connect(url)


@contextmanager
def quick_server(folder, **options):
    """Context of a server with little memory that does not wait at its end; gives the address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CPU_BATCHING, "max_memory_percent", 0.01)
        patch.setattr(server, "GRACE", 0.1)
        with serving(folder, port=0, **options) as (url, _):
            yield url


def connect(url):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def complete(client, prompt, dial, **options):
    options = {"max_tokens": 8, "temperature": 0, "extra_body": dial, **options}
    return client.completions.create(model="mine", prompt=prompt, **options)


def writer(folder):
    """What `generate_text` writes after a prompt with a dial."""
    model, tokenizer, _ = load_model(folder)
    return lambda prompt, dial: generate_text(
        model, tokenizer, prompt, SamplingOptions(temperature=0, max_new_tokens=8, **dial)
    )


@pytest.fixture(scope="module")
def written(folder):
    return writer(folder)


def test_each_request_has_its_own_dial(client, written):
    cases = [(prompt, dial) for prompt in PROMPTS for dial in DIALS]
    expected = [written(*case) for case in cases]
    assert all(len(set(expected[4 * i : 4 * i + 4])) > 1 for i in range(2))  # the dial changes each prompt's text
    with ThreadPoolExecutor(len(cases)) as pool:
        assert list(pool.map(lambda case: complete(client, *case).choices[0].text, cases)) == expected
        streams = list(pool.map(lambda case: list(complete(client, *case, stream=True)), cases))
    texts = ["".join(piece.choices[0].text for piece in pieces) for pieces in streams]
    assert texts == [text.rstrip("\ufffd") for text in expected]


def test_a_cached_prompt_is_not_that_of_another_dial(client, written):
    dials = [{"gate_threshold": 1e6}, {}, {"gate_threshold": 1e6}, {}]  # each comes after what the others cached
    texts = [complete(client, LONG, dial).choices[0].text for dial in dials]
    assert texts == [written(LONG, dial) for dial in dials]
    assert texts[0] != texts[1]


def test_chats_have_it_too(client):
    ask = {"model": "mine", "messages": [{"role": "user", "content": "cow 1?"}], "max_tokens": 8, "temperature": 0}
    texts = [client.chat.completions.create(**ask, extra_body=dial).choices[0].message.content for dial in DIALS]
    assert len(set(texts)) > 1
    body = {"input": ask["messages"], "max_output_tokens": 8, "temperature": 0, "stream": False}
    answers = [client.responses.create(model="mine", **body, extra_body=dial).output_text for dial in DIALS]
    assert answers == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_value_out_of_range_is_an_error_of_one_line(client, stream):
    import openai

    for dial, words in (
        ({"gate_threshold": -0.1}, "gate_threshold must be a finite number of at least 0"),
        ({"gate_threshold": "0.1"}, "gate_threshold must be a finite number of at least 0"),
        ({"max_experts": 0}, "max_experts must be at least 1"),
        ({"max_experts": 1.5}, "max_experts must be a whole number"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            complete(client, "cow", dial, stream=stream)
    no_limit, plain = (complete(client, "cow", dial).choices[0].text for dial in ({"max_experts": 10**30}, {}))
    assert no_limit == plain


def test_the_service_has_values_for_requests_without_their_own(folder, written):
    with quick_server(folder, continuous_batching=True, max_experts=1) as url, ThreadPoolExecutor(3) as pool:
        client, asked = connect(url), [{}, {"gate_threshold": 0.1}, {"max_experts": 4}]
        texts = pool.map(lambda dial: complete(client, "lamp", dial).choices[0].text, asked)
        meant = [{"max_experts": 1}, {"gate_threshold": 0.1, "max_experts": 1}, {}]
        assert list(texts) == [written("lamp", dial) for dial in meant]


def save(model, folder):
    model.save_pretrained(folder / "mine")
    small_writer.tokenizer().save_pretrained(folder / "mine")
    return folder / "mine"


def test_relufied_models_have_it_and_other_models_refuse_it(tmp_path):
    import openai

    torch.manual_seed(0)
    sizes = {"vocab_size": 310, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, initializer_range=0.3))
    words = "need a ReMoE or a relufied model, not a MixtralForCausalLM"
    with quick_server(save(model, tmp_path / "topk")) as url, pytest.raises(openai.BadRequestError, match=words):
        complete(connect(url), "cow", {"max_experts": 1})
    remoe.relufy(model, [torch.arange(120).view(2, 60)], max_loss_increase=None)
    folder = save(model, tmp_path / "relu")
    expected = [writer(folder)("cow", dial) for dial in DIALS]
    assert len(set(expected)) > 1
    with quick_server(folder, continuous_batching=True) as url, ThreadPoolExecutor(4) as pool:
        client = connect(url)
        texts = pool.map(lambda dial: complete(client, "cow", dial).choices[0].text, DIALS)
        assert list(texts) == expected


def test_the_command_refuses_them_for_a_model_without_gates(tmp_path, capsys):
    folder = small_writer.save(tmp_path / "mine", router="dense")
    assert main(["serve", str(folder), "--port", "0", "--device", "cpu", "--max-experts", "2"]) == 2
    assert "router 'dense' routes no pairs" in capsys.readouterr().err
