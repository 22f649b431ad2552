"""
A GPT with a mixture of experts in every block and an Engram memory in some, in plain PyTorch.

    shapes, _ = make_twins(GPTConfig(), rho=0.75)       # {"engram": GPTConfig, "moe": GPTConfig}
    model = GPT(shapes["engram"], canonical)            # canonical: engram.canonical_ids(...)
    logits, loss, balance = model(idx, targets)         # train.py and sample.py do this

The idea is the first line of Block.forward. With engram=None it never runs, and a plain pre-norm
GPT with experts is left; with n_expert=0 too, a plain dense GPT.

Letters: B batch, T time, D width (n_embd), L blocks, V vocabulary, H heads, hd width of a head;
those of the memory stand in engram.py, those of the experts in moe.py.
"""
from dataclasses import dataclass, field, replace
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from engram import Engram, EngramConfig, opt, table_parameters
from moe import MoE


@dataclass
class GPTConfig:
    vocab_size: int = 4096
    block_size: int = opt(256, "context length, in tokens")
    n_layer: int = opt(4, "blocks")
    n_head: int = opt(4, "attention heads")
    n_embd: int = opt(128, "D, model width")
    n_expert: int = opt(8, "E, routed experts of the MoE-only twin (Engram drops some); 0: dense")
    top_k: int = opt(2, "routed experts per token")
    expert_hidden: int = opt(128, "hidden units of a routed expert")
    shared_hidden: int = opt(128, "hidden units of the shared expert")
    engram: EngramConfig | None = field(default_factory=EngramConfig)

    def __post_init__(self):
        if isinstance(self.engram, dict):                 # from a checkpoint
            self.engram = EngramConfig(**self.engram)
        for name, value in vars(self).items():
            least = {"n_expert": 0, "block_size": 2}.get(name, 1)
            if name != "engram" and not least <= value <= 65536:
                raise ValueError(f"{name} {value}: must be from {least} to 65,536")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of 2 * n_head = "
                             f"{2 * self.n_head}: rotary embedding turns pairs within a head")
        if 0 < self.n_expert < self.top_k:
            raise ValueError(f"top_k {self.top_k}: must be at most n_expert = {self.n_expert}")
        if self.engram and max(self.engram.blocks) >= self.n_layer:
            raise ValueError(f"engram blocks {self.engram.blocks}: the model has blocks 0 to "
                             f"{self.n_layer - 1}")


class Attention(nn.Module):

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        B, T, D = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2)                 # [B, H, T, hd]
                   for y in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            # concatenation copies what is there; at these lengths that is far below the matmuls
            k = cache["k"] = torch.cat([cache["k"], k], dim=2) if "k" in cache else k
            v = cache["v"] = torch.cat([cache["v"], v], dim=2) if "v" in cache else v
        return self.out(attend(q, k, v).transpose(1, 2).reshape(B, T, D))


def attend(q, k, v):
    """Causal attention of T queries over T' >= T keys, the queries being the last T: [B, H, T, hd].
    On a CPU in bf16 SDPA takes twice as long as two matmuls and a softmax (T 256, LOG.md)."""
    T, keys = q.size(2), k.size(2)
    if T == keys and not (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    future = torch.full((T, keys), -torch.inf, dtype=q.dtype, device=q.device).triu(1 + keys - T)
    score = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1) + future
    return score.softmax(-1) @ v                          # softmax sums in fp32, and rounds after


def rotate(x, rope):
    """Rotary position embedding: coordinate i of a head is turned with coordinate i + hd/2."""
    cos, sin = (r.to(x.dtype) for r in rope)                                     # [T, hd/2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):

    def __init__(self, cfg, engram):
        super().__init__()
        self.engram = engram                                                     # or None
        self.norm_attn = nn.RMSNorm(cfg.n_embd)
        self.attn = Attention(cfg)
        self.norm_moe = nn.RMSNorm(cfg.n_embd)
        self.moe = MoE(cfg.n_embd, cfg.shared_hidden, cfg.n_expert, cfg.expert_hidden, cfg.top_k)

    def forward(self, x, rope, read=None, cache=None):
        if read is not None: x = x + self.engram(x, read, cache)                 # the memory
        x = x + self.attn(self.norm_attn(x), rope, cache)
        y, balance = self.moe(self.norm_moe(x))
        return x + y, balance


class Cache:
    """What decoding carries on: tokens seen, N-1 canonical ids, per block keys, values, tail."""

    def __init__(self, cfg):
        self.length, self.history, self.blocks = 0, None, [{} for _ in range(cfg.n_layer)]


class GPT(nn.Module):

    def __init__(self, cfg, canonical, new=torch.empty):
        """canonical [V]: engram.canonical_ids of the tokenizer (or what a checkpoint says it was).
        The padding before a text is the last id, end of text. new: makes the memory's tables."""
        super().__init__()
        self.cfg = cfg
        canonical = np.asarray(canonical)
        if len(canonical) != cfg.vocab_size:
            raise ValueError(f"{len(canonical)} canonical ids for a vocabulary of {cfg.vocab_size}")
        self.register_buffer("canonical", torch.as_tensor(canonical))
        memory = cfg.engram.blocks if cfg.engram else ()
        shape = (cfg.n_embd, int(canonical.max()) + 1, int(canonical[-1]))       # D, V', pad
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)                    # also the head
        self.blocks = nn.ModuleList(
            Block(cfg, Engram(cfg.engram, i, *shape, new) if i in memory else None)
            for i in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        hd = cfg.n_embd // cfg.n_head
        angle = torch.outer(torch.arange(cfg.block_size), 1e4 ** (-torch.arange(0, hd, 2) / hd))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self):
        """GPT-2's initialisation, branch outputs scaled by the number of branches. Every parameter
        must be claimed by exactly this or by Engram.reset."""
        for name, p in self.named_parameters():
            kind = name.split(".", 2)[-1]                         # blocks.3.attn.out.weight
            if ".engram." in name or "norm" in name:
                pass                                              # Engram.reset; RMSNorm's own ones
            elif kind in ("attn.out.weight", "moe.w_out", "moe.shared.w_out.weight"):
                p.normal_(std=0.02 / math.sqrt(2 * self.cfg.n_layer))
            elif kind in ("attn.qkv.weight", "moe.router.weight", "moe.w_in",
                          "moe.shared.w_in.weight") or name == "embed.weight":
                p.normal_(std=0.02)
            else:
                raise ValueError(f"nobody initialises parameter {name}")

    def engrams(self):
        return [block.engram for block in self.blocks if block.engram is not None]

    def read(self, idx, cache=None):
        """Hash tokens [B, T] and read the rows of all memory layers -> [Read per memory layer].
        Needs token ids alone, hence possible before and beside all else; what lies in host memory
        is on its way then. Without the N-1 before it (in the cache) a token reads other rows."""
        if not self.engrams():
            return []
        x, past = self.canonical[idx], cache.history if cache else None
        if cache:
            seen = x if past is None else torch.cat([past, x], dim=1)
            cache.history = seen[:, max(0, seen.size(1) + 1 - self.cfg.engram.orders[-1]):]
        return [engram.read(engram.hash(x, past)) for engram in self.engrams()]

    def forward(self, idx, targets=None, reads=None, cache=None):
        """idx [B, T] -> logits [B, T, V], loss (mean cross-entropy in nats, or None), balance loss
        (mean over blocks, not part of the loss). reads: from read(), by default done here; an
        empty list switches the memory off. cache: continue the text it holds, and extend it."""
        start = cache.length if cache else 0
        end = start + idx.size(1)
        if end > self.cfg.block_size:
            raise ValueError(f"{end} tokens, but the context holds {self.cfg.block_size}")
        reads = self.read(idx, cache) if reads is None else reads
        reads = dict(zip((b for b in self.blocks if b.engram), reads, strict=True)) if reads else {}
        rope = self.cos[start:end], self.sin[start:end]
        if cache:
            cache.length = end
        x, balance = self.embed(idx), 0
        for i, block in enumerate(self.blocks):
            x, b = block(x, rope, reads.get(block), cache.blocks[i] if cache else None)
            balance = balance + b / len(self.blocks)
        logits = F.linear(self.norm(x), self.embed.weight)
        loss = None
        if targets is not None:                               # autocast computes this in fp32
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss, balance

    # ---- accounting

    def parameters_by_kind(self):
        """{kind: numbers}, each counted once; a parameter of no kind is an error."""
        marks = {".engram.": "engram projections", "embed.": "embedding", "norm": "norms",
                 ".attn.": "attention", ".router.": "router", ".shared.": "shared experts",
                 ".w_": "routed experts"}                          # the first that fits
        kinds = dict.fromkeys(marks.values(), 0)
        for name, p in self.named_parameters():
            kinds[next(kind for mark, kind in marks.items() if mark in name)] += p.numel()
        kinds["engram tables"] = sum(engram.table.numel() for engram in self.engrams())
        return kinds

    def accounting(self):
        """The paper's quantities: P_tot, all but the vocabulary embedding (tied to the head);
        P_act, what one token uses, values read counted; P_sparse = P_tot - P_act. And per token:
        forward matmul FLOPs (2 per active weight, head included, plus attention at full context)
        and bytes read from the tables. What a table holds and is not read costs neither."""
        cfg, n = self.cfg, self.parameters_by_kind()
        total = sum(n.values()) - n["embedding"]
        values, size = sum(e.cfg.d_mem for e in self.engrams()), self.embed.weight.element_size()
        idle = 1 - cfg.top_k / cfg.n_expert if cfg.n_expert else 0
        active = total - round(n["routed experts"] * idle) - n["engram tables"] + values
        weights = active - values - n["norms"] + n["embedding"]
        attention = 2 * 2 * cfg.n_layer * cfg.block_size * cfg.n_embd
        return {"parameters": sum(n.values()), "P_tot": total, "P_act": active,
                "P_sparse": total - active, "table_parameters": n["engram tables"],
                "flops_per_token": 2 * weights + attention,
                "bytes_read_per_token": values * size}


# ---- twins --------------------------------------------------------------------------------------

def make_twins(cfg, rho):
    """cfg: the common shape, n_expert being the MoE-only twin's -> ({"engram": GPTConfig, "moe":
    GPTConfig}, lines that show the arithmetic), with the same P_tot and the same P_act. rho is the
    share of P_sparse that stays with routed experts (paper, section 3): Engram drops experts and
    buys rows with what that frees. Reading costs too, keys and values are projected: the MoE-only
    twin gets a wider shared expert for that, rounded up, so it never has less compute. If rows are
    given, they stay as they are: an experiment with the memory's size, and no twins."""
    if not cfg.n_expert:
        raise ValueError("n_expert 0: twins, and the dense model made from them, need experts")
    if not 0 <= rho < 1:
        raise ValueError(f"rho {rho}: must be from 0 (all memory) to below 1 (no memory)")
    L, D, k = cfg.n_layer, cfg.n_embd, cfg.top_k
    n_expert, given = k + round(rho * (cfg.n_expert - k)), cfg.engram.rows
    if n_expert == cfg.n_expert and not given:
        raise ValueError(f"rho {rho} leaves no row: all {n_expert} experts stay (top_k {k}); use a "
                         "smaller rho or more experts")

    def count(c):
        with torch.device("meta"):                              # shapes only, nothing allocated
            return GPT(c, np.arange(c.vocab_size)).accounting()

    probe = replace(cfg, n_expert=n_expert, engram=replace(cfg.engram, rows=1))
    moe, base = replace(cfg, engram=None), count(probe)
    owed = base["P_act"] - count(moe)["P_act"]                  # projections, values, less routers
    widen = max(0, math.ceil(owed / (3 * D * L)))
    moe.shared_hidden += widen
    target, tables = count(moe)["P_tot"], len(cfg.engram.blocks) * cfg.engram.d_mem
    freed = target - (base["P_tot"] - base["table_parameters"])
    rows = freed // tables

    def over(rows):                                             # primes lie above what is asked for
        return table_parameters(replace(cfg.engram, rows=rows)) - freed

    while rows > 1 and over(rows) > 0:
        rows -= math.ceil(over(rows) / tables)
    if rows < 2 and not given:
        raise ValueError(f"rho {rho} leaves no row: {freed:,} parameters freed, {tables:,} per row")
    engram = replace(probe, engram=replace(cfg.engram, rows=given or rows))
    e, a, b, expert = engram.engram, count(engram), count(moe), 3 * D * cfg.expert_hidden
    reached = L * (n_expert - k) * expert / a["P_sparse"]
    lines = [
        f"twins: {cfg.n_expert} - {n_expert} experts = {cfg.n_expert - n_expert} x {L} blocks x "
        f"{expert:,} parameters to memory; MoE-only: shared expert {cfg.shared_hidden} + {widen}",
        f"table: {len(e.blocks)} layers x {len(e.orders)} orders x {e.heads} heads x "
        f"~{e.rows[0]:,} rows x {e.width} = {a['table_parameters']:,}; "
        f"{a['bytes_read_per_token']:,} B read per token",
        f"rho: {reached:.3f} of P_sparse in experts, {rho} asked",
        *(f"{name:7s}P_tot {c['P_tot']:,}  P_act {c['P_act']:,}  P_tot/P_act "
          f"{c['P_tot'] / c['P_act']:.2f}  FLOPs per token {c['flops_per_token']:,}"
          for name, c in (("engram", a), ("moe", b)))]
    hidden = moe.shared_hidden + k * moe.expert_hidden          # what a token uses of the twin
    dense = replace(moe, n_expert=0, shared_hidden=hidden)
    return {"engram": engram, "moe": moe, "dense": dense}, lines
