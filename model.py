"""
A GPT with a mixture of experts in every block and an Engram memory in some, in plain PyTorch.

    model = GPT(GPTConfig(...), canonical)              # canonical: engram.canonical_ids(...)
    logits, loss = model(idx, targets)

The idea is the first statement of Block.forward. A block without an Engram skips it, and
a plain pre-norm GPT with experts is left; with n_expert=0 too, a plain dense GPT.

Letters: B batch, T time, D width (n_embd), L blocks, V vocabulary, H heads, hd width of a
head; those of the memory stand in engram.py, those of the experts in moe.py.
"""
import math
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import check_fields, fail, opt
from engram import Engram, EngramConfig, ShortConv, lookup
from moe import MoE


@dataclass
class GPTConfig:
    vocab_size: int = 4096
    block_size: int = opt(256, "context length, in tokens", least=1)
    # (a thousand blocks take seconds to build, a million would take hours)
    n_layer: int = opt(4, "blocks", least=1, most=1000)
    n_head: int = opt(4, "attention heads", least=1)
    n_embd: int = opt(128, "model width", least=1)
    n_expert: int = opt(8, "routed experts of the MoE-only model (Engram has fewer); "
                        "0: one dense feed-forward layer", least=0)
    top_k: int = opt(2, "routed experts per token", least=1)
    expert_hidden: int = opt(128, "hidden units of a routed expert", least=1)
    shared_hidden: int = opt(128, "hidden units of the shared expert", least=1)
    conv_in: int = opt(-1, "a control: number of a block whose input gets a convolution like "
                       "Engram's, but no memory; -1: none", least=-1)
    conv_dilation: int = opt(3, "distance between the taps of that convolution", least=1)
    untied: bool = opt(False, "a control: an input embedding of its own, not the head's")
    engram: EngramConfig | None = field(default_factory=EngramConfig)

    def __post_init__(self):
        if isinstance(self.engram, dict):                 # from a checkpoint
            self.engram = EngramConfig(**self.engram)
        check_fields(self)
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of 2 * n_head = "
                             f"{2 * self.n_head}: rotary embedding turns pairs within a head")
        if self.conv_in >= self.n_layer:
            raise ValueError(f"conv_in {self.conv_in}: the model has blocks 0 to "
                             f"{self.n_layer - 1}")
        if 0 < self.n_expert < self.top_k:
            raise ValueError(f"top_k {self.top_k}: must be at most n_expert, "
                             f"{self.n_expert}")


class Attention(nn.Module):

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        B, T, D = x.shape
        # queries, keys and values of all heads in one matmul, each [B, H, T, hd]
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], rope)
        v = qkv[2]
        if cache is not None:
            # keys and values of the whole text so far
            if "k" in cache:
                k = torch.cat([cache["k"], k], dim=2)
                v = torch.cat([cache["v"], v], dim=2)
            cache["k"], cache["v"] = k, v
        y = attend(q, k, v)
        # the heads side by side again
        return self.out(y.transpose(1, 2).reshape(B, T, D))


def attend(q, k, v):
    """Causal attention, [B, H, T, hd] each. The queries stand at the last positions of the
    keys."""
    T, n_keys = q.size(2), k.size(2)
    # in bf16 on a CPU SDPA takes twice as long as the lines below (T 256, LOG.md)
    slow_here = q.device.type == "cpu" and q.dtype == torch.bfloat16
    # (a single query is the last one: it sees all keys, so there is nothing to mask)
    if T == 1 or (T == n_keys and not slow_here):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
    # query i sees keys 0 to i + n_keys - T; -inf hides the rest
    mask = q.new_full((T, n_keys), -torch.inf).triu(1 + n_keys - T)
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1) + mask
    # softmax sums in fp32 and rounds after
    return scores.softmax(-1) @ v


def rotate(x, rope):
    """Rotary position embedding: rotate each pair (i, i + hd/2) of a head's coordinates."""
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)                          # [T, hd/2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):

    def __init__(self, cfg, engram):
        super().__init__()
        self.engram = engram                                              # or None
        self.norm_attn = nn.RMSNorm(cfg.n_embd)
        self.attn = Attention(cfg)
        self.norm_moe = nn.RMSNorm(cfg.n_embd)
        self.moe = MoE(cfg.n_embd, cfg.shared_hidden, cfg.n_expert, cfg.expert_hidden,
                       cfg.top_k)

    def forward(self, x, rope, read=None, cache=None):
        if read is not None:
            x = x + self.engram(x, read, cache)                           # the memory
        x = x + self.attn(self.norm_attn(x), rope, cache)
        return x + self.moe(self.norm_moe(x))


class Cache:
    """What decoding keeps of the text so far: its length, the last ids that n-grams need,
    and for each block a dict of keys, values and the last inputs of convolutions."""

    def __init__(self, cfg):
        self.length = 0
        self.history = None
        self.blocks = [{} for _ in range(cfg.n_layer)]


class GPT(nn.Module):

    def __init__(self, cfg, canonical):
        """canonical: [V], for each token an id that similar tokens share (engram.py). The last
        token of the vocabulary is the end of text; it also fills n-grams that begin before
        the text."""
        super().__init__()
        self.cfg = cfg
        canonical = np.asarray(canonical)
        if len(canonical) != cfg.vocab_size:
            raise ValueError(f"{len(canonical)} canonical ids for a vocabulary of "
                             f"{cfg.vocab_size}")
        # which blocks get a memory
        memory_in = cfg.engram.blocks if cfg.engram else ()
        if memory_in and memory_in[-1] >= cfg.n_layer:
            raise ValueError(f"engram blocks {memory_in}: the model has blocks 0 to "
                             f"{cfg.n_layer - 1}")
        # what its hash needs to know of the tokenizer
        n_canonical, pad = int(canonical.max()) + 1, int(canonical[-1])
        self.canonical = torch.from_numpy(canonical)     # no buffer: it stays on the host
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)             # also the head
        self.conv = ShortConv(cfg.n_embd, 4, cfg.conv_dilation) if cfg.conv_in >= 0 else None
        self.embed_in = nn.Embedding(cfg.vocab_size, cfg.n_embd) if cfg.untied else None
        self.blocks = nn.ModuleList()
        for i in range(cfg.n_layer):
            engram = None
            if i in memory_in:
                engram = Engram(cfg.engram, i, cfg.n_embd, n_canonical, pad)
            self.blocks.append(Block(cfg, engram))
        self.norm = nn.RMSNorm(cfg.n_embd)
        hd = cfg.n_embd // cfg.n_head
        # rotary embedding: a position times one frequency per pair of coordinates
        frequency = 1e4 ** (-torch.arange(0, hd, 2) / hd)
        angle = torch.outer(torch.arange(cfg.block_size), frequency)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.reset()

    @torch.no_grad()
    def reset(self):
        """Initialise as GPT-2 does, branch outputs scaled by the number of branches.
        Raise ValueError for a parameter that is left out."""
        for name, p in self.named_parameters():
            kind = name.split(".", 2)[-1]        # attn.out.weight of blocks.3.attn.out.weight
            if ".engram." in name or "norm" in name or name == "conv.taps":
                # Engram.reset has done it; RMSNorm starts with ones, taps with zeros
                pass
            elif kind in ("attn.out.weight", "moe.w_out", "moe.shared.w_out.weight"):
                p.normal_(std=0.02 / math.sqrt(2 * self.cfg.n_layer))
            elif kind in ("attn.qkv.weight", "moe.router.weight", "moe.w_in",
                          "moe.shared.w_in.weight") or "embed" in name:
                p.normal_(std=0.02)
            else:
                raise ValueError(f"nobody initialises parameter {name}")

    def engrams(self):
        return [block.engram for block in self.blocks if block.engram is not None]

    def addresses(self, idx, cache=None):
        """Return an Address (which rows tokens idx [B, T] read) per memory layer. It needs
        token ids alone, not even the weights, so it can run long before the forward pass.
        Ids on a GPU have to come to the host first. When decoding, give the cache: the hash
        needs the N-1 tokens before; this call adds the new ones."""
        if not self.engrams():
            return []
        x = self.canonical[idx.cpu()]
        history = cache.history if cache is not None else None
        addresses = [engram.address(x, history) for engram in self.engrams()]
        if cache is not None:
            # N - 1 would do, but [:, -0:] would keep all
            text = x if history is None else torch.cat([history, x], dim=1)
            cache.history = text[:, -self.cfg.engram.orders[-1]:]
        return addresses

    def read(self, addresses):
        """Fetch the rows. Return a Read per memory layer; rows of a table in host memory
        arrive later."""
        return [engram.read(address)
                for engram, address in zip(self.engrams(), addresses, strict=True)]

    def forward(self, idx, targets=None, reads=None, cache=None):
        """Return logits [B, T, V] for tokens idx [B, T], and the loss (mean cross-entropy
        in nats per token; None without targets).

        reads: from read(addresses(idx, cache)), by default made here; an empty list switches
        the memory off.
        cache: the text before idx; it is extended. Too long a text is a ValueError."""
        # where in the context idx stands
        start = cache.length if cache is not None else 0
        end = start + idx.size(1)
        if end > self.cfg.block_size:
            raise ValueError(f"{end} tokens, but the context holds {self.cfg.block_size}")
        if reads is None:
            reads = self.read(self.addresses(idx, cache))
        if cache is not None:
            cache.length = end
        rope = self.cos[start:end], self.sin[start:end]
        # hand the reads to the blocks that have a memory, in order
        assert len(reads) in (0, len(self.engrams())), f"{len(reads)} reads"
        reads = iter(reads)
        embed = self.embed_in if self.cfg.untied else self.embed
        x = embed(idx)
        for i, block in enumerate(self.blocks):
            read = next(reads, None) if block.engram is not None else None
            block_cache = cache.blocks[i] if cache is not None else None
            if i == self.cfg.conv_in:                         # a control, no memory
                x = x + self.conv(x, block_cache)
            x = block(x, rope, read, block_cache)
        # the head has the weights of self.embed
        logits = F.linear(self.norm(x), self.embed.weight)
        loss = None
        if targets is not None:                               # autocast computes this in fp32
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# ---- accounting ----------------------------------------------------------------------

def parameters_by_kind(model):
    """Return {kind: how many numbers}, each counted once."""
    # in this order: the first mark that a name holds tells its kind
    kinds = {".engram.": "engram projections", "embed.": "embedding",
             "embed_in.": "input embedding", "norm": "norms", "conv.": "convolution",
             ".attn.": "attention", ".router.": "router", ".shared.": "shared experts",
             ".w_": "routed experts"}
    count = dict.fromkeys(kinds.values(), 0)
    for name, p in model.named_parameters():
        # a parameter that no mark fits is an error
        mark = next(mark for mark in kinds if mark in name)
        count[kinds[mark]] += p.numel()
    count["engram tables"] = sum(engram.table.numel() for engram in model.engrams())
    return count


def accounting(model):
    """Return the paper's quantities. P_tot: all parameters except the vocabulary
    embedding, which is also the head. P_act: those that one token uses (of tables, the
    rows that it reads). P_sparse = P_tot - P_act; rho: the share of it that is in experts.
    And per token: forward FLOPs of matmuls (2 per active weight, the head included, plus
    attention at full context) and bytes read from the tables. Rows that are not read cost
    neither."""
    cfg, count = model.cfg, parameters_by_kind(model)
    # of all parameters, which does one token use?
    total = sum(count.values()) - count["embedding"]
    values_read = sum(engram.cfg.d_mem for engram in model.engrams())
    idle = round(count["routed experts"] * (1 - cfg.top_k / max(1, cfg.n_expert)))
    # an input embedding of its own is read like a table, one row per token
    row = cfg.n_embd if cfg.untied else 0
    stored = count["engram tables"] + count["input embedding"]
    used = total - idle - stored
    active = used + values_read + row
    # a weight that is multiplied costs 2 FLOPs; norms and rows are not multiplied
    weights = used - count["norms"] + count["embedding"]
    attention = 2 * 2 * cfg.n_layer * cfg.block_size * cfg.n_embd
    return {"parameters": sum(count.values()), "P_tot": total, "P_act": active,
            "P_sparse": total - active, "rho": idle / max(1, total - active),
            "table_parameters": count["engram tables"],
            "flops_per_token": 2 * weights + attention,
            "bytes_read_per_token": values_read * model.embed.weight.element_size()}


def hash_probe(model):
    """Return the row numbers of a fixed text, a list per memory layer. A checkpoint
    holds them: if they differ now, the hash was changed, and would read wrong rows."""
    # any text will do, if its n-grams differ
    idx = torch.arange(12) * 37 % model.cfg.vocab_size
    x = model.canonical[idx][None]
    return [engram.hash(x).flatten().tolist() for engram in model.engrams()]


# ---- using a model ---------------------------------------------------------------------

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=0.8, top_k=50, generator=None):
    """Continue tokens idx [1, T]; yield each new id as soon as it is known.

    Keys, values, the last n-gram and the last inputs of the convolution are kept in a
    Cache, so each token is computed once. A full context is begun anew with its last half.
    temperature 0: always the most likely token; top_k: sample among as many tokens."""
    # the prompt, at most a full context of it
    text = idx[:, -model.cfg.block_size:]
    cache, idx = Cache(model.cfg), text
    reads = model.read(model.addresses(idx, cache))
    for _ in range(max_new_tokens):
        logits = model(idx, reads=reads, cache=cache)[0][:, -1].float()
        if temperature < 1e-6:
            idx = logits.argmax(-1, keepdim=True)
        else:
            logits, ids = logits.topk(min(top_k, logits.size(-1)))
            probs = (logits / temperature).softmax(-1)
            idx = ids.gather(-1, torch.multinomial(probs, 1, generator=generator))
        new, text = idx.item(), torch.cat([text, idx], dim=1)
        # a full context: start again with its last half
        if cache.length == model.cfg.block_size:
            cache, idx = Cache(model.cfg), text[:, -max(1, model.cfg.block_size // 2):]
        # the rows of the next step are under way while the caller prints this token
        reads = model.read(model.addresses(idx, cache))
        yield new


@torch.no_grad()
def token_losses(model, x, y, batch_size, precision, memory=True):
    """Return the loss of each token [n, T] in nats, fp32 on the CPU, for x, y [n, T].
    precision: an autocast context. memory False: the memory is switched off."""
    was_training = model.training
    model.eval()
    device, losses = model.embed.weight.device, []
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    # a batch at a time, to bound the memory that logits take
    for i in range(0, len(x), batch_size):
        idx, targets = x[i:i + batch_size].to(device), y[i:i + batch_size].to(device)
        with precision:
            logits = model(idx, reads=None if memory else [])[0].float()
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(nats.view(targets.shape).cpu())
    model.train(was_training)
    return torch.cat(losses)


@contextmanager
def watch(model):
    """Record what each memory layer does in the forward passes within. Yield, per layer,
    a dict of two lists: "gate", its values [B, T] of each pass; "added", |output| / |h|."""
    def record(layer, engram, args, out):
        h, read = args[:2]
        layer["added"].append(float((out.norm() / h.norm()).detach()))
        if hasattr(engram, "gate"):      # a module that was edited may have none
            layer["gate"].append(engram.gate(h, lookup(read)).detach().float().squeeze(-1))

    seen = [{"gate": [], "added": []} for _ in model.engrams()]
    with ExitStack() as hooks:
        for engram, layer in zip(model.engrams(), seen, strict=True):
            hooks.enter_context(engram.register_forward_hook(partial(record, layer)))
        yield seen


def load_checkpoint(path, map_file=False):
    """Return what train.py saved at path, and the model with its weights, on the CPU.

    map_file: leave the weights, the tables above all, in the file until they are used. Do
    not write to the file while that lasts."""
    if not path.is_file():
        others = sorted(p.parent.name for p in path.parent.parent.glob("*/ckpt.pt"))
        there = f"there is one of: {', '.join(others)}" if others else "train first: train.py"
        fail(f"no checkpoint at {path}; {there}")
    try:
        # torch reads damaged numbers in silence, but the file, a zip archive, has checksums
        damaged = None if map_file else zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, "cpu", mmap=map_file, weights_only=True)
        # shapes only: no table is filled with numbers that are overwritten at once
        with torch.device("meta"):
            model = GPT(GPTConfig(**saved["shape"]), saved["canonical"])
        model.load_state_dict(saved["model"], assign=True)
        probe = saved["hash_probe"]
    except Exception as error:
        # torch, pickle and zipfile raise many kinds for a damaged file
        why = " ".join(f"{type(error).__name__}: {error}".split())
        fail(f"{path} is not a readable checkpoint of train.py ({why[:150]}); restore it, "
             "or train again with another --out_dir")
    if hash_probe(model) != probe:
        fail(f"{path} was trained with another hash: the same text reads rows "
             f"{probe[0][-4:]} there, {hash_probe(model)[0][-4:]} here; undo the change, or "
             "train again")
    return saved, model
