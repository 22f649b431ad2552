"""
Muon (Jordan et al., 2024) for the matrices of the backbone, batched by shape.
"""
import torch

NAMES = ("qkv.weight", "out.weight", "w_in", "w_out", "w_in.weight", "w_out.weight",
         "key.weight", "value.weight")


def is_muon(name, p):
    return name.startswith("blocks.") and name.endswith(NAMES)


def newton_schulz(g):
    """Return the nearest orthogonal matrices of g [n, a, b], roughly, a <= b."""
    x = g.bfloat16() if BF16 else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.float()


BF16, STEPS = True, 5


def split(name, p):
    """View p as a batch of matrices [n, a, b]."""
    if name.endswith("qkv.weight"):
        return p.view(3, -1, p.size(-1))
    if name.endswith("w_in.weight"):
        return p.view(2, -1, p.size(-1))
    if name.endswith("w_in"):
        E, D, h2 = p.shape
        return p.view(E, D, 2, h2 // 2).transpose(1, 2)       # [E, 2, D, h]
    return p if p.ndim == 3 else p[None]


class Muon:
    def __init__(self, model, weight_decay):
        self.decay, self.params = weight_decay, []
        for name, p in model.named_parameters():
            if is_muon(name, p):
                self.params.append((name, p, torch.zeros_like(p)))

    @torch.no_grad()
    def step(self, lr):
        groups = {}
        for name, p, buf in self.params:
            buf.lerp_(p.grad, 0.05)
            update = p.grad.lerp(buf, 0.95)
            p.grad = None
            view = split(name, p)
            g = split(name, update).reshape(-1, *view.shape[-2:])
            flip = g.size(1) > g.size(2)
            g = g.mT if flip else g
            groups.setdefault(tuple(g.shape[1:]), []).append((p, view, g, flip))
        for (a, b), items in groups.items():
            u = newton_schulz(torch.cat([g for _, _, g, _ in items]))
            scale = 0.2 * max(a, b) ** 0.5
            for (p, view, g, flip), part in zip(items, u.split([len(i[2]) for i in items])):
                part = part.mT if flip else part
                p.mul_(1 - lr * self.decay)
                view.sub_(part.reshape(view.shape), alpha=lr * scale)
