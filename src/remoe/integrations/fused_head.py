"""TRL's `SFTTrainer`, from version 1 on, takes log-probabilities from a head of its own and not the model's loss.

It patches the model's `forward`, calls the transformer without its head, and sums the log-probabilities into a loss
that knows nothing of lambda. Here the penalty joins the log-probabilities: the same amount at each target, so that it
comes out of the trainer's sum as the model's own forward pass would have added it, whatever the normalisation,
accumulation and scaling.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import NamedTuple

from torch import Tensor, nn
from transformers import TrainingArguments

from remoe.convert.relufy.model import RelufiedMixin
from remoe.errors import ConfigError
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing import Routing

Penalised = RemoeForCausalLM | RelufiedMixin
ACTING = "_penalised_fused_head"


def has_fused_head(module: nn.Module, args: TrainingArguments) -> bool:
    """Whether this is a model with ReLU routing whose forward pass TRL's `SFTTrainer` may have replaced."""
    supervised = any(cls.__name__ == "SFTConfig" for cls in type(args).__mro__)
    return supervised and isinstance(module, Penalised) and "forward" in module.__dict__


class PenalisedFusedHead:
    """Puts statistics and penalty back into a patched forward pass, and leaves out ids that no token has.

    A model has at most one that acts: the last that was made. `remove` takes it out again.

    Args:
        model: whose `forward` a trainer has patched.
        args: the trainer's; `loss_type` must sum the log-probabilities as they are.

    Raises:
        ConfigError: for a loss that weights the log-probabilities.
    """

    def __init__(self, model: Penalised, args: TrainingArguments) -> None:
        if getattr(args, "loss_type", "nll") == "dft":
            raise ConfigError("loss_type='dft' weights each target, the penalty with it; choose loss_type='nll'")
        left = vars(model).get(ACTING)  # of training that was broken off
        if left is not None:
            left.remove()
        self._model = model
        self._patched = patched = model.forward

        @wraps(patched)
        def forward(*args: object, **kwargs: object) -> object:
            # A trainer may have wrapped a forward pass of ours that was left: that one must not add the penalty too.
            if vars(model).get(ACTING) is not self:
                return patched(*args, **kwargs)
            with _recorded_routings(model, kwargs) as routings, _head_of_tokens(model):
                outputs = patched(*args, **kwargs)
            if getattr(outputs, "log_probs", None) is None:
                return outputs  # the model's own forward pass, which has done all this
            penalty = _observed_penalty(model, routings)
            if penalty is not None:
                outputs.log_probs = outputs.log_probs - penalty.to(outputs.log_probs.device) * outputs.label_mask
            return outputs

        self._forward = model.forward = forward
        setattr(model, ACTING, self)

    def remove(self) -> None:
        """Restores the patched forward pass."""
        if self._model.forward is self._forward:
            self._model.forward = self._patched
        if vars(self._model).get(ACTING) is self:
            delattr(self._model, ACTING)


class _Head(NamedTuple):
    """What TRL reads of a language-model head."""

    weight: Tensor
    bias: Tensor | None


@contextmanager
def _head_of_tokens(model: Penalised) -> Iterator[None]:
    """Inside, the model's output embeddings have no rows for ids that no token has."""
    size, head = getattr(model.config, "tokenizer_size", None), model.get_output_embeddings()
    if size is None or size == head.weight.shape[0]:
        yield
        return
    cut = _Head(head.weight[:size], None if head.bias is None else head.bias[:size])
    model.get_output_embeddings = lambda: cut
    try:
        yield
    finally:
        del model.get_output_embeddings


@contextmanager
def _recorded_routings(model: Penalised, inputs: Mapping[str, object]) -> Iterator[list[Routing]]:
    if isinstance(model, RelufiedMixin):
        with model.recorded_routings(inputs) as routings:
            yield routings
        return
    routings: list[Routing] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: routings.extend(output.routings))
    try:
        yield routings
    finally:
        hook.remove()


def _observed_penalty(model: Penalised, routings: list[Routing]) -> Tensor | None:
    """What the model's own forward pass adds to its loss."""
    if not model.training:
        return None
    if isinstance(model, RelufiedMixin):
        model.observe(routings)
    else:
        model.sparsity.observe(routings)
    return model.sparsity.loss_terms(routings).total
