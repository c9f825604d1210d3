"""`remoe serve` answers messages by the tokenizer's chat template, as `remoe generate --chat` does."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from small_writer import CHAT, save

from remoe.lab.generation import SamplingOptions, write_texts
from remoe.lab.generation.chat import ChatTemplate
from remoe.lab.generation.text import Request
from remoe.lab.serving import server
from remoe.lab.serving.server import CPU_BATCHING, serving
from remoe.lab.training.load import load_model

QUESTIONS = ["cow 1?", "hen", "goat 3. barn", ""]
GREEDY = {"model": "mine", "temperature": 0}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("fastapi")
    return save(tmp_path_factory.mktemp("chat") / "mine", CHAT)


@pytest.fixture(scope="module", params=[False, True], ids=["one by one", "together"])
def client(request, folder):
    openai = pytest.importorskip("openai")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CPU_BATCHING, "max_memory_percent", 0.01)
        patch.setattr(server, "GRACE", 0.1)
        with serving(folder, port=0, continuous_batching=request.param) as (url, _):
            yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def expected(folder):
    """What `write_texts` writes after each question."""
    model, tokenizer, _ = load_model(folder)
    requests = [Request(ChatTemplate(tokenizer).encode(conversation(question))) for question in QUESTIONS]
    written = write_texts(model, tokenizer, requests, SamplingOptions(temperature=0, max_new_tokens=8))
    texts = [one.text.rstrip("\ufffd") for one in written]
    assert len(set(texts)) > 1
    return texts


def conversation(question):
    before = [{"role": "system", "content": "sheep"}, {"role": "user", "content": "lamp"}]
    return [*before, {"role": "assistant", "content": "tram"}, {"role": "user", "content": question}]


def test_an_answer_is_the_text_of_write_texts(client, expected):
    def ask(question):
        answer = client.chat.completions.create(messages=conversation(question), max_tokens=8, **GREEDY)
        assert answer.choices[0].message.role == "assistant"
        return answer.choices[0].message.content.rstrip("\ufffd")

    def listen(question):
        options = {"messages": conversation(question), "max_tokens": 8, "stream": True, **GREEDY}
        pieces = [
            piece.choices[0].delta.content for piece in client.chat.completions.create(**options) if piece.choices
        ]
        return "".join(filter(None, pieces))

    assert [ask(question) for question in QUESTIONS] == expected
    with ThreadPoolExecutor(8) as pool:
        asked, heard = ([pool.submit(one, question) for question in QUESTIONS] for one in (ask, listen))
    assert [one.result() for one in asked] == [one.result() for one in heard] == expected


def test_a_response_is_a_stream_unless_the_request_says_otherwise(client, expected):
    options = {"input": conversation(QUESTIONS[0]), "max_output_tokens": 8, **GREEDY}
    assert client.responses.create(**options, stream=False).output_text.rstrip("\ufffd") == expected[0]
    events = client.responses.create(**options, stream=True)
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == expected[0]
    assert client.responses.create(**options).startswith("data: {")  # the events as a string
