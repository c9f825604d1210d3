"""Fits ReLU gates to the gates of another router, on sample text.

Legend: T tokens, D model width, E experts, K experts per token.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.models.loss import IGNORED_TARGET, padding_mask, shifted_targets
from remoe.models.modes import evaluating
from remoe.routing import Routing

STEPS = 400
BATCH_TOKENS = 2048
# First step of a weight, as the part of an active gate by which it could move a logit of independent inputs.
STEP_SIZE = 0.05

Batch = Tensor | Mapping[str, Tensor]


def as_batch(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """`input_ids` (B, S) and, where given, `attention_mask`, on the device.

    Raises:
        ConfigError: for what is neither.
    """
    batch = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    if not isinstance(batch, Mapping) or "input_ids" not in batch or batch["input_ids"].ndim != 2:
        raise ConfigError("samples must be token ids of shape (batch, sequence), or mappings with such input_ids")
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if batch.get(name) is not None}


def language_model_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean cross-entropy of the sample's tokens in nats, of a model that returns logits (B, S, V)."""
    nats = count = 0.0
    with evaluating(model):
        for batch in batches:
            logits_BSV = model(**batch, use_cache=False).logits.float()
            mask = padding_mask(batch.get("attention_mask"), None)
            target_BS = shifted_targets(batch["input_ids"], None, mask).to(logits_BSV.device)
            nats += F.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten(), reduction="sum").item()
            count += (target_BS != IGNORED_TARGET).sum().item()
    return nats / max(count, 1)


class GateRecorder:
    """Keeps the inputs of routers and the gates that they gave, while a model reads sample text.

    Args:
        routers: by name; their output is a `Routing`, or transformers' (logits, weights (T, K), indices (T, K)).
        max_tokens: kept per router; the first ones.
    """

    def __init__(self, routers: Mapping[str, nn.Module], max_tokens: int) -> None:
        self.routers = routers
        self.max_tokens = max_tokens
        self.x_TD: dict[str, list[Tensor]] = {name: [] for name in routers}
        self.gate_TE: dict[str, list[Tensor]] = {name: [] for name in routers}
        self.mask_T: Tensor | None = None
        self.k: dict[str, int] = {}

    def run(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        """Reads the batches.

        Raises:
            ConfigError: for a router whose output is something else; it names the module.
        """
        hooks = [router.register_forward_hook(self._hook(name)) for name, router in self.routers.items()]
        try:
            with evaluating(model):
                for batch in batches:
                    mask = batch.get("attention_mask")
                    self.mask_T = None if mask is None else mask.flatten().bool()
                    model(**batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for name in self.routers:
            if not self.x_TD[name]:
                raise ConfigError(f"{name}: the sample text never reached this router")
            if not any(map(len, self.x_TD[name])):
                raise ConfigError("the sample text is nothing but padding")

    def _hook(self, name: str):
        def record(router: nn.Module, args: tuple, output: object) -> None:
            x_TD = args[0].detach().flatten(0, -2).float()
            gate_TE, _, self.k[name] = routed(output, x_TD.shape[0], router, name)
            if self.mask_T is not None:
                mask_T = self.mask_T.to(x_TD.device)
                x_TD, gate_TE = x_TD[mask_T], gate_TE[mask_T]
            room = self.max_tokens - sum(map(len, self.x_TD[name]))
            if room > 0:
                self.x_TD[name].append(x_TD[:room])
                self.gate_TE[name].append(gate_TE[:room].detach().float())

        return record

    def samples(self, name: str) -> tuple[Tensor, Tensor]:
        """(T, D) inputs and (T, E) gates of one router."""
        return torch.cat(self.x_TD[name]), torch.cat(self.gate_TE[name])


def routed(output: object, T: int, router: nn.Module, name: str) -> tuple[Tensor, Tensor, int]:
    """What a router chose, from its output: (T, E) gates, (T, E) bool executed pairs, and the experts per token.

    Args:
        output: a `Routing`, or transformers' (logits, weights (T, K), indices (T, K)).
        T: tokens that the router was passed.
        router, name: the module and what to call it.

    Raises:
        ConfigError: for another output; it names the module.
    """
    if isinstance(output, Routing):
        return output.gate_TE, output.gate_TE != 0, router.k
    logits = output[0] if isinstance(output, tuple) and len(output) == 3 else None
    if not isinstance(logits, Tensor) or output[1].shape != output[2].shape or output[1].shape[0] != T:
        raise ConfigError(f"{name}: a router that does not return (logits, weights, indices) cannot be converted")
    _, weight_TK, index_TK = output
    gate_TE = weight_TK.new_zeros(T, logits.shape[-1]).scatter(1, index_TK.long(), weight_TK)
    active_TE = torch.zeros_like(gate_TE, dtype=torch.bool).scatter(1, index_TK.long(), True)
    return gate_TE, active_TE, index_TK.shape[1]


def fit_relu_gates(
    x_TD: Tensor, target_TE: Tensor, weight_ED: Tensor | None = None, steps: int = STEPS
) -> tuple[Tensor, Tensor, float]:
    """W and b for which ReLU(x W + b) comes closest to the target gates, in squared error.

    Args:
        x_TD: (T, D) float32.
        target_TE: (T, E) float32, zero where a token does not have the expert.
        weight_ED: (E, D), the other router's weight, whose logits rank the experts already; None to start from least
            squares.
        steps: of Adam.

    Returns:
        (E, D), (E,), and the squared error that is left, as a part of the target's square.
    """
    T, D = x_TD.shape
    weight_ED, bias_E = _start(x_TD, target_TE, weight_ED)
    active = target_TE[target_TE > 0]
    gate = active.mean().item() if active.numel() else 1.0
    width = x_TD.square().mean().sqrt().clamp(min=1e-6).item() * math.sqrt(D)
    weight_ED, bias_E = weight_ED.requires_grad_(), bias_E.requires_grad_()
    groups = [{"params": [weight_ED], "lr": STEP_SIZE * gate / width}, {"params": [bias_E], "lr": STEP_SIZE * gate}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(T, (min(T, BATCH_TOKENS),), generator=generator).to(x_TD.device)
            gate_TE = F.relu(F.linear(x_TD[rows], weight_ED, bias_E))
            loss = (gate_TE - target_TE[rows]).square().mean() / gate**2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    weight_ED, bias_E = weight_ED.detach(), bias_E.detach()
    error = (F.relu(F.linear(x_TD, weight_ED, bias_E)) - target_TE).square().sum()
    return weight_ED, bias_E, (error / target_TE.square().sum().clamp(min=1e-30)).item()


def _start(x_TD: Tensor, target_TE: Tensor, weight_ED: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each expert's gate as a line of the other router's logit, fitted where the expert is active."""
    if weight_ED is None:
        centred_TD = x_TD - x_TD.mean(dim=0)
        ridge = 1e-2 * centred_TD.square().sum(dim=0).mean() * torch.eye(x_TD.shape[1], device=x_TD.device)
        weight_ED = torch.linalg.solve(centred_TD.T @ centred_TD + ridge, centred_TD.T @ target_TE).T
    logit_TE = F.linear(x_TD, weight_ED.float())
    active_TE = (target_TE > 0).float()
    count_E = active_TE.sum(dim=0).clamp(min=1)
    mean_logit_E = (logit_TE * active_TE).sum(dim=0) / count_E
    mean_gate_E = (target_TE * active_TE).sum(dim=0) / count_E
    logit_c_TE = (logit_TE - mean_logit_E) * active_TE
    slope_E = (logit_c_TE * (target_TE - mean_gate_E)).sum(dim=0) / logit_c_TE.square().sum(dim=0).clamp(min=1e-12)
    # An expert without a rising line starts with one that falls to zero three deviations below its mean.
    flat_E = mean_gate_E / (3 * logit_TE.std(dim=0).clamp(min=1e-6))
    slope_E = torch.maximum(slope_E, flat_E)
    return slope_E[:, None] * weight_ED.float(), mean_gate_E - slope_E * mean_logit_E
