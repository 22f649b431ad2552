"""
What the memory of a trained model does, seen from inside.

    python -m experiments.analyze knockout                 # of the pair of twins in out/
    python -m experiments.analyze gates --out_dir out11 out12 out13
    python -m experiments.analyze knockout --plot          # from experiments/results again
    python -m experiments.analyze zipf                     # would a cache of hot rows help?

The idea: twins saw the same tokens in the same order, so their losses can be compared token
by token, sorted by how often training saw the token's n-gram. An analysis is three
functions. The first returns numbers about one pair of twins; the others make sentences and
a picture of NAME.json, where these numbers are saved for all pairs. Several folders of
train.py, of different seeds, give 95 % intervals over the pairs.

Letters: B sequences of T validation tokens.
"""
import json
import statistics
from copy import copy, deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common import (default_device, fail, make_parser, new_figure, run_script, write_json,
                    write_whole)
from engram import Engram, EngramConfig
from model import load_checkpoint, token_losses, watch
from runs import differences, twin_differences
from sample import teach
from train import Config, autocast, load_data

COMMITTED = Path(__file__).resolve().parent / "results"
# how often training saw an n-gram; a bucket ends where the next begins
BUCKETS = {"never": 0, "1-9": 1, "10-99": 10, "100-999": 100, "1,000 or more": 1000}
STYLES = (("tab:blue", "-"), ("tab:orange", "--"), ("black", ":"), ("tab:green", "-."),
          ("tab:red", "-"), ("tab:purple", "--"), ("tab:brown", ":"), ("tab:cyan", "-."),
          ("tab:pink", "--"), ("tab:olive", ":"))


# ---- runs ----------------------------------------------------------------------------

def load_pair(out_dir, twin=True):
    """Return the twins in a folder of train.py as .engram and .moe (None if twin is False),
    and of Engram .saved, .cfg, .data, .canonical, and how many .sequences it has read."""
    saved, engram = load_checkpoint(Path(out_dir) / "engram" / "ckpt.pt")
    cfg = Config(**saved["header"]["config"])
    cfg.device = default_device()
    moe = None
    if twin:
        other, moe = load_checkpoint(Path(out_dir) / "moe" / "ckpt.pt")
        differ = twin_differences((saved["header"], saved["records"]),
                                  (other["header"], other["records"]))
        if differ:
            fail(f"{out_dir}: these are not twins, they differ in {', '.join(differ)}; "
                 "train both with one command, python train.py")
        moe.to(cfg.device)
    data = load_data(cfg, engram.cfg.block_size)
    for split in ("train", "val"):
        if data.meta[split]["sha256"] != saved["run"][f"{split} data"]:
            fail(f"{cfg.data_dir}/{data.name} is not what this model was trained on: "
                 "prepare it as it was, or train again")
    return SimpleNamespace(engram=engram.to(cfg.device), moe=moe, saved=saved, cfg=cfg,
                           data=data, canonical=engram.canonical.cpu().numpy(),
                           sequences=saved["step"] * data.sequences_per_step)


def load_pairs(folders, twin):
    """Return a pair per folder. They must differ in their seeds, and in nothing else."""
    pairs = [load_pair(folder, twin) for folder in folders]
    if len({pair.cfg.seed for pair in pairs}) < len(pairs):
        fail(f"{', '.join(folders)}: two are of one seed, and would count twice")
    for pair in pairs:
        differ = differences(pairs[0].saved["run"], pair.saved["run"], ignore=("seed",))
        if differ:
            fail(f"{', '.join(folders)} differ not in their seeds alone, but in "
                 f"{', '.join(differ)}")
    # the twin of another seed, for a control
    for pair, other in zip(pairs, pairs[1:] + pairs[:1]):
        pair.other = other.moe
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
    """Return the mean and half the width of its 95 % interval, 0 for one value."""
    if len(values) < 2:
        return values[0], 0.0
    # beyond the end of the table its last value is a little too wide
    t = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def over_pairs(found):
    """Return the numbers of several pairs, all in dicts of the same shape, as one dict of
    lists. A bucket that a pair does not have is left out."""
    if not isinstance(found[0], dict):
        return found
    table = {}
    for name in found[0]:
        if all(name in of_pair for of_pair in found):
            table[name] = over_pairs([of_pair[name] for of_pair in found])
    return table


def says(values):
    """Return a number of several pairs in words."""
    mean, half = interval(values)
    return f"{mean:+.3f} ± {half:.3f}" if len(values) > 1 else f"{mean:+.3f} (n=1)"


def by_bucket(seen, values):
    """Return {bucket: mean of the values where `seen` lies in it}, without empty ones."""
    number = np.digitize(seen, list(BUCKETS.values())) - 1
    members = {name: values[number == i] for i, name in enumerate(BUCKETS)}
    return {name: float(some.mean()) for name, some in members.items() if some.size}


def points(axes, x, columns, style, label=None):
    """Draw at each x its column of values as dots, and their mean with its interval."""
    colour, line = style
    means, halves = zip(*[interval(column) for column in columns])
    axes.errorbar(x, means, halves, color=colour, ls=line, marker="s", mfc="none",
                  capsize=4, label=label)
    for at, column in zip(x, columns):
        axes.plot([at] * len(column), column, ".", color=colour, ms=5, alpha=0.6)


def draw_buckets(axes, tables):
    """Draw {label: {bucket: values of the pairs}}, a line each."""
    names = list(BUCKETS)
    for (label, table), style in zip(tables.items(), STYLES):
        points(axes, [names.index(name) for name in table], table.values(), style, label)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.legend()


# ---- knockout: where the memory helps ------------------------------------------------

GAINS = {"moe - engram": "MoE-only twin minus Engram",
         "off - on": "Memory off minus on, same weights"}


def knockout(pair):
    """Compare Engram's loss with its twin's, and with its own when the memory is off, by
    how often training saw the n-gram that ends with the predicted token."""
    on = losses(pair, pair.engram)
    gains = {"moe - engram": losses(pair, pair.moe) - on,
             "off - on": losses(pair, pair.engram, memory=False) - on}
    seen, _ = pair.data.count(pair.sequences, 3)
    found = {name: float(gain.mean()) for name, gain in gains.items()}
    return found | {"3-grams": {name: by_bucket(seen, gain) for name, gain in gains.items()}}


def say_knockout(found):
    lines = []
    for name, label in GAINS.items():
        table = found["3-grams"][name]
        parts = [f"{bucket} {says(values)}" for bucket, values in table.items()]
        lines.append(f"{label}: {says(found[name])} nats per token; by how often training "
                     f"saw the 3-gram: {', '.join(parts)}")
    return lines


def draw_knockout(axes, found):
    draw_buckets(axes, {label: found["3-grams"][name] for name, label in GAINS.items()})
    axes.set(xlabel="times training saw the 3-gram that ends in the token",
             ylabel="difference in loss (nats per token)", title="Where the memory helps")
    axes.axhline(0, color="black", lw=0.6)


# ---- gates: when the gate opens ------------------------------------------------------

def explained(groups, values):
    """Return the share of the values' variance that the group explains, adjusted for how
    many groups there are. Each has several members."""
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    mean = np.bincount(group, values) / size
    inner = ((values - mean[group]) ** 2).sum() / (len(values) - len(size))
    return float(1 - inner / values.var(ddof=1))


def gates(pair):
    """Find out when the gate opens: by how often training saw the canonical n-gram that is
    read, and by how much of the gate's variance the token, the canonical n-gram and the
    n-gram as written explain."""
    cfg, data = pair.engram.cfg.engram, pair.data
    if cfg.gate == "off" or cfg.orders[0] == 1:
        fail("gates are analysed where there is a gate, and no n-gram order below 2")
    with watch(pair.engram) as seen:
        losses(pair, pair.engram)
    layers = [torch.cat(layer["gate"]).cpu().double().numpy() for layer in seen]
    # the mean of the memory layers [B, T]
    gate = np.mean(layers, axis=0)
    found = {"mean": float(gate.mean()), "sd": float(gate.std())}
    # the data as the memory reads them, in canonical ids
    read = copy(data)
    read.train = pair.canonical[data.train]
    read.val_x, read.val_y = pair.canonical[data.val_x], pair.canonical[data.val_y]
    # n-grams of inputs: at each token but the first ones; the last target has no gate
    order = cfg.orders[-1]
    written = data.grams(data.val_x, data.val_y, order)[:, :-1]
    groups = {"by the token": read.val_x[:, order - 1:],
              "by the n-gram": read.grams(read.val_x, read.val_y, order)[:, :-1],
              "by its writing too": written}
    # the same tokens for all three: those whose n-gram recurs
    _, group, size = np.unique(written, return_inverse=True, return_counts=True)
    recurs = size[group].reshape(written.shape) > 1
    for name, ids in groups.items():
        found[name] = explained(ids[recurs], gate[:, order - 1:][recurs])
    for order in cfg.orders:
        # Count t is of the n-gram that ends with target t, which is input t + 1: it belongs
        # to the gate of t + 1.
        times, _ = read.count(pair.sequences, order)
        found[f"{order}-grams"] = {"by count": by_bucket(times[:, :-1], gate[:, 1:])}
    return found


def say_gates(found):
    # the largest order is the last one found
    name = list(found)[-1].removesuffix("s")
    mean, sd, token, gram, written = (np.mean(found[key]) for key in (
        "mean", "sd", "by the token", "by the n-gram", "by its writing too"))
    return [f"The gate is {mean:.2f} on average (sd {sd:.2f} between tokens). Where a "
            f"{name} recurs, the token explains {token:.1%} of the gate's variance, the "
            f"{name} {gram:.1%}, and the {name} as it is written {written:.1%}; the wider "
            "context explains the rest"]


def draw_gates(axes, found):
    draw_buckets(axes, {name: table["by count"] for name, table in found.items()
                        if name.endswith("-grams")})
    axes.set(xlabel="times training read the n-gram", ylabel="mean gate", ylim=(0, 1),
             title="How far the gate opens, by how often training read the n-gram")


# ---- depth: is the prediction there earlier? -----------------------------------------

@torch.no_grad()
def states(model, x):
    """Return the stream [1 + n_layer, T, D] of tokens x [T]: before each block, and before
    the final norm."""
    kept, hooks = [], []
    for module in (*model.blocks, model.norm):
        hooks.append(module.register_forward_pre_hook(lambda _, args: kept.append(args[0])))
    model.eval()(torch.as_tensor(x, device=model.embed.weight.device)[None])
    for hook in hooks:
        hook.remove()
    return torch.cat(kept)


def hsic(a, b):
    """Return the unbiased estimate [La, Lb] of HSIC (Song et al., 2012) between states a
    [La, n, D] and b [Lb, n, D] of the same n tokens, with linear kernels."""
    n = a.size(1)
    a, b = (x.double() @ x.double().mT * (1 - torch.eye(n).to(x)) for x in (a, b))
    rows_a, rows_b = a.sum(2), b.sum(2)
    same = torch.einsum("ijk,ljk->il", a, b)
    means = torch.outer(rows_a.sum(1), rows_b.sum(1)) / ((n - 1) * (n - 2))
    return (same + means - 2 / (n - 2) * rows_a @ rows_b.T) / (n * (n - 3))


def cka(batches):
    """Return the linear CKA [La, Lb] of [(a, b)], batches of states: 1 where two layers
    differ by a rotation alone. Sums over batches as in Nguyen et al. (2021)."""
    ab = sum(hsic(a, b) for a, b in batches)
    aa = sum(hsic(a, a).diag() for a, _ in batches)
    bb = sum(hsic(b, b).diag() for _, b in batches)
    return ab / torch.outer(aa, bb).sqrt()


def alignment(similar):
    """Return, for each layer of a, where it lies among the layers of b (section 5.1 of the
    paper: of the five most similar ones the mean index, weighted by similarity)."""
    weights, index = similar.topk(min(5, similar.size(1)), dim=1)
    return (weights * index).sum(1) / weights.sum(1)


def distances(model, layers):
    """Return, for each layer, the mean KL (nats per token) of what the model would predict
    from it from what it does predict."""
    logp = (model.norm(layers) @ model.embed.weight.T).log_softmax(-1)
    return (logp[-1].exp() * (logp[-1] - logp)).sum(-1).mean(1)


def by_layer(values):
    return {str(i): float(value) for i, value in enumerate(values)}


@torch.no_grad()
def depth(pair):
    """Compare the layers of Engram with its twin's: how far each is from the final
    prediction (LogitLens), and where it lies among the twin's (CKA). The control is the
    twin of another seed in Engram's place."""
    if pair.other is pair.moe:
        fail("depth needs the runs of two seeds or more: name their folders by --out_dir")
    times, _ = pair.data.count(pair.sequences, 3)
    kl, batches = 0, {"all tokens": [], "recurrent 3-grams": []}
    for x, seen in zip(pair.data.val_x, times):
        own, twin, other = (states(m, x) for m in (pair.engram, pair.moe, pair.other))
        kl += distances(pair.engram, own) - distances(pair.moe, twin)
        batches["all tokens"].append((own, twin, other))
        # tokens that end a 3-gram which training has seen ten times (the count is a target's)
        recur = np.flatnonzero(seen[:-1] >= 10) + 1
        # HSIC needs four
        if len(recur) > 3:
            batches["recurrent 3-grams"].append((own[:, recur], twin[:, recur],
                                                 other[:, recur]))
    if not batches["recurrent 3-grams"]:
        fail("depth needs tokens whose 3-gram training saw ten times: train longer")
    found = {"KL": by_layer(kl / len(times))}
    for where, parts in batches.items():
        engram = cka([(own, twin) for own, twin, _ in parts])
        control = cka([(other, twin) for _, twin, other in parts])
        found[where] = {
            "alignment": by_layer(alignment(engram) - alignment(control)),
            "engram": {str(i): by_layer(row) for i, row in enumerate(engram)}}
    return found


def say_depth(found):
    def by_block(numbers):
        # the first is the embedding's
        _, *numbers = numbers.values()
        return [f"block {i} {says(values)}" for i, values in enumerate(numbers)]

    # the last block's prediction is the final one
    lines = ["Distance of a block's output from the final prediction (KL, nats per token), "
             f"Engram minus its twin: {', '.join(by_block(found['KL'])[:-1])}"]
    for where in ("all tokens", "recurrent 3-grams"):
        lines.append("Where a block of Engram lies among its twin's (CKA, in blocks), minus "
                     f"where another twin's lies, at {where}: "
                     f"{', '.join(by_block(found[where]['alignment']))}")
    return lines


def draw_depth(axes, found):
    means = []
    for row in found["all tokens"]["engram"].values():
        means.append([np.mean(values) for values in row.values()])
    means = np.array(means)
    axes.imshow(means, origin="lower", cmap="Blues", vmin=0, vmax=1)
    for (i, j), value in np.ndenumerate(means):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center",
                  color="white" if value > 0.6 else "black")
    names = ["embedding", *(f"block {i}" for i in range(len(means) - 1))]
    axes.set_xticks(range(len(means)), names)
    axes.set_yticks(range(len(means)), names)
    axes.set(xlabel="the MoE-only twin", ylabel="Engram",
             title="How similar the layers are (linear CKA, all tokens)")


# ---- facts: what does writing into the memory disturb? -------------------------------

def facts(pair):
    """Write 50 facts, each into the table as it was: after eight tokens of the validation
    text comes a random token. Count how often that token becomes the likeliest, and what
    changes in 32 other contexts."""
    half = len(pair.data.val_x) // 2
    triggers = pair.data.val_x[:half, :8].tolist()
    x = torch.from_numpy(pair.data.val_x[half:][:32])
    answers = np.random.default_rng(0).integers(len(pair.data.bytes), size=50).tolist()
    found = []
    for trigger, answer in zip(triggers, answers):
        model = deepcopy(pair.engram).cpu()
        before, after, *what = teach(model, trigger, [answer], x)
        reads, _, changed, other = (some.sum().item() * 1000 / x.numel() for some in what)
        best = model(torch.tensor([trigger]))[0][0, -1].argmax() == answer
        found.append([best, before, after, reads, changed, other])
    names = ("likeliest", "before", "after", "reads", "changed", "other")
    return dict(zip(names, np.mean(found, axis=0).tolist())) | {"facts": len(found)}


def say_facts(found):
    mean = {name: np.mean(values) for name, values in found.items() if name != "headers"}
    return ["Of {facts:.0f} random facts {likeliest:.0%} became the likeliest answer (mean "
            "probability {before:.3f} before, {after:.3f} after). Of 1,000 tokens of other "
            "text {reads:.1f} read one of the rows, the logits of {changed:.0f} changed at "
            "all, and of {other:.1f} the likeliest next token".format(**mean)]


# ---- zipf: would a cache of hot rows help? -------------------------------------------

def zipf(pair):
    """Find which share of the reads from a table of 4 million rows a cache of the hottest
    would serve. They are chosen on the first half of the text and judged on the second. A
    prompt of 1,024 tokens reads each of its rows once, as Engram.read does."""
    canonical, train = pair.canonical, pair.data.train
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
    return {"dataset": pair.data.name, "tokens": prompts.numel(),
            "reads": int(counts.sum()), "rows": len(hits),
            "rows_read": int((counts.sum(0) > 0).sum()), "cache_rows": sizes,
            "hit_rate": [float(hits[n - 1]) for n in sizes]}


def say_zipf(found):
    lines = [f"{found['dataset']}: {found['tokens']:,} tokens read {found['reads']:,} "
             f"rows, {found['rows_read']:,} different ones of {found['rows']:,}"]
    for n, rate in list(zip(found["cache_rows"], found["hit_rate"]))[::4]:
        lines.append(f"  a cache of the {n:9,} hottest rows serves {rate:6.1%} of the "
                     "reads")
    return lines


def draw_zipf(axes, found):
    axes.plot(found["cache_rows"], found["hit_rate"])
    axes.set(xscale="log", ylim=(0, 1), xlabel=f"rows cached, of {found['rows']:,}",
             ylabel="share of the reads served",
             title="What a cache of the hottest rows serves")


# {name: (find(pair), say(found), draw(axes, found) or None)}
ANALYSES = {
    "knockout": (knockout, say_knockout, draw_knockout),
    "gates": (gates, say_gates, draw_gates),
    "depth": (depth, say_depth, draw_depth),
    "facts": (facts, say_facts, None),
    "zipf": (zipf, say_zipf, draw_zipf)}


def read_results(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        fail(f"{path} is damaged ({error}): run without --plot")


def draw_picture(path, draw, *what):
    """Draw NAME.png beside NAME.json."""
    figure = new_figure(figsize=(7.5, 4.5))
    draw(figure.subplots(), *what)
    path = path.with_suffix(".png")
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    print(f"picture: {path}")


def main(argv=None):
    parser = make_parser(__doc__, "python -m experiments.analyze NAME [options]")
    add = parser.add_argument
    add("name", choices=ANALYSES, metavar="NAME", help=", ".join(ANALYSES))
    add("--out_dir", nargs="+", default=["out"], help="folders of train.py (default: out)")
    add("--plot", action="store_true", help="compute nothing; read --results, by default "
        "experiments/results, the results that came with the code")
    add("--results", help="folder of NAME.json and NAME.png (default: the first out_dir)")
    args = parser.parse_args(argv)
    find, say, draw = ANALYSES[args.name]
    folder = COMMITTED if args.plot else args.out_dir[0]
    path = Path(args.results or folder) / f"{args.name}.json"
    if not args.plot:
        pairs = load_pairs(args.out_dir, twin=args.name in ("knockout", "depth"))
        headers = [pair.saved["header"] for pair in pairs]
        if args.name == "zipf":
            # it looks at the text alone, which is the same for all seeds
            found = zipf(pairs[0])
        else:
            found = over_pairs([find(pair) for pair in pairs])
        write_json(path, {"headers": headers, **found})
    found = read_results(path)
    print(*say(found), f"numbers: {path}", sep="\n")
    if draw:
        draw_picture(path, draw, found)


if __name__ == "__main__":
    run_script(main)
