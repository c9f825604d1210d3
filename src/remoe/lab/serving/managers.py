"""Generation for transformers' server, one text at a time or together, that can be stopped before its end.

transformers 5.24 stops a stream whose client has gone away. Any other request it computes to the end, for nobody.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.cli.serving.utils import CBGenerateManager, GenerateManager, _StreamError
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from remoe.errors import ConfigError
from remoe.lab.generation import LONGEST_TEXT, check_length
from remoe.lab.serving.dial import BatchDial, dial_of

Running = dict[str, Callable[[], None]]

# Settings of generation that each request of a batch has for itself, and those that only sampling uses.
OF_A_REQUEST = {"max_new_tokens", "stop_strings", "eos_token_id", "pad_token_id", "dial"}
OF_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}


def check_request(model: PreTrainedModel, input_ids: list[int] | torch.Tensor, config: GenerationConfig) -> int:
    """The most tokens that a request may take in all.

    Raises:
        ConfigError: when the request cannot be answered; the server makes an error 400 of it.
    """
    if not 1 <= (config.max_new_tokens or 0) <= LONGEST_TEXT:
        raise ConfigError(f"max_tokens must be from 1 to {LONGEST_TEXT:,}, but is {config.max_new_tokens}")
    tokens = len(input_ids) if isinstance(input_ids, list) else input_ids.shape[-1]
    check_length(model, tokens, config.max_new_tokens, "max_tokens")
    return tokens + config.max_new_tokens


class _Stop(StoppingCriteria):
    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.stopped.is_set(), device=input_ids.device)


class OneByOne(GenerateManager):
    """Writes one text after the other.

    Args:
        running: by id of the request, what stops its generation; filled here, emptied by the `Gate`.
    """

    def __init__(self, running: Running) -> None:
        super().__init__()
        self.running = running
        self._unfinished: set[Future] = set()

    def held(self) -> int:
        """Number of texts that are being written or wait for it."""
        return len(self._unfinished)

    def submit(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Future:
        """As transformers does."""
        future = super().submit(fn, *args, **options)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return future

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, torch.Tensor],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:
        """As transformers does."""
        check_request(model, inputs["input_ids"], gen_config)
        inputs = {**inputs, **dial_of(gen_config)}
        pieces, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        self.running[request_id] = streamer.cancel
        return pieces, streamer

    async def generate_non_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, torch.Tensor],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, torch.Tensor]:
        """Text, number of tokens of the prompt, and tokens of the text."""
        check_request(model, inputs["input_ids"], gen_config)
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        answer = loop.create_future()

        def generate() -> None:
            if stopped.is_set():
                return
            told: tuple[Callable[[Any], None], Any]
            try:
                rows = model.generate(
                    **inputs,
                    **dial_of(gen_config),
                    generation_config=gen_config,
                    tokenizer=processor,
                    stopping_criteria=[_Stop(stopped)],
                )
                told = answer.set_result, rows[0, inputs["input_ids"].shape[1] :]
            except Exception as error:
                told = answer.set_exception, error
            if not stopped.is_set():
                loop.call_soon_threadsafe(lambda: answer.done() or told[0](told[1]))

        self.running[request_id] = stopped.set
        self.submit(generate)
        written = await answer
        return processor.decode(written, skip_special_tokens=True), inputs["input_ids"].shape[1], written


class Together(CBGenerateManager):
    """Writes all texts together, by continuous batching.

    Args:
        running: by id of the request, what stops its generation; filled here, emptied by the `Gate`.
        config: of continuous batching.
        default: gate threshold and cap of requests without values of their own.
    """

    def __init__(self, running: Running, config: ContinuousBatchingConfig, default: dict[str, float | int]) -> None:
        super().__init__(config)
        self.running, self.default = running, default
        self._dial: BatchDial | None = None
        self._joined = False

    def held(self) -> int:
        """Number of texts that have a place in the batch or wait for one."""
        processor = self._cb and self._cb.batch_processor
        if not processor:
            return 0
        return len(processor.scheduler.active_requests) + len(processor.scheduler.waiting_requests)

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        """Starts with the first request, whose settings of sampling are those of all.

        Raises:
            ConfigError: for a later request with others, or one with a dial if the model is not on a CPU.
        """
        check_request(model, [], gen_config)  # before its settings hold for all
        if dial_of(gen_config) and model.device.type != "cpu":  # a GPU replays graphs, which have no place for it
            raise ConfigError("with continuous batching, gate_threshold and max_experts of a request need a CPU")
        super().init_cb(model, gen_config)
        if self._dial is None:
            self._dial = BatchDial(self._cb, self.default)
        first, other = (_shared_settings(config) for config in (self._cb.generation_config, gen_config))
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            names = "temperature" if "do_sample" in differing else ", ".join(differing)
            raise ConfigError(
                f"with continuous batching, all requests have the sampling settings of the first one: {names} differs"
            )

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, list[int]],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:
        """As transformers does, but a stop word ends the text."""
        self._check_room(check_request(model, inputs["input_ids"], gen_config))
        self._dial.asked[request_id] = dial_of(gen_config)
        # There already, should the first token be faster than transformers, which adds its own after the request.
        handlers = self._cb.output_router.result_handlers
        self._cb.register_result_handler(request_id, lambda output: handlers[request_id][0](output))
        pieces, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        if gen_config.stop_strings:
            self._stop_at(gen_config.stop_strings, processor, request_id, streamer)
        self.running[request_id] = lambda: self._cancel(request_id)
        return pieces, streamer

    async def generate_non_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, list[int]],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        """Text, number of tokens of the prompt, and tokens of the text."""
        if gen_config.stop_strings:
            return await self._until_stop(model, processor, inputs, gen_config, request_id)
        self._check_room(check_request(model, inputs["input_ids"], gen_config))
        self._dial.asked[request_id] = dial_of(gen_config)
        self.running[request_id] = lambda: self._cancel(request_id)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)

    def _stop_at(self, words: str | list[str], processor: Any, request_id: str, streamer: Any) -> None:
        """Ends a text with the token that completes a stop word; the streamer gets its tokens as `written`."""
        words = [words] if isinstance(words, str) else words
        reach = max(len(word.encode()) for word in words) + 4  # tokens that may have a part of a word, and some more
        handlers = self._cb.output_router.result_handlers
        handle, loop = handlers[request_id]
        stopped = False

        def hand_on(output: GenerationOutput) -> None:
            nonlocal stopped
            if stopped:  # a token that was on its way
                return
            streamer.written = output.generated_tokens
            tail = processor.decode(output.generated_tokens[-reach:], skip_special_tokens=True)
            stopped = any(word in tail for word in words)
            if stopped and not output.is_finished():
                output.status = RequestStatus.FINISHED
                self._cb.cancel_request(request_id)
            handle(output)

        handlers[request_id] = hand_on, loop

    async def _until_stop(self, *request: Any) -> tuple[str, int, list[int]]:
        """As `generate_non_streaming`, by way of a stream, because every token must be looked at."""
        pieces, streamer = self.generate_streaming(*request)
        while (piece := await pieces.get()) is not None:
            if isinstance(piece, _StreamError):
                raise RuntimeError(piece.msg)
        _, processor, inputs, *_ = request
        text = processor.decode(streamer.written, skip_special_tokens=True)
        return text, len(inputs["input_ids"]), streamer.written

    def _check_room(self, tokens: int) -> None:
        """Raises ConfigError for more tokens than the cache takes, at which the thread would end."""
        while self._cb.batch_processor is None and self._cb.is_running():
            time.sleep(0.001)  # the thread makes the cache first of all
        if self._cb.batch_processor is not None:
            if not self._joined:  # before it has a request
                self._dial.join(self._cb.batch_processor)
                self._joined = True
            room = self._cb.batch_processor.cache.max_tokens_read
            if tokens > room:
                raise ConfigError(f"prompt and text may have {tokens:,} tokens; the server has room for {room:,}")

    def _cancel(self, request_id: str) -> None:
        """Takes a request out of the batch, with what was kept to deliver its tokens."""
        self._cb.cancel_request(request_id)
        router = self._cb.output_router
        with router._lock:
            router.result_handlers.pop(request_id, None)
        with suppress(queue.Empty):
            while True:  # tokens without a handler come here, and nobody reads them
                router.output_queue.get_nowait()

    def stop(self) -> None:
        """Ends the thread after its present step, whatever it has to do."""
        if self._cb is not None:
            self._cb.stop(hard_stop=True)


def _shared_settings(config: GenerationConfig) -> dict[str, Any]:
    """The settings that hold for all requests of a batch."""
    without = OF_A_REQUEST if config.do_sample else OF_A_REQUEST | OF_SAMPLING
    return {name: value for name, value in config.to_dict().items() if name not in without}
