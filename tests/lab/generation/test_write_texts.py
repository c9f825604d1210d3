"""Texts of many prompts, token by token: as those of one prompt at a time."""

import itertools

import pytest
import small_writer
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import remoe
from remoe.errors import ConfigError
from remoe.lab.data.documents import ANSWERS
from remoe.lab.generation import SamplingOptions, generate_text, write_texts
from remoe.lab.generation.chat import SYSTEM, USER, ChatTemplate
from remoe.lab.generation.stream import Ending, TextStream
from remoe.lab.generation.text import Request, prompt_ids

PROMPTS = ["cow 1. sheep", "", "hen goat barn road " * 3, "bus", "tram lamp 3. "]


def greedy(tokens: int) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=tokens, temperature=0)


def relufied():
    model = tiny_models.build("mixtral", vocab_size=310)
    remoe.relufy(model, [tiny_models.token_ids()])
    return model.eval()


def requests(model, tokenizer):
    return [Request(prompt_ids(model, tokenizer, prompt)) for prompt in PROMPTS]


GREEDY, SAMPLED = {"temperature": 0, "repetition_penalty": 1.3}, {"temperature": 1, "seed": 3, "top_p": 0.9}


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (small_writer.model, GREEDY),
        (small_writer.model, SAMPLED),
        (lambda: small_writer.model(router="topk", num_experts_per_tok=2), GREEDY),
        (lambda: small_writer.model(router="lory", router_options={"segment": 4}), SAMPLED),
        (relufied, GREEDY),
    ],
    ids=["relu", "relu-sampled", "topk", "lory-sampled", "relufied"],
)
def test_a_batch_has_the_texts_of_one_prompt_at_a_time(build, options):
    model, tokenizer, sampling = build(), small_writer.tokenizer(), SamplingOptions(max_new_tokens=5, **options)
    state = torch.get_rng_state()
    alone = [generate_text(model, tokenizer, prompt, sampling) for prompt in PROMPTS]
    together = list(write_texts(model, tokenizer, requests(model, tokenizer), sampling, batch_size=3))
    assert [written.text for written in together] == alone
    assert len(set(alone)) == len(alone)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_tokens_are_those_of_generate_and_arrive_one_by_one():
    model, tokenizer, pieces = small_writer.model(tokenizer_size=290), small_writer.tokenizer(), []
    asked = requests(model, tokenizer)
    texts = write_texts(
        model,
        tokenizer,
        asked,
        greedy(9),
        batch_size=5,
        write=lambda *new: pieces.append(new),
    )
    for number, (request, written) in enumerate(zip(asked, texts, strict=True)):
        ids = torch.tensor([request.ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        new = out[0, ids.shape[1] :].tolist()
        assert written.tokens == len(new)
        assert written.text == tokenizer.decode(new)  # also with bytes that are no characters
        assert written.text == "".join(piece for at, piece, _ in pieces if at == number)
        assert [last for at, _, last in pieces if at == number].index(True) == len(
            [at for at, _, _ in pieces if at == number]
        ) - 1
    numbers = [at for at, _, _ in pieces]
    assert len(list(itertools.groupby(numbers))) > len(PROMPTS)  # texts of a batch take turns


def test_what_ends_one_text_ends_no_other():
    model, tokenizer = small_writer.model(), small_writer.tokenizer()
    ids = prompt_ids(model, tokenizer, "cow 1. sheep")
    (whole,) = write_texts(model, tokenizer, [Request(ids)], greedy(12))
    stream, pieces = TextStream(tokenizer, ids), []
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    pieces = [stream.put(token) for token in out]
    assert not whole.ended
    later = next(i for i in range(5, 12) if out[i] not in out[:i])
    asked = [Request(ids, Ending(frozenset([out[later]]))), Request(ids), Request(ids, Ending(text=whole.text[3:6]))]
    by_token, free, by_text = write_texts(model, tokenizer, asked, greedy(12), batch_size=3)
    assert (by_token.tokens, by_token.ended) == (later + 1, True)
    assert whole.text.startswith("".join(pieces[:later]))
    assert by_token.text == whole.text[: len(by_token.text)]
    assert free == whole
    assert by_text.ended
    assert by_text.text == whole.text[: whole.text.index(whole.text[3:6])]
    assert by_text.tokens < 12


def test_a_stop_leaves_what_is_written():
    model, tokenizer, seen = small_writer.model(), small_writer.tokenizer(), []
    options = {"batch_size": 2, "write": lambda *new: seen.append(new), "stopped": lambda: len(seen) >= 4}
    texts = list(write_texts(model, tokenizer, requests(model, tokenizer), greedy(50), **options))
    assert len(texts) == 2  # the first batch
    assert 1 < texts[0].tokens < 50
    assert not texts[0].ended


def test_errors_name_the_prompt_and_come_before_any_text():
    model, tokenizer = small_writer.model(), small_writer.tokenizer()
    asked = [Request([1]), Request([1] * 20_000)]
    with pytest.raises(ConfigError, match="prompt 2 has 20,000 tokens; this model takes at most 16,384"):
        next(write_texts(model, tokenizer, asked, SamplingOptions(), write=lambda *_: pytest.fail("wrote")))
    model = small_writer.model(router="dense")
    with pytest.raises(ConfigError, match="'dense' routes no pairs"):
        next(write_texts(model, tokenizer, [Request([1])], SamplingOptions(max_experts=1)))


def streamed(tokenizer, ids, prompt=0, end=""):
    stream = TextStream(tokenizer, ids[:prompt], end)
    return [*(stream.put(token) for token in ids[prompt:]), stream.finish()]


def test_a_character_of_several_tokens_comes_whole():
    tokenizer = small_writer.tokenizer()
    text = "cow 🐄 sheep é\ufffd!"
    ids = tokenizer(text)["input_ids"]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert any("🐄" in piece for piece in pieces)
    cut = streamed(tokenizer, tokenizer("a🐄")["input_ids"][:-1])
    assert "".join(cut) == "a\ufffd"
    assert cut[-1] == "\ufffd"


@pytest.mark.parametrize("kind", ["WordPiece", "Metaspace"])
def test_a_decoder_that_drops_a_space_loses_none(kind):
    words = ["[UNK]", "the", "▁the", "cow", "▁cow", "##s", "s", ".", "</s>"]
    if kind == "WordPiece":
        core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    else:
        core = Tokenizer(models.Unigram([(word, -len(word) / 100) for word in words], unk_id=0))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="</s>")
    ids = tokenizer("the cows the cow.")["input_ids"]
    pieces = streamed(tokenizer, [*ids[:2], tokenizer.eos_token_id, *ids[2:]], prompt=1)
    assert "".join(pieces) == " cows the cow."
    assert " the" in pieces


def test_the_text_that_ends_is_left_out_and_its_beginning_held_back():
    tokenizer = small_writer.tokenizer()
    ids = tokenizer("cow\n[u lamp\n[user]\nbus")["input_ids"]
    pieces = streamed(tokenizer, ids, end="\n[user]\n")
    assert "".join(pieces) == "cow\n[u lamp"
    assert not any(piece.endswith("\n") for piece in pieces)
    assert "".join(streamed(tokenizer, tokenizer("cow\n[use")["input_ids"], end="\n[user]\n")) == "cow\n[use"


def turn(role, content):
    return {"role": role, "content": content}


def test_a_conversation_is_the_text_of_the_template():
    tokenizer = small_writer.tokenizer(small_writer.CHAT)
    template = ChatTemplate(tokenizer)
    ids = template.encode([turn(SYSTEM, "farm"), turn(USER, "cow?")])
    assert tokenizer.decode(ids) == "[system]\nfarm\n[user]\ncow?\n[assistant]\n"
    assert template.ending == Ending(text="\n[user]\n")
    marked = small_writer.tokenizer(small_writer.MARKED)
    assert ChatTemplate(marked).ending == Ending(frozenset([marked.convert_tokens_to_ids("<|turn|>")]))
    with pytest.raises(ConfigError, match="--chat needs a tokenizer with a chat template"):
        ChatTemplate(small_writer.tokenizer())
    tokenizer.chat_template = "{{ raise_exception('no, never') }}"
    with pytest.raises(ConfigError, match="chat template refuses the conversation: no, never"):
        ChatTemplate(tokenizer).encode([turn(USER, "cow?")])
    assert ChatTemplate(tokenizer).ending == Ending()


def test_the_oldest_turns_are_left_out_until_the_rest_fits():
    template = ChatTemplate(small_writer.tokenizer(small_writer.CHAT))
    system = turn(SYSTEM, "farm")
    turns = [[turn(USER, f"cow {i}?"), turn(ANSWERS, f"sheep {i}.")] for i in range(3)]
    messages = [system, *itertools.chain(*turns), turn(USER, "and?")]
    size = len(template.encode(messages))
    assert template.fit(messages, size) == (messages, 0)
    assert template.fit(messages, size - 1) == ([system, *messages[3:]], 1)
    assert template.fit(messages, 1) == ([system, messages[-1]], 3)
    assert template.fit(messages[1:], 1) == ([messages[-1]], 3)
