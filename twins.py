"""
Make the shapes of two models with the same parameters and the same compute: one with
Engram, and its MoE-only twin.

    shapes = make_twins(GPTConfig(), rho=0.75)             # {"engram": ..., "moe": ...}

The idea: a comparison is fair if total and active parameters, P_tot and P_act, are equal.
So Engram gives up routed experts for its table, and the twin gets the compute that
reading the table takes.
"""
import math
from dataclasses import replace

import numpy as np
import torch

from engram import canonical_ids
from model import GPT, accounting
from prepare_data import grams


def count(cfg):
    """Return the accounting of a model of this shape, without making it."""
    with torch.device("meta"):
        return accounting(GPT(cfg, np.arange(cfg.vocab_size)))


def make_twins(cfg, rho):
    """Return {"engram": GPTConfig, "moe": GPTConfig}, two models of the same P_tot and P_act.

    cfg: the common shape; its n_expert is the MoE-only twin's. rho is the share of the
    sparse parameters P_sparse that stays with routed experts (paper, section 3). If
    cfg.engram.rows are given they stay; the totals differ then, so these are no twins.
    Raise ValueError if there are no experts to drop or no row can be paid for."""
    if not cfg.n_expert:
        raise ValueError("n_expert 0: twins need experts")

    # 1. Engram drops routed experts. The top k stay, for they are active and not sparse.
    n_expert = cfg.top_k + round(rho * (cfg.n_expert - cfg.top_k))
    engram = replace(cfg, n_expert=n_expert, engram=replace(cfg.engram, rows=cfg.engram.rows or 1))
    moe = replace(cfg, engram=None)

    # 2. Reading is compute too: rows are projected to keys and values. The MoE-only twin
    #    gets a wider shared expert for that, rounded up, so it never has less compute.
    owed = count(engram)["P_act"] - count(moe)["P_act"]
    moe.shared_hidden += max(0, math.ceil(owed / (3 * cfg.n_embd * cfg.n_layer)))

    # (rows that were given stay)
    if cfg.engram.rows:
        return {"engram": engram, "moe": moe}

    # 3. What is left to the twin's total becomes rows. The rows of a head are a prime at
    #    or above the number asked for, so go down until they fit.
    base = count(engram)
    freed = count(moe)["P_tot"] - (base["P_tot"] - base["table_parameters"])
    per_row = len(cfg.engram.blocks) * cfg.engram.d_mem
    rows = freed // per_row
    while rows > 1:
        engram.engram = replace(cfg.engram, rows=rows)
        over = count(engram)["table_parameters"] - freed
        if over <= 0:
            break
        rows -= math.ceil(over / per_row)
    if n_expert == cfg.n_expert or rows < 2:
        raise ValueError(f"rho {rho} leaves no row: {n_expert} of {cfg.n_expert} experts stay, "
                         f"and a row in each head takes {per_row:,} parameters; use a smaller "
                         "rho or more experts")
    return {"engram": engram, "moe": moe}


def shapes_of(model, shape, rho, large):
    """Return {model: GPTConfig} for train.py's --model, and lines that explain them."""
    has_place = shape.engram.blocks[-1] < shape.n_layer and shape.n_expert > shape.top_k
    if model == "moe" and not has_place:
        # a shape that has no place for a memory needs no twin
        return {"moe": replace(shape, engram=None)}, []
    shapes = make_twins(shape, rho)
    lines = explain(shape, shapes, rho)
    # as many numbers are read per token, but from a larger table
    memory = shapes["engram"].engram
    rows = tuple(large * n for n in memory.rows)
    shapes["large"] = replace(shapes["engram"], engram=replace(memory, rows=rows))
    lines.append(f"large   engram with {large} times the rows, {rows[0]:,} a head: P_tot "
                 f"{count(shapes['large'])['P_tot']:,}, the same P_act. It is no twin")
    return shapes, lines


def crowding(memories, x, token_bytes):
    """Return a line for each of memories, {model: EngramConfig}, that differ in their rows
    alone: how many different n-grams of tokens x [n, T], those that are trained on, share a
    row."""
    memory = next(iter(memories.values()))
    ids = canonical_ids(token_bytes, memory.compress)[x]
    found = {order: len(np.unique(grams(ids, order, len(token_bytes)))) for order in memory.orders}
    lines = []
    for name, memory in memories.items():
        shares = [f"{found[order] / rows:.1f} {order}-grams"
                  for order, rows in zip(memory.orders, memory.rows)]
        lines.append(f"{name:8s}{' and '.join(shares)} of the text (20M tokens at most) "
                     "share each row (above ten is crowded)")
    return lines


def explain(shape, shapes, rho):
    """Return lines that say what became of the experts, and that the totals are equal."""
    memory, a, b = shapes["engram"].engram, count(shapes["engram"]), count(shapes["moe"])
    widened = shapes["moe"].shared_hidden - shape.shared_hidden
    table = (f"{len(memory.blocks)} layer(s) x {len(memory.orders)} orders x {memory.heads} "
             f"heads x ~{memory.rows[0]:,} rows x {memory.width}")
    lines = [f"engram  {shapes['engram'].n_expert} of the {shape.n_expert} routed experts in "
             "each block, and a memory of",
             f"        {table} = {a['table_parameters']:,} numbers;",
             f"        a token reads {a['bytes_read_per_token']:,} bytes of it",
             f"moe     all {shape.n_expert} experts, and {widened} hidden units more "
             "in the shared expert,",
             "        for the compute that reading the memory takes",
             f"{'':8s}{'P_tot, all but the embedding':>30s}{'P_act, used per token':>24s}"
             f"{'FLOPs per token':>18s}"]
    for name, size in (("engram", a), ("moe", b)):
        lines.append(f"{name:8s}{size['P_tot']:30,}{size['P_act']:24,}"
                     f"{size['flops_per_token']:18,}")
    off = a["P_tot"] / b["P_tot"] - 1
    if abs(off) > 0.01:
        lines.append(f"These are not twins: P_tot differs by {off:.1%}.")
    else:
        lines.append(f"Of the sparse parameters, P_tot - P_act, {a['rho']:.1%} stay "
                     f"with experts (rho {rho} was asked; experts are whole).")
    return lines
