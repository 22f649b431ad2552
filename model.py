"""
A GPT with a mixture of experts in every block and an Engram memory in some, in plain PyTorch.

    model = GPT(GPTConfig(), canonical)                 # canonical: engram.canonical_ids(...)
    logits, loss, balance = model(idx, targets)         # train.py does this
    idx = model.generate(idx, 100)                      # sample.py does this

The idea is the first line of Block.forward. Delete it, and the line of Block.__init__ that makes the
memory, and a plain pre-norm GPT with experts is left; with n_expert=0 as well, a plain dense GPT.

Letters: B batch, T time, D model width (n_embd), V vocabulary, H attention heads, hd width of one;
those of the memory stand in engram.py, those of the experts in moe.py.
"""
from dataclasses import dataclass, field, replace
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from engram import Engram, EngramConfig, head_primes, opt
from moe import MoE


@dataclass
class GPTConfig:
    vocab_size: int = 4096
    block_size: int = opt(256, "context length, in tokens")
    n_layer: int = opt(4, "blocks")
    n_head: int = opt(3, "attention heads")
    n_embd: int = opt(192, "D, model width")
    n_expert: int = opt(24, "E, routed experts of the MoE-only twin (Engram gives some up); 0: dense")
    top_k: int = opt(2, "routed experts per token")
    expert_hidden: int = opt(96, "hidden units of a routed expert")
    shared_hidden: int = opt(192, "hidden units of the shared expert")
    engram: EngramConfig | None = field(default_factory=EngramConfig)

    def __post_init__(self):
        if isinstance(self.engram, dict):                 # from a checkpoint
            self.engram = EngramConfig(**self.engram)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "shared_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be 1 or more")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of 2 * n_head = "
                             f"{2 * self.n_head}: rotary embedding turns pairs within a head")
        if self.n_expert and not 1 <= self.top_k <= self.n_expert:
            raise ValueError(f"top_k {self.top_k}: must be from 1 to n_expert = {self.n_expert}")
        if self.n_expert and (self.n_expert < 0 or self.expert_hidden < 1):
            raise ValueError(f"n_expert {self.n_expert} and expert_hidden {self.expert_hidden}: "
                             "must be positive, or n_expert 0 for a dense model")
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
    """Causal attention of T queries over S >= T keys, the queries being the last T: [B, H, T, hd].
    On a CPU in bf16 SDPA takes 30 ms where two matmuls and a softmax take 17 (T 256)."""
    T, S = q.size(2), k.size(2)
    if T == S and not (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)
    score = (q @ k.transpose(-2, -1)) * (q.size(-1) ** -0.5)
    score = score.masked_fill(future, float("-inf"))
    dtype = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
    return score.softmax(-1, dtype=dtype).to(v.dtype) @ v


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
    """What decoding carries from chunk to chunk: tokens seen, the last N-1 canonical ids, and per
    block a dict with keys and values and the short convolution's tail."""

    def __init__(self, cfg):
        self.length, self.history, self.blocks = 0, None, [{} for _ in range(cfg.n_layer)]


class GPT(nn.Module):

    def __init__(self, cfg, canonical):
        """canonical [V]: engram.canonical_ids of the tokenizer (or what a checkpoint says it was).
        The padding before a text is the last id, end of text."""
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
            Block(cfg, Engram(cfg.engram, i, *shape) if i in memory else None)
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

    def read(self, idx, history=None):
        """Hash tokens [B, T] and read the rows of all memory layers -> [Read per memory layer].
        Needs token ids alone, hence possible before (and beside) everything else."""
        x = self.canonical[idx]
        return [engram.read(engram.hash(x, history)) for engram in self.engrams()]

    def forward(self, idx, targets=None, reads=None, cache=None):
        """idx [B, T] -> logits [B, T, V], loss (mean cross-entropy in nats, or None), balance loss
        (mean over blocks, not part of the loss). reads: from read(), by default done here; an
        empty list switches the memory off. cache: continue the text it holds, and extend it."""
        start = cache.length if cache else 0
        end = start + idx.size(1)
        if end > self.cfg.block_size:
            raise ValueError(f"{end} tokens, but the context holds {self.cfg.block_size}")
        if reads is None:
            reads = self.read(idx, cache.history if cache else None)
        if cache:
            self.remember(idx, cache)
        reads, rope = iter(reads), (self.cos[start:end], self.sin[start:end])
        x, balance = self.embed(idx), 0
        for i, block in enumerate(self.blocks):
            read = next(reads, None) if block.engram is not None else None
            x, b = block(x, rope, read, cache.blocks[i] if cache else None)
            balance = balance + b / len(self.blocks)
        logits = F.linear(self.norm(x), self.embed.weight)
        loss = None
        if targets is not None:
            # bf16 logits may stay so for the gradient, but are not good enough to report
            scored = logits if self.training or logits.dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(scored.flatten(0, 1), targets.flatten())
        return logits, loss, balance

    def remember(self, idx, cache):
        """Carry the last N-1 canonical ids on: feeding the hash one token at a time without them
        gives other rows than training did (a bug that a zero table hides)."""
        cache.length += idx.size(1)
        if self.engrams():
            engram = self.engrams()[0]
            past, x = cache.history, self.canonical[idx]
            if past is None:
                past = x.new_full((x.size(0), engram.cfg.max_order - 1), engram.pad)
            x = torch.cat([past, x], dim=1)
            cache.history = x[:, x.size(1) - past.size(1):]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0.8, top_k=50, generator=None, stop=None):
        """Continue idx [1, T] until max_new_tokens, the token stop or the end of the context;
        yields each new token id as soon as it is known. temperature 0 takes the likeliest."""
        cache = Cache(self.cfg)
        for _ in range(min(max_new_tokens, self.cfg.block_size - idx.size(1))):
            logits = self(idx, cache=cache)[0][:, -1].float()
            if temperature == 0:
                idx = logits.argmax(-1, keepdim=True)
            else:
                least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                probs = (logits.masked_fill(logits < least, -torch.inf) / temperature).softmax(-1)
                idx = torch.multinomial(probs, 1, generator=generator)
            yield idx.item()
            if idx.item() == stop:
                return

    # ---- accounting

    def parameters_by_kind(self):
        """{kind: numbers}, each counted once, the sum asserted."""
        kinds = dict.fromkeys(("embedding", "attention", "norms", "router", "shared experts",
                               "routed experts", "engram projections", "engram tables"), 0)
        for name, p in self.named_parameters():
            kind = ("engram projections" if ".engram." in name else
                    "embedding" if name == "embed.weight" else
                    "norms" if "norm" in name else
                    "attention" if ".attn." in name else
                    "router" if ".router." in name else
                    "shared experts" if ".shared." in name else "routed experts")
            kinds[kind] += p.numel()
        kinds["engram tables"] = sum(e.table.numel() for e in self.engrams())
        assert sum(kinds.values()) == sum(p.numel() for p in self.parameters()) \
            + sum(e.table.numel() for e in self.engrams())
        return kinds

    def accounting(self):
        """The paper's quantities: P_tot, all but the vocabulary embedding (tied to the head); P_act,
        what one token uses, values read counted; P_sparse = P_tot - P_act. And per token: forward
        matmul FLOPs (2 per active weight, head included, plus attention at full context), and bytes
        read from the tables. What a table holds and is not read costs neither."""
        cfg, n = self.cfg, self.parameters_by_kind()
        total = sum(n.values()) - n["embedding"]
        values = sum(e.cfg.d_mem for e in self.engrams())
        idle = 1 - cfg.top_k / cfg.n_expert if cfg.n_expert else 0
        active = total - round(n["routed experts"] * idle) - n["engram tables"] + values
        weights = active - values - n["norms"] + n["embedding"]
        attention = 2 * 2 * cfg.n_layer * cfg.block_size * cfg.n_embd
        return {"parameters": sum(n.values()), "P_tot": total, "P_act": active,
                "P_sparse": total - active, "table_parameters": n["engram tables"],
                "flops_per_token": 2 * weights + attention,
                "bytes_read_per_token": values * 4}


# -----------------------------------------------------------------------------
# twins

def make_twins(cfg, rho):
    """cfg: the common shape, n_expert being the MoE-only twin's -> ({"engram": GPTConfig, "moe":
    GPTConfig}, lines that show the arithmetic). Both have the same P_tot and the same P_act.

    rho is the share of the sparse budget P_sparse = P_tot - P_act that stays with routed experts
    (paper, section 3). Engram drops experts and buys rows with what that frees. Reading rows is
    not free either: keys and values are projected. The MoE-only twin gets a wider shared expert
    for that, rounded up, so it never has less compute."""
    if not cfg.engram or not cfg.n_expert:
        raise ValueError("twins need a memory and experts: for a dense model use --model dense")
    if not 0 <= rho < 1:
        raise ValueError(f"rho {rho}: must be from 0 (all memory) to below 1; without a memory "
                         "use --model moe")
    L, D, k = cfg.n_layer, cfg.n_embd, cfg.top_k
    n_expert = k + round(rho * (cfg.n_expert - k))
    if n_expert == cfg.n_expert:
        raise ValueError(f"rho {rho} leaves no row: all {cfg.n_expert} experts stay; "
                         f"use a rho below {1 - 0.5 / max(cfg.n_expert - k, 1):.3f}")

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
    rows_bought = lambda r: sum(map(sum, sum(head_primes(replace(cfg.engram, rows=r)).values(), [])))
    while rows > 0 and (over := rows_bought(rows) * cfg.engram.width - freed) > 0:
        rows -= math.ceil(over / tables)                        # primes lie above what is asked for
    if rows < 2:
        raise ValueError(f"rho {rho} leaves no row: {freed:,} parameters freed for {tables:,} "
                         "per row; use more experts or a smaller rho")
    engram = replace(probe, engram=replace(cfg.engram, rows=rows))
    a, b = count(engram), count(moe)
    expert = 3 * D * cfg.expert_hidden
    reached = L * (n_expert - k) * expert / a["P_sparse"]
    e = cfg.engram
    lines = [
        f"twins: {cfg.n_expert} - {n_expert} = {cfg.n_expert - n_expert} experts x {L} blocks x "
        f"{expert:,} dropped; shared expert of the MoE-only twin {cfg.shared_hidden} + {widen} wide",
        f"table: {len(e.blocks)} layers x {len(e.orders)} orders x {e.heads} heads x ~{rows:,} rows "
        f"x {e.width} = {a['table_parameters']:,} parameters; "
        f"{a['bytes_read_per_token']:,} B read per token",
        f"rho {reached:.3f} of P_sparse in experts (asked: {rho})",
        *(f"{name:6s} P_tot {c['P_tot']:,}  P_act {c['P_act']:,}  ratio {c['P_tot'] / c['P_act']:.2f}"
          f"  FLOPs per token {c['flops_per_token']:,}" for name, c in (("engram", a), ("moe", b))),
    ]
    return {"engram": engram, "moe": moe}, lines


def load_checkpoint(path):
    """-> what train.py saved at path; ValueError with one line if that cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}; train first: python train.py") from None
    except Exception as error:      # torch and pickle raise many kinds for a truncated file
        raise ValueError(f"{path} is not a readable checkpoint "
                         f"({type(error).__name__}); restore or delete it") from None
