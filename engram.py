"""
Engram: a hashed n-gram memory with a context-aware gate (arXiv 2601.07372), in plain PyTorch.

    python -m pytest test_engram.py -k demo       # hold it to the official demo

The demo is engram_demo_v1.py in github.com/deepseek-ai/Engram.

The idea: the last two or three tokens name a local pattern ("Alexander the Great"). Hash
them to row numbers of a big table, read those rows, and let the hidden state decide
through a gate how much of what was read to believe. The row numbers depend on token ids
alone, never on activations, so the rows to read are known before the forward pass.

Letters, here and in model.py:
    B batch, T time, D model width (n_embd), h hidden states [B, T, D]
    V' number of canonical ids (tokens that differ in case, accents or outer spaces share one)
    N largest n-gram order, K heads (hashes with rows of their own) per order,
    M = len(orders) * K rows read per token
    R rows of one layer's table, d width of one row, d_mem = M * d
    U unique rows that a layer reads in a step

Once:
  engram = Engram(EngramConfig(rows=100_000), block, D, n_canonical, pad)
  row_adam = RowAdam([engram.table])       the parameters have another optimiser
One step:
  GPT.addresses, on the host, while the step before is still under way:
    address = engram.address(x)      hash: which rows? x: canonical ids of the step's tokens
  GPT.read, before the first block runs:
    read = engram.read(address)      gather each row once into a small tensor, read.leaf
  Block.forward:
    h = h + engram(h, read)          project what was read, gate it, add it to the stream
  train.py:
    loss.backward()                  fill read.leaf.grad: U rows, not the whole table
    row_adam.step([read], lr)        update those U rows of the table, and no others
"""
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import check_fields, opt, to_device


@dataclass
class EngramConfig:
    blocks: tuple = opt((1,), "blocks that get a memory, counted from 0")
    orders: tuple = opt((2, 3), "n-gram orders; 1 is the current token alone")
    heads: int = opt(4, "hash heads per order; n-grams that share a row in one head "
                     "rarely do so in all of them", least=1)
    rows: tuple = opt((), "rows per head, raised to the next free prime: one number, or one "
                      "per order; by default as many as give the model the parameters of its "
                      "twin, see --rho")
    width: int = opt(16, "numbers in one row", least=1)
    conv_kernel: int = opt(4, "taps of the short convolution; 0 leaves it out", least=0)
    conv_dilation: int = opt(0, "distance between its taps; 0: the largest order (paper)",
                             least=0)
    gate: str = opt("sqrt", "sqrt (official demo), plain (paper, eq. 4) or off (all "
                    "that is read is believed)", ("sqrt", "plain", "off"))
    compress: bool = opt(True, "hash canonical ids ('The' and ' the' share one), not token ids")
    stop_at_eot: bool = opt(False, "an n-gram never looks back past an end of text")
    bias: bool = opt(True, "biases in the key and value projections (demo: yes, paper: no)")
    seed: int = opt(0, "seed of the hash multipliers", least=0)

    def __post_init__(self):
        self.blocks, self.orders = tuple(self.blocks), tuple(self.orders)
        # one number of rows is meant for every order
        self.rows = tuple(np.atleast_1d(self.rows).tolist())
        if len(self.rows) == 1:
            self.rows = self.rows * len(self.orders)
        for name, values, least in (("blocks", self.blocks, 0), ("orders", self.orders, 1)):
            increasing = list(values) == sorted(set(values))
            if not values or not increasing or values[0] < least:
                raise ValueError(f"engram {name} {values}: give increasing numbers from "
                                 f"{least} on")
        # (to find a prime above 10**12 takes too long)
        possible = all(1 <= rows <= 10 ** 12 for rows in self.rows)
        if self.rows and (len(self.rows) != len(self.orders) or not possible):
            raise ValueError(f"engram rows {self.rows}: give one number from 1 to 10**12 per "
                             f"order, {len(self.orders)} here, or one for all")
        check_fields(self)
        self.conv_dilation = self.conv_dilation or self.orders[-1]

    @property
    def d_mem(self):
        """Width of a token's M rows side by side."""
        return len(self.orders) * self.heads * self.width


# ---- the module ------------------------------------------------------------------------

class Address(NamedTuple):
    """Which rows one layer reads in one step. It is on the host, wherever the model is."""
    # [U] the different row numbers, sorted
    row_ids: torch.Tensor
    # [B, T, M] which of the U rows each token reads
    inverse: torch.Tensor


class Read(NamedTuple):
    """What one layer reads in one step."""
    # [U] as in Address, but on the table's device
    row_ids: torch.Tensor
    # [U, d] the values of those rows; in training an autograd leaf, so it gets a .grad
    leaf: torch.Tensor
    # [B, T, M] as in Address, but on the model's device
    inverse: torch.Tensor
    # to be called before leaf is used, see offload.py; None where leaf is filled at once
    ready: Callable | None


class Engram(nn.Module):

    def __init__(self, cfg, block, n_embd, n_canonical, pad, table_device=None):
        """cfg: EngramConfig with rows. block: the number of its block, which also seeds
        its hash. n_canonical: V'. pad: the canonical id of end of text, which also stands before
        the first token. table_device "meta" makes only the shape of a table."""
        super().__init__()
        if not cfg.rows:
            raise ValueError("engram rows are not set: give them, or use twins.make_twins()")
        self.cfg, self.pad = cfg, pad
        # A head has as many rows as its prime says. One flat table holds all heads, one
        # after the other.
        primes = np.array(head_primes(cfg)[block])                        # [orders, K]
        ends = np.cumsum(primes).reshape(primes.shape)
        # not buffers, so .to() leaves them on the host, where the hash is computed
        self.multipliers = torch.from_numpy(hash_multipliers(cfg, block, n_canonical))  # [N]
        self.primes = torch.from_numpy(primes)
        self.offsets = torch.from_numpy(ends - primes)        # where each head begins
        # The table is a buffer, not a parameter, so autograd never allocates a gradient
        # for all R rows. RowAdam trains it.
        self.register_buffer("table", torch.empty(ends[-1, -1], cfg.width, device=table_device))
        # an offload.Fetch if the table is not on the model's device
        self.fetch = None
        self.value = nn.Linear(cfg.d_mem, n_embd, bias=cfg.bias)
        if cfg.gate != "off":
            self.key = nn.Linear(cfg.d_mem, n_embd, bias=cfg.bias)
            self.norm_key = nn.RMSNorm(n_embd)
            self.norm_query = nn.RMSNorm(n_embd)
        if cfg.conv_kernel:
            self.conv = ShortConv(n_embd, cfg.conv_kernel, cfg.conv_dilation)
        self.reset()

    @torch.no_grad()
    def reset(self):
        """Initialise so that the memory contributes little at first but receives gradients
        from the first step. Table and value projection start small and random: if both were
        zero, neither would get a gradient."""
        self.table.normal_(std=0.02)
        for module in self.children():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02)
                if module.bias is not None:
                    module.bias.zero_()

    def forward(self, h, read, cache=None):
        """Return what to add to the stream h [B, T, D], given a Read (eq. 3 to 5). cache:
        see ShortConv."""
        e = lookup(read)                                                  # [B, T, d_mem]
        v = self.gate(h, e) * self.value(e)                               # [B, T, D]
        if self.cfg.conv_kernel:
            v = v + self.conv(v, cache)
        return v

    def gate(self, h, e):
        """Return alpha [B, T, 1] from 0 to 1: does what was read fit here? (eq. 4)"""
        if self.cfg.gate == "off":
            return torch.ones_like(h[..., :1])
        # (under autocast the projection gives bfloat16)
        key = self.norm_key(self.key(e).to(h.dtype))
        # does the key of what was read point the same way as the hidden state?
        score = (key * self.norm_query(h)).sum(-1, keepdim=True) / math.sqrt(h.size(-1))
        if self.cfg.gate == "sqrt":
            # a signed root, as in the demo, not in the paper; the clamp keeps its gradient
            # finite at 0
            score = score.sign() * score.abs().clamp_min(1e-6).sqrt()
        return torch.sigmoid(score)

    def hash(self, x, history=None):
        """Return, for each token of x, the numbers of the M rows of the flat table that it
        reads, [B, T, M] (section 2 of the paper).

        x: [B, T] canonical ids; history: the ids just before them, N-1 or more, fewer or
        None near the start of a text. Each of the last n ids is multiplied by the multiplier
        of its place (one for the last id, one for the id before, ...), the products are
        XORed, and the remainder by a head's prime is a row of that head. All heads of an
        order share the XOR, but each has its own prime, so two n-grams that collide in one
        head rarely do in another. int64 throughout: hash_multipliers() sees to it that
        nothing overflows.

        By hand, for 2-grams and two heads: ids 5, 7, multipliers 3 (for the last id) and
        11, primes 13 and 17. (7 * 3) ^ (5 * 11) = 21 ^ 55 = 34. First head: 34 % 13 = 8.
        Second head: 34 % 17 = 0, and its rows begin at 13. So the second token reads rows 8
        and 13."""
        N, T = self.cfg.orders[-1], x.size(1)
        # every position needs N-1 ids before it; before the text they are padding
        text = x if history is None else torch.cat([history, x], dim=1)
        padded = F.pad(text, (N - 1, 0), value=self.pad)[:, -(N - 1 + T):]
        mix = torch.zeros_like(x)
        rows_of_order = []
        same_text = torch.ones_like(x, dtype=torch.bool)
        for back in range(N):
            begin = N - 1 - back
            past = padded[:, begin:begin + T]                             # x[t - back]
            if self.cfg.stop_at_eot and back > 0:
                # once an end of text is met, it and all before it count as pad
                same_text = same_text & (past != self.pad)
                past = torch.where(same_text, past, self.pad)
            # from here on mix belongs to the n-gram of n = back + 1
            mix = mix ^ (past * self.multipliers[back])
            if back + 1 in self.cfg.orders:
                i = self.cfg.orders.index(back + 1)
                # one row number per head, [B, T, K]
                rows_of_order.append(mix[..., None] % self.primes[i] + self.offsets[i])
        return torch.cat(rows_of_order, dim=-1)

    def address(self, x, history=None):
        """Return the Address of the tokens x: their row numbers, each once."""
        return Address(*self.hash(x, history).unique(return_inverse=True))

    def read(self, address):
        """Gather each row of an Address once into one small tensor, the leaf. Autograd
        sees its [U, d] numbers and never the table's [R, d]. It never waits for the
        device."""
        row_ids, device = address.row_ids, self.value.weight.device
        if self.fetch is None:
            row_ids = to_device(row_ids, device)
            leaf, ready = self.table.index_select(0, row_ids), None
        else:
            leaf, ready = self.fetch.start(self.table, row_ids, device)
        leaf.requires_grad_(torch.is_grad_enabled())
        return Read(row_ids, leaf, to_device(address.inverse, device), ready)


class ShortConv(nn.Module):
    """SiLU(conv(RMSNorm(x))) for x [B, T, D]: each channel is convolved by itself over
    time, looking back only.

    Taps are `dilation` positions apart: by default N (paper), so that the n-grams they see
    do not overlap. A sum of shifted products is faster on a CPU than a grouped nn.Conv1d."""

    def __init__(self, n_embd, kernel, dilation):
        super().__init__()
        self.dilation = dilation
        # eps as in the demo
        self.norm = nn.RMSNorm(n_embd, eps=1e-5)
        # it starts at zero (paper)
        self.taps = nn.Parameter(torch.zeros(kernel, n_embd))

    def forward(self, x, cache=None):
        """cache: a dict; under self, the last (kernel - 1) * dilation inputs, normalised, for
        the next chunk of a text."""
        T, kernel = x.size(1), len(self.taps)
        x = self.norm(x)
        # put what came before in front of x: zeros where the text begins
        if cache is not None and self in cache:
            x = torch.cat([cache[self].to(x), x], dim=1)
        else:
            x = F.pad(x, (0, 0, (kernel - 1) * self.dilation, 0))
        if cache is not None:
            cache[self] = x[:, T:]
        # the last tap sees the token itself, the one before it sees `dilation` back, ...
        shifted = [x[:, j * self.dilation:j * self.dilation + T] for j in range(kernel)]
        return F.silu(sum(tap * past for tap, past in zip(self.taps, shifted, strict=True)))


def lookup(read):
    """Return e [B, T, d_mem], the M rows of each token side by side, once they are there."""
    if read.ready is not None:
        read.ready()
    # not leaf[inverse]: on a CPU its backward is 12 times as slow, and not repeatable
    e = read.leaf.index_select(0, read.inverse.flatten())
    return e.view(*read.inverse.shape[:2], -1)


class RowAdam:
    """Adam for tables. A step updates exactly the rows that were read in it. There is no
    weight decay.

    Dense Adam would go through all R rows, and its momentum would move rows that were not
    read. Bias correction needs a step count. torch.optim.SparseAdam has one for all rows
    together, so a row that is first read late would start at (1 - beta1) /
    sqrt(1 - beta2) = 0.45 of the rate. Here each row counts its own visits."""

    def __init__(self, tables):
        """tables: list of [R, d] tensors, changed in place; place() the model before."""
        self.tables, self.state = tables, []
        for table in tables:
            self.state.append({"exp_avg": torch.zeros_like(table),
                               "exp_avg_sq": torch.zeros_like(table),
                               "visits": torch.zeros_like(table[:, :1])})

    @torch.no_grad()
    def step(self, reads, lr):
        """Update each table from its Read: leaf.grad is the gradient of rows row_ids."""
        # eps is tiny, because a row's gradient can be
        beta1, beta2, eps = 0.9, 0.95, 1e-15
        for table, state, read in zip(self.tables, self.state, reads, strict=True):
            # the table may be in host memory, and the gradient on a GPU
            row_ids, grad = read.row_ids.to(table.device), read.leaf.grad.to(table.device)
            visits = state["visits"].index_select(0, row_ids) + 1         # [U, 1]
            m = state["exp_avg"].index_select(0, row_ids).lerp_(grad, 1 - beta1)
            v = state["exp_avg_sq"].index_select(0, row_ids).lerp_(grad.square(), 1 - beta2)
            denom = (v / (1 - beta2 ** visits)).sqrt_().add_(eps)
            values = table.index_select(0, row_ids)
            values -= lr * (m / (1 - beta1 ** visits)) / denom
            table.index_copy_(0, row_ids, values)
            state["exp_avg"].index_copy_(0, row_ids, m)
            state["exp_avg_sq"].index_copy_(0, row_ids, v)
            state["visits"].index_copy_(0, row_ids, visits)


# ---- canonical ids, multipliers, primes: fixed numbers, made once ----------------------

def normalise(text):
    """Return the normal form of a token's text. Tokens with the same normal form share
    one canonical id (the paper's tokenizer compression)."""
    # split accents from their letters and drop them
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if unicodedata.category(c) != "Mn").lower()
    text = re.sub(r"[ \t\r\n]+", " ", text)
    # white space alone must not become nothing
    return text if text == " " else text.strip()


def canonical_ids(token_bytes, compress=True):
    """Return the canonical id of every token, an int64 array [V], in order of first
    appearance.

    token_bytes: the bytes of token 0, 1, 2, ... GPT-2: 50,257 tokens have 32,982
    canonical ids. Tokens with the same key get the same id. The key is the normal form of
    the token's text, or its bytes if they are no text (a piece of a UTF-8 sequence)."""
    if not compress:
        return np.arange(len(token_bytes))
    seen, ids = {}, []
    for raw in token_bytes:
        text = raw.decode("utf-8", errors="replace")
        if "\ufffd" in text:
            key = raw
        else:
            key = normalise(text) or text      # an accent alone normalises to nothing
        ids.append(seen.setdefault(key, len(seen)))
    return np.array(ids, dtype=np.int64)


def hash_multipliers(cfg, block, n_canonical):
    """Return the N odd int64 multipliers of one layer, as the demo draws them."""
    # (2 * r + 1) * id stays below 2**63 for r below this bound and ids below V'
    bound = max(1, (2 ** 63 - 1) // n_canonical // 2)
    # every layer draws from a stream of its own; 10007 is the demo's number
    rng = np.random.default_rng(cfg.seed + 10007 * block)
    return rng.integers(0, bound, size=cfg.orders[-1], dtype=np.int64) * 2 + 1


def is_prime(n):
    return all(n % i for i in range(2, math.isqrt(n) + 1))


def head_primes(cfg):
    """Return {block: [[prime of each head] for each order]}.

    Every head of every order and layer has a prime of its own, the smallest free one not
    below cfg.rows. The head has that many rows."""
    taken, primes = set(), {}
    for block in cfg.blocks:
        primes[block] = []
        for rows in cfg.rows:
            found, candidate = [], rows
            if rows == 1:           # a control: one row per head, whatever the n-gram
                found = [1] * cfg.heads
            while len(found) < cfg.heads:
                if candidate not in taken and is_prime(candidate):
                    found.append(candidate)
                    taken.add(candidate)
                candidate += 1
            primes[block].append(found)
    return primes
