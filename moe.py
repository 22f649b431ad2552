"""
A mixture of experts as in DeepSeekMoE: one shared SwiGLU expert that every token takes, and E
routed ones of which each token takes its top k. Dropless, causal, balanced without a loss.

    python -m pytest test_engram.py -k moe

The idea: parameters grow with E, compute with k. What a token gets depends on that token alone: no
capacity limit (a token's output would hang on its neighbours), balance by a bias between steps.

Letters: S = B * T tokens, D width, E routed experts, k of them per token.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class SwiGLU(nn.Module):
    """The feed-forward layer of a dense block, and the shared expert of a sparse one."""

    def __init__(self, n_embd, hidden):
        super().__init__()
        self.w_in = nn.Linear(n_embd, 2 * hidden, bias=False)          # gate and up in one matmul
        self.w_out = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x):
        gate, up = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * up)


class MoE(nn.Module):

    def __init__(self, n_embd, shared_hidden, n_expert, expert_hidden, top_k):
        super().__init__()
        self.n_expert, self.top_k = n_expert, top_k
        self.shared = SwiGLU(n_embd, shared_hidden)
        if n_expert:
            self.router = nn.Linear(n_embd, n_expert, bias=False)
            self.w_in = nn.Parameter(torch.empty(n_expert, n_embd, 2 * expert_hidden))
            self.w_out = nn.Parameter(torch.empty(n_expert, expert_hidden, n_embd))
            self.register_buffer("bias", torch.zeros(n_expert))        # for selection only
            self.register_buffer("load", torch.zeros(n_expert), persistent=False)

    def forward(self, x):
        """x [B, T, D] -> ([B, T, D], balance loss, a scalar). Without experts: the shared one."""
        if not self.n_expert:
            return self.shared(x), x.new_zeros(())
        flat = x.reshape(-1, x.size(-1))                               # [S, D]
        chosen, weight, counts, balance = self.route(flat)
        if self.training:
            self.load += counts
        routed = self.experts(flat, chosen, weight, counts)
        return self.shared(x) + routed.view_as(x), balance

    def route(self, x):
        """x [S, D] -> chosen experts [S, k], their weights [S, k] (sigmoids in full precision, made
        to sum to 1), how often each was chosen [E], and a balance loss as DeepSeek-V3's, here over
        the whole micro-batch: E * sum of share of choices * mean affinity."""
        with torch.autocast(x.device.type, enabled=False):
            affinity = torch.sigmoid(F.linear(x, self.router.weight))            # [S, E]
        chosen = (affinity + self.bias).topk(self.top_k, dim=-1).indices
        weight = affinity.gather(-1, chosen)
        weight = weight / weight.sum(-1, keepdim=True)
        flat = chosen.flatten()        # not bincount: on a GPU that waits for the device
        counts = flat.new_zeros(self.n_expert).scatter_add_(0, flat, torch.ones_like(flat))
        mean = (affinity / affinity.sum(-1, keepdim=True)).mean(0)
        return chosen, weight, counts, self.n_expert * (counts / len(flat) * mean).sum()

    def experts(self, x, chosen, weight, counts, grouped=None):
        """The routed sum, [S, D]. Sort the S * k (token, expert) pairs by expert, so that each
        expert multiplies one contiguous slice; then take the results back in token order."""
        dtype = torch.get_autocast_dtype(x.device.type) \
            if torch.is_autocast_enabled(x.device.type) else x.dtype
        if grouped is None:      # slices need their lengths on the host; on a CPU they are faster
            grouped = x.is_cuda and dtype == torch.bfloat16 \
                and all(n % 8 == 0 for n in self.w_out.shape[1:])      # strides of 16 bytes
        if chosen.numel() <= self.n_expert:     # decoding: rather fetch weights than sort tokens
            h, e = x.to(dtype).repeat_interleave(self.top_k, 0)[:, None], chosen.flatten()
            gate, up = (h @ self.w_in[e].to(dtype)).chunk(2, dim=-1)
            h = ((F.silu(gate) * up) @ self.w_out[e].to(dtype)).view(*chosen.shape, -1)
            return (h * weight.to(dtype)[..., None]).sum(1)
        pairs = torch.arange(chosen.numel(), device=x.device)
        expert, order = chosen.flatten().sort(stable=True)             # [S * k]
        size, total = counts, len(pairs)
        if not x.is_cuda and dtype == torch.bfloat16:
            # oneDNN compiles a kernel for every new shape, and slices have new lengths each step:
            # rounded up to 64 rows there are few shapes, and a step takes 0.6 of the time
            size = (counts + 63) // 64 * 64
            total = int(size.sum())
        shift = (size - counts).cumsum(0) - (size - counts)            # padding before expert e
        slot = torch.empty_like(pairs).index_copy_(0, order, pairs + shift[expert])
        token = slot.new_zeros(total).index_copy_(0, slot, pairs // self.top_k)
        h = x.to(dtype).index_select(0, token)                         # [total, D]
        gate, up = expert_matmul(h, self.w_in.to(dtype), size, grouped).chunk(2, dim=-1)
        h = expert_matmul(F.silu(gate) * up, self.w_out.to(dtype), size, grouped)
        h = h.index_select(0, slot).view(*chosen.shape, -1)            # [S, k, D], no padding
        return (h * weight.to(dtype)[..., None]).sum(1)

    @torch.no_grad()
    def move_bias(self, step):
        """Loss-free balancing (arXiv 2408.15664): after each optimiser step, an expert that got
        less than its share since the last call becomes easier to choose, by a fixed step.
        -> how uneven the step was: load of the busiest expert over the mean."""
        mean, most = self.load.mean(), self.load.max()
        self.bias += step * torch.sign(mean - self.load)
        self.load.zero_()
        return most / mean


def expert_matmul(x, w, size, grouped):
    """x [sum of size, a] in slices of size [E], w [E, a, b] -> [., b]: slice e times w[e]."""
    if grouped:
        return F.grouped_mm(x, w, offs=size.cumsum(0).int())
    return torch.cat([a @ b for a, b in zip(x.split(size.tolist()), w.unbind(0))])
