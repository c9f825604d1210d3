"""transformers' own server, OpenAI's API over HTTP, with one model of ours behind it.

That server looks a model's class up in transformers itself, which has none of ours. Its manager of models is replaced
by one that holds a single model, loaded as all commands load theirs.
"""

import errno
import inspect
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import transformers
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from remoe.errors import ConfigError, check, missing_extra
from remoe.lab.data.tokenizer import vocabulary_size
from remoe.lab.training.load import load_model
from remoe.models.modeling_remoe import RemoeForCausalLM

# Continuous batching without a GPU: the share of the memory for its cache, of which transformers takes 0.6, and the
# tokens of one forward pass.
CPU_BATCHING: dict[str, float | int] = {"cb_max_memory_percent": 0.2, "cb_max_batch_tokens": 512}

NEEDED = {  # what is used of transformers' server
    "Serve": {
        "force_model",
        "continuous_batching",
        "device",
        "host",
        "port",
        "log_level",
        "non_blocking",
        *CPU_BATCHING,
    },
    "_load_model": {"gguf_file", "tqdm_class", "progress_callback"},
    "_load_processor": {"gguf_file"},
    "process_model_name": set(),
}


def load_served(folder: str | Path, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, with the settings of generation that the server reads from them.

    Args:
        folder: a run, one of its checkpoints, or the folder of a model.
        device: where the model is put.

    Raises:
        CheckpointError: when there is no model, or it cannot be loaded.
        DataError: when its tokenizer cannot be loaded.
    """
    model, tokenizer, _ = load_model(folder)
    settings = model.generation_config
    settings.do_sample = True  # otherwise the server ignores a request's temperature; at 0 it takes the likeliest token
    settings.eos_token_id = settings.pad_token_id = tokenizer.eos_token_id
    known, size = vocabulary_size(tokenizer), model.get_output_embeddings().weight.shape[0]
    if known < size:  # a vocabulary that is rounded up: these ids have no text
        settings.suppress_tokens = list(range(known, size))
    tokenizer.__class__ = _reads_as_generate(type(tokenizer), special=not isinstance(model, RemoeForCausalLM))
    return model.to(device), tokenizer


def _reads_as_generate(kind: type[PreTrainedTokenizerBase], *, special: bool) -> type[PreTrainedTokenizerBase]:
    """The tokenizer's class, but a prompt becomes the tokens that `remoe generate` makes of it."""

    class Tokenizer(kind):
        def __call__(self, text: str, **options: object) -> BatchEncoding:
            # An empty prompt starts a new document; without a token it would end the thread of continuous batching.
            options.setdefault("add_special_tokens", special)
            return super().__call__(text or self.eos_token, **options)

    return Tokenizer


@contextmanager
def serving(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    continuous_batching: bool = False,
    device: torch.device | None = None,
) -> Iterator[tuple[str, str]]:
    """Context in which threads answer requests; gives the address of the API and the name of the model.

    Args:
        folder: a run, one of its checkpoints, or the folder of a model; the folder's name is the name of the model.
        host: address to listen on.
        port: to listen on; another free one if it is taken, and any free one for 0.
        continuous_batching: whether requests share forward passes, by transformers' paged attention.
        device: of the model; the CPU by default.

    Raises:
        ExtraError: when a package of the extra `serve` is missing.
        ConfigError: when this version of transformers has another server, or the server does not start.
        CheckpointError: when there is no model, or it cannot be loaded.
        DataError: when its tokenizer cannot be loaded.
    """
    check(bool(host), "an empty host would listen on every network: give an address")
    serve, models = _server()
    name, port = Path(folder).resolve().name, _free(host, port)
    held = load_served(folder, device or torch.device("cpu"))

    class Held(models.ModelManager):
        """Holds one model, and loads no other."""

        def _load_processor(self, name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
            self._only(name)
            return held[1]

        def _load_model(self, name: str, **_: object) -> PreTrainedModel:
            self._only(name)
            return held[0]

        def _only(self, asked: str) -> None:
            if asked != name:
                raise ValueError(f"this server has the model {name!r} alone, not {asked!r}")

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

    theirs, models.ModelManager = models.ModelManager, Held
    try:
        server = serve.Serve(
            name,
            continuous_batching=continuous_batching,
            device=str(held[0].device),
            host=host,
            port=port,
            log_level="error",
            **({} if held[0].device.type == "cuda" else CPU_BATCHING),
            non_blocking=True,
        )
    finally:
        models.ModelManager = theirs
    try:
        while not server.server.started:
            if not server._thread.is_alive():
                raise ConfigError(f"cannot listen on {host}, port {port}")
            time.sleep(0.01)
        listening = server.server.servers[0].sockets[0].getsockname()
        yield f"http://{f'[{host}]' if ':' in host else host}:{listening[1]}/v1", name
    finally:
        server.kill_server()  # waits at most 2 s
        server.server.force_exit = True  # what is still being answered is cut off
        server._thread.join()


def _server() -> tuple[ModuleType, ModuleType]:
    """transformers' modules of the server and of its models.

    Raises:
        ExtraError: when a package of the extra `serve` is missing.
        ConfigError: when this version of transformers has another server.
    """
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra(error, "serve", "remoe serve") from error
    other = ConfigError(f"remoe serve needs the server of transformers 5.24; {transformers.__version__} has another")
    try:
        from transformers.cli import serve
        from transformers.cli.serving import model_manager
    except ImportError as error:
        raise other from error
    manager = getattr(model_manager, "ModelManager", None)
    for name, needed in NEEDED.items():
        found = getattr(serve, name, None) or getattr(manager, name, None)
        if found is None or not needed <= inspect.signature(found).parameters.keys():
            raise other
    return serve, model_manager


def _free(host: str, port: int) -> int:
    """The port, or 0, which stands for any free one, if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
            return 0
    return port
