"""
What the memory of a trained model does, seen from inside.

    python -m experiments.analyze report                   # of the pair of twins in out/
    python -m experiments.analyze knockout --out_dir out11 out12 out13
    python -m experiments.analyze knockout --plot          # from experiments/results again
    python -m experiments.analyze zipf --dataset python    # would a cache of hot rows help?

The idea: twins saw the same tokens in the same order, so a difference between their losses
on a token can be attributed to what was different: how often training saw the token's
n-gram, who shares its rows, which block. An analysis is three functions. The first returns
numbers, which are saved as NAME.json; the other two make a sentence and a picture of these
numbers alone. Give several folders of train.py, of different seeds, and you get 95 %
intervals over the pairs.

Letters: B sequences of T validation tokens, S of these tokens, G different n-grams, K hash
heads.
"""
from common import default_device, fail, make_parser, new_figure, run_script, write_whole

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from engram import Engram, EngramConfig, canonical_ids
from model import load_checkpoint, token_losses
from prepare_data import Data, Offline, encoding, load, token_bytes
from runs import differences, twin_differences
from sample import has_colours, shaded, spans_of
from train import Config, autocast, watch

COMMITTED = Path(__file__).resolve().parent / "results"
# how often training saw an n-gram; a bucket ends where the next begins
BUCKETS = ((0, "never"), (1, "1-9"), (10, "10-99"), (100, "100-999"), (1000, "1,000 or more"))
# dark and light in greyscale, and the shapes differ too
STYLES = (("tab:blue", "o-"), ("tab:orange", "s--"), ("black", "^:"), ("grey", "x-"))
FULL = 2.0        # nats saved at which a token is fully shaded


# ---- runs ----------------------------------------------------------------------------

def load_run(path):
    """Return what train.py saved at path, and its model and Config, on this machine's
    device."""
    saved, model = load_checkpoint(path)
    cfg = Config(**saved["header"]["config"])
    cfg.device = default_device()
    model.to(cfg.device).eval()
    return saved, model, cfg


def open_data(saved, cfg):
    """Return the Data of a run. Refuse data that was prepared again since."""
    name, block_size = saved["header"]["data"]["name"], saved["shape"]["block_size"]
    per_step = cfg.tokens_per_step // block_size
    try:
        data = Data(name, cfg.data_dir, block_size, per_step, cfg.steps, cfg.seed,
                    cfg.eval_tokens)
    except (Offline, ValueError) as error:
        fail(error)
    for split in ("train", "val"):
        if data.meta[split]["sha256"] != saved["run"][f"{split} data"]:
            fail(f"{cfg.data_dir}/{name} is not what this model was trained on: prepare it "
                 "as it was, or train again")
    return data


def load_pair(out_dir, twin=True):
    """Return the pair of twins in a folder of train.py: .engram and .moe (None if twin is
    False), Engram's checkpoint .saved, .cfg (train.Config), .data; .canonical ids [V],
    .base (how many), .pad; .orders above 1; and .sequences, how many of them training has
    read."""
    saved, model, cfg = load_run(Path(out_dir) / "engram" / "ckpt.pt")
    moe = None
    if twin:
        other, moe, _ = load_run(Path(out_dir) / "moe" / "ckpt.pt")
        differ = twin_differences((saved["header"], saved["records"]),
                                  (other["header"], other["records"]))
        if differ:
            fail(f"{out_dir}: these are not twins, they differ in {', '.join(differ)}; train "
                 "both with one command, python train.py")
    orders = [order for order in model.cfg.engram.orders if order > 1]
    if not orders:
        fail(f"{out_dir}: analyses need an n-gram order above 1")
    canonical = model.canonical.cpu().numpy()
    return SimpleNamespace(
        engram=model, moe=moe, saved=saved, cfg=cfg, data=open_data(saved, cfg),
        orders=orders, canonical=canonical, base=int(canonical.max()) + 1,
        pad=int(canonical[-1]),
        sequences=saved["step"] * cfg.tokens_per_step // model.cfg.block_size)


def load_pairs(folders, twin):
    """Return a pair per folder. They must differ in their seeds, and in nothing else."""
    pairs = [load_pair(folder, twin) for folder in folders]
    if len({pair.cfg.seed for pair in pairs}) < len(pairs):
        fail(f"{', '.join(folders)}: two are of one seed, and would count twice")
    for pair in pairs:
        differ = differences(pairs[0].saved["run"], pair.saved["run"], ignore=("seed",))
        if differ:
            fail(f"{', '.join(folders)} differ in more than their seeds: {', '.join(differ)}")
    return pairs


def losses(pair, model, memory=True):
    """Return nats [B, T] of the validation tokens."""
    nats = token_losses(model, pair.data.val_x, pair.data.val_y, pair.cfg.batch_size,
                        autocast(pair.cfg), memory)
    return nats.double().numpy()


# ---- statistics ----------------------------------------------------------------------

# 97.5th percentile of Student's t by degrees of freedom, from 1 on
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
           2.179, 2.160, 2.145, 2.131)


def interval(values):
    """Return the mean and half the width of its 95 % interval; of one value, 0 for the
    width."""
    if len(values) < 2:
        return values[0], 0.0
    # beyond the end of the table its last value is a little too wide
    t = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def summary(values):
    """Return what is saved of a number per pair; "half" as of interval, None for one
    pair."""
    mean, half = interval(values)
    return {"mean": mean, "half": half if len(values) > 1 else None, "values": values}


def says(number):
    """Return a summary in words."""
    if number["half"] is None:
        return f"{number['mean']:+.3f} (n=1)"
    return f"{number['mean']:+.3f} ± {number['half']:.3f}"


def by_bucket(by, values, buckets=BUCKETS, statistic=np.mean):
    """Return {bucket: mean of the values where `by` lies in it}, without empty buckets."""
    ends = [low for low, _ in buckets[1:]] + [math.inf]
    found = {}
    for (low, name), end in zip(buckets, ends):
        mask = (by >= low) & (by < end)
        if mask.any():
            found[name] = float(statistic(values[mask]))
    return found


def over_pairs(tables):
    """Return {bucket: summary} of a table per pair, for the buckets that all pairs have."""
    found = {}
    for name in tables[0]:
        values = [table[name] for table in tables if name in table]
        if len(values) == len(tables):
            found[name] = summary(values)
    return found


def points(axes, table, style, label, buckets=BUCKETS):
    """Draw {bucket: summary}: means with intervals, and each pair's value as a dot."""
    (colour, mark), names = style, [name for _, name in buckets]
    x = [names.index(name) for name in table]
    axes.errorbar(x, [number["mean"] for number in table.values()],
                  [number["half"] or 0 for number in table.values()], fmt=mark, color=colour,
                  capsize=3, label=label)
    for i, number in zip(x, table.values()):
        values = number["values"]
        axes.plot([i] * len(values), values, ".", color=colour, ms=4, alpha=0.6)
    axes.set_xticks(range(len(names)), names, fontsize=8)


# ---- report: the end of a run --------------------------------------------------------

def report(pair):
    """Return lines that say what the memory did for one model, beside its twin if there is
    one."""
    data, on = pair.data, losses(pair, pair.engram)
    saved = losses(pair, pair.engram, memory=False) - on
    columns = {"tokens": by_bucket(data.seen, on, statistic=np.size),
               "engram": by_bucket(data.seen, on), "off - on": by_bucket(data.seen, saved)}
    if pair.moe:
        columns["moe - engram"] = by_bucket(data.seen, losses(pair, pair.moe) - on)
    loss, gain = on.mean(), saved.mean()
    lines = [f"Memory switched off, same weights: {loss:.4f} -> {loss + gain:.4f} nats per "
             f"token ({gain:+.4f}).",
             "This overstates its worth: the other weights were trained with it.", "",
             "2-gram seen in training " + "".join(f"{name:>14s}" for name in columns)]
    for bucket in columns["tokens"]:
        n, loss, *gains = (column[bucket] for column in columns.values())
        lines.append(f"{bucket:>24s}{n / on.size:14.1%}{loss:14.3f}"
                     + "".join(f"{gain:+14.3f}" for gain in gains))
    enc, colour = encoding(data.meta["tokenizer"]), has_colours()
    spans = spans_of(enc, data.val_y[0, :40].tolist(), saved[0, :40])
    how = f"blue: {FULL:g} or more, orange: lost" if colour else "in brackets"
    return [*lines, "", f"Validation text, and the nats saved on each token ({how}):",
            shaded(spans, 0, FULL, colour)]


# ---- knockout: where the memory helps ------------------------------------------------

GAINS = {"moe - engram": "MoE-only twin minus Engram",
         "off - on": "Memory off minus on, same weights"}


def knockout(pairs):
    """Compare Engram's loss with its twin's, and with its own when the memory is off, by
    how often training saw the n-gram that ends with the predicted token."""
    gains = []
    for pair in pairs:
        on = losses(pair, pair.engram)
        gains.append({"off - on": losses(pair, pair.engram, memory=False) - on,
                      "moe - engram": losses(pair, pair.moe) - on})
    found = {}
    for name in GAINS:
        found[name] = summary([float(gain[name].mean()) for gain in gains])
    tables = {"off - on": [], "moe - engram": [], "tokens": []}
    for pair, gain in zip(pairs, gains):
        seen, _ = pair.data.count(pair.sequences, 3)
        for name in GAINS:
            tables[name].append(by_bucket(seen, gain[name]))
        tables["tokens"].append(by_bucket(seen, seen, statistic=np.size))
    return found | {"3-grams": {name: over_pairs(table) for name, table in tables.items()}}


def say_knockout(found):
    lines = []
    for name, label in GAINS.items():
        table = found["3-grams"][name]
        parts = [f"{bucket} {says(number)}" for bucket, number in table.items()]
        lines.append(f"{label}: {says(found[name])} nats per token; by how often training "
                     f"saw the 3-gram: {', '.join(parts)}")
    return lines


def draw_knockout(figure, found):
    axes = figure.subplots()
    for name, style in zip(GAINS, STYLES):
        points(axes, found["3-grams"][name], style, GAINS[name])
    axes.set(xlabel="times training saw the 3-gram that ends in the token",
             ylabel="difference in loss (nats per token)")
    axes.axhline(0, color="black", lw=0.6)
    axes.legend()
    # the buckets with at least half of the largest gain, from the first to the last
    table = found["3-grams"]["moe - engram"]
    gain = {name: number["mean"] for name, number in table.items()}
    best = [name for name in gain if gain[name] > max(0, *gain.values()) / 2]
    axes.set_title("Where the memory helps")
    if best:
        times = " to ".join([best[0].split("-")[0], best[-1].split("-")[-1]])
        axes.set_title(f"The memory helps most where training saw the 3-gram {times} times")


# ---- n-grams as numbers, and the rows they read --------------------------------------

def addresses(ids, order, base, pad):
    """Return the n-gram that ends at each position of ids [B, T], as one number; ids <
    base."""
    x, T = np.pad(ids, ((0, 0), (order - 1, 0)), constant_values=pad), ids.shape[1]
    return sum(x[:, order - 1 - k:order - 1 - k + T] * base ** k for k in range(order))


def grams(pair, x, order):
    """Return the canonical n-gram that ends at each token of x [B, T], as one number."""
    return addresses(pair.canonical[x], order, pair.base, pair.pad)


def trained(pair, order):
    """Return the different canonical n-grams that training read, sorted [G], and how often
    [G]."""
    starts = pair.data.order[:pair.sequences] * pair.data.T
    x, _ = pair.data.sequences(pair.data.train, starts)
    return np.unique(grams(pair, x, order), return_counts=True)


def rows_of(engram, numbers, order, base):
    """Return the rows [G, K] that n-grams [G] read, counted from the first row of each
    head."""
    ids = np.stack([numbers // base ** k % base for k in reversed(range(order))], axis=1)
    i, K = engram.cfg.orders.index(order), engram.cfg.heads
    parts = torch.from_numpy(ids).to(engram.offsets.device).split(1 << 16)
    rows = torch.cat([engram.hash(part)[:, -1] for part in parts])
    return (rows[:, i * K:(i + 1) * K] - engram.offsets[i]).cpu().numpy()


def look_up(keys, values, wanted):
    """Return the values of the wanted keys, 0 where there is no such key. Keys are
    sorted."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


# ---- collisions: who shares rows -----------------------------------------------------

SHARED = {"rows": "rows in use that hold several n-grams",
          "reads": "reads of such rows",
          "all heads": "n-grams that share a row in every head",
          "same in all": "... with the same other n-gram in every head"}


def shared(rows, counts):
    """Return shares for rows [G, K] and how often each n-gram was read [G]; SHARED explains
    them. The share of rows is the mean of the heads."""
    of_rows, alone = [], np.zeros(rows.shape, bool)
    for k, column in enumerate(rows.T):
        held = np.bincount(column)
        of_rows.append((held > 1).sum() / (held > 0).sum())
        alone[:, k] = held[column] == 1
    _, times = np.unique(rows, axis=0, return_counts=True)
    return {"rows": float(np.mean(of_rows)),
            "reads": float((~alone * counts[:, None]).sum() / counts.sum() / rows.shape[1]),
            "all heads": float((~alone).all(1).mean()),
            "same in all": float(1 - (times == 1).sum() / len(rows))}


def collisions(pairs):
    """Count who shares rows, by n-gram order and table size, from what training read."""
    if len(pairs) > 1:
        fail("collisions counts what one run read: give one --out_dir")
    pair, = pairs
    cfg = pair.engram.cfg.engram
    here = cfg.rows[-1]
    sizes = sorted({*(2 ** k for k in range(10, 23, 2)), here})
    found = {"rows": sizes, "heads": cfg.heads, "here": here}
    for order in pair.orders:
        numbers, counts = trained(pair, order)
        table = {"different": len(numbers), **{name: [] for name in SHARED}}
        for size in sizes:
            sized = replace(cfg, rows=size, blocks=cfg.blocks[:1])
            # only its hash is needed
            hashed = Engram(sized, sized.blocks[0], 8, pair.base, pair.pad,
                            table_device="meta")
            rows = rows_of(hashed, numbers, order, pair.base)
            for name, value in shared(rows, counts).items():
                table[name].append(value)
        found[f"{order}-grams"] = table
    return found


def tables_of(found):
    """Return {"2-grams": ..., "3-grams": ...} of what was found."""
    return {name: table for name, table in found.items() if name.endswith("-grams")}


def say_collisions(found):
    name, table = list(tables_of(found).items())[-1]
    i, heads = found["rows"].index(found["here"]), found["heads"]
    here, largest = found["here"], found["rows"][-1]
    return [f"With {here:,} rows per head, {table['rows'][i]:.0%} of the rows in use hold "
            f"several {name}, and {table['all heads'][i]:.0%} of the {name} share a row in all "
            f"{heads} heads; with {largest:,} rows it is {table['all heads'][-1]:.1%}. Only "
            f"{table['same in all'][i]:.2%} share all {heads} rows with the same other one"]


def draw_collisions(figure, found):
    axes, (name, table) = figure.subplots(), list(tables_of(found).items())[-1]
    for (key, label), (colour, mark) in zip(SHARED.items(), STYLES):
        axes.plot(found["rows"], table[key], mark, color=colour, label=label)
    axes.axvline(found["here"], color="grey", lw=0.8)
    axes.set(xscale="log", xlabel="rows per head (grey line: this model)", ylabel="share",
             title=f"How many of {table['different']:,} different {name} share their rows")
    axes.legend(fontsize=8)


# ---- gates: when the gate opens ------------------------------------------------------

def centred(groups, values):
    """Return values [S] minus the mean of their group."""
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    return values - (np.bincount(group, values) / size)[group]


def explained(groups, values):
    """Return the share of the values' variance that the group explains, adjusted for the
    number of groups. Each group has several members."""
    inner = (centred(groups, values) ** 2).sum() / (len(values) - len(np.unique(groups)))
    return float(1 - inner / values.var(ddof=1))


def gate_and_gain(pair):
    """Return the gate on each validation token [B, T], mean of the memory layers, and the
    nats that the memory saves there."""
    if pair.engram.cfg.engram.gate == "off":
        fail("this model has no gate (--engram_gate off)")
    with watch(pair.engram) as seen:
        on = losses(pair, pair.engram)
    layers = [torch.cat(layer["gate"]).cpu().double().numpy() for layer in seen]
    return np.mean(layers, axis=0), losses(pair, pair.engram, memory=False) - on


def what_explains(pair, gate, gain):
    """Return what the gate varies with: how much of its variance the token, the canonical
    n-gram and the n-gram as written explain, and its correlation with what the memory
    gains."""
    x, order = pair.data.val_x, pair.orders[-1]
    # leave out n-grams that begin before the text
    full = np.broadcast_to(np.arange(x.shape[1]) >= order - 1, x.shape)
    gate, gain, here = gate[full], gain[full], grams(pair, x, order)[full]
    written = addresses(x, order, len(pair.canonical), 0)[full]
    found = {"gate and gain": float(np.corrcoef(gate, gain)[0, 1]),
             "gate and gain within": float(np.corrcoef(centred(here, gate),
                                                       centred(here, gain))[0, 1])}
    # n-grams that recur as written: the same tokens for all three shares, so that they
    # compare
    _, group, size = np.unique(written, return_inverse=True, return_counts=True)
    again = size[group] > 1
    found["tokens that recur"] = float(again.mean())
    for name, groups in (("by the token", pair.canonical[x][full]), ("by the n-gram", here),
                         ("by its writing too", written)):
        found[name] = explained(groups[again], gate[again])
    return found


def gates(pairs):
    """Find out when the gate opens: by how often training read the n-gram, and by what
    explains its variance."""
    found, numbers = {}, {}
    for pair in pairs:
        gate, gain = gate_and_gain(pair)
        explained_by = what_explains(pair, gate, gain)
        for name, value in {"mean": gate.mean(), "sd": gate.std(), **explained_by}.items():
            numbers.setdefault(name, []).append(float(value))
        for order in pair.orders:
            times = look_up(*trained(pair, order), grams(pair, pair.data.val_x, order))
            found.setdefault(f"{order}-grams", []).append(by_bucket(times, gate))
    for name, tables in found.items():
        found[name] = {"by count": over_pairs(tables)}
    return {**{name: summary(values) for name, values in numbers.items()}, **found}


def say_gates(found):
    name = list(tables_of(found))[-1].removesuffix("s")
    mean, sd, token, gram, written = (found[key]["mean"] for key in (
        "mean", "sd", "by the token", "by the n-gram", "by its writing too"))
    over_all, within = says(found["gate and gain"]), says(found["gate and gain within"])
    return [f"The gate is {mean:.2f} on average (sd {sd:.2f} between tokens). Where a {name} "
            f"recurs, the token explains {token:.1%} of the gate's variance, the {name} "
            f"{gram:.1%}, and the {name} as it is written {written:.1%}; the wider context "
            f"explains the rest. Its correlation with what the memory gains is {over_all}, and "
            f"{within} between tokens of one {name}"]


def draw_gates(figure, found):
    axes = figure.subplots()
    for (name, table), style in zip(tables_of(found).items(), STYLES):
        points(axes, table["by count"], style, name)
    axes.set(xlabel="times training read the n-gram", ylabel="mean gate", ylim=(0, 1),
             title="How far the gate opens, by how often training read the n-gram")
    axes.legend()


# ---- logitlens: how early the answer is there ----------------------------------------

@torch.no_grad()
def lens(pair, model):
    """Return KL(final || block) in nats per token for the output of each block, read
    through the final norm and the head. The last one is 0."""
    def log_probs(h):
        return F.linear(model.norm(h), model.embed.weight).float().log_softmax(-1)

    def keep(kept, module, args, out):
        kept.append(out)

    kept, sums = [], np.zeros(len(model.blocks))
    hooks = [block.register_forward_hook(partial(keep, kept)) for block in model.blocks]
    for x in torch.from_numpy(pair.data.val_x).split(pair.cfg.batch_size):
        kept.clear()
        with autocast(pair.cfg):
            model(x.to(pair.cfg.device))
            final = log_probs(kept[-1])
            sums += [float(F.kl_div(log_probs(h), final, reduction="sum", log_target=True))
                     for h in kept]
    for hook in hooks:
        hook.remove()
    return (sums / pair.data.val_x.size).tolist()


def logitlens(pairs):
    """Measure how far each block's output is from the final prediction, for both twins."""
    found = {"memory in blocks": list(pairs[0].engram.cfg.engram.blocks)}
    # [blocks, pairs]
    engram = np.array([lens(pair, pair.engram) for pair in pairs]).T
    moe = np.array([lens(pair, pair.moe) for pair in pairs]).T
    for name, curves in (("engram", engram), ("moe", moe), ("engram - moe", engram - moe)):
        found[name] = [summary(block) for block in curves.tolist()]
    return found


def say_logitlens(found):
    gap = found["engram - moe"][:-1]
    blocks = [f"block {i} {says(number)}" for i, number in enumerate(gap)]
    return ["Distance of a block's output from the final prediction (KL, nats per token), "
            f"Engram minus its twin: {', '.join(blocks)}"]


def draw_logitlens(figure, found):
    axes, layers = figure.subplots(), range(len(found["engram"]))
    for name, label, style in (("engram", "Engram", STYLES[0]),
                               ("moe", "MoE-only twin", STYLES[1])):
        table = dict(zip(map(str, layers), found[name]))
        points(axes, table, style, label, [(i, str(i)) for i in layers])
    axes.set(ylabel="KL(final || block), nats per token", xlabel="output of block",
             title="How far each block's output is from the final prediction")
    axes.set_ylim(bottom=0)
    axes.legend()


# ---- zipf: would a cache of hot rows help? -------------------------------------------

def zipf(dataset, data_dir):
    """Find which share of the reads a cache of the hottest rows would serve. They are
    chosen on the first half of a prepared text and judged on the second. A prompt of 1,024
    tokens reads each of its rows once, as Engram.read does."""
    meta, train, _ = load(dataset, data_dir)
    if len(train) < 4096:
        fail(f"{dataset} has {len(train):,} tokens to train on, hit rates need 4,096")
    canonical = canonical_ids(token_bytes(meta["tokenizer"]))
    engram = Engram(EngramConfig(heads=8, rows=250_000), 1, 8, int(canonical.max()) + 1,
                    int(canonical[-1]), table_device="meta")
    prompts = torch.from_numpy(canonical[train[:len(train) // 2048 * 2048]]).view(-1, 1024)
    counts = torch.zeros(2, len(engram.table), dtype=torch.int64)
    for half, part in zip(counts, prompts.chunk(2)):
        for prompt in part:
            half[engram.hash(prompt[None]).unique()] += 1
    hottest = counts[0].argsort(descending=True)
    hits = counts[1][hottest].cumsum(0) / counts[1].sum()
    sizes = [int(10 ** (k / 4)) for k in range(8, 40) if 10 ** (k / 4) < len(hits)]
    return {"dataset": dataset, "tokens": prompts.numel(), "reads": int(counts.sum()),
            "rows": len(hits), "rows_read": int((counts.sum(0) > 0).sum()),
            "cache_rows": sizes, "hit_rate": [float(hits[n - 1]) for n in sizes]}


def say_zipf(found):
    lines = [f"{found['dataset']}: {found['tokens']:,} tokens read {found['reads']:,} rows, "
             f"{found['rows_read']:,} different ones of {found['rows']:,}"]
    for n, rate in list(zip(found["cache_rows"], found["hit_rate"]))[::4]:
        lines.append(f"  a cache of the {n:9,} hottest rows serves {rate:6.1%} of the reads")
    return lines


def draw_zipf(figure, found):
    axes = figure.subplots()
    axes.plot(found["cache_rows"], found["hit_rate"])
    axes.set(xscale="log", ylim=(0, 1), xlabel=f"rows cached, of {found['rows']:,}",
             ylabel="share of the reads served",
             title="What a cache of the hottest rows serves")


# ---- the command ---------------------------------------------------------------------

class Analysis(NamedTuple):
    find: Callable          # find(pairs): a dict of numbers
    say: Callable           # say(found): lines
    draw: Callable          # draw(figure, found)
    twin: bool = False      # does it need the twin?


ANALYSES = {
    "knockout": Analysis(knockout, say_knockout, draw_knockout, twin=True),
    "gates": Analysis(gates, say_gates, draw_gates),
    "collisions": Analysis(collisions, say_collisions, draw_collisions),
    "logitlens": Analysis(logitlens, say_logitlens, draw_logitlens, twin=True),
    "zipf": Analysis(zipf, say_zipf, draw_zipf)}


def save_figure(path, figure):
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    print(f"picture: {path}")


def find(analysis, args):
    """Return what an analysis finds, with the runs that it looked at."""
    if analysis.find is zipf:
        return zipf(args.dataset, args.data_dir)
    pairs = load_pairs(args.out_dir, analysis.twin)
    runs = []
    for pair in pairs:
        header = pair.saved["header"]
        runs.append({key: header[key] for key in ("command", "commit", "torch", "device")})
    return {"seeds": [pair.cfg.seed for pair in pairs], "runs": runs, "pairs": len(pairs),
            **analysis.find(pairs)}


def main(argv=None):
    parser = make_parser(__doc__, "python -m experiments.analyze NAME [options]")
    add = parser.add_argument
    add("name", choices=("report", *ANALYSES), metavar="NAME",
        help=", ".join(("report", *ANALYSES)))
    add("--out_dir", nargs="+", default=["out"], help="folders of train.py (default: out)")
    add("--plot", action="store_true", help="compute nothing; read --results, by default "
        "experiments/results, the results that came with the code")
    add("--results", help="folder of NAME.json and NAME.png (default: the first out_dir; of "
        "zipf the folder of the data)")
    add("--dataset", default="python", help="zipf: prepared data (default: %(default)s)")
    add("--data_dir", default="data", help="zipf: where it lies (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.name == "report":
        twin = (Path(args.out_dir[0]) / "moe" / "ckpt.pt").exists()
        print(*report(load_pair(args.out_dir[0], twin)), sep="\n")
        return
    analysis, folder = ANALYSES[args.name], Path(args.out_dir[0])
    if args.name == "zipf":
        folder = Path(args.data_dir) / args.dataset
    if args.plot:
        folder = COMMITTED
    path = Path(args.results or folder) / f"{args.name}.json"
    if args.plot:
        if not path.exists():
            fail(f"there is no {path}: run without --plot")
        found = json.loads(path.read_text())
    else:
        found = find(analysis, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(json.dumps(found, indent=1).encode()))
    print(*analysis.say(found), f"numbers: {path}", sep="\n")
    figure = new_figure(figsize=(7, 4))
    analysis.draw(figure, found)
    save_figure(path.with_suffix(".png"), figure)


if __name__ == "__main__":
    run_script(main)
