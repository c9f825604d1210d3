"""Tokens/s of `generate` end to end: our models, and transformers' Mixtral of the same shape.

All models have random weights and write the same text, so that none has an easier one: a token's embedding stays the
largest part of the residual stream, and the head's row of the token that follows is that embedding. The text walks
through the vocabulary in a fixed random order. ReLU routers get the biases that open each expert for the share k/E of
such tokens, as in a settled model.

Legend: B batch, S sequence, T = B S tokens, D model width, F expert width, E experts, k experts per token, L layers,
V vocabulary, K slots of Mixtral's router.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe.errors import RemoeError, check_integers
from remoe.lab.bench.peers import mixtral_model
from remoe.lab.bench.roofline import Roofline
from remoe.lab.bench.timing import medians_and_spread, round_seconds
from remoe.layer import MoE
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.modeling_remoe import RemoeForCausalLM

OURS = ("relu", "topk", "dense")
PEERS = ("grouped_mm", "batched_mm", "eager")
HEAD_WIDTH = 64
SLOW = 5  # times the fastest: such a contestant has one round
MOST_COPIED = 2**32  # bytes of weights that batched_mm, which copies an expert for each pair, may copy at once
SETTLED_ON = 64  # sequences from which the biases are computed


@dataclass(frozen=True)
class Work:
    """Sizes of the models, and what they write.

    Attributes:
        d_model, d_ffn, num_experts, k, layers, vocab_size: D, F, E, k, L and V.
        prompt_tokens: of each prompt, at least 1.
        new_tokens: that are written after each prompt, at least 2.
        cache: transformers' `cache_implementation`, "dynamic" or "static".

    Raises:
        ConfigError: for sizes that make no model or no text.
    """

    d_model: int
    d_ffn: int
    num_experts: int
    k: int
    layers: int
    vocab_size: int
    prompt_tokens: int
    new_tokens: int
    cache: str

    def __post_init__(self) -> None:
        check_integers(1, prompt_tokens=self.prompt_tokens)
        check_integers(2, new_tokens=self.new_tokens)  # the first one comes from the prompt's pass
        self.config("relu")

    def __str__(self) -> str:
        return (
            f"D = {self.d_model}, F = {self.d_ffn}, E = {self.num_experts}, k = {self.k}, {self.layers} layers, "
            f"vocabulary {self.vocab_size}; prompts of {self.prompt_tokens} tokens, {self.new_tokens} new ones, "
            f"{self.cache} cache"
        )

    def config(self, router: str) -> RemoeConfig:
        """Of our model with this router."""
        return RemoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=self.d_ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.d_model // HEAD_WIDTH),
            num_experts=self.num_experts,
            num_experts_per_tok=self.k,
            router=router,
            router_options={"bias": True} if router == "relu" else None,
            max_position_embeddings=self.prompt_tokens + self.new_tokens,
            initializer_range=0.02,
        )

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert's weights."""
        return 3 * self.d_model * self.d_ffn * dtype.itemsize


class Contestants:
    """All models on one device, by the contestants' names.

    Args:
        work: sizes.
        device: where the models run.
        dtype: of the weights.
        peers: whether Mixtral takes part.

    Raises:
        ConfigError: for sizes that do not fit together.
    """

    def __init__(self, work: Work, device: torch.device, dtype: torch.dtype, peers: bool) -> None:
        self.work, self.device, self.dtype = work, device, dtype
        torch.manual_seed(0)
        order_V, embedding_VD = torch.randperm(work.vocab_size), torch.randn(work.vocab_size, work.d_model)
        self._next_V = torch.empty_like(order_V).index_put_((order_V,), order_V.roll(-1))
        with device:  # drawing so many weights on the host would take longer than all measurements
            self.models: dict[str, PreTrainedModel] = {
                f"remoe {router}": RemoeForCausalLM(work.config(router)) for router in OURS
            }
            self._experts = {f"mixtral {experts}": experts for experts in PEERS if peers}
            if peers:
                self.models |= dict.fromkeys(self._experts, mixtral_model(work.config("topk"), PEERS[0]))
        for model in set(self.models.values()):
            model.to(dtype).eval()
            model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
            with torch.no_grad():
                model.get_input_embeddings().weight.copy_(embedding_VD)
                model.get_output_embeddings().weight[self._next_V] = embedding_VD.to(device, dtype)
        settle(self.models["remoe relu"], self.text(SETTLED_ON, work.prompt_tokens + work.new_tokens))

    def text(self, batch: int, length: int) -> Tensor:
        """(B, length) int64: what every model writes from B random first tokens on."""
        token_B = torch.randint(self.work.vocab_size, (batch,), generator=torch.Generator().manual_seed(1))
        tokens = [token_B]
        while len(tokens) < length:
            tokens.append(self._next_V[tokens[-1]])
        return torch.stack(tokens, dim=1).to(self.device)

    def able(self, batch: int) -> list[str]:
        """The names of those that can compute so many prompts at once."""
        copied = batch * self.work.prompt_tokens * self.work.k * self.work.expert_bytes(self.dtype)
        return [name for name in self.models if self._experts.get(name) != "batched_mm" or copied <= MOST_COPIED]

    @torch.inference_mode()
    def write(self, name: str, prompt_BS: Tensor) -> Tensor:
        """(B, prompt and new tokens) int64: the prompts and what a contestant writes after them."""
        model = self.models[name]
        if experts := self._experts.get(name):
            model.set_experts_implementation(experts)
        return model.generate(
            prompt_BS,
            attention_mask=torch.ones_like(prompt_BS),
            max_new_tokens=self.work.new_tokens,
            cache_implementation=self.work.cache,
        )

    @torch.inference_mode()
    def active(self, name: str, text_BS: Tensor) -> Tensor | None:
        """(L, B, S, E) bool, the experts of each token of a text; None for a model that does not route."""
        model, found = self.models[name], []
        if name == "remoe dense":
            return None
        hooks = [layer.mlp.register_forward_hook(partial(_note_experts, found)) for layer in model.model.layers]
        model(text_BS, use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        return torch.stack(found).view(-1, *text_BS.shape, self.work.num_experts)


def bench_generate(contestants: Contestants, batch: int, repetitions: int, roofline: Roofline) -> dict[str, object]:
    """Times all contestants that can compute the batch.

    One that is SLOW times slower than the fastest is timed once, in the round that warms up, and has no spread.

    Returns:
        The sizes, with T = B, the tokens of a decoding pass; the names left out; and by contestant: milliseconds of a
        whole `generate` and their spread, tokens/s, their ratio to those of the fastest Mixtral, experts per token
        and experts with at least one token in the decoding passes (means over layers and passes), and the ratio of the
        time to that of reading the weights that each pass needs.

    Raises:
        RemoeError: if a contestant writes another text.
    """
    work, names = contestants.work, contestants.able(batch)
    text_BS = contestants.text(batch, work.prompt_tokens + work.new_tokens)
    prompt_BS = text_BS[:, : work.prompt_tokens]
    functions: dict[str, Callable] = {name: partial(contestants.write, name, prompt_BS) for name in names}
    first = {}
    for name, function in functions.items():
        start = time.perf_counter()
        if not torch.equal(function(), text_BS):
            raise RemoeError(f"{name} writes another text than the weights were made for")
        first[name] = time.perf_counter() - start
    slow = [name for name in names if first[name] > SLOW * min(first.values())]
    rounds = {name: function for name, function in functions.items() if name not in slow}
    seconds = round_seconds(rounds, contestants.device, repetitions, warm_up=0, ahead=False)
    times = medians_and_spread({name: seconds.get(name, [first[name]]) for name in names})
    for name in slow:
        del times["spread"][name]
    speed = {name: 1e3 * batch * work.new_tokens / ms for name, ms in times["milliseconds"].items()}
    theirs = max((speed[name] for name in names if name.startswith("mixtral")), default=None)
    loads = {name: _load(contestants, name, text_BS) for name in names}
    return {
        "T": batch,
        "D": work.d_model,
        "F": work.d_ffn,
        "E": work.num_experts,
        "k": work.k,
        "left_out": [name for name in contestants.models if name not in names],
        "tokens_per_second": speed,
        **times,
        "ratio_to_fastest_mixtral": {name: speed[name] / theirs for name in names} if theirs else {},
        "experts_per_token": {name: load.per_token for name, load in loads.items()},
        "active_experts": {name: load.per_pass for name, load in loads.items()},
        "ratio_to_reading_the_weights": {
            name: times["milliseconds"][name] / 1e3 / (load.read_bytes / roofline.read_bytes)
            for name, load in loads.items()
        },
    }


@torch.no_grad()
def settle(model: RemoeForCausalLM, text_BS: Tensor) -> None:
    """Sets the biases of ReLU routers so that each expert is open for the share k/E of the tokens of a text."""

    def open_for_its_share(layer: MoE, args: tuple[Tensor, ...]) -> None:
        logits_TE = layer.router.logits(args[0].flatten(0, 1))
        density = layer.router.k / layer.router.num_experts
        layer.router.bias -= logits_TE.quantile(1 - density, dim=0)

    # A layer is settled just before it runs: the next one sees what a settled one gives.
    hooks = [layer.mlp.register_forward_pre_hook(open_for_its_share) for layer in model.model.layers]
    model(text_BS, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()


@dataclass(frozen=True)
class _Load:
    """Means over layers and decoding passes, and the bytes of weights that all passes read."""

    per_token: float
    per_pass: float
    read_bytes: float


def _load(contestants: Contestants, name: str, text_BS: Tensor) -> _Load:
    work, itemsize = contestants.work, contestants.dtype.itemsize
    parameters = dict(contestants.models[name].named_parameters())
    numbers = sum(weight.numel() for key, weight in parameters.items() if ".experts." not in key)
    once = itemsize * (numbers - work.vocab_size * work.d_model)  # of the embedding a pass reads rows
    one, passes = work.expert_bytes(contestants.dtype), work.new_tokens
    active_LBSE = contestants.active(name, text_BS[:, :-1])
    if active_LBSE is None:
        return _Load(work.k, work.k, passes * (once + work.layers * work.k * one))
    prompt_LBSE, written_LBSE = active_LBSE.tensor_split([work.prompt_tokens], dim=2)
    read_LSE = torch.cat((prompt_LBSE.flatten(1, 2).any(1, keepdim=True), written_LBSE.any(1)), dim=1)
    per_token = written_LBSE.sum(-1).double().mean().item()
    return _Load(per_token, read_LSE[:, 1:].sum(-1).double().mean().item(), passes * once + read_LSE.sum().item() * one)


def _note_experts(found: list[Tensor], layer: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
    if isinstance(layer, MoE):
        found.append(output[1].gate_TE > 0)
    else:
        logits_TE, _, expert_TK = layer.gate(args[0])
        found.append(torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, expert_TK, True))
