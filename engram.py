"""
Engram: a hashed n-gram memory with a context-aware gate (arXiv 2601.07372), in plain PyTorch.

    from engram import Engram, EngramConfig       # the module; model.py shows it at work
    python -m pytest test_engram.py -k demo       # held to the official demo's numbers

The idea: the last two or three tokens name a local pattern ("Alexander the Great"). Hash them, read
the rows of a big table at those addresses, and let the hidden state decide, through a gate, how
much of what was read to believe. The address depends on token ids alone, never on activations, so
a read can begin before the forward pass does.

Letters, here and in model.py:
    B batch, T time, D model width (n_embd)
    N largest n-gram order, K hash heads per order, M = len(orders) * K rows read per token
    R rows of one layer's table, d width of one row, d_mem = M * d, U unique rows read in a step
"""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from tempfile import TemporaryFile
from typing import NamedTuple
import math
import os
import re
import unicodedata
import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def opt(default, help, choices=None):
    """A dataclass field that train.py turns into a flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class EngramConfig:
    blocks: tuple = opt((1,), "blocks that get a memory, counted from 0")
    orders: tuple = opt((2, 3), "n-gram orders; 1 is the current token alone, a control")
    heads: int = opt(4, "K, hash heads per order: two n-grams rarely collide in all")
    rows: tuple = opt((), "rows per head, one number or one per order; none: as rho decides")
    width: int = opt(16, "d, width of one row")
    conv_kernel: int = opt(4, "taps of the short convolution; 0 leaves it out")
    gate: str = opt("sqrt", "sqrt (official demo), plain (paper, eq. 4) or off (alpha = 1)",
                    ("sqrt", "plain", "off"))
    compress: bool = opt(True, "hash canonical ids ('The', ' the' -> one id), not raw ones")
    stop_at_eot: bool = opt(False, "the n-gram never looks back past an end of text")
    bias: bool = opt(True, "biases in the key and value projections (demo: yes, paper: no)")
    seed: int = opt(0, "of the hash multipliers")

    def __post_init__(self):
        self.blocks, self.orders = tuple(self.blocks), tuple(self.orders)
        rows = (self.rows,) if isinstance(self.rows, int) else tuple(self.rows)
        self.rows = rows * len(self.orders) if len(rows) == 1 else rows
        for name, least in (("blocks", 0), ("orders", 1)):
            given = getattr(self, name)
            if not given or list(given) != sorted(set(given)) or given[0] < least:
                raise ValueError(f"engram {name} {given}: give increasing numbers from {least} on")
        if self.rows and (len(self.rows) != len(self.orders) or min(self.rows) < 1):
            raise ValueError(f"engram rows {self.rows}: give one positive number per order, "
                             f"{len(self.orders)} here, or one for all")
        if self.gate not in ("sqrt", "plain", "off"):
            raise ValueError(f"engram gate {self.gate!r}: must be sqrt, plain or off")
        for name, least in (("heads", 1), ("width", 1), ("conv_kernel", 0), ("seed", 0)):
            if not least <= getattr(self, name) <= 10_000:
                raise ValueError(f"engram {name} {getattr(self, name)}: must be {least} to 10,000")

    @property
    def d_mem(self):
        return len(self.orders) * self.heads * self.width


# The same module as others set it, blocks counted from 0 (the paper: from 1). Those models keep
# four residual streams; here is one, with one stream's keys and norms and the table they share.
DEMO = dict(blocks=(1, 15), orders=(2, 3), heads=8, rows=646_400, width=64)
PAPER_27B = dict(blocks=(1, 14), orders=(2, 3), heads=8, rows=2_262_400, width=80, gate="plain",
                 bias=False)
V41 = dict(blocks=(1, 14), orders=(2, 3, 4), heads=8, rows=16_000_000, width=256, conv_kernel=0,
           stop_at_eot=True, bias=False)


# ---- the module ---------------------------------------------------------------------------------

class Read(NamedTuple):
    """What one layer reads in one step: the unique rows once, and who wants which."""
    rows: torch.Tensor      # [U] row numbers, sorted; they lie where the table lies
    leaf: torch.Tensor      # [U, d] their values; in training a leaf, so its .grad is [U, d] too
    inverse: torch.Tensor   # [B, T, M] positions in rows
    ready: Callable | None = None     # to be called before leaf is used, see Fetch

    def micro(self, sequences):
        """The same read for some of the step's sequences: all micro-batches share one leaf."""
        return self._replace(inverse=self.inverse[sequences])


class Engram(nn.Module):

    def __init__(self, cfg, block, n_embd, n_canonical, pad, new=torch.empty):
        """cfg: EngramConfig with rows. n_canonical: V'. pad: the canonical id before the text.
        new(R, d): makes the table."""
        super().__init__()
        if not cfg.rows:
            raise ValueError("engram rows are not set: give them, or use make_twins(cfg, rho)")
        self.cfg, self.pad = cfg, pad
        primes = head_primes(cfg)[block]                                          # [orders][K]
        offsets = np.cumsum([0] + [p for heads in primes for p in heads])         # one flat table
        # derived from the config and V', so not saved; the table is
        buffer = lambda name, x: self.register_buffer(name, torch.as_tensor(x), persistent=False)
        buffer("multipliers", hash_multipliers(cfg, block, n_canonical))          # [N]
        buffer("primes", primes)
        buffer("offsets", offsets[:-1].reshape(len(cfg.orders), cfg.heads))
        # A buffer, not a parameter: no dense gradient of R rows ever exists, see read().
        self.register_buffer("table", new(int(offsets[-1]), cfg.width))
        self.fetch = None                                 # how to read a table that lies elsewhere
        self.value = nn.Linear(cfg.d_mem, n_embd, bias=cfg.bias)
        if cfg.gate != "off":
            self.key = nn.Linear(cfg.d_mem, n_embd, bias=cfg.bias)
            self.norm_key = nn.RMSNorm(n_embd)
            self.norm_query = nn.RMSNorm(n_embd)
        if cfg.conv_kernel:
            self.norm_conv = nn.RMSNorm(n_embd, eps=1e-5)                 # the demo's eps
            self.conv = nn.Parameter(torch.empty(cfg.conv_kernel, n_embd))
        self.reset()

    @torch.no_grad()
    def reset(self):
        """Start quiet but alive: a value, ~ 0.02 * 0.02 * sqrt(d_mem), is about a tenth of h, yet
        the first backward reaches table, keys, values and gate. (Were table and W_V both zero, each
        would wait for the other for ever.) The convolution starts at zero, as in the paper. 0.02 is
        also one step of the table's Adam at the laptop preset's rates."""
        self.table.normal_(std=0.02)
        for linear in (m for m in self.children() if isinstance(m, nn.Linear)):
            linear.weight.normal_(std=0.02)
            if linear.bias is not None:
                linear.bias.zero_()
        if self.cfg.conv_kernel:
            self.conv.zero_()

    def gate(self, h, e):
        """alpha [B, T, 1] in (0, 1): does what was read fit what the context is about? (eq. 4)"""
        if self.cfg.gate == "off":
            return torch.ones_like(h[..., :1])
        s = (self.norm_key(self.key(e).to(h.dtype)) * self.norm_query(h)).sum(-1, keepdim=True)
        s = s / math.sqrt(h.size(-1))
        if self.cfg.gate == "sqrt":        # not in the paper; in the demo and in DeepSeek-V4.1
            s = s.sign() * s.abs().clamp_min(1e-6).sqrt()
        return torch.sigmoid(s)

    def forward(self, h, read, cache=None):
        """h [B, T, D], read: this layer's Read -> what to add to h, [B, T, D] (eq. 3 to 5)"""
        e = lookup(read)                                                          # [B, T, d_mem]
        v = self.gate(h, e) * self.value(e)
        if not self.cfg.conv_kernel:
            return v
        x = self.norm_conv(v)
        return v + F.silu(self.short_conv(x, cache))

    def short_conv(self, x, cache=None):
        """Depthwise causal convolution over time, dilated by N, so that the taps fall on n-grams
        that do not overlap. A sum of shifted products: on a CPU faster than a grouped nn.Conv1d.
        cache: a dict that carries the last (kernel - 1) * N inputs from chunk to chunk."""
        kernel, dilation, T = self.cfg.conv_kernel, self.cfg.orders[-1], x.size(1)
        reach = (kernel - 1) * dilation
        tail = cache.get("tail") if cache is not None else None
        x = F.pad(x, (0, 0, reach, 0)) if tail is None else torch.cat([tail.to(x), x], dim=1)
        if cache is not None:
            cache["tail"] = x[:, x.size(1) - reach:]
        return sum(self.conv[j] * x[:, j * dilation:j * dilation + T] for j in range(kernel))

    # ---- addresses and rows

    def hash(self, x, history=None):
        """x [B, T] canonical ids, history [B, below N] the last of those before (None: no text)
        -> row numbers [B, T, M] in the flat table. All heads of an order share one mix and
        differ by their prime alone. int64 throughout: with ids below V' no product overflows."""
        cfg, N, T = self.cfg, self.cfg.orders[-1], x.size(1)
        x = x if history is None else torch.cat([history, x], dim=1)
        x = F.pad(x, (N - 1 + T - x.size(1), 0), value=self.pad)                  # [B, N-1+T]
        mix, rows, joined = 0, [], True
        for k in range(N):                                                        # x[t-k]
            past = x[:, N - 1 - k:N - 1 - k + T]
            if cfg.stop_at_eot and k > 0:
                joined = joined & (past != self.pad)   # pad is end of text's id: what is older ...
                past = torch.where(joined, past, self.pad)                        # ... reads as pad
            mix = mix ^ (past * self.multipliers[k])
            if k + 1 in cfg.orders:
                i = cfg.orders.index(k + 1)
                rows.append(mix[..., None] % self.primes[i] + self.offsets[i])    # [B, T, K]
        return torch.cat(rows, dim=-1)

    def read(self, rows):
        """Row numbers [B, T, M] -> Read. Every unique row is gathered once into one small tensor,
        which in training is a leaf: autograd sees [U, d], never [R, d], so a step costs the same
        with 1e5 rows or 1e7, its gradient is dense (clipping is ordinary), and a table that lives
        elsewhere differs in this one gather."""
        rows, inverse = rows.unique(return_inverse=True)
        rows, leaf, ready = self.fetch(self.table, rows) if self.fetch else \
            (rows, self.table.index_select(0, rows), None)
        return Read(rows, leaf.requires_grad_(torch.is_grad_enabled()), inverse, ready)


def lookup(read):
    """-> e [B, T, d_mem], the M rows of each token side by side. index_select, because the backward
    of leaf[inverse] on a CPU adds in another order each time and took 12x as long."""
    if read.ready:
        wait(read)
    e = read.leaf.index_select(0, read.inverse.flatten())
    return e.view(*read.inverse.shape[:2], -1)


class RowAdam:
    """Adam for tables: a step updates exactly the rows read in it, without decay. Dense Adam would
    sweep all R rows and move those not read (stale momentum). Each row counts its own visits: with
    one clock for all, as in torch.optim.SparseAdam, a row first read late takes a first step 2.2
    times too small (beta2 0.95), and most rows of a Zipfian text are first read late."""

    def __init__(self, tables, betas=(0.9, 0.95), eps=1e-8, new=torch.empty):
        """tables: list of [R, d] tensors, changed in place; new: makes the moments beside them."""
        self.betas, self.eps, self.tables = betas, eps, tables
        self.state = [{name: new(len(t), width, dtype=t.dtype, device=t.device).zero_()
                       for name, width in (("exp_avg", t.size(1)), ("exp_avg_sq", t.size(1)),
                                           ("visits", 1))} for t in tables]

    @torch.no_grad()
    def step(self, reads, lr):
        """reads: one Read per table, each leaf with its gradient."""
        b1, b2 = self.betas
        for table, state, read in zip(self.tables, self.state, reads, strict=True):
            rows, leaf, grad = (x.to(table.device) for x in (read.rows, read.leaf, read.leaf.grad))
            t = state["visits"].index_select(0, rows) + 1
            m = state["exp_avg"].index_select(0, rows).lerp_(grad, 1 - b1)
            v = state["exp_avg_sq"].index_select(0, rows).lerp_(grad.square(), 1 - b2)
            denom = (v / (1 - b2 ** t)).sqrt_().add_(self.eps)
            table.index_copy_(0, rows, leaf - lr * (m / (1 - b1 ** t)) / denom)
            for name, value in (("exp_avg", m), ("exp_avg_sq", v), ("visits", t)):
                state[name].index_copy_(0, rows, value)


# ---- canonical ids, multipliers, primes: fixed numbers, made once -------------------------------

def normalise(text):
    """What two tokens must share to count as one (the paper's tokenizer compression)."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if unicodedata.category(c) != "Mn").lower()
    text = re.sub(r"[ \t\r\n]+", " ", text)
    return text if text == " " else text.strip()


def canonical_ids(token_bytes, compress=True):
    """token_bytes: the bytes of token 0, 1, 2, ... -> int64 array [V] of canonical ids, numbered in
    order of first appearance. GPT-2: 50,257 -> 32,982. A token that is not text by itself (a piece
    of a UTF-8 sequence) keeps its bytes as its key, so keys are str or bytes and never meet."""
    if not compress:
        return np.arange(len(token_bytes))
    seen, ids = {}, []
    for raw in token_bytes:
        text = raw.decode("utf-8", errors="replace")
        key = raw if "\ufffd" in text else normalise(text) or text
        ids.append(seen.setdefault(key, len(seen)))
    return np.array(ids, dtype=np.int64)


def hash_multipliers(cfg, block, n_canonical):
    """N odd int64 multipliers of one layer; products with ids below n_canonical stay under 2**63.
    10007 is the demo's: layers draw from different streams."""
    bound = max(1, (2 ** 63 - 1) // n_canonical // 2)
    rng = np.random.default_rng(cfg.seed + 10007 * block)
    return rng.integers(0, bound, size=cfg.orders[-1], dtype=np.int64) * 2 + 1


def head_primes(cfg):
    """-> {block: [[prime per head] per order]}. Every head of every order and layer has a prime of
    its own, the next free one from rows on, so two n-grams that collide in one head rarely meet
    in another. One row a head, a control, is no prime: whatever the n-gram, it reads row 0."""
    taken, primes = set(), {}
    for block in cfg.blocks:
        primes[block] = []
        for rows in cfg.rows:
            heads, p = [1] * cfg.heads * (rows == 1), rows - 1
            while len(heads) < cfg.heads:
                p += 1
                if p > 1 and p not in taken and all(p % i for i in range(2, math.isqrt(p) + 1)):
                    heads.append(p)
                    taken.add(p)
            primes[block].append(heads)
    return primes


def table_parameters(cfg):
    return cfg.width * sum(p for layer in head_primes(cfg).values() for heads in layer
                           for p in heads)


# ---- where the table lives ----------------------------------------------------------------------

class Fetch:
    """Reads a table that lies in host memory, or in a mapped file, which looks the same. Rows are
    known as soon as the tokens are: a worker thread gathers them at once, and to a GPU they go on a
    stream of their own, while the blocks before the memory compute. Each read has a staging buffer
    and a leaf of its own, so reads in flight never mix, and torch's pinned allocator hands a buffer
    out again only when the copy from it has ended. The table is not pinned: the GPU never sees it.
    Begin a read after the update it should see. prefetch=False: all at the first place of use."""

    def __init__(self, prefetch=True):
        self.worker = ThreadPoolExecutor(1, "prefetch") if prefetch else None   # ends with self
        self.stream = None

    def __call__(self, table, rows):
        """table [R, d], rows [U] on the model's device -> rows beside the table; leaf [U, d] on
        the model's device, still empty; ready(), which returns, or raises, when it is filled."""
        leaf, now = table.new_empty(len(rows), table.size(1), device=rows.device), None
        if leaf.is_cuda:
            rows = pinned(rows.shape, rows.dtype).copy_(rows, non_blocking=True)
            now = torch.cuda.current_stream(leaf.device).record_event()
        job = partial(self.gather, table, rows, leaf.detach(), now)
        return rows, leaf, self.worker.submit(job).result if self.worker else cache(job)

    def gather(self, table, rows, leaf, now):
        """Fill leaf -> on a GPU, the event of that. now: rows are there, leaf's memory is free."""
        if not leaf.is_cuda:
            return take(table, rows, leaf)
        # what is queued runs behind the program: a synchronous read waits for all of it
        (now if self.worker else torch.cuda.current_stream(leaf.device)).synchronize()
        take(table, rows, staging := pinned(leaf.shape, leaf.dtype))
        self.stream = self.stream or torch.cuda.Stream(leaf.device)
        with torch.cuda.stream(self.stream), torch.inference_mode(leaf.is_inference()):
            leaf.copy_(staging, non_blocking=True)
            leaf.record_stream(self.stream)                     # should it be dropped unused
            return self.stream.record_event()


@torch.compiler.disable
def wait(read):
    """On a CPU the gather is over after this; on a GPU what is queued from here on comes later."""
    if event := read.ready():
        torch.cuda.current_stream(read.leaf.device).wait_event(event)


def take(table, rows, out):
    """index_select by numpy: torch's would start a second team of threads, which spin beside the
    model's while they wait (host training ran at 0.65 of its speed on two cores)."""
    table, out = (x.view(torch.uint8).numpy() for x in (table, out))
    np.take(table, rows.numpy(), axis=0, out=out, mode="clip")


def pinned(shape, dtype):
    """An empty tensor that a GPU can copy from while it computes; if that fails, any."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        warnings.warn(f"memory is not pinned, a copy from it holds up the rest: {error}")
        return torch.empty(shape, dtype=dtype)


def mapped(folder, *shape, dtype=torch.float32, device="cpu"):
    """torch.empty on the CPU in a file under folder, without a name: it goes with the process."""
    size = math.prod(shape) * dtype.itemsize
    try:
        with TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)    # on a full disk: now, and not by SIGBUS
            data = np.memmap(file, np.uint8, "r+", shape=size)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (a table of {size:,} bytes)", str(folder))
    return torch.from_numpy(data).view(dtype).view(shape)


def place(model, device, where="resident", prefetch=True):
    """Move a GPT to device; tables that are not resident stay where new made them, on the CPU."""
    fetch = None if where == "resident" else Fetch(prefetch)
    tables = {engram: engram.table for engram in model.engrams() if fetch}
    for engram in tables:
        engram.table = None                                       # what is None does not move
    model.to(device)
    for engram in model.engrams():
        engram.fetch, engram.table = fetch, tables.get(engram, engram.table)
