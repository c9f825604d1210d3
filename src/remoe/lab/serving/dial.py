"""Gate threshold and cap of a request, beside the fields of OpenAI's API: `gate_threshold` and `max_experts`.

Continuous batching has the tokens of several requests in one row. The model then takes the values of each token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from remoe.errors import check_integers, check_numbers
from remoe.models.routed import DIAL, check_dial

NO_CAP = 2**31  # above every number of experts
NO_LIMIT = {"gate_threshold": 0.0, "max_experts": NO_CAP}


def with_dial(handler: type, model: PreTrainedModel) -> type:
    """A handler of transformers' server whose requests may have a dial, which becomes that of the generation config."""

    class Handler(handler):
        def _validate_request(self, body: dict[str, Any]) -> None:
            super()._validate_request({name: value for name, value in body.items() if name not in DIAL})

        def _build_generation_config(self, body: dict[str, Any], *given: Any, **options: Any) -> GenerationConfig:
            config = super()._build_generation_config(body, *given, **options)
            config.dial = read_dial(body, model)
            return config

    return Handler


def read_dial(body: dict[str, Any], model: PreTrainedModel) -> dict[str, float | int]:
    """Those of `gate_threshold` and `max_experts` that a request has.

    Raises:
        ConfigError: for a value out of range, or a model that has no gates to leave out.
    """
    dial = {name: body[name] for name in DIAL if body.get(name) is not None}
    if dial:
        check_dial(model)
    if "gate_threshold" in dial:
        check_numbers(0, gate_threshold=dial["gate_threshold"])
    if "max_experts" in dial:
        check_integers(1, max_experts=dial["max_experts"])
        dial["max_experts"] = min(dial["max_experts"], NO_CAP)
    return dial


def set_dial(model: PreTrainedModel, **given: float | int | None) -> dict[str, float | int]:
    """Sets the model's values, for requests without their own, and returns those that are given.

    Raises:
        ConfigError: as `read_dial`.
    """
    dial = read_dial(given, model)
    for name, value in dial.items():
        getattr(model, f"set_{name}")(value)
    return dial


def dial_of(config: GenerationConfig) -> dict[str, float | int]:
    """The dial of the request for which a handler made this generation config."""
    return getattr(config, "dial", {})


class BatchDial:
    """The dial of each request in the batches of a manager of continuous batching, on a CPU.

    Args:
        manager: transformers', before it has requests.
        default: of requests without values of their own.
    """

    def __init__(self, manager: Any, default: dict[str, float | int]) -> None:
        self.default = NO_LIMIT | default
        self.asked: dict[str, dict[str, float | int]] = {}  # by request that has not been added yet
        self.add, manager.add_request = manager.add_request, self._add
        manager.logit_processor.supported_keys.update(gate_threshold=(float, int), max_experts=int)

    def _add(self, input_ids: list[int], *, request_id: str, **options: Any) -> str | None:
        return self.add(input_ids, request_id=request_id, **options, **self.asked.pop(request_id, {}))

    def join(self, processor: Any) -> None:
        """Brings the dial into what a batch processor computes, and keeps apart what it caches for other prompts.

        The cache shares the keys and values of equal beginnings of prompts. A dial changes them.
        """
        cache, runner, waiting = processor.cache, processor.model_runner, processor.scheduler.waiting_requests
        search, mark, compute = cache.search_prefix_match, cache.mark_complete_blocks, runner.compute_batch

        def search_unless_dialled(request_id: str, prompt_ids: list[int]) -> int:
            return 0 if _dial(waiting[request_id]) else search(request_id, prompt_ids)

        def mark_unless_dialled(state: Any, complete_blocks: dict[str, int]) -> None:
            if not _dial(state):
                mark(state, complete_blocks)

        def compute_with_dial(model: PreTrainedModel, batch: dict[str, Any]) -> None:
            compute(model, batch | self._of_tokens(processor.inputs_and_outputs.requests_in_batch))

        cache.search_prefix_match, cache.mark_complete_blocks = search_unless_dialled, mark_unless_dialled
        runner.compute_batch = compute_with_dial

    def _of_tokens(self, requests: list[Any]) -> dict[str, Tensor]:
        dials = [_dial(request.state) for request in requests]
        lengths = torch.tensor([request.query_length for request in requests])
        return {
            name: torch.tensor([dial.get(name, self.default[name]) for dial in dials]).repeat_interleave(lengths)[None]
            for name in DIAL
            if any(name in dial for dial in dials)
        }


def _dial(state: Any) -> dict[str, float | int]:
    return {name: value for name, value in state.logit_processor_kwargs.items() if name in DIAL}
