"""A small model with a byte-level tokenizer, whose texts are as random as its weights: incomplete characters too."""

import torch

import remoe
from remoe.lab.data.tokenizer import END_OF_TEXT, train_tokenizer

WORDS = ["cow", "sheep", "hen", "goat", "barn", "road", "shop", "bus", "tram", "lamp"]
CHAT = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
MARKED = CHAT.replace("[{{ m.role }}]", "<|turn|>{{ m.role }}").replace("[assistant]", "<|turn|>assistant")


def tokenizer(template=None):
    texts = (f"{WORDS[i % 10]} {WORDS[i * j % 7]} {i}. [user] [assistant]\n" for i in range(30) for j in range(9))
    made = train_tokenizer(texts, 300)
    if template is not None:
        made.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        made.chat_template = template
    assert made.eos_token == END_OF_TEXT
    return made


def model(size=310, **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    fixed = {"num_experts": 4, "initializer_range": 0.3, "max_position_embeddings": 128, "vocab_size": size}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same texts for every order of the tests
        return remoe.RemoeForCausalLM(remoe.RemoeConfig(**(sizes | fixed | options))).eval()


def save(folder, template=None, **options):
    made = tokenizer(template)
    model(tokenizer_size=len(made), eos_token_id=made.eos_token_id, **options).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
