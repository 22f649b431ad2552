"""
A mixture of experts as in DeepSeekMoE: one shared SwiGLU expert that every token takes,
and E routed ones of which each token takes its top k.

    python -m pytest test_engram.py -k moe

The idea: parameters grow with E, compute with k. What a token gets depends on that token
alone: there is no capacity limit (with one, it would depend on the other tokens of the
batch), and experts are balanced not by a loss, but by a bias that moves between steps.

Letters: S = B * T tokens, D width, E routed experts, k of them per token.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class SwiGLU(nn.Module):
    """The feed-forward layer of a dense block, and the shared expert of a sparse one."""

    def __init__(self, n_embd, hidden):
        super().__init__()
        # two matrices, gate and up, one above the other
        self.w_in = nn.Linear(n_embd, 2 * hidden, bias=False)
        self.w_out = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x):
        # two matmuls: the backward of one and a chunk would copy both gradients together
        gate, up = (F.linear(x, w) for w in self.w_in.weight.chunk(2))
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
            # added to the router's scores, only to choose experts, see move_bias()
            self.register_buffer("bias", torch.zeros(n_expert))
            # how often each expert was chosen since the last move_bias()
            self.register_buffer("load", torch.zeros(n_expert))

    def forward(self, x):
        """Return the layer's output for x [B, T, D]."""
        if not self.n_expert:
            return self.shared(x)
        tokens = x.reshape(-1, x.size(-1))                             # [S, D]
        chosen, weight, counts = self.route(tokens)
        if self.training:
            self.load += counts
        # autocast does not cover the experts' matmuls as it does nn.Linear's: cast by hand
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        # with so few pairs of a token and an expert, sorting them would not pay
        if chosen.numel() <= self.n_expert:
            routed = self.few_tokens(tokens.to(dtype), chosen, weight.to(dtype))
        else:
            routed = self.experts(tokens.to(dtype), chosen, weight.to(dtype), counts)
        return self.shared(x) + routed.view_as(x)

    def route(self, x):
        """Choose experts for tokens x [S, D].

        Return the chosen experts [S, k]; their weights [S, k], sigmoids in full precision
        made to sum to 1; and how often each expert was chosen [E]."""
        with torch.autocast(x.device.type, enabled=False):
            affinity = torch.sigmoid(F.linear(x, self.router.weight))          # [S, E]
        # the bias has a say in which experts are chosen, not in their weights
        chosen = (affinity + self.bias).topk(self.top_k, dim=-1).indices
        weight = affinity.gather(-1, chosen)
        # very negative logits give sigmoids of 0 in fp32; if all k are 0, avoid 0 / 0
        tiny = torch.finfo(affinity.dtype).tiny
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(tiny)
        # not bincount: on a GPU that waits for the device
        flat = chosen.flatten()
        counts = flat.new_zeros(self.n_expert).scatter_add_(0, flat, torch.ones_like(flat))
        return chosen, weight, counts

    def experts(self, x, chosen, weight, counts, grouped=None):
        """Return the weighted sum [S, D] over each token's experts. It computes this
        loop:

            out = torch.zeros_like(x)
            for e in range(E):
                token, slot = (chosen == e).nonzero(as_tuple=True)
                gate, up = (x[token] @ w_in[e]).chunk(2, dim=-1)
                y = (F.silu(gate) * up) @ w_out[e]
                out = out.index_add(0, token, y * weight[token, slot, None])

        To do so with fewer and larger operations, sort the S * k pairs (token, expert) by
        expert, so that each expert multiplies one contiguous slice, and then take the
        results back in token order. grouped: in one kernel (None: where that pays)."""
        on_gpu, bf16 = x.is_cuda, x.dtype == torch.bfloat16
        if grouped is None:
            # with separate slices the host has to wait for their lengths; one kernel for all
            # needs strides of 16 bytes (it errs on some Blackwell GPUs, pytorch issue 172439)
            strides_of_16_bytes = all(n % 8 == 0 for n in self.w_out.shape[1:])
            grouped = on_gpu and bf16 and strides_of_16_bytes
        # sort the pairs; pair p belongs to token p // k
        expert, pair = chosen.flatten().sort(stable=True)              # [S * k] both
        size, total = counts, chosen.numel()
        # row: where a sorted pair stands among the rows that are multiplied
        row = torch.arange(total, device=x.device)
        if bf16 and not on_gpu:
            # oneDNN compiles a kernel for every new shape, and the slices have new
            # lengths in each step. Rounded up to 64 rows there are few shapes: a step
            # takes 0.6 of the time.
            size = (counts + 63) // 64 * 64
            total = int(size.sum())
            padding_before = (size - counts).cumsum(0) - (size - counts)       # [E]
            row = row + padding_before[expert]
        # row_of_pair undoes the sort. token: whose vector each row holds (of padding: token
        # 0, whose result nobody takes)
        row_of_pair = torch.empty_like(pair).index_copy_(0, pair, row)
        token = pair.new_zeros(total).index_copy_(0, row, pair // self.top_k)
        # two matmuls per expert, on its slice
        h = x.index_select(0, token)                                   # [total, D]
        gate, up = expert_matmul(h, self.w_in.to(x.dtype), size, grouped).chunk(2, dim=-1)
        h = expert_matmul(F.silu(gate) * up, self.w_out.to(x.dtype), size, grouped)
        # back to token order, where padding is left behind
        h = h.index_select(0, row_of_pair).view(*chosen.shape, -1)     # [S, k, D]
        return (h * weight[..., None]).sum(1)

    def few_tokens(self, x, chosen, weight):
        """Return the same sum for a few tokens, as in decoding: one pair after the other.
        Indexing w_in with a tensor would copy the experts' weights, which takes longer than
        to multiply by them; so the indices of the experts come to the host."""
        sums = []
        for token, experts, weights in zip(x, chosen.tolist(), weight, strict=True):
            parts = []
            for e in experts:
                gate, up = (token @ self.w_in[e].to(x.dtype)).chunk(2)
                parts.append((F.silu(gate) * up) @ self.w_out[e].to(x.dtype))
            sums.append(weights @ torch.stack(parts))
        return torch.stack(sums)                                       # [S, D]

    @torch.no_grad()
    def move_bias(self, step):
        """Balance without a loss (arXiv 2408.15664): after each optimiser step, make an
        expert that got less than its share a little easier to choose, and the others a
        little harder. Return the load of the busiest over the mean, a tensor."""
        mean, most = self.load.mean(), self.load.max()
        self.bias += step * torch.sign(mean - self.load)
        self.load.zero_()
        return most / mean


def expert_matmul(x, w, size, grouped):
    """Multiply slice e of x [total, a] with w[e] of w [E, a, b]. size [E]: lengths."""
    if grouped:
        return F.grouped_mm(x, w, offs=size.cumsum(0).int())
    slices = zip(x.split(size.tolist()), w.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in slices])
