"""ReLU routing: arXiv 2412.14711, Eq. 5, with the L1 penalty of Eq. 9 or Eq. 10 and 11.

Legend: T tokens, D model width, E experts.
"""

from torch import Tensor
from torch.nn import functional as F

from remoe.errors import check
from remoe.routing.assignment import Assignment, Routing, count_tokens, largest, unmasked
from remoe.routing.base import GateRule, LinearRouter, scaled_load
from remoe.routing.regularizers import l1_loss, load_balanced_l1_loss


class ReLURouter(LinearRouter):
    """gate = ReLU(x W): every expert switches on and off on its own, and a token may have 0 to E of them.

    Args:
        d_model, num_experts: D and E.
        k: target experts per token, a mean; the sparsity controller steers S to 1 - k/E.
        load_balance: weight the penalty by each expert's load (Eq. 10 and 11) instead of plain L1 (Eq. 9).
        load_balance_power: exponent p on the load f_e; the paper has 1.
        gate_scale: constant factor on the gates that the experts see, not on those of the penalty; the paper has 1.
        max_experts_per_token: execute only that many of a token's active experts, those with the largest gates. The
            penalty still sees the others, whose gates get no gradient from the task: only the penalty can close them.
        bias: a learned bias for each expert, ReLU(x W + b), as `relufy` and `upcycle` use it.

    Raises:
        ConfigError: when k is not in 1..E, the cap is below k, or the scale is not positive.
    """

    steered = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        k: int,
        *,
        load_balance: bool = True,
        load_balance_power: float = 1.0,
        gate_scale: float = 1.0,
        max_experts_per_token: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts, k, bias=bias)
        cap_fits = max_experts_per_token is None or max_experts_per_token >= k
        check(cap_fits, f"max_experts_per_token must be at least k = {k}, but is {max_experts_per_token}")
        check(gate_scale > 0, f"gate_scale must be above zero, but is {gate_scale}")
        self.load_balance, self.load_balance_power = load_balance, load_balance_power
        self.gate_scale, self.max_experts_per_token = gate_scale, max_experts_per_token
        self.cap = max_experts_per_token if (max_experts_per_token or num_experts) < num_experts else None

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, **_: object) -> Routing:
        logits_TE = self.logits(x_TD)
        gate_TE = F.relu(logits_TE)  # Eq. 5: R(x) = ReLU(x W)
        if mask_T is not None:
            gate_TE = gate_TE.masked_fill(~mask_T[:, None], 0)
        active_TE = gate_TE != 0  # positive or NaN, which must stay visible in the output
        num_tokens = count_tokens(x_TD, mask_T)
        counted_E1 = self.counted(active_TE, num_tokens) if self.balances else None
        count_E = None if counted_E1 is None else scaled_load(counted_E1, num_tokens)
        regularizer = self.penalty(gate_TE, count_E, num_tokens)
        closed_loss, lift = self.opening_losses(logits_TE, counted_E1, num_tokens, mask_T)
        gate_TE = self.scaled(gate_TE)
        most = load_E = None
        if self.cap is not None:
            load_E = active_TE.sum(dim=0)
            active_TE = unmasked(active_TE & largest(gate_TE.abs(), self.cap), mask_T)
            gate_TE, most = gate_TE * active_TE, x_TD.shape[0] * self.cap
        pairs = Assignment.from_gates(gate_TE, active_TE, most)
        losses = {"extra_loss": lift, "closed_loss": closed_loss}
        return Routing(pairs, gate_TE, logits_TE, num_tokens, regularizer, load_E=load_E, **losses)

    def gates(self, x_TD: Tensor) -> Tensor | None:
        return self.scaled(F.relu(self.logits(x_TD))) if self.cap is None else None

    def gate_rule(self) -> GateRule | None:
        if self.cap is not None or type(self) is not ReLURouter:  # subclasses change gates
            return None
        return GateRule("relu", self.weight, self.bias, None, self.k, self.gate_scale)

    @property
    def balances(self) -> bool:
        """Whether the penalty is weighted by load."""
        return self.load_balance

    def penalty(self, gate_TE: Tensor, count_E: Tensor | None, num_tokens: Tensor) -> Tensor:
        """0-dim: what lambda multiplies. `count_E` is `load`, or None where the penalty is not weighted by it."""
        if count_E is None:
            return l1_loss(gate_TE, num_tokens=num_tokens)
        p = self.load_balance_power
        return load_balanced_l1_loss(gate_TE, count_E, k=self.k, num_tokens=num_tokens, power=p)

    def scaled(self, gate_TE: Tensor) -> Tensor:
        """(T, E): the gates that the experts see."""
        return gate_TE if self.gate_scale == 1 else gate_TE * self.gate_scale
