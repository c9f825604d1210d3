"""A model whose layers execute given pairs: the routing of another engine or of an earlier pass.

Legend: T tokens, E experts.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn

from remoe.convert.relufy.model import RelufiedRouter
from remoe.errors import ConfigError, check
from remoe.layer import MoE
from remoe.routing import Router, Routing
from remoe.routing.replay import Replay


@contextmanager
def replay_routing(model: nn.Module, replay: Replay) -> Iterator[None]:
    """Context in which every forward pass of a model executes the pairs of a replay.

    The same weights in the same engine give the same output and the same gradients, bit for bit. Penalty and sparsity
    are those of the model's own router. If activations are recomputed in the backward pass
    (`gradient_checkpointing_enable`), that pass must run inside the block too.

    Args:
        model: a ReMoE model, a model with `MoE` layers, or a relufied model; it may be wrapped, but not compiled.
        replay: of as many layers as the model has, and of the T tokens of each pass, row after row.

    Raises:
        ConfigError: for a model without such layers or with another number of them, a compiled one, a router whose
            tokens are not routed, and in a pass whatever `Replay.apply` raises.
    """
    if any("_orig_mod" in module._modules or module._compiled_call_impl for module in model.modules()):
        raise ConfigError("a compiled model does not see a replay: pass the model from before torch.compile")
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    relufied = [module for module in model.modules() if isinstance(module, RelufiedRouter)]
    found = len(layers) or len({router.layer for router in relufied})
    check(found > 0, f"{type(model).__name__} has no layers whose routing can be replayed")
    given = len(replay.active_LTE)
    check(given == found, f"the replay has {given} layers, but the model has {found}")
    if any(not layer.router.routes_pairs for layer in layers):
        raise ConfigError("the model's router routes no pairs: there is nothing to replay")
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            for module in layer.router.modules():  # an adapter may have wrapped the router, or put a copy beside it
                if isinstance(module, Router):
                    hook = partial(_replayed, replay, index)
                elif module is layer.router:
                    hook = _nothing
                else:
                    continue
                stack.callback(module.register_forward_hook(hook).remove)
        for router in relufied:
            stack.callback(setattr, router, "replay", router.replay)
            router.replay = replay
        yield


def _replayed(replay: Replay, index: int, router: Router, given: tuple, own: Routing) -> Routing:
    return replay.apply(index, router, own, given[1])  # x_TD, mask_T


def _nothing(*_: object) -> None:
    """The hook of a wrapper, which tells the layer that calling it does more than its gates say."""
