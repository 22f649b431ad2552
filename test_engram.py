"""
Tests: every fast path against a slow and obvious one, the module against the official demo, the
scripts as a user runs them.

    python -m pytest                            # all, a few minutes on a CPU, no network
    python -m pytest -k "demo or hash"          # the memory alone

test_vectors.npz holds inputs, weights and outputs of the official demo (engram_demo_v1.py) for two
configurations, with the canonical ids of the inputs, so that GPT-2's tokenizer is not needed.
"""
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import gc
import hashlib
import http.server
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import analyze
import bench_offload
import engram as engram_module
import prepare_data
import sample as sample_script
import sweep
import train as train_script
from engram import (DEMO, PAPER_27B, V41, Engram, EngramConfig, Fetch, RowAdam, canonical_ids,
                    hash_multipliers, head_primes, lookup, mapped, normalise, pinned, place)
from model import GPT, Block, Cache, GPTConfig, attend, make_twins
from moe import MoE
from sample import load_checkpoint

HERE = Path(__file__).resolve().parent
VOCAB = 60
CANONICAL = np.arange(VOCAB) // 2                     # 30 canonical ids; end of text is 29


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_engram(**changes):
    shape = dict(blocks=(0, 2), orders=(2, 3), heads=2, rows=97, width=4)
    return EngramConfig(**{**shape, **changes})


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
    """call(argv) must end in exit code 2 with one line on stderr, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call([str(a) for a in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "error: " in lines[-1] and "Traceback" not in "".join(lines)
    return lines[-1]


# ---- the memory against the official demo -------------------------------------------------------

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
    get = lambda key: torch.from_numpy(vectors[f"{name}/{block}/{key}"])
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
    with torch.device("meta"):                         # 384 million rows: not allocated
        module = Engram(cfg, 1, 32, n_canonical=99092, pad=2)
    assert module.table.shape == (384006168, 256)
    module.multipliers = torch.from_numpy(multipliers)
    module.primes = torch.tensor(primes[1])
    module.offsets = torch.zeros_like(module.primes)
    last = module.hash(torch.tensor([[5, 10, 20, 30, 40]]))[0, -1].view(3, 8)[:, :2]
    assert last.tolist() == [[1326936, 6120872], [14088109, 7705371], [14966984, 15521295]]


@pytest.mark.parametrize("named", [DEMO, PAPER_27B, V41])
def test_named_sets_build(named):
    """A named set with a misspelt field."""
    cfg = EngramConfig(**named)
    assert len(cfg.rows) == len(cfg.orders) and set(head_primes(cfg)) == set(cfg.blocks)


# ---- the memory against slow oracles ------------------------------------------------------------

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
    module = Engram(tiny_engram(orders=orders, stop_at_eot=stop), 2, 8, n_canonical=30, pad=29)
    x = torch.randint(0, 30, (3, 40))
    x[0, 5] = x[0, 6] = x[1, 0] = x[1, 39] = 29
    assert module.hash(x).tolist() == [slow_rows(module, ids, stop) for ids in x.tolist()]


@pytest.mark.parametrize("stop", [False, True])
def test_hash_continues_from_history(stop):
    """Decoding that hashes one token at a time without its past reads other rows."""
    module = Engram(tiny_engram(orders=(2, 4), stop_at_eot=stop), 2, 8, n_canonical=30, pad=29)
    x = torch.randint(0, 30, (2, 20))
    x[0, 9] = 29
    past = torch.cat([torch.full((2, 3), 29), x], 1)
    pieces = [module.hash(x[:, t:t + 1], past[:, t:t + 3]) for t in range(20)]
    assert torch.equal(torch.cat(pieces, 1), module.hash(x))


def test_canonical_ids():
    """Merging what is not text, or losing a token that normalises to nothing."""
    pieces = [b"The", b" the", b"\xc3\xa9", b"e", b"\xc3", b"\xa9", b" ", b"\n\n", b"\xcc\x81",
              b"\xef\xbf\xbd", "\ufb01".encode(), b"fi", b"<|endoftext|>"]
    assert canonical_ids(pieces).tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8]
    assert canonical_ids(pieces, compress=False).tolist() == list(range(13))
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
    module = Engram(tiny_engram(heads=4, rows=5), 0, 8, n_canonical=30, pad=29)
    rows = module.hash(torch.randint(0, 30, (2, 50)))
    read = module.read(rows)
    plain = module.table.clone().requires_grad_()
    e = plain[rows].flatten(2)
    assert torch.equal(lookup(read), e)
    weight = torch.randn_like(e)
    (lookup(read) * weight).sum().backward()
    (e * weight).sum().backward()
    torch.testing.assert_close(read.leaf.grad, plain.grad[read.rows])
    assert plain.grad.count_nonzero(1).bool().sum() == len(read.rows) < rows.numel()


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
        for r, g in zip(rows.tolist(), leaf.grad):
            oracle[r].grad, adams[r].param_groups[0]["lr"] = g.clone(), lr
            adams[r].step()
        mine.step([engram_module.Read(rows, leaf, None)], lr)
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
    module = Engram(tiny_engram(orders=(2, 3)), 0, 8, n_canonical=30, pad=29)
    torch.nn.init.normal_(module.conv)
    x = torch.randn(2, 30, 8)
    slow = F.conv1d(F.pad(x.transpose(1, 2), (9, 0)), module.conv.T[:, None], groups=8, dilation=3)
    torch.testing.assert_close(module.short_conv(x), slow.transpose(1, 2))


@pytest.mark.parametrize("gate", ["plain", "off"])
def test_other_gates(gate):
    """A switch that changes nothing, or takes a misspelt name for plain."""
    with pytest.raises(ValueError, match="sqrt, plain or off"):
        tiny_engram(gate=gate + "x")
    module = Engram(tiny_engram(gate=gate, conv_kernel=0), 0, 8, n_canonical=30, pad=29)
    h, read = torch.randn(1, 9, 8), module.read(module.hash(torch.randint(0, 30, (1, 9))))
    e, alpha = lookup(read), 1
    if gate == "plain":
        dot = (F.rms_norm(module.key(e), (8,)) * F.rms_norm(h, (8,))).sum(-1, keepdim=True)
        alpha = torch.sigmoid(dot / math.sqrt(8))
    torch.testing.assert_close(module(h, read), alpha * module.value(e))


# ---- experts ------------------------------------------------------------------------------------

def slow_moe(moe, x):
    """Every expert on every token, weighted by what the router says, most weights being zero."""
    flat = x.reshape(-1, x.size(-1))
    affinity = torch.sigmoid(flat @ moe.router.weight.T)
    out = moe.shared(flat)
    for s in range(len(flat)):
        chosen = sorted(range(moe.n_expert), key=lambda i: -(affinity[s, i] + moe.bias[i]).item())
        total = sum(affinity[s, i] for i in chosen[:moe.top_k])
        for i in chosen[:moe.top_k]:
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
        fast, slow = moe(x)[0], slow_moe(moe, x)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad((y * x).sum(), list(moe.parameters())) for y in (fast, slow)]
        for a, b in zip(*grads):
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
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            chosen, weight, counts, _ = moe.route(flat)
            fast = moe.experts(flat, chosen, weight, counts, grouped).view_as(x)
        assert counts[3] == 0
        torch.testing.assert_close(fast.float(), slow, rtol=near, atol=near)
        for a, b in zip(torch.autograd.grad((fast * x).sum(), weights), grads):
            torch.testing.assert_close(a, b, rtol=near, atol=near * b.abs().max().item())


def test_moe_is_causal_and_independent_of_the_batch():
    """A capacity limit, or balancing within the batch: later tokens then change earlier ones."""
    moe, x = tiny_moe(), torch.randn(4, 9, 16, dtype=torch.float64)
    other = x.clone()
    other[0, 5:], other[1:] = torch.randn(4, 16), torch.randn(3, 9, 16)
    same = lambda y: y[0, :5]
    torch.testing.assert_close(same(moe(x)[0]), same(moe(other)[0]), rtol=0, atol=1e-12)
    chosen = [moe.route(y.reshape(-1, 16))[0].view(4, 9, 2) for y in (x, other)]
    assert torch.equal(same(chosen[0]), same(chosen[1]))


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


# ---- the model ----------------------------------------------------------------------------------

@pytest.mark.parametrize("chunks", [[1] * 20, [1, 1, 18], [7, 1, 5, 1, 6], [20], [2, 18]])
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
    acc = model.accounting()
    assert sum(kinds.values()) == sum(p.numel() for p in model.parameters())
    assert acc["P_tot"] == acc["P_act"] and acc["P_sparse"] == 0


@pytest.mark.parametrize("rho", [0, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("changes", [{}, dict(engram=EngramConfig(blocks=(0, 2), width=8)),
                                     dict(engram=EngramConfig(orders=(1,), conv_kernel=0))])
def test_twins_agree(rho, changes):
    """An unfair comparison: other totals, other active parameters, a twin with less compute."""
    shape = dict(n_embd=192, n_head=3, n_expert=24, expert_hidden=96, shared_hidden=192)
    shapes, _ = make_twins(GPTConfig(**shape, **changes), rho)
    models = {name: GPT(shape, np.arange(4096)) for name, shape in shapes.items()}
    a, b = (models[name].accounting() for name in ("engram", "moe"))
    assert abs(a["P_tot"] / b["P_tot"] - 1) < 0.005 and abs(a["P_act"] / b["P_act"] - 1) < 0.005
    assert a["flops_per_token"] <= b["flops_per_token"] and a["P_act"] <= b["P_act"]
    assert a["P_tot"] == sum(p.numel() for p in models["engram"].parameters()) - 4096 * 192 \
        + sum(e.table.numel() for e in models["engram"].engrams())
    assert b["P_sparse"] == 4 * (24 - 2) * 3 * 192 * 96


@pytest.mark.parametrize("name", ["engram", "moe"])
def test_flops_per_token(name):
    """A FLOP count that misses a matmul, or counts a table that is not multiplied."""
    shape = make_twins(GPTConfig(), 0.75)[0][name]
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
        (model(x[i], x[i], [r.micro(i) for r in parts])[1] / 2).backward()
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a.leaf.grad, b.leaf.grad)


# ---- preparing data -----------------------------------------------------------------------------

CODE_TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i}  # ä€ it's\n\n" for i in range(60))


@pytest.fixture
def prepared(tmp_path):
    """A prepared data set of 40 documents."""
    docs = [f"document {i}\n{CODE_TEXT[i * 20:i * 20 + 400]}\n" for i in range(40)]
    (tmp_path / "mine.txt").write_text(f"{prepare_data.EOT}\n".join(docs), encoding="utf-8")
    argv = [str(tmp_path / "mine.txt"), "--data_dir", str(tmp_path / "d"), "--vocab_size", "300"]
    prepare_data.main(argv)
    return docs, tmp_path / "d", argv


def naive_bpe(texts, n_merges):
    """The definition: count all pairs anew before each merge."""
    import regex
    words = Counter(w for t in texts for w in regex.findall(prepare_data.PATTERN, t))
    words = [([bytes([b]) for b in w.encode()], n) for w, n in words.items()]
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
    tok = json.loads(json.dumps(prepare_data.make_tokenizer("bpe", texts, 407)))
    enc, of_id = prepare_data.encoding(tok), prepare_data.token_bytes(tok)
    assert of_id == tokens + [prepare_data.EOT.encode()] and enc.n_vocab == 407
    for raw, word in words.items():
        assert [of_id[i] for i in enc.encode_ordinary(raw.decode())] == word
    for text in ["\x00\ud7ff\U0001f600 e\u0301\r\n\t", prepare_data.EOT, *map(chr, range(1, 3000))]:
        assert enc.decode_bytes(enc.encode_ordinary(text)) == text.encode()
    with pytest.raises(ValueError, match="sha256"):  # two tokens swapped: all text would change
        prepare_data.encoding(dict(tok, tokens=tok["tokens"][1::-1] + tok["tokens"][2:]))


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
    assert found == docs and meta["val"]["documents"] == 2  # the last 5 % of 40


def test_a_small_text_without_documents(tmp_path):
    """A vocabulary recorded as asked for, with rows that no token has; no validation."""
    (tmp_path / "t.txt").write_text("some few words\n" * 30)
    prepare_data.main([str(tmp_path / "t.txt"), "--data_dir", str(tmp_path)])
    meta, train, _ = prepare_data.load("t", tmp_path)
    assert 257 < meta["vocab_size"] < 300 and meta["eot"] == meta["vocab_size"] - 1 == train.max()
    assert 0.02 < meta["val"]["bytes"] / 450 < 0.1


def test_read_text(tmp_path):
    """A piece cut within a character or a separator; a broken last document taken for a whole."""
    docs, eot = ["\u20ac" * 50 + "\n" + CODE_TEXT[:700], "short", CODE_TEXT * 3], prepare_data.EOT
    (tmp_path / "t").write_text(f"\n{eot}\n".join(docs), encoding="utf-8")
    for chunk in (1, 100, 1000, 1 << 20):
        got = "".join(t + eot * ends for t, ends in prepare_data.read_text(tmp_path / "t", chunk))
        assert got == f"\n{eot}".join(docs) + eot
    begun = [doc + "\n" for doc in docs[:2]]
    assert [t for t, _ in prepare_data.read_text(tmp_path / "t", whole=False)] == begun
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes() + "\u20ac".encode()[:2])
    assert [t for t, _ in prepare_data.read_text(tmp_path / "t", whole=False)] == begun


def test_python_corpus(tmp_path, capsys):
    """A cap passed or filled by one package; an order or a tokenizer that differs from run to run;
    a second run that does it all again."""
    argv = ["--data_dir", str(tmp_path), "--max_mb", "2", "--vocab_size", "512"]
    prepare_data.main(argv)
    meta, train, _ = prepare_data.load("python", tmp_path)
    size = meta["train"]["bytes"] + meta["val"]["bytes"]
    assert 1e6 < size <= 2e6 and 0.01 < meta["val"]["bytes"] / size < 0.12
    assert meta["val_13grams_in_train"] < 0.2 and train.max() < 512
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "python").iterdir()}
    assert sorted(before) == ["meta.json", "train.bin", "val.bin"]
    prepare_data.main(argv)
    assert before == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "python").iterdir()}
    prepare_data.main(["--data_dir", str(tmp_path / "again"), *argv[2:]])
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
        train, val = ({p.rpartition("/")[0] for s, p in chosen if s == split} for split in (0, 1))
        assert not train & val and {folder[:3] for folder in val} == {"big", "sma"}


def test_seen_share():
    """The 13-gram share of a hash that collides, of a chunk's edge, of no overlap at all."""
    train, val = np.random.default_rng(1).integers(0, 4096, (2, 1_100_000)).astype("<u2")
    val = val[:1000]
    assert prepare_data.seen_share(train, val) == 0
    val[100:313] = train[(1 << 20) - 100:(1 << 20) + 113]  # across the border of two chunks
    assert prepare_data.seen_share(train, val) == pytest.approx(201 / 988)


def test_a_killed_run_leaves_nothing_that_loads(prepared, monkeypatch, capsys):
    """Half a train.bin that looks finished; the old data set gone before the new one is whole."""
    _, data_dir, argv = prepared
    before = prepare_data.load("mine", data_dir)[0]

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare_data, "seen_share", killed)
    for name in ("mine", "new"):
        with pytest.raises(KeyboardInterrupt):
            prepare_data.main([*argv[:-1], "290", "--name", name])
    assert prepare_data.load("mine", data_dir)[0] == before
    with pytest.raises(SystemExit):
        prepare_data.load("new", data_dir)
    assert "run: python prepare_data.py" in capsys.readouterr().err


@pytest.mark.parametrize("file, change, message", [
    ("train.bin", lambda b: b[:-2], "meta.json says"), ("val.bin", lambda b: b[::-1], "sha256"),
    ("meta.json", lambda b: b[:99], "damaged"), ("meta.json", lambda b: b"[]", "damaged"),
    ("meta.json", lambda b: b.replace(b'"eot": ', b'"eot": 1'), "damaged"),
    ("meta.json", lambda b: b.replace(b'"pattern": "', b'"pattern": "x'), "tokenizer's sha256")])
def test_load_refuses(prepared, capsys, file, change, message):
    """Training on a truncated file (SIGBUS), on another's ids, or a traceback from json."""
    path = prepared[1] / "mine" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SystemExit):
        prepare_data.load("mine", prepared[1])
    assert message in capsys.readouterr().err
    prepare_data.main(prepared[2])  # the remedy that it names works
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
        assert not (tmp_path / f"{name}.part").exists()
        return (tmp_path / name).read_bytes()
    for mood in ["good", "no ranges", "short"]:
        for expected in [(10_000, sha), ()]:
            hub.mood, name = mood, f"{mood}{len(expected)}"
            (tmp_path / f"{name}.part").write_bytes(body[:1234])
            hub.log.clear()
            assert get(name, *expected) == body and hub.log[0].startswith("bytes=1234-")
            assert mood != "short" or hub.log[1].startswith("bytes=4234-")
    hub.mood = "good"
    assert get("first", 500) == body[:500]
    for size, digest, why in [(10_000, "0" * 64, "deleted"), (10_001, sha, "expected 10001")]:
        with pytest.raises(SystemExit):
            get("bad", size, digest)
        assert why in capsys.readouterr().err and not (tmp_path / "bad").exists()
    hub.mood, start = "silent", time.time()
    with pytest.raises(prepare_data.Offline):
        get("silent", 10_000)
    assert time.time() - start < 2


def test_tinystories(hub, tmp_path, monkeypatch, capsys):
    """A capped download that fetches all of it, or ends in half a story; a traceback without a
    network."""
    story = f"Once upon a time there was a cat.\n{prepare_data.EOT}\n".encode()
    hub.files = dict(train=story * 400, valid=story.replace(b"cat", b"dog") * 20)
    monkeypatch.setitem(prepare_data.TINYSTORIES, "files", [
        (n, len(b), hashlib.sha256(b).hexdigest()) for n, b in hub.files.items()])
    argv = ["tinystories", "--data_dir", str(tmp_path), "--vocab_size", "270", "--max_mb"]
    for cap, n in (("0.005", 5000 // len(story)), ("0", 400)):
        prepare_data.main([*argv, cap])
        meta = prepare_data.load("tinystories", tmp_path)[0]
        assert meta["train"]["documents"] == n and meta["val"]["documents"] == 20
        assert "bytes=0-4999" in hub.log
    hub.files = {}
    argv = [*argv[:2], tmp_path / "other", *argv[3:], 1]
    assert "404" in refused(capsys, prepare_data.main, *argv)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "check the network" in refused(capsys, prepare_data.main, *argv)


def test_gpt2_tokenizer(tmp_path):
    """Ids that are not GPT-2's, or no hash by which a checkpoint could tell."""
    url = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", "")
    if not cache or not os.path.exists(f"{cache}/{hashlib.sha1(url).hexdigest()}"):
        pytest.skip("TIKTOKEN_CACHE_DIR does not name a folder that holds GPT-2's ranks")
    (tmp_path / "t.txt").write_text("Hello world\n" * 50)
    prepare_data.main([str(tmp_path / "t.txt"), "--data_dir", str(tmp_path), "--tokenizer", "gpt2"])
    meta, train, _ = prepare_data.load("t", tmp_path)
    assert (meta["vocab_size"], meta["eot"]) == (50257, 50256) and list(train[:2]) == [15496, 995]
    assert prepare_data.token_bytes(meta["tokenizer"])[995] == b" world"
    assert len(meta["tokenizer"]["sha256"]) == 64


def test_mistakes_in_preparing(tmp_path, capsys, monkeypatch):
    """A traceback, or a message without the numbers, for what users get wrong."""
    for name, raw in [("empty", b""), ("bad", b"abc\n" * 5 + b"\xff"), ("ok", CODE_TEXT.encode())]:
        (tmp_path / f"{name}.txt").write_bytes(raw)
    monkeypatch.setenv("HF_ENDPOINT", "somewhere")
    for message, argv in [
            ("python, tinystories", ["pyhton"]), ("empty", [tmp_path / "empty.txt"]),
            ("byte 0xff at offset 20", [tmp_path / "bad.txt"]),
            ("to 80", ["openwebtext", "--shards", 81]),
            ("257", ["--vocab_size", 256]), ("65535", ["--vocab_size", 65536]),
            ("--max_mb -1", ["--max_mb", -1]), ("bpe or gpt2", ["--tokenizer", "gpt3"]),
            ("text files", ["--name", "x"]), ("downloads", [tmp_path / "ok.txt", "--name", "../x"]),
            ("somewhere", ["tinystories"])]:
        assert message in refused(capsys, prepare_data.main, *argv, "--data_dir", tmp_path / "d")
    argv = ["--max_mb", 1, "--data_dir", tmp_path / "ok.txt"]
    assert "ok.txt" in refused(capsys, prepare_data.main, *argv)


def test_import_is_light():
    """`import prepare_data` in train.py that loads heavy modules, or prepares anything."""
    heavy = {"torch", "tiktoken", "tqdm", "regex", "pyarrow"}
    code = f"import sys, prepare_data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout.strip() == "set()"


# ---- the scripts, as a user runs them -----------------------------------------------------------

TINY = ("--n_embd 16 --n_head 2 --block_size 32 --n_layer 2 --n_expert 4 --expert_hidden 8 "
        "--shared_hidden 8 --engram_heads 2 --engram_width 4 --tokens_per_step 128 --batch_size 2 "
        "--steps 12 --eval_every 4 --eval_tokens 256 --dtype float32 --rho 0.5").split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A prepared data set "mine" of a few thousand tokens -> the flags that name it."""
    folder = tmp_path_factory.mktemp("data")
    words = np.random.default_rng(0).zipf(1.4, 30000).clip(max=500)
    text = " ".join(f"w{w}" + ("." if w % 7 == 0 else "") for w in words)
    (folder / "mine.txt").write_text("\n".join(text[i:i + 80] for i in range(0, len(text), 80)))
    prepare_data.prepare("mine", [folder / "mine.txt"], data_dir=folder, vocab_size=400)
    return ["--dataset", "mine", "--data_dir", str(folder)]


def run(*argv):
    train_script.main([str(a) for a in argv])


def log(out, name="engram"):
    return [json.loads(line) for line in open(Path(out) / name / "log.jsonl")]


def same_curve(a, b):
    return [(r["step"], r["val_loss"], r["train_loss"]) for r in a[1:]] == \
           [(r["step"], r["val_loss"], r["train_loss"]) for r in b[1:]]


def test_train_both_and_sample(corpus, tmp_path, capsys):
    """The whole way: two twins, logs, checkpoints, table, picture, and text from either model."""
    run(*corpus, *TINY, "--out_dir", tmp_path)
    printed = capsys.readouterr().out
    assert "engram passed the twin" in printed or "did not reach" in printed
    (header, *records), (other, *_) = log(tmp_path), log(tmp_path, "moe")
    assert [r["step"] for r in records] == [4, 8, 12] and header["config"]["seed"] == 0
    assert abs(header["accounting"]["P_tot"] / other["accounting"]["P_tot"] - 1) < 0.005
    assert records[-1]["val_loss"] < records[0]["val_loss"] < math.log(400) + 0.1
    assert 0 < records[-1]["gate_mean"][0] < 1 and 0 < records[-1]["rows_touched"][0] <= 1
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    texts = []
    for model in ("engram", "moe", "engram"):
        sample_script.main(f"--out_dir {tmp_path} --model {model} --prompt w1 --seed 3".split())
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2] != texts[1] and texts[0].startswith("w1")
    sample_script.main(["--out_dir", str(tmp_path), "--compare"])
    assert capsys.readouterr().out.strip() in printed
    argv = ["--out_dir", tmp_path, "--prompt", "w1 " * 40]
    assert "shorten it" in refused(capsys, sample_script.main, *argv)


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
    assert same_curve(log(tmp_path / "a"), log(tmp_path / "b"))
    assert len(log(tmp_path / "a")[0]["resumed"]) == 1


@pytest.mark.parametrize("flags", ["--engram_gate off --engram_conv_kernel 0", "--engram_orders 1",
                                   "--engram_stop_at_eot --no-engram_bias --engram_gate plain",
                                   "--no-engram_compress --engram_blocks 0 1 --n_expert 6",
                                   "--model dense", "--balance_loss 0.01"])
def test_variants_train(corpus, tmp_path, flags):
    """A variant with a parameter that no gradient reaches, or that a twin cannot pay for."""
    run(*corpus, *TINY, "--steps", 4, "--rho", "0.3", "--out_dir", tmp_path, *flags.split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
def test_train_on_a_gpu(corpus, tmp_path):
    """A tensor left on the CPU, a state that resumes on the wrong device."""
    argv = [*corpus, *TINY, "--preset", "laptop", "--device", "cuda", "--dtype", "bfloat16"]
    run(*argv, "--out_dir", tmp_path)
    run(*argv, "--out_dir", tmp_path, "--resume")
    assert log(tmp_path)[-1]["val_loss"] < math.log(400)


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


def test_a_full_disk_keeps_the_last_checkpoint(corpus, tmp_path, capsys):
    """A traceback, or half a checkpoint in place of the last whole one."""
    argv = [*corpus, *TINY, "--model", "moe", "--out_dir", tmp_path]
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "ckpt.pt.part").symlink_to("/dev/full")
    assert "could not be written" in refused(capsys, train_script.main, *argv)
    assert not (tmp_path / "moe" / "ckpt.pt").exists()


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path):
    """torch's writer turns it into a RuntimeError: a stop reported as a full disk."""
    def write(file):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos")

    with pytest.raises(KeyboardInterrupt):
        prepare_data.write_whole(tmp_path / "a", write)
    assert not (tmp_path / "a").exists()


def test_checkpoints_that_do_not_fit_are_refused(corpus, tmp_path, capsys):
    """Resuming with other flags, another tokenizer, half a file or no file."""
    argv = [*corpus, *TINY, "--model", "moe", "--out_dir", tmp_path]
    main, path = train_script.main, tmp_path / "moe" / "ckpt.pt"
    assert "nothing to resume" in refused(capsys, main, *argv, "--resume")
    run(*argv)
    assert "--resume" in refused(capsys, main, *argv)
    assert "n_embd 16 there, 32 here" in refused(capsys, main, *argv, "--resume", "--n_embd", 32)
    whole = path.read_bytes()
    saved = load_checkpoint(path)[0]
    saved["run"]["tokenizer"] = "0" * 64
    torch.save(saved, path)
    assert "tokenizer '000" in refused(capsys, main, *argv, "--resume")
    torch.save({}, tmp_path / "empty")
    empty = (tmp_path / "empty").read_bytes()
    for broken in (whole[:len(whole) // 2], b"", b"not a checkpoint", empty):
        path.write_bytes(broken)
        assert "not a readable checkpoint" in refused(capsys, main, *argv, "--resume")
    argv = ["--out_dir", tmp_path / "none"]
    assert "no checkpoint" in refused(capsys, sample_script.main, *argv)
    assert "no log" in refused(capsys, sample_script.main, *argv, "--compare")


@pytest.mark.parametrize("argv, part", [
    ("--no_such_flag 1", "unrecognized arguments"), ("--steps many", "invalid int"),
    ("--steps 0", "steps 0"), ("--lr nan", "lr nan"), ("--model gpt", "invalid choice"),
    ("--n_head 3", "multiple of 2 * n_head"), ("--batch_size 3", "not a multiple"),
    ("--engram_blocks 7", "blocks 0 to 1"), ("--engram_orders 3 2", "increasing"),
    ("--rho 1", "below 1"), ("--rho 0.9", "leaves no row"), ("--top_k 9", "at most n_expert"),
    ("--device cuda:77", "try cpu"), ("--device meta", "try cpu"), ("--block_size 1", "from 2 to"),
    ("--n_layer 99999", "to 65,536"), ("--engram_heads 99999", "to 10,000"),
    ("--dataset nothing", "not prepared"), ("--block_size 50000 "
     "--tokens_per_step 100000", "too few"), ("--n_expert 0", "need experts")])
def test_usual_mistakes(corpus, tmp_path, capsys, argv, part):
    """A traceback, or a run that ignores what was asked."""
    given = [*corpus, *TINY, "--out_dir", tmp_path / "out", *argv.split()]
    assert part in refused(capsys, train_script.main, *given)


def test_truncated_and_foreign_data_are_refused(corpus, tmp_path, capsys):
    """Training on half a file, or on another vocabulary's ids."""
    folder = tmp_path / "mine"
    shutil.copytree(Path(corpus[-1]) / "mine", folder)
    argv = ["--dataset", "mine", "--data_dir", tmp_path, *TINY, "--out_dir", tmp_path / "out"]
    whole = (folder / "train.bin").read_bytes()
    for bad, part in ((whole[:-2], "bytes"), (whole[:-2] + b"\0\0", "sha256")):
        (folder / "train.bin").write_bytes(bad)
        assert part in refused(capsys, train_script.main, *argv)


def test_no_network_falls_back_and_says_so(monkeypatch, tmp_path, capsys):
    """A GPU user behind a firewall: python is used only if nothing else was asked for."""
    prepared = []

    def prepare(name, data_dir):
        prepared.append(name)
        if name != "python":
            raise prepare_data.Offline("the hub does not answer")

    monkeypatch.setattr(prepare_data, "prepare", prepare)
    name, note = prepare_data.find("auto", "tinystories", tmp_path)
    assert name == "python" and prepared == ["tinystories", "python"]
    assert note and note in capsys.readouterr().out
    with pytest.raises(prepare_data.Offline):
        prepare_data.find("openwebtext", "python", tmp_path)


def test_steps_are_capped_at_one_pass(corpus, tmp_path, capsys):
    """A table trained on the same text twice, without a word."""
    argv = [*corpus, *TINY, "--steps", 9999, "--batch_size", 100, "--tokens_per_step", 3200]
    run(*argv, "--model", "moe", "--out_dir", tmp_path)
    steps = len(prepare_data.load("mine", corpus[-1])[1]) // 32 // 100
    assert f"steps 9999 capped at {steps}" in capsys.readouterr().out
    assert log(tmp_path, "moe")[-1]["step"] == steps


def test_copyable_tokens(corpus):
    """Counts of n-grams, and with them the loss that shows in-context copying, on wrong tokens."""
    cfg, shape = train_script.parse([*corpus, *TINY])
    data = prepare_data.Data(cfg, shape.block_size)
    whole = lambda x, y: [[*xs, ys[-1]] for xs, ys in zip(x.tolist(), y.tolist())]
    trained = whole(*data.sequences(data.train, data.order[:2] * data.T))
    for order in (2, 3):
        grams = lambda row: [tuple(row[i:i + order]) for i in range(len(row) + 1 - order)]
        times = Counter(gram for row in trained for gram in grams(row))
        seen, copyable = data.count(2, order)
        none = [-1] * (order - 2)
        slow = [grams(row) for row in whole(data.val_x, data.val_y)]
        assert seen.tolist() == [none + [times[gram] for gram in row] for row in slow]
        assert copyable.any() and copyable.tolist() == [
            [False for _ in none] + [times[g] == 0 and g in row[:t] for t, g in enumerate(row)]
            for row in slow]


def test_crossing():
    """A share of the tokens that is off by an evaluation."""
    curve = ((10, 5), (20, 3), (30, 2))
    records = [{"tokens": t, "seconds": t / 10, "val_loss": v} for t, v in curve]
    assert sample_script.crossing(records, 4) == (15, 1.5)
    assert sample_script.crossing(records, 6) == (10, 1) and not sample_script.crossing(records, 1)


# ---- looking at what was trained ----------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Two tiny twins in one out_dir; the memory made loud, so that it shows."""
    out = tmp_path_factory.mktemp("out")
    run(*corpus, *TINY, "--out_dir", out)
    saved = load_checkpoint(out / "engram" / "ckpt.pt")[0]
    saved["model"]["blocks.1.engram.value.weight"] *= 30
    torch.save(saved, out / "engram" / "ckpt.pt")
    return out


def look(capsys, out, *argv):
    sample_script.main(["--out_dir", str(out), *map(str, argv)])
    return capsys.readouterr()


def test_sampling(trained, capsys):
    """Flags that change nothing, samples that cannot be repeated one by one."""
    texts = {}
    for flags in ("", "--seed 1", "--num_samples 2", "--temperature 0", "--top_k 1", "--top_p 1e-6",
                  "--max_new_tokens 5", "--max_new_tokens 99"):
        printed = look(capsys, trained, "--prompt", "w1 w2", *flags.split())
        texts[flags] = printed.out
        assert "tokens/s; stopped: " in printed.err
    assert "context of 32 tokens is full" in printed.err
    assert texts[""] != texts["--seed 1"]
    assert texts["--num_samples 2"] == texts[""] + "-" * 20 + "\n" + texts["--seed 1"]
    assert texts["--temperature 0"] == texts["--top_k 1"] == texts["--top_p 1e-6"] != texts[""]
    assert texts[""].startswith(texts["--max_new_tokens 5"][:-1])


def test_top_p_keeps_the_nucleus():
    """The token that crosses the threshold dropped, or all of them."""
    class Fixed(torch.nn.Module):                      # logits that do not depend on the text
        cfg, read = GPTConfig(block_size=5000, engram=None), lambda self, idx, cache: []

        def forward(self, idx, reads, cache):
            return torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None, None], None, None

    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        tokens = list(sample_script.generate(Fixed(), torch.zeros(1, 1, dtype=torch.long), 400,
                                             temperature=1.0, top_p=top_p))
        assert set(tokens) == kept
        share = 0.5 / sum((0.5, 0.3, 0.15, 0.05)[i] for i in kept)
        assert tokens.count(0) / 400 == pytest.approx(share, abs=0.1)


def test_text_is_streamed_in_whole_characters(monkeypatch):
    """Half an emoji on the terminal, or an end of text that goes on."""
    enc = prepare_data.encoding(prepare_data.make_tokenizer("bpe", ["ab ab ab"], 259))
    raw = "h\u00e9\U0001f600!".encode()
    ids = [enc.encode_single_token(bytes([b])) for b in raw] + [enc.eot_token, 65]
    monkeypatch.setattr(sample_script, "generate", lambda *a, **k: iter(ids))
    pairs = list(sample_script.complete(tiny_gpt(), enc, [enc.eot_token]))
    assert [text for _, text in pairs] == ["h", "", "\u00e9", "", "", "", "\U0001f600", "!", ""]
    assert pairs[-1][0] == enc.eot_token


def test_decoding_with_a_cache_is_five_times_as_fast():
    """A cache that computes everything again. At the gpu preset's width and context of 512."""
    shape = GPTConfig(block_size=512, n_layer=2, n_embd=512, n_head=8, expert_hidden=256,
                      shared_hidden=512)
    model = GPT(make_twins(shape, 0.75)[0]["engram"], np.arange(4096)).eval()
    idx = torch.randint(0, 4096, (1, 512))
    began = time.perf_counter()
    assert len(list(sample_script.generate(model, idx[:, :1], 511))) == 511
    cached, slow = time.perf_counter() - began, 0.0
    with torch.inference_mode():
        for n in range(16, 512, 32):                   # every 32nd length of the 511
            began = time.perf_counter()
            model(idx[:, :n])
            slow += 32 * (time.perf_counter() - began)
    assert slow > 5 * cached, f"{slow:.1f} s without, {cached:.1f} s with a cache"


def test_nats_saved_are_a_difference_of_two_losses(trained, capsys):
    """A sign turned round, or a value beside the wrong token."""
    saved, model = load_checkpoint(trained / "engram" / "ckpt.pt")
    enc = prepare_data.encoding(saved["tokenizer"])
    printed = look(capsys, trained, "--prompt", "w1 w3 w1", "--max_new_tokens", 8, "--memory").out
    again = printed.partition("\n")[2]
    ids = [enc.eot_token] + enc.encode_ordinary("w1 w3 w1")
    ids += [i for i, _ in sample_script.complete(model, enc, ids, max_new_tokens=8)]
    with torch.no_grad():
        on, off = ([-model(torch.tensor([ids[:i]]), reads=reads)[0][0, -1].log_softmax(-1)[ids[i]]
                    for i in range(1, len(ids))] for reads in (None, []))
    gains = [f"{b - a:+.2f}" for a, b in zip(on, off)]
    shown = "".join(f"{enc.decode([i])}[{g}]" for i, g in zip(ids[1:], gains))
    assert again.startswith(shown) and len(set(gains)) > 3
    total = sum(b - a for a, b in zip(on, off)).item()
    parts = [float(line.split(": ")[-1].split()[0]) for line in again.splitlines()[-2:]]
    assert sum(parts) == pytest.approx(total, abs=0.11)


def test_gates_are_the_modules_own(trained, tmp_path, capsys):
    """Values of another token, a scale that is not the run's; a gate that hardly moves."""
    saved, model = load_checkpoint(trained / "engram" / "ckpt.pt")
    enc = prepare_data.encoding(saved["tokenizer"])
    ids, gates = [enc.eot_token] + enc.encode_ordinary("w1 w3 w1"), []
    gate = model.engrams()[0].gate
    model.engrams()[0].gate = lambda h, e: gates.append(gate(h, e)) or gates[-1]
    model(torch.tensor([ids]))
    argv = ["--prompt", "w1 w3 w1", "--max_new_tokens", 0, "--gates"]
    printed = look(capsys, trained, *argv).out
    assert "".join(f"{enc.decode([i])}[{g:+.2f}]"
                   for i, g in zip(ids[1:], gates[0][0, 1:, 0].tolist())) in printed
    for low, high, says in ((0.1, 0.9, False), (0.5, 0.52, True)):
        saved["records"][-1].update(gate_p5=[low], gate_p95=[high])
        (tmp_path / "engram").mkdir(exist_ok=True)
        torch.save(saved, tmp_path / "engram" / "ckpt.pt")
        printed = look(capsys, tmp_path, *argv).out
        assert f"white {low:.2f}, blue {high:.2f}" in printed
        assert ("hardly moves" in printed) == says


def test_shades():
    """Text lost between the colours, a number that reads as text, no shade where there is gain."""
    spans = [("def", 1.0), (" f\n\n  ", -0.5), ("x", 0.0)]
    assert sample_script.shaded(spans, 0, 2, colour=False) == \
        "def[+1.00] f\u21b5\n\u21b5[-0.50]\n  x[+0.00]"
    coloured = sample_script.shaded(spans, 0, 2, colour=True)
    assert re.sub("\x1b.*?m", "", coloured) == "def f\u21b5\n\u21b5\n  x"
    assert [sample_script.tint(v) for v in (0, 1, 5, -1)] == \
        [(255, 255, 255), (80, 150, 255), (80, 150, 255), (255, 190, 110)]
    assert "48;2;168;202;255m" in coloured


def test_picture_of_the_shades(trained, tmp_path, capsys):
    """$ read as mathematics, a long line cut, a blank picture."""
    import matplotlib.image
    path, heights = tmp_path / "a.png", []
    look(capsys, trained, "--prompt", "$x_1", "--max_new_tokens", 9, "--memory", "--png", path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    for text in ("$x_1$", "x" * 90, "x" * 91, "a\nb\nc"):
        sample_script.draw([(text, 2.0)], 0, 2, "title", path)
        picture = matplotlib.image.imread(path)[..., :3]
        heights.append(len(picture))
        blue = np.isclose(picture, np.array([80, 150, 255]) / 255, atol=0.01).all(-1).mean()
        assert blue > 0.0015 * len(text)
    assert heights[0] == heights[1] < heights[2] < heights[3]
    argv = ["--out_dir", trained, "--memory", "--png", tmp_path / "no" / "a.png"]
    assert "could not be written" in refused(capsys, sample_script.main, *argv)


def test_report_of_a_run(corpus, trained, capsys):
    """Buckets that overlap or miss tokens, a gain of another sign, the same text on and off."""
    cfg, shape = train_script.parse([*corpus, *TINY])
    data = prepare_data.Data(cfg, shape.block_size)
    models = {name: load_checkpoint(trained / name / "ckpt.pt")[1] for name in ("engram", "moe")}
    x, y = torch.from_numpy(data.val_x), torch.from_numpy(data.val_y)
    with torch.no_grad():
        nats = [F.cross_entropy(m(x, reads=r)[0].flatten(0, 1), y.flatten(),
                                reduction="none").view(y.shape)
                for m, r in ((models["engram"], None), (models["engram"], []), (models["moe"], []))]
    lines = sample_script.report(models, data, 4, train_script.autocast(cfg))
    assert f"{nats[0].mean():.4f} -> {nats[1].mean():.4f} nats" in lines[1]
    rows, share = [line for line in lines[3:] if "%" in line], 0
    assert lines[2].split()[-6:] == "off - on moe - engram".split()
    names = {"never": (0, 0), "1-9": (1, 9), "10-99": (10, 99), "100-999": (100, 999),
             "1,000 or more": (1000, math.inf)}
    assert len(rows) >= 3
    for row in rows:
        *name, tokens, loss, off, twin = row.split()
        low, high = names[" ".join(name)]
        here = torch.from_numpy((data.seen >= low) & (data.seen <= high))
        assert float(tokens[:-1]) == pytest.approx(100 * here.float().mean().item(), abs=0.06)
        share += float(tokens[:-1])
        for shown, exact in ((loss, nats[0]), (off, nats[1] - nats[0]), (twin, nats[2] - nats[0])):
            assert float(shown) == pytest.approx(exact[here].mean().item(), abs=6e-4)
    assert share == pytest.approx(100, abs=0.3)
    on, off = "\n".join(lines).split("memory on:\n")[1].split("memory off:\n")
    assert on.splitlines()[0] and off.splitlines()[0] != on.splitlines()[0]


@pytest.mark.parametrize("argv, part", [
    ("--prompt=", "is empty"), ("--model dense", "there is one of: engram, moe"),
    ("--model moe --memory", "has no memory"), ("--png a.png", "needs --memory"),
    ("--top_p 0", "top_p 0"), ("--max_new_tokens 0", "nothing to do"), ("--seed -1", "seed -1"),
    ("--memory --gates", "not allowed with"), ("--num_samples 0", "num_samples 0")])
def test_usual_mistakes_in_sampling(trained, capsys, argv, part):
    """A traceback, or a flag that is ignored."""
    argv = ["--out_dir", trained, *argv.split()]
    assert part in refused(capsys, sample_script.main, *argv)


def test_damaged_files_are_refused(corpus, trained, tmp_path, capsys):
    """A flipped bit that becomes a strange model, a log that becomes a strange table."""
    shutil.copytree(trained, tmp_path / "out")
    path = tmp_path / "out" / "engram" / "ckpt.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    argv = ["--out_dir", tmp_path / "out"]
    assert "another checksum" in refused(capsys, sample_script.main, *argv)
    saved = load_checkpoint(trained / "engram" / "ckpt.pt")[0]
    saved["model"].pop("embed.weight")
    torch.save(saved, path)
    assert "embed.weight" in refused(capsys, sample_script.main, *argv)
    path = tmp_path / "out" / "moe" / "log.jsonl"
    whole = path.read_text()
    for bad in (whole[:-5], whole.replace("val_loss", "loss"), "[]\n" * 3,
                re.sub('"val_loss": [0-9.]+', '"val_loss": NaN', whole)):
        path.write_text(bad)
        assert "not a readable log" in refused(capsys, sample_script.main, *argv, "--compare")
    run(*corpus, *TINY, "--model", "moe", "--out_dir", tmp_path / "out", "--resume")
    assert path.read_text().splitlines()[1:] == whole.splitlines()[1:], "as the message promised"
    shutil.copy(trained / "moe" / "ckpt.pt", tmp_path / "out" / "engram")
    assert "holds a model moe" in refused(capsys, sample_script.main, *argv)
    shutil.copy(path, tmp_path / "out" / "engram")
    assert "log of a model moe" in refused(capsys, sample_script.main, *argv, "--compare")
    assert "not valid UTF-8 at character 2" in refused(
        capsys, sample_script.main, "--out_dir", trained, "--prompt", "ca\udce9")
    (tmp_path / "file").touch()
    for where in (tmp_path / "file", tmp_path / "file" / "x"):
        assert "file" in refused(capsys, sample_script.main, "--out_dir", where)
        assert "name another folder" in refused(capsys, train_script.main, "--out_dir", where)


# ---- from the shell -----------------------------------------------------------------------------

def shell(command, **how):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "PY": sys.executable, **how})


def test_an_output_that_takes_no_more(trained):
    """A traceback in the pipe to head, silence on a full disk, or a character no terminal knows."""
    closed = shell(f"$PY sample.py --out_dir {trained} --num_samples 300 --max_new_tokens 5 |"
                   " head -n1; exit ${PIPESTATUS[0]}")
    full = shell(f"$PY sample.py --out_dir {trained} > /dev/full")
    table = shell(f"$PY sample.py --out_dir {trained} --compare > /dev/full")
    prepare = shell(f"$PY prepare_data.py README.md --data_dir {trained}/d > /dev/full")
    for done in (closed, full, table, prepare):
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: the output could not be written")
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    for quiet in ("2>/dev/full >/dev/null", "2>&1 >/dev/null | true", ">&-"):
        done = shell(f"$PY sample.py --out_dir {trained} --seed -1 {quiet};"
                     " exit ${PIPESTATUS[0]}")
        assert done.returncode == 2 and "Traceback" not in done.stderr, quiet
    done = shell(f"$PY sample.py --out_dir {trained} --prompt \u21b5 --max_new_tokens 1",
                 PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith("?"), done.stderr


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


def test_ctrl_c_shows_how_to_go_on(corpus, tmp_path):
    """A traceback, another exit code than 130, or a command that does not resume."""
    argv = [*corpus, *TINY, "--steps", "3000", "--out_dir", str(tmp_path)]
    with started("train.py", *argv) as stopped:
        deadline = time.time() + 120
        while not (tmp_path / "engram" / "ckpt.pt").exists() and time.time() < deadline:
            time.sleep(0.01)
        second = shell(f"$PY train.py --out_dir {tmp_path} --model engram")
        assert second.returncode == 2 and "another process is writing" in second.stderr
        stopped.send_signal(signal.SIGINT)
        message = stopped.communicate()[1].strip().splitlines()[-1]
    assert stopped.returncode == 130 and message.startswith("stopped; the last checkpoint is kept")
    again = message.partition("go on with: python ")[2]
    done = load_checkpoint(tmp_path / "engram" / "ckpt.pt")[0]["step"]
    resumed = subprocess.Popen(["bash", "-c", f"exec {sys.executable} {again}"], cwd=HERE,
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while load_checkpoint(tmp_path / "engram" / "ckpt.pt")[0]["step"] <= done < 3000 \
            and resumed.poll() is None:
        time.sleep(0.01)
    resumed.kill()
    assert resumed.wait() == -signal.SIGKILL and len(log(tmp_path)[0]["resumed"]) == 1


def test_ctrl_c_before_the_first_checkpoint(corpus, tmp_path):
    """A command to resume that cannot."""
    argv = [*corpus, *TINY, *"--steps 400 --eval_every 400 --batch_size 1".split(),
            "--out_dir", str(tmp_path)]
    with started("train.py", *argv) as stopped:
        while "steps x" not in stopped.stdout.readline():
            assert stopped.poll() is None
        time.sleep(2)                                                    # of some 15 seconds
        stopped.send_signal(signal.SIGINT)
        assert "before the first checkpoint (step 400)" in stopped.communicate()[1]
    assert stopped.returncode == 130 and not list(tmp_path.glob("*/ckpt.pt"))


# ---- where the table lives ----------------------------------------------------------------------

@pytest.mark.parametrize("where, prefetch", [("host", True), ("host", False), ("disk", True)])
def test_offloaded_is_resident_bit_for_bit(where, prefetch, tmp_path):
    """Rows of another layer, another batch or another step; a gather that rounds. Two memory
    layers, n-grams that repeat, whole texts and cached chunks."""
    model, idx = tiny_gpt(torch.float32), torch.randint(VOCAB, (3, 20))
    idx[1, 5:15] = idx[0, 5:15]

    def outputs():
        cache = Cache(model.cfg)
        chunks = [model(part, cache=cache)[0] for part in idx.split([1, 1, 7, 11], dim=1)]
        return [model(idx)[0], *chunks, torch.tensor(list(
            sample_script.generate(model, idx[:1, :4], 20, temperature=0)))]

    want = outputs()
    if where == "disk":
        for engram in model.engrams():
            engram.table = mapped(tmp_path, *engram.table.shape).copy_(engram.table)
    place(model, "cpu", where, prefetch)
    assert all(read.ready for read in model.read(idx))
    assert all(map(torch.equal, outputs(), want)) and not list(tmp_path.iterdir())


LAYERS = "--model engram --engram_blocks 0 1 --steps 20 --eval_every 10".split()


def same_run(a, b):
    """Equal curves, weights, tables and moments, to the last bit."""
    (x, _), (y, _) = (load_checkpoint(folder / "engram" / "ckpt.pt") for folder in (a, b))
    moments = lambda saved: [v for state in saved["tables"] for v in state.values()]
    return same_curve(log(a), log(b)) and all(
        torch.equal(p, y["model"][name]) for name, p in x["model"].items()) and all(
        map(torch.equal, moments(x), moments(y)))


def mapping(tensor):
    """The line of the process's memory map that the tensor's data lies in."""
    for line in open("/proc/self/maps"):
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return line


def test_offloaded_training_is_resident_training_bit_for_bit(corpus, tmp_path, monkeypatch):
    """A gradient that goes to other rows, moments that miss a step, a read before the update; a
    table "on disk" that is in memory."""
    argv, places = [*corpus, *TINY, *LAYERS], set()

    def look(model, tables, *args):
        places.update((where, "rw-s" in line and str(tmp_path / where) in line) for line in map(
            mapping, [*tables.tables, *(v for s in tables.state for v in s.values())]))
        return sample_script.evaluate(model, tables, *args)

    monkeypatch.setattr(train_script, "evaluate", look)
    for where in ("resident", "host", "disk"):
        run(*argv, "--table", where, "--out_dir", tmp_path / where)
    assert places == {("resident", False), ("host", False), ("disk", True)}
    monkeypatch.setattr(train_script, "place", partial(place, prefetch=False))
    run(*argv, "--table", "host", "--out_dir", tmp_path / "synchronous")
    for where in ("host", "disk", "synchronous"):
        assert same_run(tmp_path / where, tmp_path / "resident"), where
    assert sorted(p.name for p in (tmp_path / "disk" / "engram").iterdir()) == \
        ["ckpt.pt", "log.jsonl"]


def test_a_run_goes_on_with_its_table_elsewhere(corpus, tmp_path, monkeypatch):
    """A table or moments that do not come back from the checkpoint, or only where they were."""
    argv, schedule = [*corpus, *TINY, *LAYERS], train_script.learning_rate
    run(*argv, "--out_dir", tmp_path / "whole")
    for first, then in (("host", "disk"), ("disk", "host"), ("resident", "disk")):
        out = tmp_path / f"{first}_{then}"

        def stop(step, cfg):
            if step == 13:
                raise KeyboardInterrupt
            return schedule(step, cfg)

        monkeypatch.setattr(train_script, "learning_rate", stop)
        with pytest.raises(SystemExit):
            run(*argv, "--table", first, "--out_dir", out)
        monkeypatch.setattr(train_script, "learning_rate", schedule)
        run(*argv, "--table", then, "--out_dir", out, "--resume")
        assert len(log(out)[0]["resumed"]) == 1 and same_run(out, tmp_path / "whole")


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
    for r, read in reversed(list(zip(rows, reads))):
        assert torch.equal(lookup(read), engram.table[r].flatten(2))


def test_reads_start_early():
    """A prefetch that begins at the place of use, or, in decoding, when the caller asks for more;
    a synchronous read that does not wait for its place."""
    model, idx = tiny_gpt(), torch.randint(VOCAB, (1, 4))
    place(model, "cpu", "host")
    slow = Slow()
    for engram in model.engrams():
        engram.fetch = slow
    for n, _ in zip(range(2, 8), sample_script.generate(model, idx, 20)):
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
    want = model(idx)[0]
    place(model, "cpu", "host")
    good, broken = model.engrams()[0].fetch, Broken()
    for engram in model.engrams():
        engram.fetch = broken
    with pytest.raises(OSError, match="does not answer"):
        model(idx)
    for engram in model.engrams():
        engram.fetch = good
    assert torch.equal(model(idx)[0], want)
    assert threading.active_count() > before
    del model, engram, good, broken
    gc.collect()
    deadline = time.time() + 10
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_memory_that_cannot_be_pinned(monkeypatch):
    """A run that ends because the system pins no more. (Without a GPU nothing can be pinned.)"""
    def empty(*args, pin_memory=False, real=torch.empty, **how):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(*args, **how)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.warns(UserWarning, match="not pinned.*out of memory"):
        assert pinned((3, 2), torch.bfloat16).shape == (3, 2)


def test_not_enough_room_for_a_table(corpus, tmp_path, capsys, monkeypatch):
    """A machine that swaps or ends the process; a disk that fills up half way (SIGBUS)."""
    argv = [*corpus, *TINY, "--out_dir", tmp_path]
    main = bench_offload.main
    assert prepare_data.free_memory() > 1e8
    assert "not enough memory" in refused(capsys, main, "--rows", 10 ** 12, "--out", tmp_path)
    monkeypatch.setattr(prepare_data, "free_memory", lambda: 100)
    assert "takes 0.0 GB" in refused(capsys, train_script.main, *argv, "--table", "host")

    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="a table of 48 bytes") as error:
        mapped(tmp_path, 4, 3)
    assert error.value.filename == str(tmp_path)


def test_the_checkpoint_is_the_file_of_the_table(trained, tmp_path, capsys, monkeypatch):
    """sample.py --table disk: a table that is copied into memory all the same, that is written to,
    or a file that is missing, cut short or of something else and is read nevertheless."""
    path = trained / "engram" / "ckpt.pt"
    before = path.read_bytes()
    _, model = load_checkpoint(path, None)
    assert all(str(path) in mapping(engram.table) for engram in model.engrams())
    del model
    texts = {look(capsys, trained, "--seed", 3, "--table", where).out
             for where in ("resident", "host", "disk")}
    assert len(texts) == 1 and path.read_bytes() == before
    (tmp_path / "engram").mkdir()
    saved = torch.load(path, weights_only=True)
    saved["model"]["blocks.1.engram.table"] = saved["model"]["blocks.1.engram.table"].double()
    torch.save(saved, other := io.BytesIO())
    for content in (before[:-100], before[:len(before) // 2], other.getvalue(), b"PK" + bytes(5000),
                    b"", None):
        copy = tmp_path / "engram" / "ckpt.pt"
        copy.write_bytes(content) if content is not None else copy.unlink()
        argv = ["--out_dir", tmp_path, "--table", "disk"]
        assert "checkpoint" in refused(capsys, sample_script.main, *argv)


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
    assert all(r.leaf.is_cuda and not e.table.is_cuda for r, e in zip(reads, model.engrams()))


@pytest.fixture
def tiny_bench(monkeypatch):
    shape, how = bench_offload.CPU
    shape = {**shape, "n_layer": 2, "n_embd": 16, "shared_hidden": 16, "vocab_size": 600}
    how = {**how, "prompts": (2, 32), "rows": (500, 2000), "full": (500, 1000, 2000)}
    monkeypatch.setattr(bench_offload, "CPU", (shape, how))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)         # a second one may take 10 ms to wake up after a sleep
    yield bench_offload.Bench(shape, how, "cpu")
    torch.set_num_threads(threads)


def test_a_simulated_link_costs_what_is_predicted(tiny_bench):
    """A link that a prefetch does not hide, that a synchronous read hides, or that sleeps as long
    as it likes. The compute before the memory is a sleep here, so that it is known."""
    bench, make = tiny_bench, lambda: [tiny_bench.ids(2, 32)]
    bench.set_table(2000)
    bench.gbps = bench.predict(make(), 3)["bytes"] / 40e6                             # 40 ms
    bench.set_table(2000)
    bench.model.blocks[0].register_forward_pre_hook(lambda *args: time.sleep(0.025))
    p = bench.predict(make(), 5)
    assert p["transfer_ms"] == pytest.approx(40, rel=0.05)
    assert 5 < p["exposed_ms"] == p["transfer_ms"] - p["before_ms"]
    times = bench.rounds(bench.prompts, 7, make)
    added = {arm: np.median(ms - times["resident"]) for arm, ms in times.items()}
    assert added["synchronous"] == pytest.approx(p["transfer_ms"], rel=0.2)
    assert added["prefetched"] == pytest.approx(p["exposed_ms"], abs=0.2 * p["transfer_ms"])


def test_every_page_of_a_bench_table_is_written(tiny_bench):
    """A gather from pages that were never written reads one page of zeros, and is fast."""
    for rows in (2000, 600_000):
        table = tiny_bench.engram(rows, torch.empty).table
        assert len(table) >= rows - 16 and table.view(len(table), -1).abs().amax(1).min() > 0


def test_bench(tiny_bench, tmp_path, capsys):
    """The whole bench: an arm that is missing, a figure that is not in the file, a file that
    stays behind."""
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
        assert table["simulated_gbps"] > 0
        for arm in table["arms"]:
            figures = table["arms"][arm]
            assert len(figures["ms"]) == 6 and figures["lost_percent"][0] < 100
            assert any(line.split(",")[0].startswith(f"  {arm.split(',')[0]}") and
                       f"{figures['tokens_per_s'][0]:,.0f}" in line for line in lines)
    assert [p["block"] for p in result["crossover"]["points"]] == [0, 1]
    assert sum("SIMULATED" in line for line in lines) == 8
    gc.collect()
    assert threading.active_count() == before
    for speed in (-1, 1e-9, "nan"):
        assert "from 0.001 to" in refused(capsys, bench_offload.main, "--link_gbps", speed)
    assert "from 6 to" in refused(capsys, bench_offload.main, "--rounds", 1)
    assert "from 16 to" in refused(capsys, bench_offload.main, "--rows", 3)


def test_ctrl_c_in_the_bench(tmp_path):
    """A hang on the worker, a traceback, a file left behind."""
    out = tmp_path / "out"
    argv = ["--rows", "20000", "--disk", "--rounds", "5000", "--out", out]
    with started("bench_offload.py", *argv) as bench:
        while "predicted" not in bench.stdout.readline():
            assert bench.poll() is None
        time.sleep(1)
        bench.send_signal(signal.SIGINT)
        assert bench.communicate(timeout=30)[1].strip() == "stopped" and bench.returncode == 130
    assert not list(out.iterdir())


def test_hit_rate_of_a_cache(corpus, tmp_path, capsys):
    """Rows judged on the text they were chosen on, or counted twice within a prompt."""
    argv = ["--zipf", corpus[1], "--data_dir", corpus[-1], "--out", str(tmp_path)]
    bench_offload.main(argv)
    assert "different ones of" in capsys.readouterr().out and (tmp_path / "zipf.png").exists()
    result = json.loads((tmp_path / "zipf.json").read_text())
    meta, train, _ = prepare_data.load("mine", corpus[-1])
    canonical = canonical_ids(prepare_data.token_bytes(meta["tokenizer"]))
    engram = Engram(EngramConfig(heads=8, rows=250_000), 1, 8, int(canonical.max()) + 1,
                    int(canonical[-1]))
    prompts = canonical[train[:len(train) // 2048 * 2048]].reshape(-1, 1024)
    halves = [Counter(), Counter()]
    for i, prompt in enumerate(prompts):
        halves[i >= len(prompts) // 2].update(
            set(engram.hash(torch.from_numpy(prompt)[None]).flatten().tolist()))
    reads = sum(halves[1].values())
    assert result["reads"] == reads + sum(halves[0].values())
    assert result["rows_read"] == len(halves[0] | halves[1])
    for n, rate in zip(result["cache_rows"], result["hit_rate"]):
        counts = sorted(halves[0].values(), reverse=True) + [0]
        sure = sum(halves[1][row] for row, k in halves[0].items() if n < len(counts)
                   and k > counts[n])                            # those surely among the n hottest
        tied = sum(halves[1][row] for row, k in halves[0].items() if k >= counts[min(n, len(
            counts) - 1)])
        assert sure / reads - 1e-6 <= rate
        assert rate <= tied / reads + 1e-6 or n >= len(counts) - 1
    assert refused(capsys, bench_offload.main, "--zipf", "nothing", "--data_dir", tmp_path)


# ---- sweeps -------------------------------------------------------------------------------------

def test_interval():
    """A normal quantile in place of t, or n in place of n - 1; an interval from one value."""
    mean, half = sample_script.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * 1.527525 / 3 ** 0.5)
    assert sample_script.interval([5.0])[0] == 5 and math.isnan(sample_script.interval([5.0])[1])
    assert sample_script.interval(list(range(30)))[1] == pytest.approx(2.131 * 77.5 ** 0.5
                                                                       / 30 ** 0.5)


def ending(*losses, **header):
    """{seed: a run that ends at this loss}, seeds from 1 on."""
    return {seed: {"header": header, "records": [{"val_loss": 9, "tokens": 1, "seconds": 1},
                                                 {"val_loss": loss, "tokens": 3, "seconds": 3}]}
            for seed, loss in enumerate(losses, 1)}


def test_pairs_are_of_one_seed():
    """Means of different seeds subtracted: the spread between seeds is then in the interval."""
    runs = {"a": ending(3.0, 5.0, 9.0), "b": dict(reversed(ending(2.0, 0.0, 8.5).items()))}
    del runs["b"][2]
    assert sweep.gaps(runs, "a", "b") == [1.0, 0.5] and sweep.gaps(runs, "a", "c") == []
    assert sweep.verdict([1.0, 0.5]) == "+0.750 ± 3.176 (n=2), undecided"
    assert sweep.verdict([0.75, 0.76, 0.74]) == "+0.750 ± 0.025 (n=3), higher"
    assert sweep.verdict([-1.0, -1.1]).endswith("lower") and sweep.verdict([0.5]) == "+0.500, n=1"


def test_what_a_sweep_says():
    """A minimum inside that one end does not support, a slope in the wrong logarithm, a jump dated
    to the evaluation after it."""
    count = dict(accounting={"P_tot": 1000, "P_act": 100})
    ends = lambda zero: {"1": ending(4.0, 4.1, **count), "0.75": ending(3.0, 3.1, **count),
                         "0": ending(*zero, **count)}
    assert " a minimum inside" in sweep.say_allocation(None, ends((3.5, 3.601)))
    assert " no minimum inside" in sweep.say_allocation(None, ends((3.0, 3.101)))
    unequal = {**ends((3.5, 3.6)), "0": ending(1.0, accounting={"P_tot": 1006, "P_act": 100})}
    with pytest.raises(AssertionError, match="P_tot differs"):
        sweep.say_allocation(None, unequal)
    x, y = [4, 64, 1024], [3.0, 2.5, 1.0]
    mean = lambda v: sum(v) / len(v)
    slow = sum((math.log2(a) - mean([2, 6, 10])) * (b - mean(y)) for a, b in zip(x, y)) / \
        sum((k - 6) ** 2 for k in (2, 6, 10))
    assert sweep.slope(x, y) == pytest.approx(slow)
    curve = lambda *v: {1: {"records": [{"copy_loss": c, "tokens": i * 1e6, "seconds": i,
                                         "val_loss": c / 2} for i, c in enumerate(v, 1)]}}
    said = sweep.say_jump(None, {"engram": curve(7, 6.5, 5.5), "moe": curve(7, 6.8, 6.4, 5.6)})
    assert "Engram 2.5" in said and "twin 3.5" in said and "difference -1.000, n=1" in said
    assert said.endswith("Engram minus twin -0.050, n=1")
    said = sweep.say_jump(None, {"engram": curve(7, 6.9), "moe": curve(7, 6)})
    assert "Engram never" in said and "both in 0 of 1 pairs, difference no pair" in said
    assert sweep.say_jump(None, {"moe": curve(7, 6)}) == "not finished"


def test_rho_reached():
    """The share of experts on the abscissa, by another count than make_twins' own."""
    for rho in (0, 0.3, 0.75):
        shapes, lines = make_twins(GPTConfig(n_expert=20), rho)
        for name, reached in (("engram", float(lines[2].split()[1])), ("moe", 1)):
            with torch.device("meta"):
                model = GPT(shapes[name], np.arange(4096))
            header = {"shape": vars(model.cfg), "accounting": model.accounting(),
                      "parameters_by_kind": model.parameters_by_kind()}
            assert sweep.share(header) == pytest.approx(reached, abs=2e-3 if rho else 1e-9)


@pytest.fixture
def tiny_sweeps(corpus, tmp_path, monkeypatch):
    """Every sweep at toy size, in an empty folder, without a new process a run."""
    base = " ".join([*TINY, "--data_dir", corpus[3], "--n_expert", "12", "--n_layer",
                     "4", "--shared_hidden", "256", "--eval_tokens", "2048"])
    for name in ("LAPTOP", "JUMP", "SMALL"):
        monkeypatch.setattr(sweep, name, base)
    monkeypatch.setattr(sweep, "ROWS", [8, 32, 128])
    wide = {"0.9": 256, "0.75": 64, "0.5": 257, "0.25": 258, "0": 259}
    monkeypatch.setattr(sweep, "SHARED", wide)
    monkeypatch.chdir(tmp_path)
    commands = []

    def here(command, **how):
        commands.append([str(part) for part in command[2:]])
        train_script.main(commands[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=here))
    for name in ("report", "compare", "plot"):                # what a run prints at its end
        monkeypatch.setattr(train_script, name, lambda *_: [])
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))
    return commands


def swept(name, *argv):
    sweep.main([name, "--dataset", "mine", "--steps", "8", *argv])
    return json.loads(Path(f"results/{name}.json").read_text())


def test_every_sweep_runs(tiny_sweeps, capsys):
    """An arm whose flags train.py refuses, a run trained twice because two sweeps need it."""
    for name in sweep.sweeps(8).keys() - {"twins_rates", "twins_long"}:     # like rates and twins
        saved = swept(name, "--seeds", "1")
        arms = sweep.sweeps(8)[name]["arms"]
        assert {run["arm"] for run in saved["runs"]} == set(arms), name
        printed = capsys.readouterr().out
        assert all(title in printed for _, title, *_ in arms.values())
        assert Path(f"results/{name}.png").stat().st_size > 5000
    assert len({str(command) for command in tiny_sweeps}) == len(tiny_sweeps)
    table = json.loads(Path("results/controls.json").read_text())["runs"]
    loss = {run["arm"]: run["records"][-1]["val_loss"] for run in table}
    assert len(set(loss.values())) == len(loss)              # every arm is another experiment
    rows = {run["arm"]: run["header"]["shape"]["engram"]["rows"] for run in table
            if run["arm"] != "moe"}
    assert set(rows["one row"]) == {1} and min(rows["engram"]) > 8


def test_a_sweep_goes_on_where_it_was(tiny_sweeps, monkeypatch, capsys):
    """A finished run trained again; one that was interrupted taken for a result, or begun anew;
    runs of other settings in one file."""
    assert len(swept("experts", "--seeds", "1")["runs"]) == len(tiny_sweeps) == 2
    whole = swept("experts", "--seeds", "2", "--arms", "moe")
    assert [(r["arm"], r["seed"]) for r in whole["runs"]] == [
        ("half", 11), ("moe", 11), ("half", 12), ("moe", 12)] and len(tiny_sweeps) == 4
    shutil.rmtree("runs")
    assert swept("experts", "--seeds", "2") == whole and len(tiny_sweeps) == 4
    Path("results/experts.json").unlink()
    cut = []

    def stopped(path, write):                                # Ctrl-C after the first checkpoint
        prepare_data.write_whole(path, write)
        if path.name == "ckpt.pt" and not cut:
            cut.append(path)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "write_whole", stopped)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            swept("experts", "--seeds", "1")
    assert cut and not json.loads(Path("results/experts.json").read_text())["runs"]
    again = swept("experts", "--seeds", "1")["runs"]
    assert "--resume" in tiny_sweeps[-2] or "--resume" in tiny_sweeps[-1]
    first = {run["arm"]: run["records"][-1]["val_loss"] for run in whole["runs"][:2]}
    assert first == {run["arm"]: run["records"][-1]["val_loss"] for run in again}
    argv = ["experts", "--dataset", "mine"]
    assert "are not like these" in refused(capsys, sweep.main, *argv, "--steps", 16)
    assert "another folder" in refused(capsys, sweep.main, *argv, "--steps", 16)
    assert "no arm nothing" in refused(capsys, sweep.main, *argv, "--steps", 8, "--arms", "nothing")
    assert "no sweep nothing" in refused(capsys, sweep.main, "nothing")
    assert "there is no" in refused(capsys, sweep.main, "jump", "--plot")
    sweep.main(["experts", "--plot", "--reference", "moe"])
    printed = capsys.readouterr().out
    assert "32 experts" in printed.split("reference |")[0].splitlines()[-1]
    argv = ["experts", "--plot", "--reference", "x"]
    assert "it has half, moe" in refused(capsys, sweep.main, *argv)
    Path("results/experts.json").write_text("{}")
    assert "is damaged" in refused(capsys, sweep.main, "experts", "--plot")
    assert "--seeds 0" in refused(capsys, sweep.main, "experts", "--seeds", 0)


def test_rows_shuffled_within_their_head(trained):
    """Rows that leave their head, a memory off that is on, a checkpoint that is changed."""
    before = (trained / "engram" / "ckpt.pt").read_bytes()
    losses = sweep.after(trained)
    saved, model = load_checkpoint(trained / "engram" / "ckpt.pt")
    data = prepare_data.Data(train_script.Config(**saved["header"]["config"]), 32)
    loss = lambda **how: float(sample_script.token_losses(
        model, data.val_x, data.val_y, 2, train_script.autocast(train_script.Config(
            device="cpu", dtype="float32")), **how).double().mean())
    assert losses["off"] == pytest.approx(loss(memory=False), abs=1e-6)
    engram, generator = model.engrams()[0], torch.Generator().manual_seed(0)
    starts = [*engram.offsets.flatten().tolist(), len(engram.table)]
    parts = [engram.table[a:b] for a, b in zip(starts, starts[1:])]
    engram.table = torch.cat([part[torch.randperm(len(part), generator=generator)]
                              for part in parts])
    assert losses["shuffled"] == pytest.approx(loss(), abs=1e-6)
    assert len({round(v, 4) for v in (*losses.values(), saved["records"][-1]["val_loss"])}) == 3
    assert (trained / "engram" / "ckpt.pt").read_bytes() == before


def test_one_row_per_head():
    """The control of capacity 1 that reads a second row."""
    module = Engram(tiny_engram(rows=1, heads=3), 0, 8, n_canonical=30, pad=29)
    rows = module.hash(torch.randint(0, 30, (4, 25)))
    assert module.table.shape == (6, 4) and rows.flatten(0, 1).unique(dim=0).tolist() == [
        list(range(6))]


def test_repeated_data(corpus):
    """Passes in one order, a pass with a sequence twice, other tokens than the first ones."""
    argv = [*corpus, *TINY, "--train_tokens", "300", "--steps", "6"]
    cfg, shape = train_script.parse(argv)
    data = prepare_data.Data(cfg, shape.block_size)
    assert len(data.train) == 300 and cfg.steps == 6
    passes = data.order[:27].reshape(3, 9)
    assert all(sorted(one) == list(range(9)) for one in passes.tolist())
    assert len({tuple(one) for one in passes.tolist()}) == 3 and len(data.order) >= 24


# ---- analyses -----------------------------------------------------------------------------------

def test_by_bucket():
    """A border on the wrong side, positions without an n-gram counted as never seen."""
    by, values = np.array([[-1, 0, 9, 10], [99, 100, 1000, 0]]), np.arange(8.0).reshape(2, 4)
    assert analyze.by_bucket(by, values) == {
        "never": 4.0, "1-9": 2.0, "10-99": 3.5, "100-999": 5.0, "1,000 or more": 6.0}


def test_addresses_are_ngrams():
    """An n-gram that looks ahead, or across the start of a sequence."""
    ids = np.random.default_rng(0).integers(0, 7, (3, 9))
    for order in (1, 2, 3):
        for row, got in zip(ids.tolist(), analyze.addresses(ids, order, 7, 6).tolist()):
            padded = [6] * (order - 1) + row
            for t, number in enumerate(got):
                digits = [number // 7 ** k % 7 for k in reversed(range(order))]
                assert digits == padded[t:t + order]


def test_rows_and_counts_of_what_was_trained(trained):
    """Rows of another head or order, n-grams of tokens that this run never reached."""
    pair = analyze.load_pair(trained, twin=False)
    engram, canonical = pair.engram.engrams()[0], pair.engram.canonical.numpy()
    base = int(canonical.max()) + 1
    starts = pair.data.order[:12 * 128 // 32] * 32
    for i, order in enumerate((2, 3)):
        grams, counts = analyze.trained(pair, order)
        slow = Counter()
        for s in starts:
            ids = [int(canonical[-1])] * (order - 1) + canonical[pair.data.train[s:s + 32]].tolist()
            slow.update(tuple(ids[t:t + order]) for t in range(32))
        number = lambda ids: sum(x * base ** k for k, x in enumerate(reversed(ids)))
        assert dict(zip(grams.tolist(), counts.tolist())) == {number(k): n for k, n in slow.items()}
        rows = analyze.rows_of(engram, grams, order, base)
        for ids in list(slow)[:40]:
            mine = rows[np.searchsorted(grams, number(ids))]
            theirs = engram.hash(torch.tensor([[0, *ids]]))[0, -1, 2 * i:2 * i + 2]
            assert mine.tolist() == (theirs - engram.offsets[i]).tolist()
        found = analyze.look_up(grams, counts, np.array([grams[0], grams[-1] + 1, grams[3]]))
        assert found.tolist() == [counts[0], 0, counts[3]]


def test_who_shares_rows():
    """A share of all rows for one of those used; a read counted once for an n-gram; a row's own
    share by n-grams, not by reads."""
    rng = np.random.default_rng(0)
    rows, counts = rng.integers(0, 40, (30, 3)), rng.integers(1, 9, 30)
    held = [Counter(column) for column in rows.T.tolist()]
    several = [sum(n > 1 for n in h.values()) / len(h) for h in held]
    company = [[held[k][r] > 1 for k, r in enumerate(row)] for row in rows.tolist()]
    reads = sum(c * sum(row) for c, row in zip(counts, company)) / counts.sum() / 3
    assert analyze.shared(rows, counts) == pytest.approx({
        "rows": sum(several) / 3, "reads": reads, "all heads": np.mean([all(r) for r in company]),
        "same in all": 0})
    rows[4] = rows[9] = rows[2]
    assert analyze.shared(rows, counts)["same in all"] == pytest.approx(3 / 30)
    own = [np.mean([c / sum(d for d, s in zip(counts, rows) if s[k] == row[k]) for k in range(3)])
           for c, row in zip(counts, rows)]
    assert analyze.own_share(counts, rows) == pytest.approx(own)


def test_what_an_ngram_explains():
    """A share that grows with the number of groups, means of the wrong group."""
    rng = np.random.default_rng(0)
    groups, noise = rng.integers(0, 50, 400), rng.normal(size=400)
    a = noise + groups
    mean = {g: a[groups == g].mean() for g in groups}
    assert analyze.centred(groups, a) == pytest.approx([v - mean[g] for g, v in zip(groups, a)])
    within = sum((v - mean[g]) ** 2 for g, v in zip(groups, a)) / (400 - 50)
    total = sum((v - a.mean()) ** 2 for v in a) / 399
    assert analyze.explained(groups, a) == pytest.approx(1 - within / total)
    assert abs(analyze.explained(groups, noise)) < 0.15 and analyze.explained(groups, a) > 0.99
    assert abs(analyze.explained(np.arange(400) // 2, noise)) < 0.3         # 200 groups of two


def test_lens_is_the_divergence_by_hand(trained):
    """KL the wrong way round, a block read before its memory, a final norm left out."""
    pair = analyze.load_pair(trained)
    model, x = pair.engram, torch.from_numpy(pair.data.val_x)
    with torch.no_grad():
        final, h = model(x)[0].log_softmax(-1), model.embed(x)
        rope, slow = (model.cos[:32], model.sin[:32]), []
        reads = iter(model.read(x))
        for block in model.blocks:
            h = block(h, rope, next(reads) if block.engram else None)[0]
            layer = (model.norm(h) @ model.embed.weight.T).log_softmax(-1)
            slow.append(float((final.exp() * (final - layer)).sum(-1).mean()))
    assert analyze.lens(pair, model) == pytest.approx(slow, abs=1e-5) and slow[0] > 1e-3


@pytest.mark.parametrize("name", ["knockout", "gates", "collisions", "logitlens"])
def test_every_analysis_runs(trained, corpus, tmp_path, capsys, name):
    """From two pairs of checkpoints to JSON and picture; one seed taken for two."""
    run(*corpus, *TINY, "--seed", 1, "--out_dir", tmp_path / "b")
    capsys.readouterr()
    outs = [str(trained), str(tmp_path / "b")][:1 if name == "collisions" else 2]
    analyze.main([name, "--out_dir", *outs, "--results", str(tmp_path)])
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["finding"] in capsys.readouterr().out and found["seeds"] == list(range(len(outs)))
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    if name == "knockout":
        records = [log(out, model)[-1]["val_loss"] for out in (trained, tmp_path / "b")
                   for model in ("moe", "engram")]
        assert found["moe - engram"]["values"][1] == pytest.approx(records[2] - records[3], 1e-3)
        tokens = found["2-grams"]["tokens"]
        assert sum(v["values"][0] for v in tokens.values()) == 256
    argv = [name, "--results", tmp_path, "--out_dir", trained]
    assert "of one seed" in refused(capsys, analyze.main, *argv, trained)
    if name == "collisions":
        assert "give one --out_dir" in refused(capsys, analyze.main, *argv, tmp_path / "b")
    assert "no checkpoint" in refused(capsys, analyze.main, *argv, tmp_path / "none")


def test_checkpoints_that_are_no_twins(trained, corpus, tmp_path, capsys):
    """Two models of different tokenizers or lengths laid side by side; data prepared anew since."""
    assert "no analysis nothing" in refused(capsys, analyze.main, "nothing")
    shutil.copytree(trained, tmp_path / "out")
    path, argv = tmp_path / "out" / "moe" / "ckpt.pt", ["knockout", "--out_dir", tmp_path / "out"]
    saved = load_checkpoint(path)[0]
    torch.save({**saved, "tokenizer": {**saved["tokenizer"], "sha256": "0"}}, path)
    assert "they differ in tokenizer (" in refused(capsys, analyze.main, *argv)
    torch.save({**saved, "step": 8}, path)
    assert "they differ in step (12, 8)" in refused(capsys, analyze.main, *argv)
    path = tmp_path / "out" / "engram" / "ckpt.pt"
    saved = load_checkpoint(path)[0]
    torch.save({**saved, "run": {**saved["run"], "val": "0"}}, path)
    assert "is not what" in refused(capsys, analyze.main, "gates", *argv[1:])
    for flags, part in (("--engram_gate off", "no gate"), ("--engram_orders 1", "order above 1")):
        out = tmp_path / flags.split()[0][2:]
        run(*corpus, *TINY, "--model", "engram", "--out_dir", out, *flags.split())
        assert part in refused(capsys, analyze.main, "gates", "--out_dir", out)


# ---- what stands in the README ------------------------------------------------------------------

def test_what_is_called_a_twin(trained, tmp_path):
    """An old run of another shape in the same out_dir, compared as if it were the twin."""
    shutil.copytree(trained, tmp_path / "out")
    assert "engram - moe" in "".join(sample_script.compare(tmp_path / "out"))
    path = tmp_path / "out" / "moe" / "log.jsonl"
    whole = path.read_text()
    p_tot = log(tmp_path / "out", "moe")[0]["accounting"]["P_tot"]
    for old, new in (('"n_layer": 2', '"n_layer": 3'), ('"seed": 0, "train', '"seed": 1, "train'),
                     (f'"P_tot": {p_tot}', f'"P_tot": {2 * p_tot}')):
        assert old in whole
        path.write_text(whole.replace(old, new))
        assert "these are no twins" in sample_script.compare(tmp_path / "out")[-1]


def test_the_readme_is_the_result(tmp_path):
    """A row or a finding in the README that no run supports; results that it does not tell of."""
    readme, kinds = (HERE / "README.md").read_text(), sweep.sweeps()
    assert not [line for line in sample_script.compare(HERE / "results" / "seed0")
                if line not in readme]
    printed = []
    for path in sorted((HERE / "results").glob("*.json")):
        if path.stem in kinds:
            shutil.copy(path, tmp_path)
            printed += sweep.report(tmp_path / path.name, kinds[path.stem])
        else:
            printed.append(json.loads(path.read_text())["finding"])
        script = "sweep" if path.stem in kinds else "analyze"
        assert f"{script}.py {path.stem}" in readme, path.stem
    rows = re.findall(r"^(\| .* \| [\d,]{6,} \| [\d,]{6,} \| \d+ \| .*|> .*)$", readme, re.M)
    assert len(rows) > 25 and not [row for row in rows if row.removeprefix("> ") not in printed]


def test_the_readme_is_the_bench():
    """A table in the offload section that no run printed."""
    readme, folder = (HERE / "README.md").read_text(), HERE / "results" / "offload"
    bench = json.loads((folder / "offload.json").read_text())
    tables = [bench["prompts"][-1], bench["others"][0], bench["others"][-1], bench["crossover"],
              json.loads((folder / "zipf.json").read_text())]
    lines = [line for table in tables for line in table["lines"]]
    assert len(lines) == 9 + 9 + 8 + 8 + 6 and not [line for line in lines if line not in readme]


def test_exit_code_of_the_command(tmp_path):
    """Errors that are clear in-process and a traceback, or exit code 1, from the shell."""
    for script, *argv in (("train.py", "--dataset", "nothing"), ("sample.py", "--seed", "-1"),
                          ("prepare_data.py", "nothing")):
        done = subprocess.run([sys.executable, HERE / script, *argv], cwd=tmp_path, text=True,
                              capture_output=True)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr


def test_readme_has_the_two_commands():
    """The one-line main job and the one-line tests, as continuous integration runs them."""
    readme = (HERE / "README.md").read_text()
    assert "pip install -r requirements.txt && python train.py" in readme
    assert "pip install -r requirements.txt && python -m pytest" in readme
    assert inspect.getsource(Block.forward) in readme
    lengths = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", readme))
    assert lengths.keys() == {path.name for path in HERE.glob("*.py")}
    for name, n in lengths.items():                        # near enough while you try things
        assert int(n) == pytest.approx((HERE / name).read_text().count("\n"), rel=0.1)
    screen = readme.split("## The files")[0]
    assert screen.count("\n") <= 45 and "results/twins.png" in screen


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
