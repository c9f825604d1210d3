"""The routing of a text while a model writes it: what its layers executed, step by step and with the cache.

Legend: V vocabulary, L layers, T tokens of prompt and text, E experts.
"""

import inspect
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import StoppingCriteria

from remoe.errors import ConfigError
from remoe.lab.analysis.mixture import LayerRouting, Mixture
from remoe.lab.analysis.record import RecordWriter, RoutingRecord
from remoe.lab.analysis.recording import about_of
from remoe.lab.analysis.source import Source
from remoe.lab.analysis.texts import TokenIds, TokenTexts
from remoe.lab.generation import SamplingOptions, generate_ids

DOMAIN = "prompt and text"
ROWS = 1024  # tokens of a prompt whose losses are computed at a time


@dataclass(frozen=True)
class Written:
    """A prompt and what a model wrote after it.

    Attributes:
        token_T: (T,) int64 ids, those of the prompt first.
        prompt: number of tokens of the prompt.
        texts: what each token adds to the text.
        nats_T: (T,) float32, cross-entropy of each token after those before it, under the model's own distribution,
            whatever it was sampled from; NaN for the first.
        active_LTE: (L, T - 1, E) bool, pairs that were executed; the last token was written, and not read any more.
        gate_LTE: (L, T - 1, E) float32, their gates, zero elsewhere.
        identity: prompt and sampling.
    """

    token_T: Tensor
    prompt: int
    texts: list[str]
    nats_T: Tensor
    active_LTE: Tensor
    gate_LTE: Tensor
    identity: dict[str, Any]

    def record(self, source: Source, sink: Path | BinaryIO) -> RoutingRecord:
        """Writes the record of all tokens that were read, as one sequence; `source` has the model that wrote them."""
        read = len(self.token_T) - 1
        with RecordWriter(sink, about_of(source.mixture, source.identity(), self.identity)) as writer:
            writer.append(
                sequence_T=torch.zeros(read, dtype=torch.int64),
                domains=[DOMAIN] * read,
                token_T=self.token_T[:-1],
                loss_T=self.nats_T[1:],
                active_LTE=list(self.active_LTE),
                gate_LTE=list(self.gate_LTE),
                texts=self.texts[:-1],
            )
        return RoutingRecord(sink if isinstance(sink, Path) else sink.getvalue())


def write_text(source: Source, prompt: str, options: SamplingOptions) -> tuple[Source, Written]:
    """Has the model of a source write, and records what its layers executed meanwhile.

    Args:
        source: the model.
        prompt: the start of the text.
        options: sampling.

    Returns:
        The source with prompt and text, without the last token, as its text; and what was written.

    Raises:
        ConfigError: for a model that routes no pairs, and as `generate_ids`.
    """
    mixture = source.mixture
    if mixture is None:
        raise ConfigError(f"router {source.model.config.router!r} does not send single tokens to experts")
    ear = _Ear(mixture)
    # transformers computes the logits of the prompt's last token alone where a model can.
    every = {"logits_to_keep": 0} if "logits_to_keep" in inspect.signature(mixture.model.forward).parameters else {}
    with mixture.listening(ear.hear):
        ids, first = generate_ids(mixture.model, source.tokenizer, prompt, options, ear, **every)
    token_T = torch.tensor(ids)
    identity = {"prompt": prompt, "prompt_tokens": first, "sampling": asdict(options)}
    nats_T = torch.cat([torch.full((1,), torch.nan), *ear.nats])
    texts = TokenTexts(source.tokenizer)(ids)
    written = Written(token_T, first, texts, nats_T, ear.stacked("active_TE"), ear.stacked("gate_TE"), identity)
    return replace(source, text=TokenIds(token_T[None, :-1], DOMAIN)), written


class _Ear(StoppingCriteria):
    """Hears each pass of `generate`, and, as a criterion that never stops, each token that it chose."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.read: list[list[LayerRouting]] = []  # of the tokens that are new in each pass
        self.heard = 0  # tokens whose routing is known
        self.nats: list[Tensor] = []
        self.logits_SV = torch.empty(0)

    def hear(self, output: Any, layers: list[LayerRouting]) -> None:
        self.read.append(layers)
        self.logits_SV = output.logits[0]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """A token was chosen: what the last pass has read besides is new since the choice before."""
        new = input_ids.shape[1] - 1 - self.heard
        # A model without a cache reads the whole text in each pass.
        self.read[-1] = [
            LayerRouting(one.active_TE[-new:].clone().cpu(), one.gate_TE[-new:].clone().float().cpu())
            for one in self.read[-1]
        ]
        self.heard += new
        targets_S = input_ids[0, -new:].to(self.logits_SV.device)
        logits = zip(self.logits_SV[-new:].split(ROWS), targets_S.split(ROWS), strict=True)
        self.nats += [F.cross_entropy(part_RV.float(), part_R, reduction="none").cpu() for part_RV, part_R in logits]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def stacked(self, name: str) -> Tensor:
        """(L, T - 1, E)."""
        return torch.stack(
            [torch.cat([getattr(layers[layer], name) for layers in self.read]) for layer in range(self.mixture.layers)]
        )
