"""
Tests: every fast path against a slow and obvious one, the module against the official demo, the
scripts as a user runs them.

    python -m pytest                            # all, a few minutes on a CPU, no network
    python -m pytest -k "demo or hash"          # the memory alone

test_vectors.npz holds inputs, weights and outputs of the official demo (engram_demo_v1.py) for two
configurations, with the canonical ids of the inputs, so that GPT-2's tokenizer is not needed.
"""
import common

import gc
import gzip
import hashlib
import http.server
import inspect
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench_offload
import engram as engram_module
import offload
import prepare_data
import runs
import sample
import train as train_script
from engram import (Engram, EngramConfig, RowAdam, canonical_ids, hash_multipliers, head_primes,
                    lookup, normalise)
from model import GPT, Block, Cache, GPTConfig, attend, generate, load_checkpoint
from moe import MoE
from offload import Fetch, place
from twins import dense_twin, make_twins

HERE = Path(__file__).resolve().parent
VOCAB = 60
CANONICAL = np.arange(VOCAB) // 2                     # 30 canonical ids; end of text is 29


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_engram(**changes):
    shape = dict(blocks=(0, 2), orders=(2, 3), heads=2, rows=97, width=4)
    return EngramConfig(**{**shape, **changes})


def tiny_module(**changes):
    return Engram(tiny_engram(**changes), 0, 8, n_canonical=30, pad=29)


def tiny_gpt(dtype=torch.float64, **changes):
    """A small model whose memory and convolution are loud, not nearly silent as at the start."""
    shape = dict(vocab_size=VOCAB, block_size=32, n_layer=3, n_head=2, n_embd=16, n_expert=4,
                 expert_hidden=8, shared_hidden=12, engram=tiny_engram())
    model = GPT(GPTConfig(**{**shape, **changes}), CANONICAL).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        for engram in model.engrams():
            engram.table.normal_()
    return model


def refused(capsys, call, *argv):
    """Call call(argv), which must end in exit code 2 with one line on stderr; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call([str(a) for a in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---- the memory against the official demo ----------------------------------------------

# The module as others set it, blocks counted from 0 (the paper: from 1).
DEMO = dict(blocks=(1, 15), orders=(2, 3), heads=8, rows=646_400, width=64)
PAPER_27B = dict(blocks=(1, 14), orders=(2, 3), heads=8, rows=2_262_400, width=80, gate="plain",
                 bias=False)
V41 = dict(blocks=(1, 14), orders=(2, 3, 4), heads=8, rows=16_000_000, width=256, conv_kernel=0,
           stop_at_eot=True, bias=False)

DEMO_RUNS = {"demo_order3": (tiny_engram(blocks=(1, 15), heads=8, rows=(211, 409), width=8), 32),
             "two_layers_order4_branches2":
                 (tiny_engram(blocks=(0, 3), orders=(2, 3, 4), heads=4, rows=(199, 397, 499),
                              width=6, seed=7), 16)}


@pytest.fixture(scope="module")
def vectors():
    return np.load(HERE / "test_vectors.npz")


def demo_module(vectors, name, block, branch):
    """Our module with the demo's weights for one residual branch. Rows the demo did not read are
    NaN here: reading any other row shows."""
    cfg, D = DEMO_RUNS[name]

    def get(key):
        return torch.from_numpy(vectors[f"{name}/{block}/{key}"])

    module = Engram(cfg, block, D, n_canonical=32982, pad=32981)
    module.table.fill_(float("nan"))
    module.table[get("table_rows").long()] = get("table_values")
    conv = get("short_conv.conv.weight")[branch * D:(branch + 1) * D, 0].T        # [kernel, D]
    with torch.no_grad():
        for mine, theirs in ((module.key.weight, get(f"key_projs.{branch}.weight")),
                             (module.key.bias, get(f"key_projs.{branch}.bias")),
                             (module.value.weight, get("value_proj.weight")),
                             (module.value.bias, get("value_proj.bias")),
                             (module.norm_key.weight, get(f"norm1.{branch}.weight")),
                             (module.norm_query.weight, get(f"norm2.{branch}.weight")),
                             (module.norm_conv.weight, get(f"short_conv.norms.{branch}.weight")),
                             (module.conv, conv)):
            mine.copy_(theirs)
    return module, get


@pytest.mark.parametrize("name", DEMO_RUNS)
def test_demo_addresses(vectors, name):
    """Another seed, dtype or order of primes gives rows that look fine and are not the paper's."""
    cfg, D = DEMO_RUNS[name]
    x = torch.from_numpy(vectors[f"{name}/canonical"]).long()
    for block in cfg.blocks:
        module, get = demo_module(vectors, name, block, 0)
        assert np.array_equal(hash_multipliers(cfg, block, 32982), get("multipliers").numpy())
        assert np.array_equal(np.array(head_primes(cfg)[block]), get("primes").numpy())
        assert torch.equal(module.hash(x) - module.offsets.flatten(), get("rows").long())


@pytest.mark.parametrize("name, branches", [("demo_order3", 1), ("two_layers_order4_branches2", 2)])
def test_demo_outputs(vectors, name, branches):
    """A swapped norm, a plain gate, a convolution with the wrong dilation: all train."""
    cfg, D = DEMO_RUNS[name]
    x = torch.from_numpy(vectors[f"{name}/canonical"]).long()
    for block in cfg.blocks:
        for branch in range(branches):
            module, get = demo_module(vectors, name, block, branch)
            out = module(get("h")[:, :, branch], module.read(module.hash(x)))
            torch.testing.assert_close(out, get("out")[:, :, branch], rtol=0, atol=1e-5)


def test_deepseek_v41_addresses():
    """Golden values of the released DeepSeek-V4.1: large tables, 4-grams, look-back that stops."""
    cfg = EngramConfig(**V41)
    primes = head_primes(cfg)
    assert [sum(map(sum, primes[b])) for b in cfg.blocks] == [384006168, 384016682]
    multipliers = hash_multipliers(cfg, 1, 99092)
    assert multipliers.tolist() == [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    module = Engram(cfg, 1, 32, n_canonical=99092, pad=2, table_device="meta")
    assert module.table.shape == (384006168, 256)
    rows = module.hash(torch.tensor([[5, 10, 20, 30, 40]]))[0, -1].view(3, 8) - module.offsets
    assert rows[:, :2].tolist() == [[1326936, 6120872], [14088109, 7705371], [14966984, 15521295]]


@pytest.mark.parametrize("named", [DEMO, PAPER_27B])
def test_named_sets_build(named):
    """The settings of the demo and the paper refused, or primes that belong to other blocks."""
    cfg = EngramConfig(**named)
    assert len(cfg.rows) == len(cfg.orders) and set(head_primes(cfg)) == set(cfg.blocks)


# ---- the memory against slow oracles ---------------------------------------------------

def slow_rows(module, ids, stop):
    """Row numbers of one sequence of canonical ids, by Python's unbounded integers."""
    cfg, m = module.cfg, [int(v) for v in module.multipliers]
    rows = []
    for t in range(len(ids)):
        past = [ids[t]]
        for k in range(1, cfg.orders[-1]):
            gone = t - k < 0 or past[-1] is None or (stop and ids[t - k] == module.pad)
            past.append(None if gone and stop else module.pad if gone else ids[t - k])
        past = [module.pad if p is None else p for p in past]
        row, base = [], 0
        for i, n in enumerate(cfg.orders):
            mix = 0
            for k in range(n):
                mix ^= past[k] * m[k]
            assert 0 <= mix < 2 ** 63
            for prime in module.primes[i].tolist():
                row.append(base + mix % prime)
                base += prime
        rows.append(row)
    return rows


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("orders", [(1,), (2,), (2, 3), (1, 3, 4)])
def test_hash_is_the_python_loop(orders, stop):
    """int32 hashing, an overflow, a look-back off by one, or a stop that forgets older tokens."""
    module = tiny_module(orders=orders, stop_at_eot=stop)
    x = torch.randint(0, 30, (3, 40))
    x[0, 5] = x[0, 6] = x[1, 0] = x[1, 39] = 29
    assert module.hash(x).tolist() == [slow_rows(module, ids, stop) for ids in x.tolist()]


def test_hash_by_hand():
    """The example in the docstring of hash(), once the hash has changed."""
    module = tiny_module(orders=(2,))
    module.multipliers = torch.tensor([3, 11])
    module.primes, module.offsets = torch.tensor([[13, 17]]), torch.tensor([[0, 13]])
    assert module.hash(torch.tensor([[5, 7]]))[0, 1].tolist() == [8, 13]
    text = " ".join(Engram.hash.__doc__.split())
    assert "7 * 3 ^ 5 * 11 = 21 ^ 55 = 34" in text and 7 * 3 ^ 5 * 11 == 21 ^ 55 == 34
    assert "34 % 13 = 8" in text and "34 % 17 = 0" in text and "reads rows 8 and 13" in text


@pytest.mark.parametrize("stop", [False, True])
def test_hash_continues_from_history(stop):
    """Decoding that hashes one token at a time without its past reads other rows."""
    module = tiny_module(orders=(2, 4), stop_at_eot=stop)
    x = torch.randint(0, 30, (2, 20))
    x[0, 9] = 29
    past = torch.cat([torch.full((2, 3), 29), x], 1)
    pieces = [module.hash(x[:, t:t + 1], past[:, t:t + 3]) for t in range(20)]
    assert torch.equal(torch.cat(pieces, 1), module.hash(x))


def test_one_row_per_head():
    """The control of capacity 1 that reads a second row."""
    module = tiny_module(rows=1, heads=3)
    rows = module.hash(torch.randint(0, 30, (4, 25)))
    assert len(module.table) == 6 and rows.flatten(0, 1).unique(dim=0).tolist() == [list(range(6))]


def test_canonical_ids():
    """Merging what is not text, or losing a token that normalises to nothing."""
    pieces = [b"The", b" the", b"\xc3\xa9", b"e", b"\xc3", b"\xa9", b" ", b"\n\n", b"\xcc\x81",
              b"\xef\xbf\xbd", "\ufb01".encode(), b"fi", b"<|endoftext|>", b"\xcc\x80"]
    assert canonical_ids(pieces).tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9]
    assert canonical_ids(pieces, compress=False).tolist() == list(range(14))
    assert normalise(" \tA  B\n") == "a b"


def test_canonical_map_of_gpt2():
    """The map of GPT-2's vocabulary, id by id, as the demo's multipliers presuppose it."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("needs GPT-2's tokenizer in the folder that TIKTOKEN_CACHE_DIR names")
    ids = canonical_ids(prepare_data.token_bytes({"kind": "gpt2"}))
    assert ids.max() + 1 == 32982 and len(ids) == 50257
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == \
        "648b280b8082b3868d20fef4dfd3c60f72673bafc4e5e13002744f4967b2ddae"


def test_read_equals_plain_indexing():
    """Wrong inverse, or a gradient that counts a row read twice once."""
    module = tiny_module(heads=4, rows=5)
    row_ids = module.hash(torch.randint(0, 30, (2, 50)))
    read = module.read(row_ids)
    plain = module.table.clone().requires_grad_()
    e = plain[row_ids].flatten(2)
    assert torch.equal(lookup(read), e)
    weight = torch.randn_like(e)
    (lookup(read) * weight).sum().backward()
    (e * weight).sum().backward()
    torch.testing.assert_close(read.leaf.grad, plain.grad[read.row_ids])
    read_at_all = plain.grad.count_nonzero(1).bool().sum()
    assert read_at_all == len(read.row_ids) < row_ids.numel()


def test_row_adam_is_adam_on_the_visits_of_each_row():
    """Rows not read that move, moments shared between rows, bias correction by another clock."""
    table = torch.randn(7, 3, dtype=torch.float64)
    before, mine = table.clone(), RowAdam([table])
    oracle = [torch.nn.Parameter(row.clone()) for row in table]
    adams = [torch.optim.Adam([row], betas=(0.9, 0.95)) for row in oracle]
    for step in range(20):
        rows = torch.randperm(5)[:torch.randint(1, 5, ())].sort().values      # rows 5, 6: never
        leaf = table.index_select(0, rows).requires_grad_()
        leaf.grad = torch.randn_like(leaf)
        lr = 0.1 / (step + 1)
        for r, g in zip(rows.tolist(), leaf.grad, strict=True):
            oracle[r].grad, adams[r].param_groups[0]["lr"] = g.clone(), lr
            adams[r].step()
        mine.step([engram_module.Read(rows, leaf, None, None)], lr)
    torch.testing.assert_close(table, torch.stack(list(oracle)).detach())
    assert torch.equal(table[5:], before[5:]) and not torch.equal(table[:5], before[:5])


def test_first_backward_reaches_everything():
    """Table and projection both zero: neither ever learns, and the loss looks as usual."""
    module = Engram(tiny_engram(), 0, 16, n_canonical=30, pad=29)
    h = (0.02 * torch.randn(2, 10, 16)).requires_grad_()       # as the embedding starts
    read = module.read(module.hash(torch.randint(0, 30, (2, 10))))
    out = module(h, read)
    (out * torch.randn_like(out)).sum().backward()
    grads = {n: p.grad for n, p in module.named_parameters()}
    grads.update(table=read.leaf.grad, h=h.grad)
    assert grads.pop("norm_conv.weight").abs().max() == 0      # waits one step for the zero taps
    for name, grad in grads.items():
        assert grad is not None and grad.abs().max() > 0, name
    assert out.norm() < 0.3 * h.norm()


def test_short_conv_is_a_grouped_convolution():
    """Taps in reverse, a leak from the future, the dilation of another module."""
    module = tiny_module()
    torch.nn.init.normal_(module.conv)
    x = torch.randn(2, 30, 8)
    slow = F.conv1d(F.pad(x.transpose(1, 2), (9, 0)), module.conv.T[:, None], groups=8, dilation=3)
    torch.testing.assert_close(module.short_conv(x), slow.transpose(1, 2))


@pytest.mark.parametrize("gate", ["plain", "off"])
def test_other_gates(gate):
    """A switch that changes nothing, or takes a misspelt name for plain."""
    with pytest.raises(ValueError, match="sqrt, plain or off"):
        tiny_engram(gate=gate + "x")
    module = tiny_module(gate=gate, conv_kernel=0)
    h, read = torch.randn(1, 9, 8), module.read(module.hash(torch.randint(0, 30, (1, 9))))
    e, alpha = lookup(read), 1
    if gate == "plain":
        dot = (F.rms_norm(module.key(e), (8,)) * F.rms_norm(h, (8,))).sum(-1, keepdim=True)
        alpha = torch.sigmoid(dot / math.sqrt(8))
    torch.testing.assert_close(module(h, read), alpha * module.value(e))


# ---- experts ---------------------------------------------------------------------------

def slow_moe(moe, x):
    """Every expert on every token, weighted by what the router says, most weights being zero."""
    flat = x.reshape(-1, x.size(-1))
    affinity = torch.sigmoid(flat @ moe.router.weight.T)
    out = moe.shared(flat)
    for s in range(len(flat)):
        order = torch.argsort(affinity[s] + moe.bias, descending=True)[:moe.top_k].tolist()
        total = sum(affinity[s, i] for i in order)
        for i in order:
            gate, up = (flat[s] @ moe.w_in[i]).chunk(2)
            out[s] = out[s] + affinity[s, i] / total * ((F.silu(gate) * up) @ moe.w_out[i])
    return out.view_as(x)


def tiny_moe(dtype=torch.float64, top_k=2):
    moe = MoE(16, 12, 5, 8, top_k).to(dtype)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    moe.bias.normal_(std=0.1)
    return moe


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_moe_is_the_weighted_sum_over_experts(top_k):
    """Results put back in another token's place, a bias that leaks into the weights; gradients."""
    moe = tiny_moe(top_k=top_k)
    for T in (7, 1):                                   # 7: sorted; 1 with top_k up to 2: decoding
        x = torch.randn(2, T, 16, dtype=torch.float64)
        fast, slow = moe(x), slow_moe(moe, x)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad((y * x).sum(), list(moe.parameters())) for y in (fast, slow)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_moe_padded_and_grouped_paths():
    """A CPU's bf16 slices are padded, a GPU's are grouped: a result shifted to another expert, a
    gradient that reaches padding, an expert with no token."""
    moe, x = tiny_moe(torch.float32), torch.randn(2, 7, 16)
    moe.bias[3] = -9
    weights, flat = [moe.w_in, moe.w_out, moe.router.weight], x.view(-1, 16)
    slow = slow_moe(moe, x) - moe.shared(x)
    grads = torch.autograd.grad((slow * x).sum(), weights)
    for dtype, grouped, near in ((torch.float32, True, 1e-5), (torch.bfloat16, False, 0.1),
                                 (torch.bfloat16, True, 0.1)):
        chosen, weight, counts = moe.route(flat)
        fast = moe.experts(flat.to(dtype), chosen, weight.to(dtype), counts, grouped).view_as(x)
        assert counts[3] == 0
        torch.testing.assert_close(fast.float(), slow, rtol=near, atol=near)
        found = torch.autograd.grad((fast.float() * x).sum(), weights)
        for a, b in zip(found, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=near, atol=near * b.abs().max().item())


def test_moe_is_causal_and_independent_of_the_batch():
    """A capacity limit, or balancing within the batch: later tokens then change earlier ones."""
    moe, x = tiny_moe(), torch.randn(4, 9, 16, dtype=torch.float64)
    other = x.clone()
    other[0, 5:], other[1:] = torch.randn(4, 16), torch.randn(3, 9, 16)
    out, changed = moe(x), moe(other)
    torch.testing.assert_close(out[0, :5], changed[0, :5], rtol=0, atol=1e-12)
    chosen = [moe.route(y.reshape(-1, 16))[0].view(4, 9, 2)[0, :5] for y in (x, other)]
    assert torch.equal(*chosen)


def test_moe_bias_moves_against_the_load():
    """A sign error: the busiest expert gets busier."""
    moe, x = tiny_moe(torch.float32), torch.randn(4, 64, 16)
    moe.bias[2] = 1.0                                  # nearly every token takes expert 2
    uneven = []
    for _ in range(60):
        moe(x)
        uneven.append(moe.move_bias(0.05).item())
    assert uneven[0] > 2.2 and np.mean(uneven[-5:]) < 1.5
    moe.eval()
    moe(x)
    assert moe.load.sum() == 0, "evaluation counted as load"


def test_moe_with_logits_that_vanish():
    """0/0 where the sigmoids of all of a token's experts are zero in fp32."""
    moe, x = tiny_moe(torch.float32), torch.ones(1, 7, 16)
    with torch.no_grad():
        moe.router.weight.fill_(-10.0)
    assert moe(x).isfinite().all()


# ---- the model -------------------------------------------------------------------------

@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 5, 1, 6], [2, 18]])
@pytest.mark.parametrize("stop", [False, True])
def test_cached_decoding_is_the_full_forward(chunks, stop):
    """The hash, the convolution, rotary positions or the mask forgetting what came before."""
    model = tiny_gpt(engram=tiny_engram(orders=(2, 4), stop_at_eot=stop))
    idx = torch.randint(0, VOCAB, (2, 20))
    idx[0, 6] = VOCAB - 1
    cache, pieces = Cache(model.cfg), []
    with torch.no_grad():
        for part in idx.split(chunks, dim=1):
            pieces.append(model(part, cache=cache)[0])
        full = model(idx)[0]
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-10)
    off = model(idx, reads=[])[0]
    assert (off - full).abs().max() > 0.1, "the memory does nothing here: the test is blind"


def test_model_is_causal():
    """Any leak from later tokens, in any part."""
    model, idx = tiny_gpt(), torch.randint(0, VOCAB, (1, 20))
    other = idx.clone()
    other[0, 11:] = torch.randint(0, VOCAB, (9,))
    torch.testing.assert_close(model(idx)[0][:, :11], model(other)[0][:, :11], rtol=0, atol=1e-12)


def test_attention_by_hand_is_sdpa():
    """The plain form that a CPU takes in bf16, and the one that a cache needs."""
    q, k, v = torch.randn(3, 2, 4, 10, 8, dtype=torch.float64)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q[:, :, -3:], k, v), full[:, :, -3:])
    half = [t.bfloat16() for t in (q, k, v)]
    torch.testing.assert_close(attend(*half).double(), full, rtol=0, atol=0.05)


def test_dense_model_is_plain():
    """Leftovers of experts or memory in a model that has neither."""
    model = tiny_gpt(n_expert=0, engram=None)
    kinds = model.parameters_by_kind()
    assert all(kinds[k] == 0 for k in kinds if "engram" in k or "rout" in k)
    size = model.accounting()
    assert sum(kinds.values()) == sum(p.numel() for p in model.parameters())
    assert size["P_tot"] == size["P_act"] and size["P_sparse"] == 0


@pytest.mark.parametrize("rho", [0, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("changes", [{}, dict(engram=EngramConfig(blocks=(0, 2), width=8)),
                                     dict(engram=EngramConfig(orders=(1,), conv_kernel=0))])
def test_twins_agree(rho, changes):
    """An unfair comparison: other totals, other active parameters, a twin with less compute."""
    shape = dict(n_embd=192, n_head=3, n_expert=24, expert_hidden=96, shared_hidden=192)
    shapes, numbers = make_twins(GPTConfig(**shape, **changes), rho)
    models = {name: GPT(shape, np.arange(4096)) for name, shape in shapes.items()}
    a, b = (models[name].accounting() for name in ("engram", "moe"))
    assert abs(a["P_tot"] / b["P_tot"] - 1) < 0.005 and abs(a["P_act"] / b["P_act"] - 1) < 0.005
    assert a["flops_per_token"] <= b["flops_per_token"] and a["P_act"] <= b["P_act"]
    assert a["P_tot"] == sum(p.numel() for p in models["engram"].parameters()) - 4096 * 192 \
        + sum(e.table.numel() for e in models["engram"].engrams())
    assert b["P_sparse"] == 4 * (24 - 2) * 3 * 192 * 96
    assert numbers["rho"] == pytest.approx(rho, abs=0.025) and numbers["engram"] == a


@pytest.mark.parametrize("name", ["engram", "moe", "dense"])
def test_flops_per_token(name):
    """A FLOP count that misses a matmul, or counts a table that is not multiplied."""
    shapes = make_twins(GPTConfig(), 0.75)[0]
    shape = (shapes | {"dense": dense_twin(shapes["moe"])})[name]
    model, T = GPT(shape, np.arange(4096)).eval(), 64
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.long))
    attention = 4 * shape.n_layer * shape.n_embd
    matmuls = model.accounting()["flops_per_token"] - attention * shape.block_size
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items()
                  if "attention" not in str(op)) / T
    assert matmuls == pytest.approx(counted, rel=0.002)


def test_micro_batches_add_up():
    """Accumulation that updates a row by its last micro-batch alone."""
    model, x = tiny_gpt(), torch.randint(0, VOCAB, (4, 12))
    whole = model.read(x)
    model(x, x, whole)[1].backward()
    parts = model.read(x)
    for i in (slice(0, 2), slice(2, 4)):
        (model(x[i], x[i], [r.part(i) for r in parts])[1] / 2).backward()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a.leaf.grad, b.leaf.grad)


def test_a_module_that_was_edited_needs_no_change_elsewhere(monkeypatch):
    """Evaluation that calls the gate of a module without one; twins that take the width of what is
    projected for the numbers in a row, once rows are summed over heads instead of joined."""
    def summed(read):
        e = read.leaf[read.inverse]                            # [B, T, M, d]
        return e.unflatten(2, (2, -1)).sum(3).flatten(2)

    monkeypatch.setattr(engram_module, "lookup", summed)
    monkeypatch.setattr(EngramConfig, "d_mem", property(lambda cfg: 2 * cfg.width))
    monkeypatch.delattr(Engram, "gate")
    monkeypatch.setattr(Engram, "forward", lambda self, h, read, cache=None: self.value(
        engram_module.lookup(read)))
    shapes, numbers = make_twins(GPTConfig(vocab_size=VOCAB), 0.75)
    assert numbers["engram"]["P_tot"] == pytest.approx(numbers["moe"]["P_tot"], rel=0.005)
    model, x = GPT(shapes["engram"], CANONICAL), torch.randint(0, VOCAB, (2, 9))
    with train_script.watch(model) as seen:
        model(x)
    assert seen[0]["gate"] == [] and len(seen[0]["added"]) == 1


def test_decoding_with_a_cache_is_five_times_as_fast():
    """A cache that computes everything again. At the gpu preset's width and context of 512, on one
    thread, as sample.py decodes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shape = GPTConfig(block_size=512, n_layer=2, n_embd=512, n_head=8, expert_hidden=256,
                      shared_hidden=512)
    model = GPT(make_twins(shape, 0.75)[0]["engram"], np.arange(4096)).eval()
    idx = torch.randint(0, 4096, (1, 512))
    began = time.perf_counter()
    assert len(list(generate(model, idx[:, :1], 511))) == 511
    cached, slow = time.perf_counter() - began, 0.0
    with torch.inference_mode():
        for n in range(16, 512, 32):                   # every 32nd length of the 511
            began = time.perf_counter()
            model(idx[:, :n])
            slow += 32 * (time.perf_counter() - began)
    torch.set_num_threads(threads)
    assert slow > 5 * cached, f"{slow:.1f} s without, {cached:.1f} s with a cache"


# ---- train.py, as a user runs it -------------------------------------------------------

TINY = ("--n_embd 16 --n_head 2 --block_size 32 --n_layer 2 --n_expert 4 --expert_hidden 8 "
        "--shared_hidden 8 --engram_heads 2 --engram_width 4 --tokens_per_step 128 --batch_size 2 "
        "--steps 12 --eval_every 4 --eval_tokens 256 --dtype float32 --rho 0.5").split()
TWO_LAYERS = "--model engram --engram_blocks 0 1 --steps 20 --eval_every 10".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A prepared data set "mine" of a few thousand tokens -> the flags that name it."""
    folder = tmp_path_factory.mktemp("data")
    words = np.random.default_rng(0).zipf(1.4, 30000).clip(max=500)
    text = " ".join(f"w{w}" + ("." if w % 7 == 0 else "") for w in words)
    (folder / "mine.txt").write_text("\n".join(text[i:i + 80] for i in range(0, len(text), 80)))
    prepare_data.prepare("mine", [folder / "mine.txt"], data_dir=folder, vocab_size=400)
    return ["--dataset", "mine", "--data_dir", str(folder)]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Two tiny twins in one out_dir; the memory made loud, so that it shows."""
    out = tmp_path_factory.mktemp("out")
    run(*corpus, *TINY, "--out_dir", out)
    saved = load_checkpoint(out / "engram" / "ckpt.pt")[0]
    saved["model"]["blocks.1.engram.value.weight"] *= 30
    torch.save(saved, out / "engram" / "ckpt.pt")
    return out


def run(*argv):
    train_script.main([str(a) for a in argv])


def log(out, name="engram"):
    return [json.loads(line) for line in open(Path(out) / name / "log.jsonl")]


def curve(out):
    return [(r["step"], r["val_loss"], r["train_loss"]) for r in log(out)[1:]]


def same_run(a, b):
    """Whether curves, weights, tables and moments are equal to the last bit."""
    tensors = []
    for folder in (a, b):
        saved = load_checkpoint(folder / "engram" / "ckpt.pt")[0]
        tensors.append(list(saved["model"].values()))
        for state in saved["tables"]:
            tensors[-1] += state.values()
    return curve(a) == curve(b) and all(map(torch.equal, *tensors))


def test_train_both(corpus, tmp_path, capsys):
    """The whole way: two twins, a line per evaluation, logs, checkpoints, table and picture; run
    again with --resume, it must show its result again. As in a notebook, whose backend no fresh
    process can load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "module://nowhere.backend")
        run(*corpus, *TINY, "--out_dir", tmp_path)
    printed = capsys.readouterr().out
    (header, *records), (other, *_) = log(tmp_path), log(tmp_path, "moe")
    assert [r["step"] for r in records] == [4, 8, 12] and header["config"]["seed"] == 0
    assert abs(header["accounting"]["P_tot"] / other["accounting"]["P_tot"] - 1) < 0.005
    assert records[-1]["val_loss"] < records[0]["val_loss"] < math.log(400) + 0.1
    assert 0 < records[-1]["gate_mean"][0] < 1 and 0 < records[-1]["rows_touched"][0] <= 1
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    lines = [line for line in printed.splitlines() if " step " in line]
    assert len(lines) == 6 and sum("against the first" in line for line in lines) == 3
    assert f"validation {records[-1]['val_loss']:.4f}" in lines[2]
    table = "\n".join(runs.compare(tmp_path))
    assert table in printed and "Engram minus its twin" in table
    run(*corpus, *TINY, "--out_dir", tmp_path, "--resume")
    assert table in capsys.readouterr().out


def test_killed_run_resumes_exactly(corpus, tmp_path):
    """kill -9, then --resume: another data order, fresh moments or a broken checkpoint would show
    in the losses, which must be those of a run that was left alone."""
    argv = [*corpus, *TINY, "--model", "engram", "--steps", "200", "--eval_every", "10"]
    command = [sys.executable, HERE / "train.py", *argv, "--out_dir", tmp_path / "a"]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "a" / "engram" / "ckpt.pt").exists() and time.time() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    done = load_checkpoint(tmp_path / "a" / "engram" / "ckpt.pt")[0]["step"]
    assert 10 <= done < 200, "killed too late to test anything"
    run(*argv, "--out_dir", tmp_path / "a", "--resume")
    run(*argv, "--out_dir", tmp_path / "b")
    assert same_run(tmp_path / "a", tmp_path / "b") and len(log(tmp_path / "a")[0]["resumed"]) == 1


@pytest.mark.parametrize("flags", ["--engram_gate off --engram_conv_kernel 0", "--engram_orders 1",
                                   "--engram_stop_at_eot --no-engram_bias --engram_gate plain",
                                   "--no-engram_compress --engram_blocks 0 1 --n_expert 6",
                                   "--model dense", "--model dense --n_layer 1",
                                   "--engram_rows 1 --engram_seed 1234567"])
def test_variants_train(corpus, tmp_path, capsys, flags):
    """A variant with a parameter that no gradient reaches, that a twin cannot pay for, or that is
    refused because of a memory it does not have. Rows of one's own are no twins, said first."""
    run(*corpus, *TINY, "--steps", 4, "--rho", "0.3", "--out_dir", tmp_path, *flags.split())
    before = capsys.readouterr().out.split(" step ")[0]
    assert "rows were given" in before or "--engram_rows" not in flags


def test_more_steps_on_resume(corpus, tmp_path, capsys):
    """Longer training refused as another run; a changed model or order of data accepted."""
    argv = [*corpus, *TINY, "--model", "engram", "--out_dir", tmp_path]
    run(*argv)
    run(*argv, "--resume", "--steps", 20, "--batch_size", 4, "--eval_every", 5, "--table", "host")
    header, *records = log(tmp_path)
    assert [r["step"] for r in records] == [4, 8, 12, 15, 20]
    assert header["config"]["steps"] == 20
    assert header["resumed"][0]["steps_before"] == 12
    for flag, value, was in (("steps", 12, 20), ("n_embd", 32, 16), ("engram_heads", 4, 2),
                             ("seed", 1, 0)):
        line = refused(capsys, train_script.main, *argv, "--resume", f"--{flag}", value)
        assert f"{flag} ({was}, {value})" in line


def test_accumulation_and_evaluation_do_not_change_training(corpus, tmp_path):
    """Evaluation that draws from the training's random numbers or leaves the model in eval mode."""
    run(*corpus, *TINY, "--model", "engram", "--out_dir", tmp_path / "a")
    run(*corpus, *TINY, "--model", "engram", "--eval_every", "12", "--out_dir", tmp_path / "b")
    run(*corpus, *TINY, "--model", "engram", "--batch_size", "1", "--out_dir", tmp_path / "c")
    ends = [log(tmp_path / x)[-1]["val_loss"] for x in "abc"]
    assert ends[0] == ends[1] and ends[0] == pytest.approx(ends[2], abs=1e-4)


def test_infinite_loss_stops_and_keeps_the_checkpoint(corpus, tmp_path, capsys, monkeypatch):
    """A run that goes on training NaNs, or overwrites the last good checkpoint with them."""
    schedule = train_script.learning_rate
    monkeypatch.setattr(train_script, "learning_rate",
                        lambda step, cfg: schedule(step, cfg) if step < 6 else float("inf"))
    argv = [*corpus, *TINY, "--model", "moe", "--out_dir", tmp_path]
    message = refused(capsys, train_script.main, *argv)
    assert "at step 7" in message and "last good checkpoint" in message
    assert load_checkpoint(tmp_path / "moe" / "ckpt.pt")[0]["step"] == 4


@pytest.mark.parametrize("writer", [lambda file: file.write(bytes(99999)),
                                    partial(torch.save, torch.zeros(9999))])
def test_what_was_there_is_kept(tmp_path, capsys, monkeypatch, writer):
    """Half a file in place of the last whole one, or torch's own words for a full disk; Ctrl-C in
    the middle of a write reported as a full disk."""
    path = tmp_path / "a"
    path.write_text("before")
    (tmp_path / f"a.{os.getpid()}.part").symlink_to("/dev/full")
    message = refused(capsys, lambda argv: common.write_whole(path, writer))
    assert "No space left" in message and path.read_text() == "before"

    def interrupted(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        common.write_whole(path, writer)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "before"


def test_ctrl_c_while_torch_writes(tmp_path):
    """torch.save turns it into a RuntimeError."""
    class Interrupting:
        def write(self, data):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.write_whole(tmp_path / "a", lambda file: torch.save(torch.zeros(9), Interrupting()))


def test_checkpoints_that_do_not_fit_are_refused(corpus, tmp_path, capsys, monkeypatch):
    """Resuming from another tokenizer's, half a file or none; a changed hash that reads the old
    table's wrong rows in silence."""
    argv = [*corpus, *TINY, "--model", "engram", "--out_dir", tmp_path]
    main, path = train_script.main, tmp_path / "engram" / "ckpt.pt"
    assert "nothing to resume" in refused(capsys, main, *argv, "--resume")
    run(*argv)
    assert "--resume" in refused(capsys, main, *argv)
    with monkeypatch.context() as patch:
        right = Engram.hash
        patch.setattr(Engram, "hash", lambda self, *args: right(self, *args).roll(1, 0) // 2)
        assert "another hash" in refused(capsys, main, *argv, "--resume")
    whole, saved = path.read_bytes(), load_checkpoint(path)[0]
    saved["run"]["tokenizer"] = "0" * 64
    torch.save(saved, path)
    assert "tokenizer (000" in refused(capsys, main, *argv, "--resume")
    del saved["model"]["embed.weight"]
    torch.save(saved, path)
    assert "embed.weight" in refused(capsys, main, *argv, "--resume")
    for broken in (whole[:len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(broken)
        assert "not a readable checkpoint" in refused(capsys, main, *argv, "--resume")


@pytest.mark.parametrize("argv, part", [
    ("--no_such_flag 1", "unrecognized arguments"), ("--steps many", "invalid int"),
    ("--steps 0", "steps 0"), ("--lr nan", "lr nan"), ("--model gpt", "invalid choice"),
    ("--n_head 3", "multiple of 2 * n_head"), ("--batch_size 3", "not a multiple"),
    ("--engram_blocks 7", "blocks 0 to 1"), ("--engram_orders 3 2", "increasing"),
    ("--rho 1", "below 1"), ("--rho 0.9", "leaves no row"), ("--top_k 9", "at most n_expert"),
    ("--device cuda:77", "try --device cpu"), ("--device meta", "try --device cpu"),
    ("--device mps", "try --device cpu"), ("--dataset nothing", "not prepared"),
    ("--block_size 50000 --tokens_per_step 100000", "block_size"), ("--n_expert 0", "need experts"),
    ("--engram_rows 9999999999", "GB")])
def test_usual_mistakes(corpus, tmp_path, capsys, argv, part):
    """A traceback, a wall of usage, or a run that ignores what was asked."""
    given = [*corpus, *TINY, "--out_dir", tmp_path / "out", *argv.split()]
    assert part in refused(capsys, train_script.main, *given)


def test_more_mistakes(corpus, tmp_path, capsys, monkeypatch):
    """Truncated data, an out_dir that is a file, several processes, a missing compiler."""
    argv = [*corpus[:2], "--data_dir", tmp_path, *TINY, "--out_dir", tmp_path / "out"]
    shutil.copytree(Path(corpus[-1]) / "mine", tmp_path / "mine")
    data = tmp_path / "mine" / "train.bin"
    data.write_bytes(data.read_bytes()[:-2])
    assert "bytes" in refused(capsys, train_script.main, *argv)
    (tmp_path / "file").touch()
    done = shell(f"$PY train.py {' '.join(map(str, argv))} --out_dir {tmp_path / 'file'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "file" in done.stderr
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in refused(capsys, train_script.main, *argv, "--compile")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused(capsys, train_script.main, *argv)


def shell(command, **env):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "PY": sys.executable, **env})


@contextmanager
def started(*command):
    """A script that Ctrl-C reaches even where our own parent ignores it (a shell script's `&`), and
    that a test which fails does not leave behind."""
    with subprocess.Popen([sys.executable, *command], cwd=HERE, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(
                              signal.SIGINT, signal.SIG_DFL)) as child:
        try:
            yield child
        finally:
            child.kill()


def test_ctrl_c_shows_how_to_continue(corpus, tmp_path):
    """A traceback, another exit code than 130, or a command that does not resume."""
    argv = [*corpus, *TINY, "--steps", "3000", "--out_dir", str(tmp_path)]
    with started("train.py", *argv) as stopped:
        while " step " not in stopped.stdout.readline():
            assert stopped.poll() is None
        stopped.send_signal(signal.SIGINT)
        message = stopped.communicate()[1].strip().splitlines()[-1]
    assert stopped.returncode == 130 and message.startswith("stopped; the last checkpoint is kept")
    again = message.partition("continue with: python ")[2]
    with started(*again.split()) as resumed:
        while " step " not in resumed.stdout.readline():
            assert resumed.poll() is None
    assert len(log(tmp_path)[0]["resumed"]) == 1


def test_runs_that_are_no_twins(trained, tmp_path):
    """An old run of another shape in the same out_dir, compared as if it were the twin."""
    shutil.copytree(trained, tmp_path / "out")
    assert "Engram minus its twin" in "".join(runs.compare(tmp_path / "out"))
    path = tmp_path / "out" / "moe" / "log.jsonl"
    whole = path.read_text()
    p_tot = log(tmp_path / "out", "moe")[0]["accounting"]["P_tot"]
    for old, new in (('"n_layer": 2', '"n_layer": 3'), ('"seed": 0,', '"seed": 1,'),
                     (f'"P_tot": {p_tot}', f'"P_tot": {2 * p_tot}')):
        assert old in whole
        path.write_text(whole.replace(old, new))
        assert "not comparable" in runs.compare(tmp_path / "out")[-1]


def test_crossing():
    """A share of the tokens that is off by an evaluation."""
    records = [{"tokens": t, "val_loss": v} for t, v in ((10, 5), (20, 3), (30, 2))]
    assert runs.crossing(records, 4) == 15 and runs.crossing(records, 6) == 10
    assert runs.crossing(records, 1) is None


# ---- where the table lives -------------------------------------------------------------

@pytest.mark.parametrize("prefetch", [True, False])
def test_offloaded_is_resident_bit_for_bit(prefetch):
    """Rows of another layer, another batch or another step; a gather that rounds. Two memory
    layers, n-grams that repeat, whole texts and cached chunks."""
    model, idx = tiny_gpt(torch.float32), torch.randint(VOCAB, (3, 20))
    idx[1, 5:15] = idx[0, 5:15]

    def outputs():
        cache = Cache(model.cfg)
        chunks = [model(part, cache=cache)[0] for part in idx.split([1, 1, 7, 11], dim=1)]
        text = torch.tensor(list(generate(model, idx[:1, :4], 20, temperature=0)))
        return [model(idx)[0], *chunks, text]

    want = outputs()
    place(model, "cpu", "host", prefetch)
    assert all(read.ready for read in model.read(idx))
    assert all(map(torch.equal, outputs(), want))


def test_offloaded_training_is_resident_training_bit_for_bit(corpus, tmp_path, monkeypatch):
    """A gradient that goes to other rows, moments that miss a step, a read before the update; a
    table or moments that do not come back from a checkpoint to another place."""
    argv = [*corpus, *TINY, *TWO_LAYERS]
    for where in ("resident", "host"):
        run(*argv, "--table", where, "--out_dir", tmp_path / where)
    with monkeypatch.context() as patch:
        patch.setattr(train_script, "place", partial(place, prefetch=False))
        run(*argv, "--table", "host", "--out_dir", tmp_path / "synchronous")
    schedule = train_script.learning_rate
    for first, then in (("host", "resident"), ("resident", "host")):
        def stop(step, cfg):
            if step == 13:
                raise KeyboardInterrupt
            return schedule(step, cfg)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(train_script, "learning_rate", stop)
            run(*argv, "--table", first, "--out_dir", tmp_path / then / "resumed")
        run(*argv, "--table", then, "--out_dir", tmp_path / then / "resumed", "--resume")
    for name in ("host", "synchronous", "host/resumed", "resident/resumed"):
        assert same_run(tmp_path / name, tmp_path / "resident"), name


class Slow(Fetch):
    """Gathers that take a while, and say when they begin."""
    begun = 0

    def gather(self, *args):
        self.begun += 1
        time.sleep(0.05)
        return super().gather(*args)


def test_reads_in_flight_do_not_mix():
    """A staging buffer used again before the read before it was."""
    engram = tiny_gpt().engrams()[0]
    rows = [torch.randint(len(engram.table), (2, 9, 4)) for _ in range(6)]
    engram.fetch = Slow()
    reads = [engram.read(r) for r in rows]
    for r, read in reversed(list(zip(rows, reads, strict=True))):
        assert torch.equal(lookup(read), engram.table[r].flatten(2))


def test_reads_start_early():
    """A prefetch that begins at the place of use, or, in decoding, when the caller asks for more;
    a synchronous read that does not wait for its place."""
    model, idx = tiny_gpt(), torch.randint(VOCAB, (1, 4))
    place(model, "cpu", "host")
    slow = Slow()
    for engram in model.engrams():
        engram.fetch = slow
    for n, _ in zip(range(2, 8), generate(model, idx, 20), strict=False):
        deadline = time.time() + 10
        while slow.begun < 2 * n and time.time() < deadline:      # two layers; one read ahead
            time.sleep(0.01)
        assert slow.begun == 2 * n
    slow = Slow(prefetch=False)
    for engram in model.engrams():
        engram.fetch = slow
    reads = model.read(idx)
    time.sleep(0.1)
    assert slow.begun == 0
    model(idx, reads=reads), model(idx, reads=reads)
    assert slow.begun == 2                                        # once a read


def test_a_worker_that_fails():
    """A hang, a silent empty row, or a thread that outlives its model."""
    class Broken(Fetch):
        def gather(self, *args):
            raise OSError(5, "the disk does not answer")

    before, model, idx = threading.active_count(), tiny_gpt(), torch.randint(VOCAB, (1, 4))
    place(model, "cpu", "host")
    good = model.engrams()[0].fetch
    want = model(idx)[0]
    for engram in model.engrams():
        engram.fetch = Broken()
    with pytest.raises(OSError, match="does not answer"):
        model(idx)
    for engram in model.engrams():
        engram.fetch = good
    assert torch.equal(model(idx)[0], want) and threading.active_count() > before
    del model, engram, good
    gc.collect()
    deadline = time.time() + 10
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_device_that_reads_other_rows(capsys, monkeypatch):
    """A unique() that returns a wrong inverse, as on some accelerators."""
    model, idx = tiny_gpt(), torch.randint(VOCAB, (2, 9))
    offload.check_rows(model, idx)
    place(model, "cpu", "host")
    offload.check_rows(model, idx)
    right = Engram.read

    def wrong(self, row_ids):
        read = right(self, row_ids)
        return read._replace(inverse=read.inverse.roll(1, 1))

    monkeypatch.setattr(Engram, "read", wrong)
    assert "other rows" in refused(capsys, lambda argv: offload.check_rows(model, idx))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
@pytest.mark.parametrize("prefetch", [True, False])
def test_offloaded_on_a_gpu(prefetch):
    """A copy that is used before it has ended, or lands in memory that is still in use."""
    model, losses = tiny_gpt(torch.float32), {}
    ids = torch.randint(VOCAB, (50, 4, 32))
    for where in ("resident", "host"):
        place(model.cpu(), "cuda", where, prefetch)
        with torch.no_grad():
            losses[where] = torch.stack([model(x.cuda(), x.cuda())[1] for x in ids])
    torch.testing.assert_close(losses["host"], losses["resident"], rtol=0, atol=1e-5)
    reads = model.read(ids[0].cuda())
    model(ids[0].cuda(), ids[0].cuda(), reads)[1].backward()
    RowAdam([engram.table for engram in model.engrams()]).step(reads, 0.1)
    assert all(read.leaf.is_cuda for read in reads)
    assert not any(engram.table.is_cuda for engram in model.engrams())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
def test_train_on_a_gpu(corpus, tmp_path):
    """A tensor left on the CPU, a state that resumes on the wrong device."""
    argv = [*corpus, *TINY, "--preset", "laptop", "--device", "cuda", "--dtype", "bfloat16"]
    run(*argv, "--out_dir", tmp_path)
    run(*argv, "--out_dir", tmp_path, "--resume", "--steps", 16)
    assert log(tmp_path)[-1]["val_loss"] < math.log(400)


# ---- sample.py -------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def same_threads():
    """sample.py decodes on one thread; other tests keep theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def look(capsys, out, *argv):
    """Return what sample.py prints: out and err."""
    capsys.readouterr()
    sample.main(["--out_dir", str(out), *map(str, argv)])
    return capsys.readouterr()


def opened(out):
    """Return the model of a run, its tokenizer, and what the checkpoint holds."""
    saved, model = load_checkpoint(out / "engram" / "ckpt.pt")
    return model, prepare_data.encoding(saved["tokenizer"]), saved


def test_sampling(trained, capsys):
    """Flags that change nothing, samples that cannot be repeated one by one."""
    texts = {}
    torch.set_num_threads(2)
    for flags in ("", "--seed 1", "--num_samples 2", "--temperature 0", "--top_k 1",
                  "--top_p 1e-6", "--max_new_tokens 5", "--temperature 0.8"):
        printed = look(capsys, trained, "--prompt", "w1 w2", *flags.split())
        texts[flags] = printed.out
        assert printed.out.startswith("w1 w2") and "tokens/s; stopped: " in printed.err
    assert texts[""] != texts["--seed 1"] and texts[""] != texts["--temperature 0.8"]
    assert texts["--num_samples 2"] == texts[""] + "-" * 20 + "\n" + texts["--seed 1"]
    assert texts["--temperature 0"] == texts["--top_k 1"] == texts["--top_p 1e-6"] != texts[""]
    assert texts[""].startswith(texts["--max_new_tokens 5"][:-1])
    assert torch.get_num_threads() == 1


def test_top_p_keeps_the_nucleus():
    """The token that crosses the threshold dropped, or all of them."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])

    class Fixed(torch.nn.Module):                      # logits that do not depend on the text
        cfg = GPTConfig(block_size=5000, engram=None)

        def read(self, idx, cache):
            return []

        def forward(self, idx, reads, cache):
            return probabilities.log()[None, None], None, None

    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        tokens = list(generate(Fixed(), torch.zeros(1, 1, dtype=torch.long), 400,
                               temperature=1.0, top_p=top_p))
        assert set(tokens) == kept
        share = 0.5 / sum(probabilities[i].item() for i in kept)
        assert tokens.count(0) / 400 == pytest.approx(share, abs=0.1)


def test_text_is_streamed_in_whole_characters(monkeypatch):
    """Half an emoji on the terminal, an end of text that goes on, or the bytes of a character
    that is cut off at the end of a sample lost."""
    enc = prepare_data.encoding(prepare_data.make_tokenizer("bpe", ["ab ab ab"], 259))
    ids = [enc.encode_single_token(bytes([b])) for b in "h\u00e9\U0001f600!".encode()]

    def texts(made, most):
        monkeypatch.setattr(sample, "generate", lambda *args, **how: iter(made[:most]))
        return list(sample.complete(tiny_gpt(), enc, [enc.eot_token], max_new_tokens=most))

    whole = ["h", "", "\u00e9", "", "", "", "\U0001f600", "!"]
    assert [text for _, text in texts(ids, 8)] == whole
    assert texts([*ids, enc.eot_token, 65], 20)[7:] == [(ids[7], "!"), (enc.eot_token, "")]
    assert [text for _, text in texts(ids, 5)] == whole[:4] + ["\ufffd"]
    assert texts([*ids[:5], enc.eot_token], 20)[5] == (enc.eot_token, "\ufffd")


@pytest.mark.parametrize("length", [1, 20, 32, 50])
@pytest.mark.parametrize("memory", [True, False])
def test_beyond_the_context_is_going_on_by_hand(length, memory):
    """A cache that outlives its text, rows of another n-gram, a half that is not the last."""
    model, made = tiny_gpt(), []
    context = torch.randint(0, 60, (1, length))[:, -32:]
    new = list(generate(model, context, 60, temperature=0, memory=memory))
    for _ in range(60):
        logits = model(context, reads=None if memory else [])[0][:, -1]
        made.append(logits.argmax().item())
        full = context.size(1) == 32
        context = torch.cat([context, logits.argmax(-1, keepdim=True)], dim=1)
        if full:
            context = context[:, -16:]
    assert new == made


def test_prompts(trained, capsys, tmp_path):
    """A long prompt refused or cut at its end, a file read as its name, a marker that becomes
    characters."""
    model, enc, _ = opened(trained)
    text = "w1 w3 " * 60
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfw1")
    long = look(capsys, trained, "--prompt", text, "--max_new_tokens", 50)
    file = look(capsys, trained, "--prompt", f"FILE:{tmp_path / 'a.txt'}", "--max_new_tokens", 50)
    ids = prepare_data.encode_text(enc, text)
    pairs = sample.complete(model, enc, ids[-32:], max_new_tokens=50, temperature=0.5)
    assert long.out == enc.decode(ids[-32:]) + "".join(part for _, part in pairs) + "\n"
    assert file.out == long.out and "the last 32 are kept" in long.err
    assert f"the prompt has {len(ids) + 1} tokens" in long.err and "its last half" in long.err
    short = look(capsys, trained, "--prompt", "w1", "--max_new_tokens", 5)
    assert short.err.count("[") == 1
    file = look(capsys, trained, "--prompt", f"FILE:{tmp_path / 'mark.txt'}", "--max_new_tokens", 5)
    assert file.out == short.out
    marker = "<|endoftext|>"
    assert sample.prompt_tokens(f"w1{marker}w2", enc, 32).count(enc.eot_token) == 2
    assert look(capsys, trained, "--prompt", marker).out == look(capsys, trained).out


def test_nats_saved_are_a_difference_of_two_losses(trained, capsys):
    """A sign turned round, or a value beside the wrong token."""
    model, enc, _ = opened(trained)
    argv = ("--prompt", "w1 w3 w1", "--max_new_tokens", 8, "--temperature", 0.8)
    printed = look(capsys, trained, *argv, "--memory").out
    ids = sample.prompt_tokens("w1 w3 w1", enc, 32)
    ids += [i for i, _ in sample.complete(model, enc, ids, max_new_tokens=8, temperature=0.8)]
    on, off = [], []
    for nats, reads in ((on, None), (off, [])):
        for i in range(1, len(ids)):
            logits = model(torch.tensor([ids[:i]]), reads=reads)[0][0, -1].detach()
            nats.append(float(F.cross_entropy(logits, torch.tensor(ids[i]))))
    saved = [b - a for a, b in zip(on, off, strict=True)]
    shown = [f"{enc.decode([i])}[{v:+.2f}]" for i, v in zip(ids[1:], saved, strict=True)]
    # the text comes first; then it comes shaded, with its line ends made visible
    again = printed.removeprefix(enc.decode(ids[1:]) + "\n")
    assert re.sub("[\u21b5\n]", "", again).startswith(re.sub("\n", "", "".join(shown)))
    assert len(set(shown)) > 3
    prompt, new = again.splitlines()[-3:-1]
    n = len(ids) - 1 - 8
    for line, part in ((prompt, slice(0, n)), (new, slice(n, None))):
        shown = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]
        exact = [np.mean(on[part]), np.mean(off[part]), sum(saved[part])]
        assert shown == pytest.approx(exact, abs=0.006)


def test_gates_are_the_modules_own(trained, tmp_path, capsys, monkeypatch):
    """Values of another token, a sign before a number that has none, a gate that barely varies,
    a module from which somebody has removed the gate."""
    model, enc, saved = opened(trained)
    ids, seen, gate = sample.prompt_tokens("w1 w3 w1", enc, 32), [], model.engrams()[0].gate

    def record(h, e):
        seen.append(gate(h, e))
        return seen[-1]

    model.engrams()[0].gate = record
    model(torch.tensor([ids]))
    argv = ["--prompt", "w1 w3 w1", "--max_new_tokens", 0, "--gates"]
    values = seen[0][0, 1:, 0].tolist()
    shown = [f"{enc.decode([i])}[{v:.2f}]" for i, v in zip(ids[1:], values, strict=True)]
    assert "".join(shown) in look(capsys, trained, *argv).out
    monkeypatch.setattr(sample, "has_colours", lambda: True)
    (tmp_path / "engram").mkdir()
    for low, high in ((0.1, 0.9), (0.5, 0.52)):
        saved["records"][-1].update(gate_p5=[low], gate_p95=[high])
        torch.save(saved, tmp_path / "engram" / "ckpt.pt")
        printed = look(capsys, tmp_path, *argv).out
        assert f"white {low:.2f}, blue {high:.2f}" in printed
        assert ("barely varies" in printed) == (high == 0.52)
    monkeypatch.delattr("engram.Engram.gate")
    monkeypatch.setattr("engram.Engram.forward", lambda self, h, *args: torch.zeros_like(h))
    argv = ["--out_dir", trained, *argv]
    assert "no gate" in refused(capsys, sample.main, *argv)


def test_shades():
    """Text lost between the colours, a number that reads as text, no shade where there is
    gain."""
    spans = [("def", 1.0), (" f\n\n  ", -0.5), ("x", 0.0)]
    assert sample.shaded(spans, 0, 2, colour=False) == \
        "def[+1.00] f\u21b5\n\u21b5[-0.50]\n  x[+0.00]"
    coloured = sample.shaded(spans, 0, 2, colour=True)
    assert re.sub("\x1b.*?m", "", coloured) == "def f\u21b5\n\u21b5\n  x"
    assert [sample.tint(v) for v in (0, 1, 5, -1)] == \
        [(255, 255, 255), (80, 150, 255), (80, 150, 255), (255, 190, 110)]
    assert "48;2;168;202;255m" in coloured


@pytest.mark.filterwarnings("error")
def test_picture_of_the_shades(trained, tmp_path, capsys):
    """$ read as mathematics, a long line cut, a blank picture, a text beyond the context."""
    path, heights = tmp_path / "a.png", []
    printed = look(capsys, trained, "--prompt", "$x_1", "--memory", "--png", path,
                   "--max_new_tokens", 60)
    assert path.read_bytes()[:4] == b"\x89PNG" and "only its last 31 tokens" in printed.err
    assert "sample: 31 tokens" in printed.out and "prompt:" not in printed.out
    begun = re.search(r"\$\[[^]]*\]x\[[^]]*\]_\[", printed.out)      # $[...]x[...]_[...]
    assert begun is None, "shaded from its beginning"
    for text in ("$x_1$", "x" * 90, "x" * 91, "a\nb\nc"):
        sample.draw([(text, 2.0)], 0, 2, "title", path)
        picture = matplotlib.image.imread(path)[..., :3]
        heights.append(len(picture))
        blue = np.isclose(picture, np.array([80, 150, 255]) / 255, atol=0.01).all(-1).mean()
        assert blue > 0.0015 * len(text)
    assert heights[0] == heights[1] < heights[2] < heights[3]


@pytest.mark.parametrize("argv, part", [
    ("--model dense", "there is one of: engram, moe"), ("--model moe --memory", "has none"),
    ("--png a.png", "needs --memory"), ("--max_new_tokens 0", "nothing to do"),
    ("--temperature nan", "temperature nan"), (f"--seed {2 ** 63}", "2 ** 63"),
    ("--device nowhere", "'nowhere' is not usable"), ("--prompt FILE:nowhere", "No such file"),
    (f"--prompt FILE:{HERE / 'test_vectors.npz'}", "utf-8")])
def test_usual_mistakes_in_sampling(trained, capsys, argv, part):
    """A traceback, or a flag that is ignored."""
    assert part in refused(capsys, sample.main, "--out_dir", trained, *argv.split())


def mapping(tensor):
    """Return the line of the process's memory map that the tensor's data lies in."""
    for line in open("/proc/self/maps"):
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return line


def test_the_checkpoint_is_the_file_of_the_table(trained, tmp_path, capsys, monkeypatch):
    """--table disk: a table that is copied into memory all the same, that is written to, or a
    file that is missing, cut short or of something else and is read nevertheless."""
    path = trained / "engram" / "ckpt.pt"
    before = path.read_bytes()
    texts, mapped = set(), []

    def keep_mapping(args, record, model, *others):
        mapped.append(all(str(path) in mapping(engram.table) for engram in model.engrams()))

    for where in ("resident", "host", "disk"):
        texts.add(look(capsys, trained, "--seed", 3, "--table", where, "--memory").out)
        with monkeypatch.context() as patch:
            patch.setattr(sample, "show", keep_mapping)
            look(capsys, trained, "--table", where, "--memory")
    assert mapped == [False, False, True]
    assert len(texts) == 1 and path.read_bytes() == before
    saved = torch.load(path, weights_only=True)
    saved["model"].pop("embed.weight")
    other = io.BytesIO()
    torch.save(saved, other)
    copy = tmp_path / "engram" / "ckpt.pt"
    copy.parent.mkdir()
    for content in (before[:-100], before[:len(before) // 2], other.getvalue(), b"PK" * 500, b""):
        copy.write_bytes(content)
        argv = ["--out_dir", tmp_path, "--table", "disk"]
        assert "not a readable checkpoint" in refused(capsys, sample.main, *argv)
    copy.unlink()
    assert "no checkpoint" in refused(capsys, sample.main, *argv)


def test_an_output_that_takes_no_more(trained):
    """A traceback or an error in the pipe to head, silence on a full disk."""
    def shell(command):
        command = f"{sys.executable} sample.py --out_dir {trained} --max_new_tokens 5 {command}"
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=HERE)

    closed = shell("--num_samples 2000 | head -n1; exit ${PIPESTATUS[0]}")
    assert closed.returncode == 141 and closed.stdout.count("\n") == 1
    assert all(line.startswith("[seed ") for line in closed.stderr.splitlines())
    full = shell("> /dev/full")
    assert full.returncode == 2 and "No space left" in full.stderr.splitlines()[-1]
    assert len(full.stderr.splitlines()) <= 2


# ---- preparing data --------------------------------------------------------------------

CODE_TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i}  # ä€ it's\n\n" for i in range(60))


def prepare(*argv):
    prepare_data.main([str(a) for a in argv])


@pytest.fixture
def prepared(tmp_path):
    """A prepared data set of 40 documents."""
    docs = [f"document {i}\n{CODE_TEXT[i * 20:i * 20 + 400]}\n" for i in range(40)]
    (tmp_path / "mine.txt").write_text(f"{prepare_data.EOT}\n".join(docs), encoding="utf-8")
    argv = [str(tmp_path / "mine.txt"), "--data_dir", str(tmp_path / "d"), "--vocab_size", "300"]
    prepare(*argv)
    return docs, tmp_path / "d", argv


def naive_bpe(texts, n_merges):
    """The definition: count all pairs anew before each merge."""
    import regex
    counts, words = Counter(), []
    for text in texts:
        counts.update(regex.findall(prepare_data.PATTERN, text))
    for word, n in counts.items():
        words.append(([bytes([b]) for b in word.encode()], n))
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 256 + n_merges:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda p: (-pairs[p], tokens.index(p[0]), tokens.index(p[1])))
        tokens.append(best[0] + best[1])
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
    return tokens, {b"".join(w): w for w, _ in words}


def test_bpe_is_the_naive_one_and_tiktoken_runs_it():
    """Incremental counts that drift, ties decided by hash order, other merges in tiktoken."""
    texts = [CODE_TEXT, "".join(random.Random(0).choices("aaabbcd \n\u20ac", k=9000))]
    tokens, words = naive_bpe(texts, 150)
    assert prepare_data.train_bpe(texts, 150) == tokens and len(tokens) == 406
    few = ["one two one"]
    assert prepare_data.train_bpe(few, 150) == naive_bpe(few, 150)[0]
    tok = json.loads(json.dumps(prepare_data.make_tokenizer("bpe", texts, 407)))
    enc, of_id = prepare_data.encoding(tok), prepare_data.token_bytes(tok)
    assert of_id == tokens + [prepare_data.EOT.encode()] and enc.n_vocab == 407
    for raw, word in words.items():
        assert [of_id[i] for i in enc.encode_ordinary(raw.decode())] == word
    for text in ["\x00\ud7ff\U0001f600 e\u0301\r\n\t", prepare_data.EOT, *map(chr, range(1, 3000))]:
        assert enc.decode_bytes(enc.encode_ordinary(text)) == text.encode()
    with pytest.raises(ValueError, match="sha256"):  # two tokens swapped: all text would change
        prepare_data.encoding(dict(tok, tokens=tok["tokens"][1::-1] + tok["tokens"][2:]))


def test_the_marker_means_end_of_text_everywhere(prepared):
    """The marker encoded as characters in a prompt, and as one id in a file."""
    meta, train, _ = prepare_data.load("mine", prepared[1])
    enc = prepare_data.encoding(meta["tokenizer"])
    text = Path(prepared[2][0]).read_text()
    assert prepare_data.encode_text(enc, text)[:3000] == train[:3000].tolist()


@pytest.mark.parametrize("letters", ["ACGT", "0123456789abcdef", "ACDEFGHIKLMNPQRSTVWY",
                                     "\u7684\u4e00\u662f\u4e0d\u4e86\u4eba\u6211\u5728", "!?.,;"])
def test_words_without_end(tmp_path, letters, monkeypatch):
    """Half an hour of merging in one word of millions of letters; a trainer that takes the longer
    the more different words there are. Encoding that fails on them, or loses some."""
    monkeypatch.setattr(prepare_data, "WORD_BYTES", 100_000)
    text = "".join(random.Random(0).choices(letters, k=1_000_000))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    began = time.time()
    prepare(tmp_path / "t.txt", "--data_dir", tmp_path, "--vocab_size", 1024)
    assert time.time() - began < 60
    meta, *bins = prepare_data.load("t", tmp_path)
    enc = prepare_data.encoding(meta["tokenizer"])
    parts = [enc.decode(list(ids)).removesuffix(prepare_data.EOT) for ids in bins]
    assert "".join(parts) == text and meta["vocab_size"] > 500


def test_the_bounds_of_the_trainer_leave_ordinary_words_alone(monkeypatch):
    """Other ids for ordinary text, because it holds one long word or many different ones."""
    import regex
    text = CODE_TEXT + "y" * 99
    ordinary = Counter(regex.findall(prepare_data.PATTERN, text))
    assert prepare_data.count_words([text, "x" * 10_000]) == ordinary + Counter({"x" * 20: 500})
    monkeypatch.setattr(prepare_data, "WORD_BYTES", 20)
    few = prepare_data.count_words([text])
    assert 0 < len(few) < len(ordinary) and min(few.values()) >= max((ordinary - few).values())


def test_prepared_text_round_trip(prepared):
    """Text lost, doubled or reordered between documents and ids; a document without its end."""
    docs, data_dir, _ = prepared
    meta, *bins = prepare_data.load("mine", data_dir)
    enc, found = prepare_data.encoding(meta["tokenizer"]), []
    for split, ids in zip(("train", "val"), bins):
        assert ids[-1] == meta["eot"] and len(ids) == meta[split]["tokens"]
        parts = enc.decode_bytes(list(ids)).decode().split(prepare_data.EOT)[:-1]
        assert len(parts) == meta[split]["documents"]
        assert sum(len(p.encode()) for p in parts) == meta[split]["bytes"]
        found += parts
    assert "".join(found) == "".join(docs) and 2 <= meta["val"]["documents"] <= 12


@pytest.mark.parametrize("size, block_size", [(24_000, 256), (3_000, 64), (500, 16)])
@pytest.mark.parametrize("break_at", ["\n", " ", ""])
def test_small_texts_and_texts_without_lines(tmp_path, size, block_size, break_at):
    """No validation, or no text at all, of what is short or is one line."""
    words = [f"w{n}" for n in np.random.default_rng(0).zipf(1.4, size).clip(max=300)]
    (tmp_path / "t.txt").write_text((break_at or "\u20ac").join(words)[:size], encoding="utf-8")
    prepare(tmp_path / "t.txt", "--data_dir", tmp_path)
    data = prepare_data.Data("t", tmp_path, block_size, 8, 50, 0, 65536)
    assert len(data.val_x) >= 1 and data.passes > 2 and data.batch(49)[0].shape == (8, block_size)


def test_where_validation_begins(tmp_path):
    """A story in both splits although one ends nearby; half a story without its end of text;
    a piece as long as the text."""
    for text, begins in (("begin\n" + "a story\n" * 290 + prepare_data.EOT + "\n", "begin"),
                         ("word by word\n", "word"), ("a word ", " word"), ("\u20ac", "\u20ac")):
        (tmp_path / "t.txt").write_text(text * (200_000 // len(text)), encoding="utf-8")
        pieces = list(prepare_data.text_corpus([tmp_path / "t.txt"]))
        splits = ["", ""]
        for split, part, _ in pieces:
            splits[split] += part
        sizes = [len(split.encode()) for split in splits]
        assert splits[1].startswith(begins) and 0.05 <= sizes[1] / sum(sizes) < 0.08
        whole = text.replace(prepare_data.EOT + "\n", "") * (200_000 // len(text))
        assert "".join(splits) == whole
        assert [p for p in pieces if p[0] == 0][-1][2] and pieces[-1][2]
        assert max(len(t.encode()) for _, t, _ in pieces) < sum(sizes) / 20


def test_what_is_too_small_says_by_how_much(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("some few words\n" * 30)
    prepare(tmp_path / "t.txt", "--data_dir", tmp_path)
    meta, train, _ = prepare_data.load("t", tmp_path)
    assert 257 < meta["vocab_size"] < 300 and meta["eot"] == meta["vocab_size"] - 1 == train.max()
    line = refused(capsys, lambda argv: prepare_data.Data("t", tmp_path, 256, 8, 5, 0, 65536))
    assert f"{len(train)} tokens of training" in line and "257" in line and "block_size" in line


def test_read_text(tmp_path):
    """A piece cut within a character or a marker; a broken last document taken for a whole."""
    docs, eot = ["\u20ac" * 50 + "\n" + CODE_TEXT[:700], "short", "x" * 900], prepare_data.EOT
    (tmp_path / "t").write_text(f"\n{eot}\n".join(docs), encoding="utf-8")
    for chunk in (1, 20, 100, 1000, 1 << 20):
        pieces = list(prepare_data.read_text(tmp_path / "t", chunk))
        got = "".join(text + eot * ends for text, ends in pieces)
        assert got == f"\n{eot}".join(docs) + eot
        assert max(len(text) for text, _ in pieces) <= chunk + 900
    begun = [doc + "\n" for doc in docs[:2]]
    assert [t for t, _ in prepare_data.read_text(tmp_path / "t", whole=False)] == begun
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes() + "\u20ac".encode()[:2])
    assert [t for t, _ in prepare_data.read_text(tmp_path / "t", whole=False)] == begun


def test_encodings(tmp_path):
    """A byte order mark or carriage returns that become tokens; JSON lines taken for text."""
    docs = [f"document {i}, it is short\n" for i in range(99)]
    plain = f"{prepare_data.EOT}\n".join(docs)
    (tmp_path / "plain.txt").write_text(plain)
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode())
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in docs))
    metas = {}
    for name in ("plain.txt", "dos.txt", "lines.jsonl"):
        prepare(tmp_path / name, "--data_dir", tmp_path)
        metas[name] = prepare_data.load(name.split(".")[0], tmp_path)[0]
    assert metas["plain.txt"]["corpus_sha256"] == metas["dos.txt"]["corpus_sha256"]
    lines = metas["lines.jsonl"]
    assert lines["train"]["documents"] + lines["val"]["documents"] == 99


def test_documents_of_jsonl(tmp_path):
    """A new line at the start of a document taken for the marker's; documents cut at a block's
    edge, or one longer than a block lost."""
    docs = ["first", "\nsecond", "a\n\nb\n", "\u20ac\U0001f600" * 500, "last"]
    lines = [json.dumps({"id": 1, "text": doc}) for doc in docs]
    (tmp_path / "t.jsonl").write_text("\r\n".join(lines) + "\n\n")
    for chunk in (1, 7, 1000, 1 << 20):
        pieces = prepare_data.read_text(tmp_path / "t.jsonl", chunk)
        text = "".join(text + prepare_data.EOT * ends for text, ends in pieces)
        assert text == "".join(doc + prepare_data.EOT for doc in docs)


def test_python_corpus(tmp_path):
    """A cap passed or filled by one package; an order or a tokenizer that differs from run to run;
    a second run that does it all again."""
    argv = ["--data_dir", tmp_path, "--max_mb", 2, "--vocab_size", 512]
    prepare(*argv)
    meta, train, _ = prepare_data.load("python", tmp_path)
    size = meta["train"]["bytes"] + meta["val"]["bytes"]
    assert 1e6 < size <= 2e6 and 0.01 < meta["val"]["bytes"] / size < 0.12
    assert meta["val_13grams_in_train"] < 0.2 and train.max() < 512
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "python").iterdir()}
    assert sorted(before) == ["meta.json", "train.bin", "val.bin"]
    prepare(*argv)
    assert before == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "python").iterdir()}
    prepare("--data_dir", tmp_path / "again", *argv[2:])
    assert prepare_data.load("python", tmp_path / "again")[0] == meta


def test_choice_of_files():
    """A directory in both splits: 6 % instead of 3 % of validation would stand in train."""
    files = [(prepare_data.key(f"{p}{i}"), p, f"{p}/d{i % 30}", f"{p}/d{i % 30}/{i}", 100 + i)
             for p, n in (("big", 400), ("small", 200)) for i in range(n)]
    for cap, share_big in ((0, 120 / 160), (0.04, 0.5)):  # in MB: all of 160 kB; 20 kB of each
        chosen, size = prepare_data.choose(files, cap), {f[3]: f[4] for f in files}
        total = sum(size[path] for _, path in chosen)
        assert total == sum(size.values()) if cap == 0 else 0.9 * cap < total / 1e6 <= cap
        big = sum(size[path] for _, path in chosen if path.startswith("big"))
        assert big / total == pytest.approx(share_big, abs=0.05)
        folders = [set(), set()]
        for split, path in chosen:
            folders[split].add(path.rpartition("/")[0])
        train, val = folders
        assert not train & val and {folder[:3] for folder in val} == {"big", "sma"}


def test_seen_share():
    """The 13-gram share of a hash that collides, of a chunk's edge, of no overlap at all."""
    train, val = np.random.default_rng(1).integers(0, 4096, (2, 1_100_000)).astype("<u2")
    val = val[:1000]
    assert prepare_data.seen_share(train, val) == 0
    val[100:313] = train[(1 << 20) - 100:(1 << 20) + 113]  # across the border of two chunks
    assert prepare_data.seen_share(train, val) == pytest.approx(201 / 988)


def test_a_killed_preparation_leaves_nothing_that_loads(prepared, monkeypatch, capsys):
    """Half a train.bin that looks finished; the old data set gone before the new one is whole."""
    _, data_dir, argv = prepared
    before = prepare_data.load("mine", data_dir)[0]

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare_data, "seen_share", killed)
    for name in ("mine", "new"):
        with pytest.raises(KeyboardInterrupt):
            prepare(*argv[:-1], "290", "--name", name)
    assert prepare_data.load("mine", data_dir)[0] == before
    assert "not prepared" in refused(capsys, lambda argv: prepare_data.load("new", data_dir))


@pytest.mark.parametrize("limit", [400, 3000, 6000])
def test_a_full_disk_leaves_what_was_there(prepared, limit):
    """A traceback, half a file, or the old data set gone. The limit stands for the disk."""
    _, data_dir, argv = prepared
    before = {f: f.read_bytes() for f in (data_dir / "mine").iterdir()}
    command = [sys.executable, "prepare_data.py", *argv[:-1], "290"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, preexec_fn=lambda:
                          resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "untouched" in done.stderr
    assert before == {f: f.read_bytes() for f in (data_dir / "mine").iterdir()}


def test_two_runs_at_once(prepared, tmp_path):
    """Two runs that write into each other's files."""
    _, data_dir, argv = prepared
    runs = [subprocess.Popen([sys.executable, "prepare_data.py", *argv[:-1], "290", "--name", "x"],
                             cwd=HERE, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    prepare(*argv[:-1], "290", "--name", "alone")
    one, two = (prepare_data.load(name, data_dir)[0] for name in ("x", "alone"))
    assert one["train"] == two["train"] and one["val"] == two["val"]
    assert len(list((data_dir / "x").iterdir())) == 3


@pytest.mark.parametrize("file, change, message", [
    ("train.bin", lambda b: b[:-2], "meta.json says"), ("meta.json", lambda b: b[:99], "damaged"),
    ("meta.json", lambda b: b"[]", "damaged"), ("val.bin", lambda b: b + b"x", "meta.json says")])
def test_load_refuses(prepared, capsys, file, change, message):
    """Training on a truncated file (SIGBUS), or a traceback from json."""
    path = prepared[1] / "mine" / file
    path.write_bytes(change(path.read_bytes()))
    assert message in refused(capsys, lambda argv: prepare_data.load("mine", prepared[1]))
    prepare(*prepared[2])  # the remedy that it names works
    prepare_data.load("mine", prepared[1])


class HubServer(http.server.BaseHTTPRequestHandler):
    """Serves bytes; `mood` says how badly."""
    def do_GET(self):
        body, mood = self.server.files.get(self.path.rpartition("/")[2]), self.server.mood
        self.server.log.append(self.headers["Range"])
        if mood == "silent":
            return time.sleep(1)
        if body is None:
            return self.send_error(404)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last or 1 << 60), len(body) - 1)
        if mood == "no ranges":
            first, last = 0, len(body) - 1
        self.send_response(200 if mood == "no ranges" else 206)
        self.send_header("Content-Length", str(last + 1 - first))
        if mood != "no ranges":
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[first:last + 1][:3000 if mood == "short" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubServer)
    server.files, server.mood, server.log, server.daemon_threads = {}, "good", [], True
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.5)
    yield server
    server.shutdown()
    server.server_close()


def test_download(hub, tmp_path, capsys):
    """Resumed at the wrong byte; a 200 appended to what was there; a dropped connection taken for
    the end; a file that is not the one expected kept as if it were; waiting without an end."""
    hub.files["f"] = body = random.Random(0).randbytes(10_000)
    sha = hashlib.sha256(body).hexdigest()

    def get(name, *expected):
        prepare_data.download(dict(repo="a/b", rev="1"), "f", tmp_path / name, *expected)
        return (tmp_path / name).read_bytes()
    for mood in ["good", "no ranges", "short"]:
        for expected in [(10_000, sha), ()]:
            hub.mood, name = mood, f"{mood}{len(expected)}"
            (tmp_path / f"{name}.part").write_bytes(body[:1234])
            hub.log.clear()
            assert get(name, *expected) == body and hub.log[0].startswith("bytes=1234-")
    hub.mood = "good"
    assert get("first", 500) == body[:500]
    # another run has written on since: each byte has its own place
    (tmp_path / "two").write_bytes(body[:5000])
    address = f"{os.environ['HF_ENDPOINT']}datasets/a/b/resolve/1/f"
    prepare_data.fetch(address, tmp_path / "two", 1000, 9000)
    assert (tmp_path / "two").read_bytes() == body[:9000]
    for size, digest, why in [(10_000, "0" * 64, "deleted"), (10_001, sha, "expected 10001")]:
        assert why in refused(capsys, partial(lambda *a: get("bad", *a[:2]), size, digest))
        assert not (tmp_path / "bad").exists()
    hub.mood = "silent"
    with pytest.raises(prepare_data.Offline):
        get("silent", 10_000)


def test_tinystories(hub, tmp_path, monkeypatch, capsys):
    """A capped download that fetches all of it, or ends in half a story; a traceback without a
    network; python taken although something else was asked for."""
    story = f"Once upon a time there was a cat.\n{prepare_data.EOT}\n".encode()
    hub.files = dict(train=story * 400, valid=story.replace(b"cat", b"dog") * 20)
    monkeypatch.setitem(prepare_data.TINYSTORIES, "files", [
        (n, len(b), hashlib.sha256(b).hexdigest()) for n, b in hub.files.items()])
    argv = ["tinystories", "--data_dir", tmp_path, "--vocab_size", "270", "--max_mb"]
    for cap, n in (("0.005", 5000 // len(story)), ("0", 400)):
        prepare(*argv, cap)
        meta = prepare_data.load("tinystories", tmp_path)[0]
        assert meta["train"]["documents"] == n and meta["val"]["documents"] == 20
        assert "bytes=0-4999" in hub.log
    hub.files = {}
    argv = [*argv[:2], tmp_path / "other", *argv[3:], 1]
    assert "404" in refused(capsys, prepare_data.main, *argv)
    with pytest.raises(prepare_data.Offline):
        prepare_data.find("tinystories", "cuda", tmp_path / "new")
    monkeypatch.setitem(prepare_data.DEFAULT_MB, "python", 1)
    name, note = prepare_data.find("auto", "cuda", tmp_path / "new")
    assert name == "python" and "404" in note and note in capsys.readouterr().out


def test_gpt2_tokenizer(tmp_path):
    """Ids that are not GPT-2's, or no hash by which a checkpoint could tell."""
    url = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", "")
    if not cache or not os.path.exists(f"{cache}/{hashlib.sha1(url).hexdigest()}"):
        pytest.skip("TIKTOKEN_CACHE_DIR does not name a folder that holds GPT-2's ranks")
    (tmp_path / "t.txt").write_text("Hello world\n" * 50)
    prepare(tmp_path / "t.txt", "--data_dir", tmp_path, "--tokenizer", "gpt2")
    meta, train, _ = prepare_data.load("t", tmp_path)
    assert (meta["vocab_size"], meta["eot"]) == (50257, 50256) and list(train[:2]) == [15496, 995]
    assert len(meta["tokenizer"]["sha256"]) == 64


def test_mistakes_in_preparing(tmp_path, capsys, monkeypatch):
    """A traceback, or a message without the numbers, for what users get wrong; what is no plain
    text taken for it."""
    for name, raw in (("empty", b""), ("bad", b"abc\n" * 5 + b"\xff"), ("nul", b"a\0b"),
                      ("ok", CODE_TEXT.encode()), ("zip.txt", gzip.compress(b"text")),
                      ("utf16", "text".encode("utf-16")), ("pdf.txt", b"%PDF-1.7"),
                      ("a.jsonl", b'{"text": "a"}\n[]'), ("late", b"a\n" * 9000 + b"\xe2\x82"),
                      ("bom", b"\xef\xbb\xbf\xff"), ("half.jsonl", b'{"text": "\\ud800"}')):
        (tmp_path / name).write_bytes(raw)
    monkeypatch.setenv("HF_ENDPOINT", "somewhere")
    for message, argv in [
            ("python, tinystories", ["pyhton"]), ("empty", ["empty"]), ("is a folder", ["."]),
            ("byte 0xff at offset 20", ["bad"]), ("gzip", ["zip.txt"]), ("UTF-16", ["utf16"]),
            ("NUL", ["nul"]), ("a PDF", ["pdf.txt"]), ("line 2", ["a.jsonl"]),
            ("to 80", ["openwebtext", "--shards", 81]), ("257", ["--vocab_size", 256]),
            ("65535", ["--vocab_size", 65536]), ("--max_mb -1", ["--max_mb", -1]),
            ("invalid choice", ["--tokenizer", "gpt3"]), ("downloads", ["ok", "--name", "../x"]),
            ("somewhere", ["tinystories"]), ("0xe2 at offset 18,000", ["late"]),
            ("offset 3;", ["bom"]), ("line 1", ["half.jsonl"]), ("one at a time", ["python", "x"]),
            ("--name x", ["python", "--name", "x"]), ("regular", [os.devnull])]:
        if argv[0] in os.listdir(tmp_path) or argv[0] == ".":
            argv = [tmp_path / argv[0], *argv[1:]]
        assert message in refused(capsys, prepare_data.main, *argv, "--data_dir", tmp_path / "d")
    line = refused(capsys, prepare_data.main, "--max_mb", 1, "--data_dir", tmp_path / "ok")
    assert "ok" in line


def test_names_of_data_sets(tmp_path, capsys):
    """A name that nobody gave refused; one data set that silently replaces another."""
    for name, of in (("wiki.train.raw", "wiki_train"), ("two words.txt", "two_words"),
                     (".hidden", "hidden"), ("donn\u00e9es.txt", "donn\u00e9es"),
                     ("python.txt", "python_text"), ("b/hidden", None)):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / name).write_text(CODE_TEXT)
        argv = [tmp_path / name, "--data_dir", tmp_path / "d"]
        if of is None:
            assert "--name" in refused(capsys, prepare_data.main, *argv)
        else:
            prepare(*argv)
            prepare_data.load(of, tmp_path / "d")


def test_import_is_light():
    """`import prepare_data` in train.py that loads heavy modules, or prepares anything."""
    heavy = {"torch", "tiktoken", "tqdm", "regex", "pyarrow"}
    code = f"import sys, prepare_data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout.strip() == "set()"


# ---- what train.py sees of the data ----------------------------------------------------

def test_passes(corpus):
    """Passes in one order, a pass with a sequence twice, an order that more steps change; a
    step that needs more sequences than there are."""
    name, folder = corpus[1], corpus[3]
    short, long = (prepare_data.Data(name, folder, 1600, 30, steps, 5, 3200) for steps in (3, 9))
    n = short.sequences_per_pass
    assert n == (len(short.train) - 1) // 1600 and short.passes == 90 / n
    passes = long.order[:3 * n].reshape(3, n).tolist()
    assert all(sorted(one) == list(range(n)) for one in passes) and passes[0] != passes[1]
    assert long.order[:len(short.order)].tolist() == short.order.tolist()
    assert passes[0] == np.random.default_rng(5).permutation(n).tolist()
    x, y = long.batch(2)
    begin = long.order[63] * 1600
    assert (x[:, 1:] == y[:, :-1]).all() and (x[3] == long.train[begin:begin + 1600]).all()


def test_copyable_tokens(corpus):
    """Counts of n-grams, and with them the loss that shows in-context copying, on wrong tokens."""
    data = prepare_data.Data(corpus[1], corpus[3], 32, 4, 12, 0, 256)

    def whole(x, y):
        return [[*xs, ys[-1]] for xs, ys in zip(x.tolist(), y.tolist())]

    def grams(row, order):
        return [tuple(row[i:i + order]) for i in range(len(row) + 1 - order)]

    trained = whole(*data.sequences(data.train, data.order[:2] * data.T))
    for order in (2, 3):
        times = Counter(gram for row in trained for gram in grams(row, order))
        seen, copyable = data.count(2, order)
        none = [-1] * (order - 2)
        slow = [grams(row, order) for row in whole(data.val_x, data.val_y)]
        assert copyable.any()
        for row, in_row, can_copy in zip(slow, seen.tolist(), copyable.tolist(), strict=True):
            assert in_row == none + [times[gram] for gram in row]
            repeats = [times[gram] == 0 and gram in row[:t] for t, gram in enumerate(row)]
            assert can_copy == [False] * len(none) + repeats


def test_a_step_of_several_passes(corpus):
    """Fewer sequences than asked for, where one step needs more than a pass has."""
    data = prepare_data.Data(corpus[1], corpus[3], 3000, 40, 3, 0, 3000)
    assert data.sequences_per_pass < 30 and data.passes > 4
    for step in range(3):
        x, y = data.batch(step)
        starts = data.order[step * 40:step * 40 + 40] * 3000
        assert x.tolist() == [data.train[start:start + 3000].tolist() for start in starts]
    # a second pass adds no n-grams
    one, all_passes = (data.count(n, 2)[0] for n in (data.sequences_per_pass, 120))
    assert one.tolist() == all_passes.tolist()


# ---- the bench -------------------------------------------------------------------------

@pytest.fixture
def tiny_bench(monkeypatch):
    shape = {**bench_offload.CPU["shape"], "n_layer": 2, "n_embd": 16, "shared_hidden": 16,
             "vocab_size": 600}
    setup = {**bench_offload.CPU, "shape": shape, "prompts": (2, 32), "rows": (500, 2000),
             "full": (500, 1000, 2000)}
    monkeypatch.setattr(bench_offload, "CPU", setup)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)         # a second one may take 10 ms to wake up after a sleep
    yield bench_offload.Bench(setup, "cpu")
    torch.set_num_threads(threads)


def test_a_simulated_link_costs_what_is_predicted(tiny_bench):
    """A link that a prefetch does not hide, that a synchronous read hides, or that sleeps as long
    as it likes. The compute before the memory is a sleep here, so that it is known."""
    def make():
        return [tiny_bench.ids(2, 32)]

    tiny_bench.set_table(2000)
    tiny_bench.gbps = bench_offload.predict(tiny_bench, make(), 3)["bytes"] / 40e6     # 40 ms
    tiny_bench.set_table(2000)
    tiny_bench.model.blocks[0].register_forward_pre_hook(lambda *args: time.sleep(0.025))
    p = bench_offload.predict(tiny_bench, make(), 5)
    assert p["transfer_ms"] == pytest.approx(40, rel=0.05)
    assert 5 < p["exposed_ms"] == p["transfer_ms"] - p["before_ms"]
    times = bench_offload.measure_rounds(tiny_bench, bench_offload.time_prompts, 7, make)
    added = {arm: np.median(ms - times["resident"]) for arm, ms in times.items()}
    assert added["synchronous"] == pytest.approx(p["transfer_ms"], rel=0.2)
    assert added["prefetched"] == pytest.approx(p["exposed_ms"], abs=0.2 * p["transfer_ms"])


def test_every_page_of_a_bench_table_is_written(tiny_bench, tmp_path):
    """A gather from pages that were never written reads one page of zeros, and is fast."""
    for folder in (None, tmp_path):
        table = tiny_bench.engram(600_000, "cpu", folder).table
        assert len(table) >= 600_000 - 16 and table.abs().amax(1).min() > 0


def test_bench(tiny_bench, tmp_path, capsys):
    """The whole bench: an arm that is missing, a figure that is not in the file, a file or a thread
    that stays behind."""
    before = threading.active_count()
    argv = ["--full", "--disk", "--rounds", "6", "--out", str(tmp_path), "--device", "cpu"]
    bench_offload.main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["crossover.png", "lost.png",
                                                          "offload.json"]
    result = json.loads((tmp_path / "offload.json").read_text())
    arms = ["no Engram", "resident", "synchronous", "prefetched", "disk, prefetched"]
    whats = [table["what"].split(",")[0] for table in result["prompts"] + result["others"]]
    assert whats == ["prompts"] * 3 + ["decoding"] * 3 + ["a training step"]
    for table in result["prompts"] + result["others"]:
        assert list(table["arms"]) == arms[:4 + ("training" not in table["what"])]
        assert table["simulated_gbps"] > 0 and all(line in lines for line in table["lines"])
        for arm, figures in table["arms"].items():
            assert len(figures["ms"]) == 6 and figures["lost_percent"][0] < 100
            assert any(line.startswith(f"  {arm} ") and f"{figures['tokens_per_s'][0]:,.0f}" in line
                       for line in table["lines"])
    assert [p["block"] for p in result["crossover"]["points"]] == [0, 1]
    assert sum("SIMULATED" in line for line in lines) == 8
    assert lines[-5].startswith("Against a resident table") or "Against" in "".join(lines[-6:])
    gc.collect()
    assert threading.active_count() == before
    (tmp_path / "lost.png").unlink()
    bench_offload.main(["--plot", "--out", str(tmp_path)])
    assert (tmp_path / "lost.png").exists()
    for flag, value in (("--link_gbps", -1), ("--link_gbps", "nan"), ("--rounds", 1),
                        ("--rows", 3)):
        assert flag[2:] in refused(capsys, bench_offload.main, flag, value)
    assert "not enough memory" in refused(capsys, bench_offload.main, "--rows", 10 ** 12,
                                          "--out", tmp_path)


def test_the_committed_pictures_can_be_drawn(tmp_path):
    """A format of the figures that no longer fits those in the repository."""
    shutil.copy(HERE / "experiments" / "results" / "offload" / "offload.json", tmp_path)
    bench_offload.main(["--plot", "--out", str(tmp_path)])


def test_ctrl_c_in_the_bench(tmp_path):
    """A hang on the worker, a traceback, a file left behind."""
    out = tmp_path / "out"
    argv = ["--rows", "20000", "--disk", "--rounds", "5000", "--link_gbps", "0.1", "--out", out]
    with started("bench_offload.py", *argv) as bench:
        while not out.exists():
            assert bench.poll() is None
            time.sleep(0.05)
        time.sleep(2)
        bench.send_signal(signal.SIGINT)
        assert bench.communicate(timeout=30)[1].strip() == "stopped" and bench.returncode == 130
    assert not list(out.iterdir())


# ---- what stands in the README ---------------------------------------------------------

def test_the_readme():
    """A command that is not the one that is tested, code that is no longer so, sizes of files that
    have changed, more words than a person reads."""
    readme = (HERE / "README.md").read_text()
    assert readme.count("\n") <= 200 and len(readme.encode()) <= 14_336
    assert "pip install -r requirements.txt && python train.py" in readme
    assert "pip install -r requirements.txt && python -m pytest" in readme
    assert inspect.getsource(Block.forward) in readme
    lengths = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M))
    assert lengths.keys() == {path.name for path in HERE.glob("*.py")}
    for name, n in lengths.items():                        # near enough while you try things
        assert int(n) == pytest.approx((HERE / name).read_text().count("\n"), rel=0.1)
    # the example output is that of the committed run
    printed = runs.compare(HERE / "experiments" / "results" / "seed0")
    assert not [line for line in printed if line.strip() and line not in readme]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
