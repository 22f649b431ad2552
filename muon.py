"""
Muon: an optimiser for matrices, as in the paper's backbone. A step moves a matrix by its
momentum made orthogonal, so that no direction is left behind.

    python train.py --optimizer muon

The idea: matrices of one shape, of all layers and experts, are made orthogonal together,
in one batch. Matrices that only share a parameter (queries, keys and values; the gate and
up projections; experts) are taken apart first. Source: Jordan et al., 2024
(kellerjordan.github.io/posts/muon); factor and decay: Liu et al., arXiv 2502.16982.
"""
from collections import defaultdict

import torch


class Muon(torch.optim.Optimizer):

    def __init__(self, groups, weight_decay, dtype):
        """groups: dicts of "params", each [a, b] (out, in) or [E, a, b] (in, out), and of
        how many "parts" their outputs consist. dtype: of the matmuls."""
        super().__init__(groups, dict(lr=0.0, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        batches = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 0.05)
                # Nesterov's momentum looks one step ahead
                update = matrices(p.grad.lerp(momentum, 0.95), group["parts"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                batches[update.shape[-2:]].append((matrices(p, group["parts"]), update,
                                                   group["lr"]))
        for (a, b), batch in batches.items():
            updates = [update.reshape(-1, a, b) for _, update, _ in batch]
            sizes = [len(update) for update in updates]
            steps = orthogonal(torch.cat(updates).to(self.dtype)).to(updates[0]).split(sizes)
            for (weights, _, lr), step in zip(batch, steps, strict=True):
                # numbers of the size of Adam's: rate and decay are the same
                weights.sub_(step.view(weights.shape), alpha=0.2 * max(a, b) ** 0.5 * lr)


def matrices(x, parts):
    """Return a parameter's matrices, [parts, a, b] or [E, parts, a, b], as a view: what is
    subtracted from it moves the parameter."""
    if x.ndim == 2:
        return x.view(parts, -1, x.size(1))
    return x.unflatten(-1, (parts, -1)).movedim(-2, 1)


def orthogonal(x):
    """Bring all singular values of x [n, a, b] near 1, by five Newton-Schulz steps."""
    wide = x.size(1) <= x.size(2)
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        # x becomes 3.4445 x - 4.7750 (x x') x + 2.0315 (x x')^2 x
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x,
                          beta=3.4445)
    return x if wide else x.mT
