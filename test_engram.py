"""
Tests: every fast path against a slow and obvious one, the module against the official
demo, the scripts as a user runs them.

    python -m pytest                  # all, a few minutes on a CPU, no network

test_vectors.npz holds ids, weights and outputs of the official demo, engram_demo_v1.py.
"""
import gc
import hashlib
import http.server
import inspect
import json
import math
import os
import random
import re
import shlex
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
from unittest.mock import Mock

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench_offload
import common
import prepare_data
import runs
import sample
import train
from engram import Engram, EngramConfig, Read, RowAdam, canonical_ids, head_primes, lookup
from model import (GPT, Block, Cache, GPTConfig, accounting, attend, generate, load_checkpoint,
                   watch)
from moe import MoE
from offload import Fetch, check_rows, place
from prepare_data import EOT
from twins import crowding, make_twins

HERE = Path(__file__).resolve().parent
VOCAB = 60
CANONICAL = np.arange(VOCAB) // 2            # 30 canonical ids; end of text is 29


def tiny_engram(**changes):
    shape = dict(blocks=(0, 2), orders=(2, 3), heads=2, rows=97, width=4)
    return EngramConfig(**shape | changes)


def tiny_module(**changes):
    return Engram(tiny_engram(**changes), 0, 8, n_canonical=30, pad=29)


def tiny_gpt(dtype=torch.float64, **changes):
    """A model whose memory and convolution are loud, not nearly silent as at the start."""
    shape = dict(vocab_size=VOCAB, block_size=32, n_layer=3, n_head=2, n_embd=16,
                 n_expert=4, expert_hidden=8, shared_hidden=12, engram=tiny_engram())
    model = GPT(GPTConfig(**shape | changes), CANONICAL).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        for engram in model.engrams():
            engram.table.normal_()
    return model


def run(script, *argv):
    script.main([str(a) for a in argv])


def wait_until(condition, seconds=10):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


# ---- the module and the model ----------------------------------------------------------

# configuration, width of the model, how many residual branches are compared
DEMO_RUNS = {
    "demo_order3":
        (tiny_engram(blocks=(1, 15), heads=8, rows=(211, 409), width=8), 32, 1),
    "two_layers_order4_branches2":
        (tiny_engram(blocks=(0, 3), orders=(2, 3, 4), heads=4, rows=(199, 397, 499),
                     width=6, seed=7), 16, 2)}
# our names of the weights, and the demo's
THEIRS = {"key": "key_projs.{}", "value": "value_proj", "norm_key": "norm1.{}",
          "norm_query": "norm2.{}", "conv.norm": "short_conv.norms.{}"}


@pytest.mark.parametrize("name", DEMO_RUNS)
def test_demo_addresses_and_outputs(name):
    """Another seed, order of primes, norm or dilation, which trains all the same."""
    cfg, D, branches = DEMO_RUNS[name]
    vectors = np.load(HERE / "test_vectors.npz")
    x = torch.from_numpy(vectors[f"{name}/canonical"]).long()
    for block in cfg.blocks:
        prefix = f"{name}/{block}/"
        known = {key.removeprefix(prefix): torch.from_numpy(vectors[key])
                 for key in vectors.files if key.startswith(prefix)}
        module = Engram(cfg, block, D, n_canonical=32982, pad=32981)
        for mine in ("multipliers", "primes"):
            assert getattr(module, mine).tolist() == known[mine].tolist()
        rows = module.hash(x)
        assert torch.equal(rows - module.offsets.flatten(), known["rows"].long())
        # rows the demo did not read are NaN: reading any other row shows
        module.table.fill_(float("nan"))
        module.table[known["table_rows"].long()] = known["table_values"]
        for branch in range(branches):
            state = module.state_dict()
            for name_here in state:
                part, _, kind = name_here.rpartition(".")
                if part in THEIRS:
                    state[name_here] = known[f"{THEIRS[part].format(branch)}.{kind}"]
            conv = known["short_conv.conv.weight"][branch * D:(branch + 1) * D]
            state["conv.taps"] = conv[:, 0].T                              # [kernel, D]
            module.load_state_dict(state)
            out = module(known["h"][:, :, branch], module.read(module.address(x)))
            torch.testing.assert_close(out, known["out"][:, :, branch], rtol=0, atol=1e-5)


def slow_rows(module, ids, t, stop):
    """Row numbers that position t of a sequence reads, by Python's unbounded integers."""
    past, ended = [], False                              # this id, the one before it, ...
    for k in range(module.cfg.orders[-1]):
        ended = ended or k > t or (stop and k > 0 and ids[t - k] == module.pad)
        past.append(module.pad if ended else ids[t - k])
    row_ids, base = [], 0
    for n, primes in zip(module.cfg.orders, module.primes.tolist()):
        mix = 0
        for k in range(n):
            mix ^= past[k] * module.multipliers[k].item()
        assert 0 <= mix < 2 ** 63
        for prime in primes:
            row_ids.append(base + mix % prime)
            base += prime
    return row_ids


def test_deepseek_v41_addresses():
    """Golden values of DeepSeek-V4.1: large tables, 4-grams, look-back that stops."""
    cfg = EngramConfig(blocks=(1, 14), orders=(2, 3, 4), heads=8, rows=16_000_000,
                       width=256, conv_kernel=0, stop_at_eot=True, bias=False)
    primes = head_primes(cfg)
    assert [sum(map(sum, primes[b])) for b in cfg.blocks] == [384006168, 384016682]
    module = Engram(cfg, 1, 32, n_canonical=99092, pad=2, table_device="meta")
    assert module.table.shape == (384006168, 256)
    assert module.multipliers.tolist() == [76632096046245, 4839876093313, 35959672319349,
                                           73987337458391]
    rows = module.hash(torch.tensor([[5, 10, 20, 30, 40]]))[0, -1].view(3, 8)
    assert (rows - module.offsets)[:, :2].tolist() == [
        [1326936, 6120872], [14088109, 7705371], [14966984, 15521295]]


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("orders", [(1,), (2, 3), (1, 3, 4)])
def test_hash_is_the_python_loop(orders, stop):
    """An overflow, a look-back off by one, a stop that forgets, a lost past."""
    module = tiny_module(orders=orders, stop_at_eot=stop)
    x = torch.randint(0, 30, (3, 40))
    x[0, 5] = x[0, 6] = x[1, 0] = x[1, 39] = 29
    slow = []
    for ids in x.tolist():
        slow.append([slow_rows(module, ids, t, stop) for t in range(40)])
    assert module.hash(x).tolist() == slow
    n = orders[-1] - 1
    past = F.pad(x, (n, 0), value=29)
    pieces = [module.hash(x[:, t:t + 1], past[:, t:t + n]) for t in range(40)]
    assert torch.cat(pieces, 1).tolist() == slow
    rows = tiny_module(orders=orders, rows=1).hash(x)
    assert (rows == torch.arange(2 * len(orders))).all()


def test_hash_by_hand():
    """The example in the docstring of hash(), once the hash has changed."""
    module = tiny_module(orders=(2,))
    module.multipliers = torch.tensor([3, 11])
    module.primes, module.offsets = torch.tensor([[13, 17]]), torch.tensor([[0, 13]])
    assert module.hash(torch.tensor([[5, 7]]))[0, 1].tolist() == [8, 13]
    text = " ".join(Engram.hash.__doc__.split())
    assert "(7 * 3) ^ (5 * 11) = 21 ^ 55 = 34" in text and "reads rows 8 and 13" in text


def test_canonical_ids():
    """Merging what is not text, or losing a token that normalises to nothing."""
    pieces = [b"The", b" the", b"\xc3\xa9", b"e", b"\xc3", b"\xa9", b" ", b"\n\n",
              b"\xcc\x81", b"\xef\xbf\xbd", "\ufb01".encode(), b"fi", EOT.encode(),
              b"\xcc\x80", b" \tA  B\n", b"a b"]
    ids = [0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10]
    assert canonical_ids(pieces).tolist() == ids
    assert canonical_ids(pieces, compress=False).tolist() == list(range(16))


def test_read_is_plain_indexing_and_gradients_reach_everything():
    """Wrong inverse, or a gradient that counts a row read twice once; table and projection
    both zero: neither ever learns, and the loss looks as usual."""
    module = tiny_module(heads=4, rows=5)
    x = torch.randint(0, 30, (2, 50))
    row_ids, read = module.hash(x), module.read(module.address(x))
    plain = module.table.clone().requires_grad_()
    assert len(read.row_ids) == len(row_ids.unique()) < row_ids.numel()
    assert torch.equal(lookup(read), plain[row_ids].flatten(2))
    h = (0.02 * torch.randn(2, 50, 8)).requires_grad_()       # as the embedding starts
    known = {"h": h, **dict(module.named_parameters())}
    weight, grads = torch.randn_like(h), []
    for leaf, inverse in ((read.leaf, read.inverse), (plain, row_ids)):
        out = module(h, Read(None, leaf, inverse, None))
        grads.append(torch.autograd.grad((out * weight).sum(), [leaf, *known.values()]))
    torch.testing.assert_close(grads[0], (grads[1][0][read.row_ids], *grads[1][1:]))
    for name, grad in zip(["table", *known], grads[0]):
        # the norm of the convolution waits a step for the zero taps
        assert grad.abs().max() > 0 or name == "conv.norm.weight", name
    assert out.norm() < 0.3 * h.norm()


def test_row_adam_is_adam_on_the_visits_of_each_row():
    """Rows not read that move, moments shared between rows, one clock for all rows."""
    table = torch.randn(7, 3, dtype=torch.float64)
    mine = RowAdam([table])
    oracle = [torch.nn.Parameter(row.clone()) for row in table]
    adams = [torch.optim.Adam([row], betas=(0.9, 0.95)) for row in oracle]
    for step in range(20):
        rows = torch.randperm(5)[:torch.randint(1, 5, ())].sort().values     # not 5 and 6
        leaf = table.index_select(0, rows).requires_grad_()
        leaf.grad = torch.randn_like(leaf)
        lr = 0.1 / (step + 1)
        for r, g in zip(rows.tolist(), leaf.grad, strict=True):
            oracle[r].grad, adams[r].param_groups[0]["lr"] = g.clone(), lr
            adams[r].step()
        mine.step([Read(rows, leaf, None, None)], lr)
    torch.testing.assert_close(table, torch.stack(oracle).detach())


def test_muon_is_torch_muon_on_each_matrix():
    """Matrices that only share a parameter made orthogonal as one; a shape mixed up."""
    def apart(name, x):
        parts = next((n for word, n in (("qkv", 3), ("w_in", 2)) if word in name), 1)
        experts = x.view(-1, *x.shape[-2:])              # one, if it is no expert's
        return [matrix for w in experts for matrix in w.chunk(parts, x.ndim - 2)]

    model, matrices = tiny_gpt(torch.float32), []
    mine = train.optimisers(model, train.Config(dtype="bfloat16"))[0][1]
    known = {p for group in mine.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p in known:
            p.grad = torch.empty_like(p)
            for view, grad in zip(apart(name, p.data), apart(name, p.grad), strict=True):
                matrices.append((view, grad, torch.nn.Parameter(view.clone())))
    oracle = torch.optim.Muon([slow for _, _, slow in matrices], 0.02, 0.1,
                              adjust_lr_fn="match_rms_adamw")
    for group in mine.param_groups:
        group["lr"] = 0.02
    for _ in range(3):
        for _, grad, slow in matrices:
            slow.grad = grad.normal_().clone()
        mine.step()
        oracle.step()
    for fast, _, slow in matrices:
        torch.testing.assert_close(fast, slow.data, rtol=0, atol=1e-3)
    assert len(matrices) == 3 * (3 + 1 + 2 + 1 + 4 * (2 + 1)) + 2 * 2


@pytest.mark.parametrize("gate, orders, dilation", [("plain", (1, 2), 0), ("off", (2, 3), 5)])
def test_gates_and_dilations_that_the_demo_lacks(gate, orders, dilation):
    """A switch that changes nothing, taps in reverse, a leak from the future."""
    module = tiny_module(gate=gate, orders=orders, conv_dilation=dilation)
    torch.nn.init.normal_(module.conv.taps)
    h, x = torch.randn(2, 30, 8), torch.randint(0, 30, (2, 30))
    read = module.read(module.address(x))
    e, alpha = lookup(read), 1
    if gate == "plain":
        dot = F.rms_norm(module.key(e), (8,)) * F.rms_norm(h, (8,))
        alpha = torch.sigmoid(dot.sum(-1, keepdim=True) / math.sqrt(8))
    v = alpha * module.value(e)
    dilation = dilation or orders[-1]
    past = F.pad(F.rms_norm(v, (8,), eps=1e-5).mT, (3 * dilation, 0))
    conv = F.conv1d(past, module.conv.taps.T[:, None], groups=8, dilation=dilation)
    torch.testing.assert_close(module(h, read), v + F.silu(conv.mT))


def slow_moe(moe, x):
    """One token and one expert after the other."""
    flat = x.reshape(-1, x.size(-1))
    affinity = torch.sigmoid(flat @ moe.router.weight.T)
    gate, up = (flat @ moe.shared.w_in.weight.T).chunk(2, dim=-1)
    out = (F.silu(gate) * up) @ moe.shared.w_out.weight.T
    for s in range(len(flat)):
        order = torch.argsort(affinity[s] + moe.bias, descending=True)[:moe.top_k].tolist()
        total = sum(affinity[s, i] for i in order)
        for i in order:
            gate, up = (flat[s] @ moe.w_in[i]).chunk(2)
            y = (F.silu(gate) * up) @ moe.w_out[i]
            out[s] = out[s] + affinity[s, i] / total * y
    return out.view_as(x)


def tiny_moe(top_k=2):
    moe = MoE(16, 12, 5, 8, top_k).double()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    moe.bias.normal_(std=0.1)
    return moe


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_moe_is_the_weighted_sum_over_experts(top_k):
    """Results put back in another token's place, a bias that leaks into the weights; in bf16
    a gradient that reaches padding; an expert that nobody chose."""
    moe = tiny_moe(top_k)
    weights = list(moe.parameters())

    def check(fast, x, near):
        slow = slow_moe(moe, x)
        torch.testing.assert_close(fast, slow, rtol=near, atol=near)
        found, want = (torch.autograd.grad((y * x).sum(), weights) for y in (fast, slow))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=near, atol=near * max(1, b.abs().max()))

    for T in (1, 7):                         # 7 are sorted; 1 is the path of decoding
        x = torch.randn(2, T, 16, dtype=torch.float64)
        check(moe(x), x, 1e-11)
    moe.bias[3] = -9
    flat = x.view(-1, 16)
    for dtype, grouped, near in ((torch.float32, True, 1e-5), (torch.bfloat16, False, 0.1),
                                 (torch.bfloat16, True, 0.1)):
        chosen, weight, counts = moe.route(flat)
        routed = moe.experts(flat.to(dtype), chosen, weight.to(dtype), counts, grouped)
        check(moe.shared(x) + routed.view_as(x), x, near)


def test_moe_bias_moves_against_the_load():
    """The busiest expert gets busier; evaluation as load; 0/0 where sigmoids vanish."""
    moe, x = tiny_moe().float(), torch.randn(4, 64, 16)
    moe.bias[2] = 1.0                        # nearly every token takes expert 2
    uneven = []
    for _ in range(60):
        moe(x)
        uneven.append(moe.move_bias(0.05).item())
    assert uneven[0] > 2.2 and np.mean(uneven[-5:]) < 1.5
    moe.eval()
    torch.nn.init.constant_(moe.router.weight, -10.0)
    assert moe(torch.ones(1, 7, 16)).isfinite().all() and moe.load.sum() == 0


@pytest.mark.parametrize("control", [False, True])
def test_cached_decoding_is_the_full_forward(control):
    """The hash, the convolution, rotary positions or the mask forgetting the past."""
    model = tiny_gpt(engram=tiny_engram(orders=(2, 4), stop_at_eot=control),
                     conv_in=control - 1, untied=control)
    idx = torch.randint(0, VOCAB, (2, 20))
    idx[0, 6] = VOCAB - 1
    cache = Cache(model.cfg)
    pieces = [model(part, cache=cache)[0] for part in idx.split([2, 1, 7, 1, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(idx)[0], rtol=0, atol=1e-10)


def test_attention_by_hand_is_sdpa():
    """A mask off by one, or none, in the form that a CPU takes in bf16."""
    q, k, v = torch.randn(3, 2, 4, 10, 8, dtype=torch.float64)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    torch.testing.assert_close(half.double(), full, rtol=0, atol=0.05)


def test_a_parameter_that_nobody_initialises():
    """A matrix that a reader adds, and that keeps what happened to be in memory."""
    model = tiny_gpt()
    model.extra = torch.nn.Parameter(torch.empty(3, 3))
    with pytest.raises(ValueError, match="extra"):
        model.reset()


def test_n_grams_that_share_a_row():
    """Token ids counted for canonical ids, all n-grams for the different ones, or those that
    lie across two sequences; long n-grams of which only the first tokens count."""
    # in canonical ids the first is a b a b a: two 2-grams, two 3-grams
    x, pieces = np.array([[0, 1, 2, 1, 0], [0, 0, 0, 0, 0]]), [b"a", b"b", b" A"]
    lines = crowding({"engram": EngramConfig(rows=(2, 4))}, x, pieces)
    # in the second sequence one of each; none lies across the two
    assert len(lines) == 1 and "1.5 2-grams and 0.8 3-grams" in lines[0]
    x = torch.randint(2, (50, 20)).numpy() * 1023
    windows = np.lib.stride_tricks.sliding_window_view(x, 9, axis=1).reshape(-1, 9)
    numbers = prepare_data.grams(x, 9, 1024)
    assert len(np.unique(numbers)) == len(np.unique(windows, axis=0)) > 200


@pytest.mark.parametrize("rho", [0, 0.75, 0.9])
@pytest.mark.parametrize("memory, untied", [({}, False), (dict(blocks=(0, 2), width=8), True),
                                            (dict(orders=(1,), conv_kernel=0), False)])
def test_twins_agree(rho, memory, untied):
    """An unfair comparison: other totals or active parameters, a twin with less compute;
    a matmul that is not counted, or a table that is."""
    cfg = GPTConfig(n_embd=192, n_head=3, n_expert=24, expert_hidden=96, shared_hidden=192,
                    untied=untied, engram=EngramConfig(**memory))
    shapes = make_twins(cfg, rho)
    models = [GPT(shapes[name], np.arange(4096)).eval() for name in ("engram", "moe")]
    a, b = map(accounting, models)
    assert a["P_tot"] == pytest.approx(b["P_tot"], rel=0.005)
    assert a["P_act"] == pytest.approx(b["P_act"], rel=0.005) and a["P_act"] <= b["P_act"]
    assert a["flops_per_token"] <= b["flops_per_token"]
    weights = sum(p.numel() for p in models[0].parameters()) - 4096 * 192
    assert a["P_tot"] == weights + sum(e.table.numel() for e in models[0].engrams())
    assert b["P_sparse"] == 4 * (24 - 2) * 3 * 192 * 96 + untied * 4095 * 192
    if not untied:
        assert a["rho"] == pytest.approx(rho, abs=0.025)
    # what one token really multiplies; without a context its attention is next to nothing
    attention = 4 * cfg.n_layer * cfg.n_embd * cfg.block_size
    for model, size in zip(models, (a, b)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, dtype=torch.long))
        counted = counter.get_total_flops()
        assert size["flops_per_token"] - attention == pytest.approx(counted, rel=0.002)


# ---- train.py, as a user runs it -------------------------------------------------------

TINY = ("--n_embd 16 --n_head 2 --block_size 32 --n_layer 2 --n_expert 4 --expert_hidden 8 "
        "--shared_hidden 8 --engram_heads 2 --engram_width 4 --tokens_per_step 128 "
        "--batch_size 2 --steps 12 --eval_every 4 --eval_tokens 256 --dtype float32 "
        "--rho 0.5 --device cpu").split()


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Two tiny twins in one out_dir; the memory made loud, so that it shows."""
    out = tmp_path_factory.mktemp("out")
    run(train, *corpus, *TINY, "--out_dir", out)
    path = out / "engram" / "ckpt.pt"
    saved = load_checkpoint(path)[0]
    saved["model"]["blocks.1.engram.value.weight"] *= 30
    torch.save(saved, path)
    return out


def log(out, name="engram"):
    return [json.loads(line) for line in open(Path(out) / name / "log.jsonl")]


def assert_same_run(a, b):
    """Curves, weights, tables and moments are equal to the last bit."""
    found = []
    for out in (a, b):
        curve = [(r["step"], r["val_loss"], r["train_loss"]) for r in log(out)[1:]]
        saved = load_checkpoint(out / "engram" / "ckpt.pt")[0]
        found.append([curve, saved["model"], saved["tables"]])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_train_and_side_by_side(corpus, tmp_path, capsys, monkeypatch):
    """A step of the whole way that breaks, also with a notebook's backend; other bits than
    one after the other; a gap at another step; a model that dies, and the rest trains on."""
    monkeypatch.setenv("MPLBACKEND", "module://nowhere.backend")
    folders = [tmp_path / "one", tmp_path / "two"]
    for threads, out in enumerate(folders, start=1):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        run(train, *corpus, *TINY, "--out_dir", out)
        printed = capsys.readouterr().out
        for record, twin in zip(log(out)[1:], log(out, "moe")[1:], strict=True):
            gap = f"{record['val_loss'] - twin['val_loss']:+.4f}"
            line = re.search(f"engram step {record['step']} of 12, .*", printed)[0]
            assert line.endswith(f"{gap} against moe")
        assert "\n".join(runs.compare(out)) in printed
        assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert_same_run(*folders)
    records = log(out)[1:]
    assert records[-1]["val_loss"] < records[0]["val_loss"] < math.log(400) + 0.1
    assert 0 < records[-1]["gate_mean"][0] < 1 and 0 < records[-1]["rows_touched"][0] <= 1
    # one dies while the others have long to go
    (out / "large" / "ckpt.pt").write_bytes(b"")
    argv = shlex.join([*corpus, *TINY, "--steps", "50000", "--out_dir", str(out)])
    limit = f"OMP_NUM_THREADS=2 timeout 300 {sys.executable}"
    done = shell(f"{limit} train.py --resume {argv}")
    assert done.returncode == 2 and done.stderr.count("not a readable checkpoint") == 1


def test_killed_run_resumes_exactly(corpus, tmp_path):
    """kill -9, then --resume with the table elsewhere: another data order, fresh moments, a
    broken checkpoint; rows read before their update, or the gradient of other rows."""
    argv = [*corpus, *TINY, "--model", "engram", "--engram_blocks", "0", "1", "--steps", "100",
            "--eval_every", "10", "--table"]
    for where in ("resident", "host"):
        run(train, *argv, where, "--out_dir", tmp_path / where)
    for first, then in (("host", "resident"), ("resident", "host")):
        out = tmp_path / f"{first} then {then}"
        path = out / "engram" / "ckpt.pt"
        with started("train.py", *argv, first, "--out_dir", out):
            wait_until(path.exists, 300)
        assert 10 <= load_checkpoint(path)[0]["step"] < 100, "killed too late"
        run(train, *argv, then, "--out_dir", out, "--resume")
    for out in tmp_path.iterdir():
        assert_same_run(out, tmp_path / "resident")


@pytest.mark.parametrize("flags", [
    "--engram_gate off --engram_conv_kernel 0", "--engram_orders 1 --dtype bfloat16",
    "--engram_stop_at_eot --no-engram_bias --engram_gate plain --engram_rows 1",
    "--no-engram_compress --engram_orders 2 9 --n_expert 6", "--model moe --n_expert 0",
    "--model moe --n_layer 1", "--model moe --n_expert 2 --device cpu:0"])
def test_variants_train(corpus, tmp_path, flags):
    """A parameter without a gradient, a twin that cannot be paid."""
    run(train, *corpus, *TINY, "--steps", 4, "--rho", 0.3, "--out_dir", tmp_path,
        *flags.split())


def test_resume_takes_what_fits(corpus, tmp_path, refused, monkeypatch):
    """Longer training refused; a model, an order of data, a tokenizer or a hash accepted
    that is not the checkpoint's; half a file, or damaged numbers; NaNs trained on, or saved
    over it."""
    argv = [*corpus, *TINY, "--model", "engram", "--out_dir", tmp_path]
    again = [run, train, *argv, "--resume"]
    path, right = tmp_path / "engram" / "ckpt.pt", Engram.hash
    refused("nothing to resume", *again)
    run(train, *argv)
    refused("--resume", run, train, *argv)
    run(*again[1:], "--steps", 20, "--batch_size", 4, "--eval_every", 5, "--table", "host")
    header, *records = log(tmp_path)
    assert [r["step"] for r in records] == [4, 8, 12, 15, 20]
    assert header["config"]["steps"] == 20 and header["resumed"][0]["steps_before"] == 12
    for flag, value in (("steps", 12), ("n_embd", 32), ("engram_heads", 4), ("seed", 1)):
        refused(f"{flag} (", *again, f"--{flag}", value)
    whole, saved = path.read_bytes(), load_checkpoint(path)[0]
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda step, cfg: math.inf)
        refused("step 21", *again, "--steps", 30)
        assert path.read_bytes() == whole
        patch.setattr(Engram, "hash", lambda self, *args: right(self, *args) // 2)
        refused("another hash", *again)
    saved["run"]["tokenizer"] = "0" * 64
    torch.save(saved, path)
    refused("tokenizer (000", *again)
    damaged = whole[:-60_000] + bytes(999) + whole[-59_001:]
    for broken in (whole[:len(whole) // 2], damaged, b"not a checkpoint"):
        path.write_bytes(broken)
        refused("not a readable checkpoint", *again)


@pytest.mark.parametrize("writer", [lambda file: file.write(bytes(99999)),
                                    partial(torch.save, torch.zeros(9999))])
def test_what_was_there_is_kept(tmp_path, refused, writer):
    """Half a file in place of a whole one; torch's own errors for a full disk or Ctrl-C."""
    def interrupted(data):
        if len(data) > 9999:                 # what torch writes at the end succeeds
            raise KeyboardInterrupt

    path = tmp_path / "a"
    path.write_text("before")
    (tmp_path / f"a.{os.getpid()}.part").symlink_to("/dev/full")
    refused("No space left", common.write_whole, path, writer)
    refused("no ordinary file", common.write_whole, tmp_path, writer)
    with pytest.raises(KeyboardInterrupt):
        common.write_whole(path, lambda file: writer(Mock(write=interrupted)))
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "before"


@pytest.mark.parametrize("script, flags, word", [
    (train, "--no_such_flag 1", "unrecognized"), (train, "--lr nan", "lr nan"),
    (train, "--n_head 3", "2 * n_head"), (train, "--engram_blocks 7", "blocks 0 to 1"),
    (train, "--engram_orders 3 2", "increasing"), (train, "--rho 0.9", "no row"),
    (train, "--device mps", "--device cpu"), (train, "--dataset no", "not prepared"),
    (train, "--block_size 50000 --tokens_per_step 100000", "block_size"),
    (train, "--engram_rows 9999999999", "GB"),
    (train, "--n_embd 1000000000", "overflow"), (train, "--compile", "C++ compiler"),
    (sample, "--model moe --memory", "no memory"),
    (sample, "--model moe --write a b", "no memory"), (sample, "--png a.png", "needs"),
    (sample, "--max_new_tokens 0", "nothing to do"), (sample, "--temperature nan", "nan"),
    (sample, f"--prompt FILE:{HERE / 'test_vectors.npz'}", "utf-8"),
    (bench_offload, "--link_gbps nan", "gbps"), (prepare_data, "--vocab_size 256", "257"),
    (prepare_data, "pyhton", "python, tinystories"), (prepare_data, ".", "a folder"),
    (prepare_data, f"{__file__} --max_mb 1", "--max_mb 1"),
    (prepare_data, f"{__file__} --name python", "--name python")])
def test_usual_mistakes(corpus, trained, tmp_path, refused, monkeypatch, script, flags, word):
    """A traceback, a wall of usage, or a run that ignores what was asked."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    argv = {train: [*corpus, *TINY, "--out_dir", tmp_path], sample: ["--out_dir", trained],
            bench_offload: ["--out", tmp_path], prepare_data: ["--data_dir", tmp_path]}
    refused(word, run, script, *argv[script], *flags.split())


def shell(command):
    """Run a command of the shell in our folder."""
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=HERE)


@contextmanager
def started(*command):
    """A script that Ctrl-C reaches even where our parent ignores it, killed at the end."""
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, *command], cwd=HERE, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          preexec_fn=listen) as child:
        try:
            yield child
        finally:
            child.kill()


def test_ctrl_c_shows_how_to_continue(corpus, tmp_path, monkeypatch):
    """A traceback, another exit code than 130, a command that does not resume; a model side
    by side, or a worker that reads its table, that goes on."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    argv = [*corpus, *TINY, "--table", "host", "--steps", "3000", "--out_dir", str(tmp_path)]
    with started("train.py", *argv) as stopped:
        wait_until((tmp_path / "moe" / "ckpt.pt").exists, 300)
        stopped.send_signal(signal.SIGINT)
        # the pipes close when the last process has ended
        said = stopped.communicate(timeout=300)[1]
    assert stopped.returncode == 130 and "Traceback" not in said
    with started(*said.strip().partition("continue with: python ")[2].split()):
        wait_until(lambda: "resumed" in log(tmp_path, "moe")[0], 300)


def test_runs_that_are_no_twins(corpus, trained, tmp_path):
    """An old run of another shape compared as a twin; a share off by an evaluation; a log
    that was cut short and is not written again."""
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / "moe" / "log.jsonl"
    path.write_text("{")
    run(train, *corpus, *TINY, "--out_dir", out, "--resume")
    assert "larger table" in runs.compare(out)[-2]
    whole, p_tot = path.read_text(), log(out, "moe")[0]["accounting"]["P_tot"]
    for old, new in (('"n_layer": 2', '"n_layer": 3'), ('"seed": 0,', '"seed": 1,'),
                     (f'"P_tot": {p_tot}', f'"P_tot": {2 * p_tot}')):
        path.write_text(whole.replace(old, new))
        assert "not comparable" in runs.compare(out)[-1]
    records = [{"tokens": t, "val_loss": v} for t, v in ((10, 5), (20, 3), (30, 2))]
    assert [runs.crossing(records, loss) for loss in (4, 6, 1)] == [15, 10, None]


def test_out_of_memory_is_one_line(corpus, tmp_path, monkeypatch, refused):
    """A traceback where a smaller batch would do."""
    def forward(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    monkeypatch.setattr(GPT, "forward", forward)
    refused("--batch_size", run, train, *corpus, *TINY, "--model", "moe", "--out_dir", tmp_path)


def test_ranks_train_as_one_process(corpus, tmp_path):
    """A gradient that is not averaged, rows that get lost or are updated twice, experts that
    are balanced by one rank's load; a checkpoint that another number cannot resume; an error
    that every rank prints; a load that takes the message with it into the checkpoint."""
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node"
    argv = [*corpus, *TINY, "--model", "engram", "--engram_blocks", 0, 1]
    said = shell(f"{torchrun} 3 train.py {shlex.join(map(str, argv))}").stderr
    assert said.count("processes * batch_size") == 1
    argv += ["--tokens_per_step", 192]
    results, sizes = [], []
    for numbers in ((1, 1, 1), (1, 3, 2)):
        out = tmp_path / str(sum(numbers))
        for n, where, steps in zip(numbers, ("host", "host", "resident"), (4, 8, 12)):
            # one process adds up micro-batches, where several share a step
            flags = [*argv, "--batch_size", 3 // n, "--table", where, "--steps", steps]
            flags += ["--out_dir", out] + ["--resume"] * out.exists()
            if n == 1:
                run(train, *flags)
            else:
                done = shell(f"{torchrun} {n} train.py {shlex.join(map(str, flags))}")
                assert done.returncode == 0 and done.stdout.count("training tokens") == 1
        path = out / "engram" / "ckpt.pt"
        saved = load_checkpoint(path)[0]
        sizes.append(path.stat().st_size)
        results.append([saved["model"], saved["records"][-1]["train_loss"]])
    torch.testing.assert_close(*results, rtol=0, atol=5e-4)
    assert sizes[1] < 1.1 * sizes[0]


def test_a_rank_that_dies_ends_the_others(corpus, tmp_path):
    """Processes that wait for ever."""
    argv = [*corpus, *TINY, "--model", "engram", "--out_dir", tmp_path]
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py".split()
    with started(*command, *map(str, argv), "--steps", "100000") as torchrun:
        wait_until((tmp_path / "engram" / "ckpt.pt").exists, 300)
        children = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        torchrun.communicate(timeout=60)
    assert torchrun.returncode == 1


# ---- where the table lives -------------------------------------------------------------

class Slow(Fetch):
    """Counts its gathers, takes time for each, and fails if told to."""
    begun, works, seconds = 0, True, 0.002

    def gather(self, *args):
        Slow.begun += 1
        time.sleep(self.seconds)
        if not self.works:
            raise OSError("the disk does not answer")
        return super().gather(*args)


@pytest.mark.parametrize("prefetch", [True, False])
def test_offloaded_is_resident_bit_for_bit(prefetch, refused, monkeypatch):
    """Rows of another layer, batch or step; a buffer used again before it is read; a gather
    that rounds; a device that errs."""
    model, idx = tiny_gpt(torch.float32), torch.randint(VOCAB, (3, 20))
    idx[1, 5:15] = idx[0, 5:15]

    def outputs():
        check_rows(model, idx)
        cache = Cache(model.cfg)
        chunks = [model(part, cache=cache)[0] for part in idx.split([1, 1, 7, 11], dim=1)]
        text = torch.tensor(list(generate(model, idx[:1, :4], 20, temperature=0)))
        # a flood of reads under way at once: some dropped, the others used in another order
        reads = [model.read(model.addresses(row[None])) for row in idx.repeat(20, 1)]
        late = [model(idx[i % 3][None], reads=reads.pop(i))[0] for i in (58, 31, 2, 1, 0)]
        return [model(idx)[0], *chunks, text, *late]

    want = outputs()
    monkeypatch.setattr("offload.Fetch", Slow)
    place(model, "cpu", "host", prefetch)
    assert all(read.ready for read in model.read(model.addresses(idx)))
    assert all(map(torch.equal, outputs(), want))
    right = Engram.read
    monkeypatch.setattr(Engram, "read", lambda self, address: right(
        self, address._replace(inverse=address.inverse.roll(1, 1))))
    refused("other rows", check_rows, model, idx)


def test_reads_start_early(monkeypatch):
    """A prefetch that begins too late; a hang, or a silent empty row, where the worker
    fails."""
    monkeypatch.setattr("offload.Fetch", Slow)
    monkeypatch.setattr(Slow, "begun", 0)
    monkeypatch.setattr(Slow, "seconds", 0.05)
    model, idx = tiny_gpt(), torch.randint(VOCAB, (1, 4))
    place(model, "cpu", "host")
    for n, _ in zip(range(2, 8), generate(model, idx, 20), strict=False):
        wait_until(lambda n=n: Slow.begun >= 2 * n)       # two layers; one read ahead
        assert Slow.begun == 2 * n
    monkeypatch.setattr(Slow, "works", False)
    with pytest.raises(OSError, match="does not answer"):
        model(idx)
    # at the place of use: not before
    Slow.begun, Slow.works = 0, True
    place(model, "cpu", "host", prefetch=False)
    reads = model.read(model.addresses(idx))
    time.sleep(0.1)
    assert Slow.begun == 0
    model(idx, reads=reads)
    assert Slow.begun == 2


def test_addresses_are_ready_a_step_ahead(corpus, tmp_path, monkeypatch):
    """A forward pass for which the host waits; addresses that wait for the update before,
    or are those of other tokens: of the targets, they would tell the answer."""
    def checked(self, idx, targets=None, reads=None, cache=None):
        for engram, read in zip(self.engrams(), reads or []):
            assert torch.equal(read.row_ids[read.inverse], engram.hash(self.canonical[idx]))
        return forward(self, idx, targets, reads, cache)

    model, idx = tiny_gpt(n_expert=0), torch.randint(VOCAB, (2, 8))
    addresses = model.addresses(idx)
    # a device without data: nothing can come back from it to the host
    model.to("meta")
    reads, idx = model.read(addresses), idx.to("meta")
    model(idx, idx, reads)[1].backward()
    assert all(read.leaf.grad.is_meta for read in reads)
    order, addresses, step, forward = [], GPT.addresses, RowAdam.step, GPT.forward
    monkeypatch.setattr(GPT, "forward", checked)
    monkeypatch.setattr(GPT, "addresses", lambda *args: order.append(1) or addresses(*args))
    monkeypatch.setattr(RowAdam, "step", lambda *args: order.append(2) or step(*args))
    run(train, *corpus, *TINY, "--model", "engram", "--out_dir", tmp_path)
    # up to the first evaluation, after four steps
    assert order[:9] == [1, 1, 2, 1, 2, 1, 2, 1, 2]


def test_another_accelerator_takes_the_plain_path():
    """A stream, an event or pinned memory of CUDA where there is none; a leaf that the worker
    may not write."""
    class Elsewhere(torch.Tensor):
        device = property(lambda self: torch.device("mps"))

        def numpy(self):
            raise TypeError("not in host memory")

    table, row_ids = torch.randn(50, 4), torch.tensor([3, 7, 11])
    with torch.inference_mode():
        leaf = torch.empty(3, 4).as_subclass(Elsewhere)
    assert Fetch().gather(table, row_ids, leaf, None) is None
    assert torch.equal(leaf.as_subclass(torch.Tensor), table[row_ids])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_gpu
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
    assert not any(engram.table.is_cuda for engram in model.engrams())


@needs_gpu
def test_train_on_a_gpu(corpus, tmp_path):
    """A tensor left on the CPU, a state that resumes on the wrong device."""
    argv = [*corpus, *TINY, "--preset", "laptop", "--device", "cuda", "--dtype", "bfloat16"]
    run(train, *argv, "--out_dir", tmp_path)
    run(train, *argv, "--out_dir", tmp_path, "--resume", "--steps", 16, "--table", "host")
    assert log(tmp_path)[-1]["val_loss"] < math.log(400)


# ---- sample.py -------------------------------------------------------------------------

@pytest.fixture
def look(trained, capsys):
    """look(*argv): what sample.py prints."""
    def printed(*argv):
        capsys.readouterr()
        run(sample, "--out_dir", trained, *argv)
        return capsys.readouterr().out
    return printed


def test_sampling(trained, look, tmp_path):
    """Flags that change nothing, samples that cannot be repeated one by one; a prompt cut at
    its end, a file read as its name, a marker as characters."""
    texts = {}
    for flags in ("", "--seed 1", "--num_samples 2", "--temperature 0", "--top_k 1",
                  "--max_new_tokens 5", "--temperature 0.8", "--model large"):
        texts[flags] = look("--prompt", "w1 w2", *flags.split())
    assert len(set(texts.values())) == len(texts) - 1
    assert texts["--num_samples 2"] == texts[""] + "-" * 20 + "\n" + texts["--seed 1"]
    assert texts["--temperature 0"] == texts["--top_k 1"]
    assert look("--prompt", EOT) == look()
    enc = prepare_data.encoding(load_checkpoint(trained / "engram" / "ckpt.pt")[0]["tokenizer"])
    text, file = "w1 w3 " * 60, tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert sample.prompt_tokens(f"FILE:{file}", enc, 32) == enc.encode_ordinary(text)[-32:]
    assert sample.prompt_tokens(f"w1{EOT}w2", enc, 32).count(enc.eot_token) == 2
    blanks = " " * 1_000_000                     # more than tiktoken takes at once
    assert enc.decode(prepare_data.encode_text(enc, blanks)) == blanks


def test_text_is_streamed_in_whole_characters(monkeypatch):
    """Half an emoji on the terminal, or lost at the end; an end of text that goes on."""
    enc = prepare_data.encoding(prepare_data.make_tokenizer("bpe", ["ab ab ab"], 259))
    made = [enc.encode_single_token(bytes([b])) for b in "h\u00e9\U0001f600!".encode()]
    made += [enc.eot_token, 65]
    monkeypatch.setattr(sample, "generate", lambda *args, **how: iter(made))
    whole = ["h", "", "\u00e9", "", "", "", "\U0001f600", "!"]
    texts = [text for _, text in sample.complete(tiny_gpt(), enc, [0])]
    assert texts == [*whole, ""]
    del made[5:]                                          # it ends within the emoji
    texts = [text for _, text in sample.complete(tiny_gpt(), enc, [0])]
    assert texts == [*whole[:5], "\ufffd"]


@pytest.mark.parametrize("length", [1, 20, 32, 50])
def test_beyond_the_context_is_going_on_by_hand(length):
    """A cache that outlives its text, or computes it again; a half that is not the last."""
    model, made, sizes = tiny_gpt(), [], []
    prompt = torch.randint(0, 60, (1, length))
    hook = model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].size(1)))
    new, context = list(generate(model, prompt, 60, temperature=0)), prompt[:, -32:]
    hook.remove()
    assert sizes[0] == context.size(1) and set(sizes[1:]) == {1, 16}
    for _ in range(60):
        logits = model(context)[0][:, -1]
        best = logits.argmax(-1, keepdim=True)
        made.append(best.item())
        kept = context if context.size(1) < 32 else context[:, -15:]
        context = torch.cat([kept, best], dim=1)
    assert new == made


def test_values_stand_beside_their_tokens(trained, look):
    """A sign turned round, a value beside the wrong token."""
    saved, model = load_checkpoint(trained / "engram" / "ckpt.pt")
    enc, argv = prepare_data.encoding(saved["tokenizer"]), ["--prompt", "w1 w3 w1"]
    ids = sample.prompt_tokens("w1 w3 w1", enc, 32)
    pairs = sample.complete(model, enc, ids, max_new_tokens=8, temperature=0.5)
    for tokens, _ in pairs:
        ids += tokens
    x, y = torch.tensor([ids]), torch.tensor(ids[1:])
    with torch.no_grad(), watch(model) as seen:
        on, off = (F.cross_entropy(model(x, reads=reads)[0][0, :-1], y, reduction="none")
                   for reads in (None, []))
    gates = seen[0]["gate"][0][0][1:]
    for flag, values in (("--gates", gates), ("--memory", off - on)):
        printed = look(*argv, "--max_new_tokens", 8, flag)
        shown = [f"{enc.decode([i])}[{v:+.2f}]" for i, v in zip(ids[1:], values.tolist())]
        # a line break is shown too, and a number stands before it
        assert "".join(shown).replace("\n", "") in re.sub("[\u21b5\n]", "", printed)


def test_writing_a_fact(trained, tmp_path, look, refused):
    """A weight or another row that moves, a token out of reach that changes, a checkpoint
    that is written over."""
    model, x = tiny_gpt(torch.float32), torch.randint(VOCAB, (5, 30))
    x[0] = 7                                   # reads nothing of the fact
    model.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    old, new, reads, reached, changed, other = sample.teach(model, [1, 2, 3], [4, 50], x)
    assert new > 2 * old and not (changed & ~reached).any() and not (other & ~changed).any()
    assert reads.any() and not reached[0].any() and (changed >= reads).all()
    for i, engram in enumerate(model.engrams()):
        rows = engram.hash(model.canonical[torch.tensor([[1, 2, 3, 4]])])[0, 2:]
        mine = torch.isin(torch.arange(len(engram.table)), rows)
        key = f"blocks.{(0, 2)[i]}.engram.table"
        assert torch.equal((engram.table != before.pop(key)).any(1), mine)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    path = trained / "engram" / "ckpt.pt"
    whole = path.read_bytes()
    how = ["--max_new_tokens", 3, "--table", "disk"]
    text = look("--write", "w1 w2", " w3", "--save", tmp_path, *how)
    assert text == look("--out_dir", tmp_path, "--prompt", "w1 w2", *how) != look(
        "--prompt", "w1 w2", *how)
    refused("needs --write", look, "--write", "w1", " w2", "--save", tmp_path)
    refused("0 tokens", look, "--write", "w1", "")
    refused("to 31", look, "--write", "w1", "x" * 99)
    look("--write", "w1 " * 40, " w3 w4 w5", "--max_new_tokens", 3)      # cropped, and fits
    assert path.read_bytes() == whole


@pytest.mark.filterwarnings("error")
def test_shades_and_their_picture(look, tmp_path):
    """Text lost between the colours, a number that reads as text, a sign that is a formula."""
    tokens = [("def", 1.0, 0.5), (" f\u21b5\n\u21b5\n  ", -0.5, -1), ("x", 0.0, 0)]
    plain = "def[+1.00] f\u21b5[-0.50]\n\u21b5\n  x[+0.00]"
    assert sample.shaded(tokens, colour=False) == plain
    coloured = sample.shaded(tokens, colour=True)
    assert re.sub("\x1b.*?m", "", coloured) == re.sub(r"\[.*?\]", "", plain)
    assert "48;2;168;202;255m" in coloured and sample.tint(-1) == (255, 190, 110)
    path = tmp_path / "a.png"
    look("--prompt", "$x_1$", "--memory", "--png", path, "--max_new_tokens", 60)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_checkpoint_is_the_file_of_the_table(trained, look, tmp_path, refused):
    """--table disk: a table copied into memory or written to, a file cut short and read."""
    path, copy = trained / "engram" / "ckpt.pt", tmp_path / "engram" / "ckpt.pt"
    before, places = path.read_bytes(), ("resident", "host", "disk")
    texts = {look("--table", where, "--memory") for where in places}
    assert len(texts) == 1 and path.read_bytes() == before
    # the table lies in the part of memory that is mapped from the file
    model = load_checkpoint(path, map_file=True)[1]
    start = model.engrams()[0].table.data_ptr()
    for line in open("/proc/self/maps"):
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        assert not low <= start < high or str(path) in line
    copy.parent.mkdir()
    copy.write_bytes(before[:-100])
    refused("not a readable", run, sample, "--out_dir", tmp_path, "--table", "disk")


def test_an_output_that_takes_no_more(trained):
    """A traceback or an error in the pipe to head, silence on a full disk."""
    command = f"{sys.executable} sample.py --out_dir {trained} --max_new_tokens 5"
    closed = shell(f"{command} --num_samples 2000 | head -n1; exit ${{PIPESTATUS[0]}}")
    assert closed.returncode == 141 and closed.stdout.count("\n") == 1
    assert "error" not in closed.stderr and "Traceback" not in closed.stderr
    full = shell(f"{command} > /dev/full")
    assert full.returncode == 2 and full.stderr.count("No space left") == 1


# ---- preparing data --------------------------------------------------------------------

CODE_TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i}  # ä€ it's\n\n"
                    for i in range(60))


def naive_bpe(text, n_merges):
    """The definition: count all pairs anew before each merge."""
    counts, words = Counter(regex.findall(prepare_data.PATTERN, text)), {}
    for word in counts:
        words[word] = [bytes([b]) for b in word.encode()]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 256 + n_merges:
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs or max(pairs.values()) < 2:
            break
        a, b = min(pairs, key=lambda p: (-pairs[p], tokens.index(p[0]), tokens.index(p[1])))
        tokens.append(a + b)
        for parts in words.values():
            for i in range(len(parts) - 1):
                if parts[i:i + 2] == [a, b]:
                    parts[i:i + 2] = [a + b]
    return tokens, words


def test_bpe_is_the_naive_one_and_tiktoken_runs_it():
    """Counts that drift, ties by hash order, a text too short for so many merges."""
    text = CODE_TEXT + "".join(random.Random(0).choices("aaabbcd \n\u20ac", k=9000))
    tokens, words = naive_bpe(text, 150)
    assert prepare_data.train_bpe([text], 150) == tokens and len(tokens) == 406
    assert prepare_data.train_bpe(["one two one"], 150) == naive_bpe("one two one", 150)[0]
    tok = json.loads(json.dumps(prepare_data.make_tokenizer("bpe", [text], 407)))
    enc, of_id = prepare_data.encoding(tok), prepare_data.token_bytes(tok)
    assert of_id == [*tokens, EOT.encode()] and enc.n_vocab == 407
    for word, parts in words.items():
        assert [of_id[i] for i in enc.encode_ordinary(word)] == parts
    for odd in ["\x00\ud7ff\U0001f600 e\u0301\r\n\t", EOT, *map(chr, range(1, 3000))]:
        assert enc.decode_bytes(enc.encode_ordinary(odd)) == odd.encode()


@pytest.mark.parametrize("letters, size, block_size", [
    ("\u7684\u4e00", 1_000_000, 256), (" ", 1_000_000, 256), ("!?.,;", 3_000, 64), (" ", 500, 8)])
def test_odd_and_small_texts(tmp_path, letters, size, block_size, monkeypatch):
    """Half an hour of merging in one word of a million letters; text that is lost; too
    little of it for validation."""
    monkeypatch.setattr(prepare_data, "MAX_WORDS", 3_000)
    text = "".join(random.Random(0).choices(letters, k=size))
    (tmp_path / "t.txt").write_text(text)
    run(prepare_data, tmp_path / "t.txt", "--data_dir", tmp_path)
    meta, *bins = prepare_data.load("t", tmp_path)
    enc = prepare_data.encoding(meta["tokenizer"])
    train, val = (enc.decode(list(ids)).replace(EOT, "") for ids in bins)
    assert train + val == text and meta["vocab_size"] > 256
    assert len(val) == pytest.approx(max(size / 20, min(size / 4, 4096)), abs=2)
    data = prepare_data.Data("t", tmp_path, block_size, 8, 50, 0, 65536)
    assert len(data.val_x) >= 1 and data.batch(49)[0].shape == (8, block_size)


def test_documents(tmp_path, monkeypatch):
    """A character or marker cut, a byte order mark kept, a long document or half a character
    of JSON that ends it all; text lost, doubled or reordered, an end of text missing, the
    marker as characters."""
    docs = ["\u20ac" * 50 + CODE_TEXT[:700], *["\nsecond?\n" * 3] * 9, "x" * 900, "last"]
    plain, dos, lines = (tmp_path / name for name in ("plain", "dos", "t.jsonl"))
    plain.write_text(f"{EOT}\n".join(docs))
    dos.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    objects = [json.dumps({"id": 1, "text": doc}).replace("?", "\\ud800") for doc in docs]
    lines.write_text("\r\n".join(objects) + "\n\n")
    for path in (plain, dos, lines):
        assert [text for text in prepare_data.documents([path]) if text] == docs
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    for path in (plain, dos, lines):
        parts = list(prepare_data.documents([path]))
        assert "".join(parts) == "".join(docs) and len(parts) > len(docs)
        run(prepare_data, path, "--data_dir", tmp_path / "d")
        meta, *bins = prepare_data.load(path.stem, tmp_path / "d")
        for split, ids in zip(("train", "val"), bins):
            assert list(ids).count(meta["eot"]) == meta[split]["documents"]
            assert ids[-1] == meta["eot"] and len(ids) == meta[split]["tokens"]
        enc = prepare_data.encoding(meta["tokenizer"])
        written = [i for i in np.concatenate(bins).tolist() if i != meta["eot"]]
        assert enc.decode(written) == "".join(docs)
        n_bytes = meta["train"]["bytes"] + meta["val"]["bytes"]
        assert n_bytes == len("".join(docs).encode())


def test_python_corpus():
    """A cap passed or filled by one package, a directory in both splits."""
    files = prepare_data.python_files()
    known = {path: (package, n) for _, package, _, path, n in files}
    folders, of_split, of_package = [set(), set()], Counter(), Counter()
    for split, path in prepare_data.choose(files, 2):
        package, n = known[path]
        folders[split].add(path.parent)
        of_split[split] += n
        of_package[package] += n
    assert not folders[0] & folders[1]
    assert 1e6 < of_split.total() <= 2e6 and 0.01 < of_split[1] / of_split.total() < 0.12
    assert len(of_package) > 20 and max(of_package.values()) < 2e5


def test_what_is_not_whole_does_not_load(tmp_path, monkeypatch, refused):
    """A truncated file (SIGBUS), half a file that looks whole; the old data gone early, or
    replaced by another text of the same name."""
    folder = tmp_path / "d" / "mine"
    for name in ("mine.txt", "mine.md"):
        (tmp_path / name).write_text(CODE_TEXT)
    argv = [tmp_path / "mine.txt", "--data_dir", folder.parent, "--vocab_size", 300]
    run(prepare_data, *argv)
    before = {f: f.read_bytes() for f in folder.iterdir()}
    for file, content in (("train.bin", b"\0\0"), ("val.bin", bytes(9 ** 6)),
                          ("meta.json", b'{"name": ')):
        (folder / file).write_bytes(content)
        refused("damaged", prepare_data.load, "mine", folder.parent)
        run(prepare_data, *argv)             # the remedy that it names works
    refused("--name", run, prepare_data, tmp_path / "mine.md", *argv[1:])
    monkeypatch.setattr(prepare_data, "write_bins", lambda *args: 1 / 0)
    for name in ("mine", "new"):
        with pytest.raises(ZeroDivisionError):
            run(prepare_data, *argv[:-1], 290, "--name", name)
    assert before == {f: f.read_bytes() for f in folder.iterdir()}
    refused("not prepared", prepare_data.load, "new", folder.parent)


class HubServer(http.server.BaseHTTPRequestHandler):
    """Serves bytes; `mood` says how badly."""
    def do_GET(self):
        body, mood = self.server.files.get(self.path.rpartition("/")[2]), self.server.mood
        self.server.log.append(self.headers["Range"])
        if mood == "silent":
            return time.sleep(1)
        if body is None:
            return self.send_error(404)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.server.log[-1]).groups()
        part = body if mood == "no ranges" else body[int(first):int(last) + 1]
        self.send_response(200 if mood == "no ranges" else 206)
        self.send_header("Content-Length", len(part))
        self.end_headers()
        self.wfile.write(part[:3000] if mood == "short" else part)

    # not to stderr, where a mistake has one line
    log_message = print


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubServer) as server:
        server.files, server.mood, server.log = {}, "good", []
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield server
        server.shutdown()


def test_download(hub, tmp_path, refused):
    """Resumed at the wrong byte, half a file taken for it, waiting without an end."""
    hub.files["f"] = body = random.Random(0).randbytes(10_000)
    sha = hashlib.sha256(body).hexdigest()
    for mood in ("no ranges", "short", "good"):
        hub.mood, path = mood, tmp_path / mood
        (tmp_path / f"{mood}.part").write_bytes(body[:1234])
        hub.log.clear()
        prepare_data.download("f", path, 10_000, sha)
        assert path.read_bytes() == body and hub.log[0] == "bytes=1234-9999"
    bad = tmp_path / "bad"
    refused("deleted", prepare_data.download, "f", bad, 10_000, "0" * 64)
    for hub.mood, size, why in (("silent", 10_000, "timed out"), ("good", 10_001, "dropped")):
        refused(why, prepare_data.download, "f", bad, size, sha)
    assert not bad.exists()


def test_tinystories(hub, tmp_path, monkeypatch, refused):
    """A cap that fetches all, or fails on half a character; python in place of what was
    asked for."""
    story = ("\u20ac" * 11 + f" cat.\n{EOT}\n").encode()
    hub.files = dict(train=story * 400, valid=story.replace(b"cat", b"dog") * 20)
    known = [(n, len(b), hashlib.sha256(b).hexdigest()) for n, b in hub.files.items()]
    monkeypatch.setitem(prepare_data.DOWNLOADS, "tinystories", known)
    argv = ["tinystories", "--vocab_size", 270, "--data_dir"]
    for cap, n in ((0.0005, 500 // len(story) + 1), (0, 400)):
        run(prepare_data, *argv, tmp_path, "--max_mb", cap)
        meta = prepare_data.load("tinystories", tmp_path)[0]
        assert meta["train"]["documents"] == n and meta["val"]["documents"] == 20
        assert "bytes=0-499" in hub.log
    hub.files = {}
    refused("404", prepare_data.find, "tinystories", tmp_path / "new")


def test_gpt2(tmp_path):
    """Ids or a map to canonical ids that are not GPT-2's, which the demo presupposes."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("needs GPT-2's tokenizer in the folder that TIKTOKEN_CACHE_DIR names")
    (tmp_path / "t.txt").write_text("Hello world\n" * 50)
    run(prepare_data, tmp_path / "t.txt", "--data_dir", tmp_path, "--tokenizer", "gpt2")
    meta, train_ids, _ = prepare_data.load("t", tmp_path)
    assert meta["eot"] == 50256 and train_ids[:2].tolist() == [15496, 995]
    ids = canonical_ids(prepare_data.token_bytes(meta["tokenizer"]))
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == \
        "648b280b8082b3868d20fef4dfd3c60f72673bafc4e5e13002744f4967b2ddae"


def test_files_that_are_no_text(tmp_path, refused):
    """A traceback; what is no text taken for it."""
    for word, name, content in [
            ("too little", "empty", b""), ("0xff", "bad", b"abc\n" * 5 + b"\xff"),
            ("NUL", "nul", b"a\0b"), ("gzip", "zip.txt", b"\x1f\x8b"),
            ("object", "a.jsonl", b'{"text": "a"}\n7'), ("'text'", "b.jsonl", b"{}")]:
        (tmp_path / name).write_bytes(content)
        refused(word, run, prepare_data, tmp_path / name, "--data_dir", tmp_path / "d")


def test_passes(corpus):
    """Passes in one order, or with a sequence twice; an order that more steps change."""
    short, long = (prepare_data.Data("mine", corpus[3], 1600, 60, steps, 5, 3200)
                   for steps in (3, 9))
    n = short.sequences_per_pass
    assert n == (len(short.train) - 1) // 1600 < 60 and short.passes == 180 / n
    passes = long.order[:3 * n].reshape(3, n).tolist()
    assert all(sorted(one) == list(range(n)) for one in passes) and passes[0] != passes[1]
    assert long.order[:len(short.order)].tolist() == short.order.tolist()
    assert passes[0] == np.random.default_rng(5).permutation(n).tolist()
    x, y = long.batch(2)
    starts = long.order[120:180] * 1600
    assert x.tolist() == [long.train[start:start + 1600].tolist() for start in starts]
    assert (x[:, 1:] == y[:, :-1]).all()


def test_copyable_tokens(corpus):
    """Counts of n-grams on wrong tokens, or grown by a second pass."""
    def grams(x, y):
        rows = np.concatenate([x, y[:, -1:]], axis=1).tolist()
        return [list(zip(row, row[1:], row[2:])) for row in rows]

    data = prepare_data.Data("mine", corpus[3], 32, 4, 2000, 0, 256)
    trained = grams(*data.sequences(data.train, data.order[:2] * data.T))
    times = Counter(sum(trained, []))
    seen, copyable = (found.tolist() for found in data.count(2, 3))
    for row, counts, can_copy in zip(grams(data.val_x, data.val_y), seen, copyable):
        assert counts == [-1] + [times[gram] for gram in row]
        repeats = [times[gram] == 0 and gram in row[:t] for t, gram in enumerate(row)]
        assert can_copy == [False] + repeats
    assert any(map(any, copyable)) and data.passes > 2
    once, twice = (data.count(n * data.sequences_per_pass, 2)[0] for n in (1, 2))
    assert once.tolist() == twice.tolist()


# ---- the bench and the README ----------------------------------------------------------

@pytest.fixture
def tiny_setup(monkeypatch):
    shape = dict(n_layer=2, n_embd=16, shared_hidden=16, vocab_size=600)
    setup = dict(shape=bench_offload.CPU["shape"] | shape, prompt=(2, 32),
                 full=(500, 1000, 2000))
    monkeypatch.setattr(bench_offload, "CPU", bench_offload.CPU | setup)
    return bench_offload.CPU


def test_a_simulated_link_costs_what_is_predicted(tiny_setup):
    """A link that a prefetch does not hide, or that a synchronous read hides."""
    bench = bench_offload.Bench(tiny_setup, "cpu", 2000, 0)
    gbps = bench_offload.predict(bench, 3, [(2, 32)])["bytes"] / 40e6
    bench = bench_offload.Bench(tiny_setup, "cpu", 2000, gbps)
    bench.model.blocks[0].register_forward_pre_hook(lambda *args: time.sleep(0.025))
    p = bench_offload.predict(bench, 5, [(2, 32)])
    assert p["transfer_ms"] == pytest.approx(40, rel=0.05)
    assert 5 < p["exposed_ms"] == p["transfer_ms"] - p["before_ms"]
    times = bench_offload.measure_rounds(bench, bench_offload.prompts, 7, [(2, 32)])
    for arm, want in (("synchronous", p["transfer_ms"]), ("prefetched", p["exposed_ms"])):
        added = np.median(times[arm] - times["resident"])
        assert added == pytest.approx(want, abs=0.2 * p["transfer_ms"]), arm


def test_bench(tiny_setup, tmp_path, capsys):
    """An arm or figure that is missing, a thread left behind."""
    before, path = set(threading.enumerate()), tmp_path / "offload.json"
    run(bench_offload, *"--full --rounds 6 --device cpu --out".split(), tmp_path)
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    tables = [*result["prompts"], result["training"]]
    assert len(tables) == 3 + 1 and result["latency"]["n"] == 3 * 32
    for table in tables:
        assert list(table["arms"]) == ["no Engram", "resident", "synchronous", "prefetched"]
        assert all(len(figures["ms"]) == 6 for figures in table["arms"].values())
        assert "\n".join(table["lines"]) in printed and "SIMULATED" in table["lines"][1]
    # hash, unique, gather, two blocks, and the wait within the second
    names = {what for _, what, *_ in result["parts"]["time_line"]}
    assert names == {"hash", "unique", "gather", "block 0", "block 1", "wait"}
    assert [p["block"] for p in result["crossover"]["points"]] == [0, 1]
    gc.collect()
    assert set(threading.enumerate()) <= before
    assert {p.name for p in tmp_path.glob("*.png")} == {"crossover.png", "time_line.png"}
    # a wrong row does not pass for a fast one
    bench = bench_offload.Bench(tiny_setup, "cpu", 500, 0)
    bench.use("prefetched")
    _, reads = bench_offload.forward(bench, *bench.batches([(2, 32)]))
    bench.trust(reads)
    with pytest.raises(AssertionError, match="wrong rows"):
        bench.trust([reads[0]._replace(row_ids=reads[0].row_ids.roll(1))])


def test_the_readme():
    """A command that is not the tested one, code and sizes that have changed."""
    readme = (HERE / "README.md").read_text()
    assert readme.count("\n") <= 200 and len(readme.encode()) <= 14_336
    for command in ("python train.py", "python -m pytest"):
        assert f"pip install -r requirements.txt && {command}" in readme
    assert inspect.getsource(Block.forward) in readme
    lengths = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M))
    assert lengths.keys() == {path.name for path in HERE.glob("*.py")}
    for name, n in lengths.items():                      # near enough while you try things
        assert int(n) == pytest.approx((HERE / name).read_text().count("\n"), rel=0.1)
    example = runs.compare(HERE / "experiments" / "results" / "seed0")
    assert not [line for line in example if line.strip() and line not in readme]
