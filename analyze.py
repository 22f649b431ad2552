"""
What the memory of a trained model does, seen from inside. Optional reading.

    python train.py && python analyze.py knockout --results mine
    python analyze.py gates --out_dir out11 out12 out13 --results mine    # collisions, logitlens

The idea: the twins saw the same tokens in the same order, so a difference on a validation token can
be laid to what was different: how often training saw its n-gram, who shares its row, which block.
Each analysis takes one or more folders of train.py (a pair of twins each, of different seeds;
intervals are over pairs, t) and writes NAME.json and NAME.png.

Letters: B sequences of T validation tokens, S of these tokens, P pairs of twins, G different
n-grams, K hash heads.
"""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import argparse
import json
import math

import numpy as np
import torch
import torch.nn.functional as F

from engram import Engram
from prepare_data import Data, Offline, encoding, fail, script, write_whole
from sample import (BUCKETS, grid, has_colours, interval, load_checkpoint, paint, shaded, spans_of,
                    token_losses, watch)
from train import Config, autocast

BLUE, ORANGE = "tab:blue", "tab:orange"          # dark and light in greyscale; shapes differ too
STYLES = ((BLUE, "o-"), (ORANGE, "s--"), ("black", "^:"), ("grey", "x-"))


def load_pair(out_dir, twin=True):
    """-> one pair of twins: .engram, .moe (models), .data (prepare_data.Data), .cfg (train.Config),
    .run, .header (of Engram's checkpoint), .sequences (that training read); .canonical [V] ids,
    .base (how many), .pad."""
    saved, model = load_checkpoint(Path(out_dir) / "engram" / "ckpt.pt")
    header, device = saved["header"], "cuda" if torch.cuda.is_available() else "cpu"
    pair = SimpleNamespace(engram=model, header=header, cfg=Config(**header["config"]))
    pair.run = {**saved["run"], "step": saved["step"], "tokenizer": saved["tokenizer"]["sha256"]}
    pair.cfg.device, pair.cfg.dataset = device, header["data"]["name"]
    if twin:
        moe, pair.moe = load_checkpoint(Path(out_dir) / "moe" / "ckpt.pt")
        other = {**moe["run"], "step": moe["step"], "tokenizer": moe["tokenizer"]["sha256"]}
        differ = [f"{k} ({v}, {other.get(k)})" for k, v in pair.run.items()
                  if k not in ("n_expert", "shared_hidden", "engram") and v != other.get(k)]
        for key in ("P_tot", "P_act"):
            p, q = header["accounting"][key], moe["header"]["accounting"][key]
            differ += [f"{key} ({p}, {q})"] * (abs(p / q - 1) > 0.01)
        if differ:
            fail(f"{out_dir}: these are no twins, they differ in {', '.join(differ)}: train both "
                 "with one command, python train.py")
        pair.moe.to(device).eval()
    pair.engram.to(device).eval()
    try:
        pair.data = Data(pair.cfg, model.cfg.block_size)
    except (Offline, ValueError) as error:
        fail(error)
    for split in ("train", "val"):
        if pair.data.meta[split]["sha256"] != pair.run[split]:
            fail(f"{pair.cfg.data_dir}/{pair.data.name} is not what {out_dir} was trained on: "
                 "prepare it as it was, or train anew")
    pair.sequences = saved["step"] * pair.cfg.tokens_per_step // model.cfg.block_size
    pair.canonical = model.canonical.cpu().numpy()
    pair.base, pair.pad = int(pair.canonical.max()) + 1, int(pair.canonical[-1])
    pair.orders = [order for order in model.cfg.engram.orders if order > 1]
    if not pair.orders or pair.base ** pair.orders[-1] >= 2 ** 63:
        fail(f"{out_dir}: n-grams of orders {model.cfg.engram.orders}, {pair.base:,} ids: "
             "analyses need one order above 1, and n-grams that fit in 63 bits")
    return pair


def losses(pair, model, memory=True):
    """-> nats [B, T] of the validation tokens."""
    return token_losses(model, pair.data.val_x, pair.data.val_y, pair.cfg.batch_size,
                        autocast(pair.cfg), memory).double().numpy()


def summary(values):
    """Values of the P pairs -> {"mean", "half" (of the 95 % interval, None for one), "values"}."""
    mean, half = interval(values)
    return {"mean": mean, "half": None if math.isnan(half) else half, "values": values}


def says(s):
    return f"{s['mean']:+.3f}" + (f" ± {s['half']:.3f}" if s["half"] is not None else ", n=1")


def by_bucket(by, values, buckets=BUCKETS, of=np.mean):
    """by, values: arrays of one shape -> {bucket of by: mean of the values in it}, none empty."""
    ends = [low for low, _ in buckets[1:]] + [math.inf]
    masks = {name: (by >= low) & (by < end) for (low, name), end in zip(buckets, ends)}
    return {name: float(of(values[mask])) for name, mask in masks.items() if mask.any()}


def over_pairs(tables):
    """[{bucket: value} per pair] -> {bucket: summary} of the buckets that all pairs have."""
    return {k: summary([t[k] for t in tables]) for k in tables[0] if all(k in t for t in tables)}


# ---- knockout -----------------------------------------------------------------------------------

def knockout(pairs, figure):
    """Loss with the memory off, and the twin's, over Engram's, by how often training saw the n-gram
    that ends with the predicted token."""
    found, gains = {"pairs": len(pairs)}, []
    for pair in pairs:
        on = losses(pair, pair.engram)
        gains.append({"off - on": losses(pair, pair.engram, memory=False) - on,
                      "moe - engram": losses(pair, pair.moe) - on})
    for name in gains[0]:
        found[name] = summary([float(gain[name].mean()) for gain in gains])
    for order in (2, 3):
        seen = [pair.data.count(pair.sequences, order)[0] for pair in pairs]
        found[f"{order}-grams"] = {name: over_pairs([by_bucket(s, gain[name]) for s, gain in
                                                     zip(seen, gains)]) for name in gains[0]}
        found[f"{order}-grams"]["tokens"] = over_pairs([by_bucket(s, s, of=len) for s in seen])
    axes = figure.subplots(1, 2, sharey=True)
    for ax, order in zip(axes, (2, 3)):
        for name, colour, mark in (("off - on", ORANGE, "s--"), ("moe - engram", BLUE, "o-")):
            points(ax, found[f"{order}-grams"][name], colour, mark, {
                "off - on": "memory off, same weights", "moe - engram": "MoE-only twin"}[name])
        ax.set(xlabel=f"times training saw the\n{order}-gram ending in the token")
        ax.axhline(0, color="black", lw=0.6)
    axes[0].set(ylabel="loss minus Engram's (nats per token)")
    axes[0].legend()
    return found, (f"The twin's loss minus Engram's: {says(found['moe - engram'])}; by how often "
                   "training saw the 3-gram: " + ", ".join(
                       f"{name} {says(s)}" for name, s in found["3-grams"]["moe - engram"].items()))


def points(ax, table, colour, mark, label, buckets=BUCKETS):
    """{bucket: summary}: means with intervals, joined, and each pair's value as a dot."""
    names = [name for _, name in buckets]
    x = [names.index(name) for name in table]
    ax.errorbar(x, [s["mean"] for s in table.values()],
                [s["half"] or 0 for s in table.values()], fmt=mark, color=colour, capsize=3,
                label=label)
    for i, s in zip(x, table.values()):
        ax.plot([i] * len(s["values"]), s["values"], ".", color=colour, ms=4, alpha=0.6)
    ax.set_xticks(range(len(names)), names, rotation=20, fontsize=8)


# ---- addresses ----------------------------------------------------------------------------------

def addresses(ids, order, base, pad):
    """ids [B, T] below base -> [B, T]: the n-gram that ends at each position, as one number."""
    x, T = np.pad(ids, ((0, 0), (order - 1, 0)), constant_values=pad), ids.shape[1]
    return sum(x[:, order - 1 - k:order - 1 - k + T] * base ** k for k in range(order))


def grams(pair, x, order):
    """Token ids [., T] -> the canonical n-gram that ends at each, as one number."""
    return addresses(pair.canonical[x], order, pair.base, pair.pad)


def trained(pair, order):
    """-> the different canonical n-grams that training read, sorted [G], and how often [G]."""
    starts = pair.data.order[:pair.sequences] * pair.data.T
    return np.unique(grams(pair, pair.data.sequences(pair.data.train, starts)[0], order),
                     return_counts=True)


def rows_of(engram, numbers, order, base):
    """n-grams [G] as numbers -> the rows they read, [G, K], counted from each head's first."""
    ids = np.stack([numbers // base ** k % base for k in reversed(range(order))], axis=1)
    i, K = engram.cfg.orders.index(order), engram.cfg.heads
    rows = torch.cat([engram.hash(part)[:, -1] for part in
                      torch.from_numpy(ids).to(engram.offsets.device).split(1 << 16)])
    return (rows[:, i * K:(i + 1) * K] - engram.offsets[i]).cpu().numpy()


def look_up(keys, values, wanted):
    """values of the wanted keys (0 where there is no such key); keys are sorted."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


# ---- collisions ---------------------------------------------------------------------------------

def collisions(pairs, figure):
    """Who shares rows, by order and table size: counted from the hash and what training read."""
    if len(pairs) > 1:
        fail("collisions counts what one run read: give one --out_dir")
    pair, = pairs
    cfg = pair.engram.cfg.engram
    here, sizes = cfg.rows[-1], sorted({*(2 ** k for k in range(10, 23, 2)), cfg.rows[-1]})
    found = {"rows": sizes, "heads": cfg.heads, "here": here}
    axes = figure.subplots(1, len(pair.orders), sharey=True, squeeze=False)[0]
    for ax, order in zip(axes, pair.orders):
        numbers, counts = trained(pair, order)
        table = found[f"{order}-grams"] = {"different": len(numbers)}
        for size in sizes:
            sized = replace(cfg, rows=size, blocks=cfg.blocks[:1])
            hashed = Engram(sized, sized.blocks[0], 8, pair.base, pair.pad,
                            lambda *shape: torch.empty(0, 1))       # the hash alone: no table
            for name, value in shared(rows_of(hashed, numbers, order, pair.base), counts).items():
                table.setdefault(name, []).append(value)
        for (name, label), (colour, mark) in zip({
                "rows": "rows used that hold several", "reads": "reads of such rows",
                "all heads": f"n-grams with company in all {cfg.heads} heads",
                "same in all": "the same company in all"}.items(), STYLES):
            ax.plot(sizes, table[name], mark, color=colour, label=label)
        ax.axvline(here, color="grey", lw=0.8)
        ax.set(xscale="log", xlabel="rows per head (grey: this model)")
        ax.set_title(f"{len(numbers):,} different {order}-grams", fontsize=9)
    axes[0].set(ylabel="share")
    axes[-1].legend(fontsize=8, loc="center left")
    i = sizes.index(here)
    return found, (f"At {here:,} rows per head {table['rows'][i]:.0%} of the rows used hold "
                   f"several {order}-grams, {table['all heads'][i]:.0%} of the n-grams have "
                   f"company in all {cfg.heads} heads (at {sizes[-1]:,} rows "
                   f"{table['all heads'][-1]:.1%}), "
                   f"{table['same in all'][i]:.2%} the same in all")


def shared(rows, counts):
    """rows [G, K], counts [G] -> shares: of the rows used, those that hold several n-grams (mean of
    the heads); of the reads, those of such rows; of the n-grams, those that have company in every
    head, and those whose company is the same n-gram in every head, so that nothing parts them."""
    of_rows, alone = [], np.zeros(rows.shape, bool)
    for k, column in enumerate(rows.T):
        held = np.bincount(column)
        of_rows.append((held > 1).sum() / (held > 0).sum())
        alone[:, k] = held[column] == 1
    return {"rows": float(np.mean(of_rows)),
            "reads": float((~alone * counts[:, None]).sum() / counts.sum() / rows.shape[1]),
            "all heads": float((~alone).all(1).mean()),
            "same in all": float(1 - (np.unique(rows, axis=0, return_counts=True)[1] == 1).sum()
                                 / len(rows))}


# ---- gates --------------------------------------------------------------------------------------

def own_share(counts, rows):
    """[G]: of the times training read the rows of an n-gram, the share that was its own (mean of
    its heads). 1: alone in all; near 0: its rows belong to others."""
    return np.mean([counts / np.bincount(r, counts)[r] for r in rows.T], axis=0)


def centred(groups, values):
    """groups, values [S] -> values minus the mean of their group [S]."""
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    return values - (np.bincount(group, values) / size)[group]


def explained(groups, values):
    """The share of the values' variance that the group explains, adjusted for the number of groups;
    each has several members."""
    inner = (centred(groups, values) ** 2).sum() / (len(values) - len(np.unique(groups)))
    return float(1 - inner / values.var(ddof=1))


def one_gate(pair):
    """What the gate (mean of the memory layers) does in one model -> results, and what to draw."""
    x, order = pair.data.val_x, pair.orders[-1]
    with watch(pair.engram) as seen:
        on = losses(pair, pair.engram)
    gate = sum(torch.cat([g for g, _ in layer]).cpu().double() for layer in seen).numpy()
    gate, gain = gate / len(seen), losses(pair, pair.engram, memory=False) - on
    result = {"mean": float(gate.mean()), "sd": float(gate.std())}
    for n in pair.orders:
        numbers, counts = trained(pair, n)
        ours = grams(pair, x, n)
        times = look_up(numbers, counts, ours)
        own = np.mean([own_share(counts, rows_of(engram, numbers, n, pair.base))
                       for engram in pair.engram.engrams()], axis=0)
        own, parts = look_up(numbers, own, ours), zip((1, 10, 100), (10, 100, math.inf))
        result[f"{n}-grams"] = {"by count": by_bucket(times, gate), **{
            f"by own share, seen {name}": by_bucket(own[mask], gate[mask], SHARES)
            for name, (low, high) in zip(("1-9", "10-99", "100 or more"), parts)
            for mask in [(times >= low) & (times < high)]}}
    full = np.broadcast_to(np.arange(x.shape[1]) >= order - 1, x.shape)        # no padding in it
    view = SimpleNamespace(whole=gate, gate=gate[full], full=full, order=order,
                           here=grams(pair, x, order)[full],
                           raw=addresses(x, order, len(pair.data.bytes), 0)[full])
    both = {"gate and gain": (view.gate, gain[full]),
            "gate and gain within": [centred(view.here, v) for v in (view.gate, gain[full])]}
    result.update({name: float(np.corrcoef(*ab)[0, 1]) for name, ab in both.items()})
    _, group, size = np.unique(view.raw, return_inverse=True, return_counts=True)
    again = size[group] > 1                     # the same tokens for all three, so that they nest
    result["tokens that recur"] = float(again.mean())
    for name, groups in (("by the token", pair.canonical[x][full]), ("by the n-gram", view.here),
                         ("by its writing too", view.raw)):
        result[name] = explained(groups[again], view.gate[again])
    return result, view


SHARES = ((1e-9, "< 0.03"), (0.03, "0.03-0.1"), (0.1, "0.1-0.3"), (0.3, "0.3 or more"))


def words(pair, seen, least):
    """-> [(mean gate, times, text)] of the n-grams that come at least so often, the most closed
    first; and [(difference, mean gates, texts)] of those that stand in two writings (The, the): one
    n-gram to the hash, two contexts to the gate; the largest difference first."""
    enc, x = encoding(pair.data.meta["tokenizer"]), pair.data.val_x
    text = lambda at: enc.decode(x[at[0], at[1] + 1 - seen.order:at[1] + 1].tolist())
    at = np.argwhere(seen.full)
    mean = lambda members: float(seen.gate[members].mean())
    _, group, times = np.unique(seen.here, return_inverse=True, return_counts=True)
    ranked, twofold = [], []
    for members in np.split(np.argsort(group, kind="stable"), np.cumsum(times)[:-1]):
        if len(members) < least:
            continue
        ranked.append((mean(members), len(members), text(at[members[0]])))
        _, which, n = np.unique(seen.raw[members], return_inverse=True, return_counts=True)
        top = np.argsort(-n)[:2]                                    # the two commonest writings
        a, b = members[which == top[0]], members[which == top[-1]]
        if len(n) > 1 and len(b) >= least // 2:
            twofold.append((abs(mean(a) - mean(b)), [mean(a), mean(b)],
                            [text(at[a[0]]), text(at[b[0]])]))
    return sorted(ranked), sorted(twofold, key=lambda t: -t[0])


def gates(pairs, figure):
    """Where the gate opens: in a text, by how often an n-gram was seen, by who shares its rows, and
    for one n-gram in two contexts."""
    if pairs[0].engram.cfg.engram.gate == "off":
        fail("this model has no gate (--engram_gate off)")
    results, views = zip(*(one_gate(pair) for pair in pairs))
    pair, seen, found = pairs[0], views[0], {"pairs": len(pairs)}
    for key, value in results[0].items():
        found[key] = {name: over_pairs([r[key][name] for r in results]) for name in value} \
            if isinstance(value, dict) else summary([r[key] for r in results])
    least = 10
    ranked, twofold = words(pair, seen, least)
    found["closed"], found["open"] = ranked[:8], ranked[:-9:-1]
    found["two writings"] = [t[1:] for t in twofold[:8]]
    enc = encoding(pair.data.meta["tokenizer"])
    row = int(np.argmax(seen.whole.std(axis=1)))            # the sequence in which it moves most
    spans = spans_of(enc, pair.data.val_x[row, 1:90].tolist(), seen.whole[row, 1:90])
    low, high = (float(v) for v in np.percentile(seen.whole, (5, 95)))
    print(shaded(spans, low, high, has_colours()))
    parts = figure.add_gridspec(2, 3, height_ratios=(1, 1.6))
    cells = grid(spans, 100)
    text = figure.add_subplot(parts[0, :])
    text.set(xlim=(0, 100), ylim=(max(c[0] for c in cells) + 0.5, -0.5))
    text.set_title(f"gate on each token: white {low:.2f} or less, blue {high:.2f} or more",
                   fontsize=9)
    paint(text, cells, low, high, 7.5)
    ax = figure.add_subplot(parts[1, 0])
    for n, (colour, mark) in zip(pair.orders, STYLES):
        points(ax, found[f"{n}-grams"]["by count"], colour, mark, f"{n}-grams")
    ax.set(xlabel="times training read the n-gram", ylabel="mean gate")
    ax.legend(fontsize=8)
    ax = figure.add_subplot(parts[1, 1], sharey=ax)
    last = found[f"{seen.order}-grams"]
    for (name, table), (colour, mark) in zip([kv for kv in last.items() if "own" in kv[0]], STYLES):
        points(ax, table, colour, mark, name.split(", ")[1], SHARES)
    ax.set(xlabel=f"own share of the rows' reads ({seen.order}-grams)")
    ax.legend(fontsize=8)
    ax = figure.add_subplot(parts[1, 2])
    shown = found["closed"][:6] + found["open"][5::-1]
    ax.barh(range(len(shown)), [s[0] for s in shown], color=[ORANGE] * 6 + [BLUE] * 6)
    ax.set_yticks(range(len(shown)), [repr(s[2]).replace("$", r"\$") for s in shown], fontsize=7)
    ax.set(xlabel=f"mean gate ({seen.order}-grams seen >= {least}x)")
    return found, (f"The gate (mean {found['mean']['mean']:.2f}, sd {found['sd']['mean']:.2f}): "
                   f"where a {seen.order}-gram recurs, the token explains "
                   f"{found['by the token']['mean']:.1%} of its variance, the {seen.order}-gram "
                   f"{found['by the n-gram']['mean']:.1%}, as written "
                   f"{found['by its writing too']['mean']:.1%}, wider context the rest; "
                   f"correlation with what the memory gains {says(found['gate and gain'])}, "
                   f"within an n-gram {says(found['gate and gain within'])}")


# ---- logitlens ----------------------------------------------------------------------------------

@torch.no_grad()
def lens(pair, model):
    """-> KL(final || block) in nats per token, for the output of each block, read through the final
    norm and the head. The last is 0."""
    logits = lambda x: F.linear(model.norm(x), model.embed.weight).float().log_softmax(-1)
    kept, sums = [], np.zeros(len(model.blocks))
    hooks = [block.register_forward_hook(lambda _, __, out: kept.append(out[0]))
             for block in model.blocks]
    for x in torch.from_numpy(pair.data.val_x).split(pair.cfg.batch_size):
        kept.clear()
        with autocast(pair.cfg):
            model(x.to(pair.cfg.device))
            final = logits(kept[-1])
            sums += [float(F.kl_div(logits(h), final, reduction="sum", log_target=True))
                     for h in kept]
    for hook in hooks:
        hook.remove()
    return (sums / pair.data.val_x.size).tolist()


def logitlens(pairs, figure):
    """How far each block's output is from the model's last word, both twins."""
    curves = {name: [lens(pair, getattr(pair, name)) for pair in pairs] for name in
              ("engram", "moe")}
    layers = range(len(curves["engram"][0]))
    found = {"pairs": len(pairs), "memory in blocks": pairs[0].engram.cfg.engram.blocks,
             **{name: [summary([c[i] for c in cs]) for i in layers] for name, cs in curves.items()},
             "engram - moe": [summary([a[i] - b[i] for a, b in zip(*curves.values())])
                              for i in layers]}
    ax = figure.subplots()
    for name, colour, mark, label in (("engram", BLUE, "o-", "Engram"),
                                      ("moe", ORANGE, "s--", "MoE-only twin")):
        points(ax, dict(zip(map(str, layers), found[name])), colour, mark, label,
               [(i, str(i)) for i in layers])
    ax.set(ylabel="KL(final || block), nats per token", xlabel="output of block")
    ax.legend()
    gap = found["engram - moe"][:-1]
    return found, "KL to the final distribution, Engram minus twin, by block: " + ", ".join(
        f"{says(s)}" for s in gap)


ANALYSES = {f.__name__: f for f in (knockout, gates, collisions, logitlens)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=", ".join(ANALYSES))
    parser.add_argument("--out_dir", nargs="+", default=["out"], help="of train.py, a pair of "
                        "twins each (default: out)")
    parser.add_argument("--results", default="results", help="where NAME.json and NAME.png go "
                        "(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.name not in ANALYSES:
        fail(f"there is no analysis {args.name}: choose from {', '.join(ANALYSES)}")
    from matplotlib.figure import Figure
    import textwrap
    path = Path(args.results) / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [load_pair(out, args.name in ("knockout", "logitlens")) for out in args.out_dir]
    if len({pair.cfg.seed for pair in pairs}) < len(pairs):
        fail(f"{', '.join(args.out_dir)}: two are of one seed, and would count twice")
    if len({json.dumps({**pair.run, "seed": 0}) for pair in pairs}) > 1:
        fail(f"{', '.join(args.out_dir)} differ in more than their seed: one at a time")
    figure = Figure(figsize=(10, 6) if args.name == "gates" else (8, 4), layout="constrained")
    found, title = ANALYSES[args.name](pairs, figure)
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=10)
    of_run = ("command", "commit", "torch", "device")
    result = {"finding": title, "seeds": [pair.cfg.seed for pair in pairs],
              "runs": [{k: pair.header[k] for k in of_run} for pair in pairs], **found}
    write_whole(path, lambda file: file.write(json.dumps(result, indent=1).encode()))
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(title, f"{path}, {path.with_suffix('.png')}", sep="\n")


if __name__ == "__main__":
    script(main)
