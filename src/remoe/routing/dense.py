"""No routing: every token goes to the one expert with gate one. The dense baseline behind the same interface."""

import torch
from torch import Tensor, nn

from remoe.routing.assignment import Assignment, Routing, count_tokens


class DenseRouter(nn.Module):
    """Sends every token to expert 0; has no parameters and no regulariser."""

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
        T, device = x_TD.shape[0], x_TD.device
        token_R = torch.arange(T, device=device) if mask_T is None else mask_T.nonzero().squeeze(1)
        count_E = torch.full((1,), token_R.shape[0], device=device)
        gate_TE = torch.ones(T, 1, device=device)
        if mask_T is not None:
            gate_TE = gate_TE * mask_T[:, None]
        assignment = Assignment(
            token_R, torch.zeros_like(token_R), torch.ones_like(token_R, dtype=torch.float32), count_E, T
        )
        return Routing(assignment, gate_TE, None, count_tokens(x_TD, mask_T), torch.zeros((), device=device))
