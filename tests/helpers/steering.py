"""Made-up routings, and controllers driven by them."""

import torch

from remoe.routing.assignment import Assignment, Routing


def routing(active_TE, num_tokens=None):
    gate_TE = active_TE.float()
    tokens = torch.tensor(len(active_TE) if num_tokens is None else num_tokens)
    return Routing(Assignment.from_gates(gate_TE, active_TE), gate_TE, None, tokens, gate_TE.sum())


def batch(pairs, tokens=100, experts=8):
    """A routing with exactly `pairs` routed pairs."""
    return routing((torch.arange(tokens * experts) < pairs).view(tokens, experts))


def drive(controller, course_of_pairs):
    values = []
    for pairs in course_of_pairs:
        controller.observe([batch(pairs)])
        controller.update()
        values.append(controller.lam.item())
    return values


COURSE = [400, 420, 380, 300, 160, 90, 100, 100, 80, 110, 120, 99, 101, 0, 800] * 4  # 100 of 800 is the target
