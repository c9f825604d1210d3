"""Generation for transformers' server, one text at a time or together, that can be stopped before its end.

transformers 5.24 stops a stream whose client has gone away. Any other request it computes to the end, for nobody.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.cli.serving.utils import CBGenerateManager, GenerateManager

Running = dict[str, Callable[[], None]]


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

    def generate_streaming(self, *args: Any, request_id: str, **options: Any) -> tuple[asyncio.Queue, Any]:
        """As transformers does."""
        pieces, streamer = super().generate_streaming(*args, request_id=request_id, **options)
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
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        answer = loop.create_future()

        def generate() -> None:
            if stopped.is_set():
                return
            told: tuple[Callable[[Any], None], Any]
            try:
                rows = model.generate(
                    **inputs, generation_config=gen_config, tokenizer=processor, stopping_criteria=[_Stop(stopped)]
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
    """

    def __init__(self, running: Running, config: ContinuousBatchingConfig) -> None:
        super().__init__(config)
        self.running = running

    def held(self) -> int:
        """Number of texts that have a place in the batch or wait for one."""
        processor = self._cb and self._cb.batch_processor
        if not processor:
            return 0
        return len(processor.scheduler.active_requests) + len(processor.scheduler.waiting_requests)

    def generate_streaming(self, *args: Any, request_id: str, **options: Any) -> tuple[asyncio.Queue, Any]:
        """As transformers does."""
        # There already, should the first token be faster than transformers, which adds its own after the request.
        handlers = self._cb.output_router.result_handlers
        self._cb.register_result_handler(request_id, lambda output: handlers[request_id][0](output))
        pieces, streamer = super().generate_streaming(*args, request_id=request_id, **options)
        self.running[request_id] = lambda: self._cancel(request_id)
        return pieces, streamer

    async def generate_non_streaming(self, *args: Any, request_id: str, **options: Any) -> tuple[str, int, list[int]]:
        """As transformers does."""
        self.running[request_id] = lambda: self._cancel(request_id)
        return await super().generate_non_streaming(*args, request_id=request_id, **options)

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
