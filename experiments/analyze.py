"""
What the memory of a trained model does, seen from inside.

    python -m experiments.analyze report                   # of the pair of twins in out/
    python -m experiments.analyze knockout --out_dir out11 out12 out13
    python -m experiments.analyze knockout --plot          # from experiments/results again
    python -m experiments.analyze zipf --dataset python    # would a cache of hot rows help?

The idea: twins saw the same tokens in the same order, so their losses can be compared token
by token, sorted by how often training saw the token's n-gram. An analysis is three
functions. The first returns numbers, which are saved as NAME.json; the others make
sentences and a picture of these numbers alone. Several folders of train.py, of different
seeds, give 95 % intervals over the pairs.

Letters: B sequences of T validation tokens.
"""
import json
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from common import default_device, fail, make_parser, new_figure, run_script, write_whole
from engram import Engram, EngramConfig, canonical_ids
from model import load_checkpoint, token_losses
from prepare_data import Data, Offline, load, token_bytes
from runs import MODELS, differences, twin_differences
from train import Config, autocast, watch

COMMITTED = Path(__file__).resolve().parent / "results"
# how often training saw an n-gram; a bucket ends where the next begins
BUCKETS = {"never": 0, "1-9": 1, "10-99": 10, "100-999": 100, "1,000 or more": 1000}
STYLES = (("tab:blue", "-"), ("tab:orange", "--"), ("black", ":"), ("tab:green", "-."),
          ("tab:red", "-"), ("tab:purple", "--"))


# ---- runs ----------------------------------------------------------------------------

def load_run(path):
    """Return what train.py saved at path, its model on the device, and its Config."""
    saved, model = load_checkpoint(path)
    cfg = Config(**saved["header"]["config"])
    cfg.device = default_device()
    model.to(cfg.device).eval()
    return saved, model, cfg


def load_pair(out_dir, twin=True):
    """Return the twins in a folder of train.py as .engram and .moe (None if twin is False),
    and of Engram .saved, .cfg, .data, .canonical, and how many .sequences it has read."""
    saved, model, cfg = load_run(Path(out_dir) / "engram" / "ckpt.pt")
    moe = None
    if twin:
        other, moe, _ = load_run(Path(out_dir) / "moe" / "ckpt.pt")
        differ = twin_differences((saved["header"], saved["records"]),
                                  (other["header"], other["records"]))
        if differ:
            fail(f"{out_dir}: these are not twins, they differ in {', '.join(differ)}; "
                 "train both with one command, python train.py")
    if model.cfg.engram.orders[-1] == 1:
        fail(f"{out_dir}: analyses need an n-gram order above 1")
    name, block_size = saved["header"]["data"]["name"], model.cfg.block_size
    try:
        data = Data(name, cfg.data_dir, block_size, cfg.tokens_per_step // block_size,
                    cfg.steps, cfg.seed, cfg.eval_tokens)
    except (Offline, ValueError) as error:
        fail(error)
    for split in ("train", "val"):
        if data.meta[split]["sha256"] != saved["run"][f"{split} data"]:
            fail(f"{cfg.data_dir}/{name} is not what this model was trained on: prepare it "
                 "as it was, or train again")
    return SimpleNamespace(engram=model, moe=moe, saved=saved, cfg=cfg, data=data,
                           canonical=model.canonical.cpu().numpy(),
                           sequences=saved["step"] * cfg.tokens_per_step // block_size)


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
    return pairs


def losses(pair, model, memory=True):
    """Return nats [B, T] of the validation tokens."""
    nats = token_losses(model, pair.data.val_x, pair.data.val_y, pair.cfg.batch_size,
                        autocast(pair.cfg), memory)
    return nats.double().numpy()


def losses_and_gains(pair):
    """Return Engram's nats [B, T], and what it gains over itself with the memory off, and
    over its twin if there is one."""
    on = losses(pair, pair.engram)
    gains = {"off - on": losses(pair, pair.engram, memory=False) - on}
    if pair.moe:
        gains["moe - engram"] = losses(pair, pair.moe) - on
    return on, gains


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


def summary(values):
    """Return what is saved of a number per pair; "half" is None for one pair."""
    mean, half = interval(values)
    return {"mean": mean, "half": half if len(values) > 1 else None, "values": values}


def says(number):
    """Return a summary in words."""
    if number["half"] is None:
        return f"{number['mean']:+.3f} (n=1)"
    return f"{number['mean']:+.3f} ± {number['half']:.3f}"


def buckets(by):
    """Return {bucket: mask} of the places where `by` lies in it, without empty buckets."""
    number = np.digitize(by, list(BUCKETS.values())) - 1
    found = {}
    for i, name in enumerate(BUCKETS):
        if (number == i).any():
            found[name] = number == i
    return found


def by_bucket(by, values):
    """Return {bucket: mean of the values where `by` lies in it}."""
    return {name: float(values[mask].mean()) for name, mask in buckets(by).items()}


def over_pairs(tables):
    """Return {bucket: summary} of a table per pair, for the buckets that all pairs have."""
    found = {}
    for name in BUCKETS:
        if all(name in table for table in tables):
            found[name] = summary([table[name] for table in tables])
    return found


def points(axes, x, columns, style, label=None):
    """Draw at each x its column of values as dots, and their mean with its interval."""
    colour, line = style
    means, halves = zip(*[interval(column) for column in columns])
    axes.errorbar(x, means, halves, color=colour, ls=line, marker="s", mfc="none",
                  capsize=4, label=label)
    for at, column in zip(x, columns):
        axes.plot([at] * len(column), column, ".", color=colour, ms=5, alpha=0.6)


def draw_buckets(axes, table, style, label):
    """Draw {bucket: summary}."""
    names = list(BUCKETS)
    points(axes, [names.index(name) for name in table],
           [number["values"] for number in table.values()], style, label)
    axes.set_xticks(range(len(names)), names, fontsize=8)


# ---- report: the end of a run --------------------------------------------------------

def report(pair):
    """Return lines that say what the memory did for one model, and against its twin."""
    on, gains = losses_and_gains(pair)
    loss, gain = on.mean(), gains["off - on"].mean()
    names = "".join(f"{name:>14s}" for name in ("tokens", "engram", *gains))
    lines = [f"Memory switched off, same weights: {loss:.4f} -> {loss + gain:.4f} nats per "
             f"token ({gain:+.4f}).",
             "This overstates its worth: the other weights were trained with it.", "",
             f"2-gram seen in training {names}"]
    for bucket, mask in buckets(pair.data.seen).items():
        line = f"{bucket:>24s}{mask.mean():14.1%}{on[mask].mean():14.3f}"
        for gain in gains.values():
            line += f"{gain[mask].mean():+14.3f}"
        lines.append(line)
    return lines


# ---- knockout: where the memory helps ------------------------------------------------

GAINS = {"moe - engram": "MoE-only twin minus Engram",
         "off - on": "Memory off minus on, same weights"}


def knockout(pairs):
    """Compare Engram's loss with its twin's, and with its own when the memory is off, by
    how often training saw the n-gram that ends with the predicted token."""
    overall = {name: [] for name in GAINS}
    tables = {name: [] for name in GAINS}
    for pair in pairs:
        _, gains = losses_and_gains(pair)
        seen, _ = pair.data.count(pair.sequences, 3)
        for name in GAINS:
            overall[name].append(float(gains[name].mean()))
            tables[name].append(by_bucket(seen, gains[name]))
    found = {name: summary(values) for name, values in overall.items()}
    return found | {"3-grams": {name: over_pairs(table) for name, table in tables.items()}}


def say_knockout(found):
    lines = []
    for name, label in GAINS.items():
        table = found["3-grams"][name]
        parts = [f"{bucket} {says(number)}" for bucket, number in table.items()]
        lines.append(f"{label}: {says(found[name])} nats per token; by how often training "
                     f"saw the 3-gram: {', '.join(parts)}")
    return lines


def draw_knockout(axes, found):
    for name, style in zip(GAINS, STYLES):
        draw_buckets(axes, found["3-grams"][name], style, GAINS[name])
    axes.set(xlabel="times training saw the 3-gram that ends in the token",
             ylabel="difference in loss (nats per token)", title="Where the memory helps")
    axes.axhline(0, color="black", lw=0.6)
    axes.legend()


# ---- gates: when the gate opens ------------------------------------------------------

def grams(pair, ids, order):
    """Return the n-gram that ends at each of the ids [B, T], as one number."""
    T, base = ids.shape[1], len(pair.canonical)
    x = np.pad(ids, ((0, 0), (order - 1, 0)), constant_values=pair.canonical[-1])
    return sum(x[:, order - 1 - k:order - 1 - k + T] * base ** k for k in range(order))


def times_read(pair, order):
    """Return how often training read the canonical n-gram at each validation token."""
    starts = pair.data.order[:pair.sequences] * pair.data.T
    x, _ = pair.data.sequences(pair.data.train, starts)
    read, times = np.unique(grams(pair, pair.canonical[x], order), return_counts=True)
    ours = grams(pair, pair.canonical[pair.data.val_x], order)
    at = np.searchsorted(read, ours).clip(max=len(read) - 1)
    return np.where(read[at] == ours, times[at], 0)


def explained(groups, values):
    """Return the share of the values' variance that the group explains, adjusted for how
    many groups there are. Each has several members."""
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    mean = np.bincount(group, values) / size
    inner = ((values - mean[group]) ** 2).sum() / (len(values) - len(size))
    return float(1 - inner / values.var(ddof=1))


def what_explains(pair, gate):
    """Return how much of the gate's variance the token, the canonical n-gram and the n-gram
    as written explain."""
    written, order = pair.data.val_x, pair.engram.cfg.engram.orders[-1]
    canonical = pair.canonical[written]
    ngrams = grams(pair, written, order)
    # the same tokens for all three: those whose n-gram lies within the text, and recurs
    kept = np.zeros(gate.shape, bool)
    _, group, size = np.unique(ngrams[:, order - 1:], return_inverse=True,
                               return_counts=True)
    kept[:, order - 1:] = (size[group] > 1).reshape(len(gate), -1)
    found = {}
    for name, groups in (("by the token", canonical),
                         ("by the n-gram", grams(pair, canonical, order)),
                         ("by its writing too", ngrams)):
        found[name] = explained(groups[kept], gate[kept])
    return found


def gates(pairs):
    """Find out when the gate opens: by how often training read the n-gram, and by what
    explains its variance."""
    numbers, tables = {}, {}
    for pair in pairs:
        if pair.engram.cfg.engram.gate == "off":
            fail("this model has no gate (--engram_gate off)")
        with watch(pair.engram) as seen:
            losses(pair, pair.engram)
        layers = [torch.cat(layer["gate"]).cpu().double().numpy() for layer in seen]
        # the mean of the memory layers [B, T]
        gate = np.mean(layers, axis=0)
        shares = what_explains(pair, gate)
        for name, value in {"mean": gate.mean(), "sd": gate.std(), **shares}.items():
            numbers.setdefault(name, []).append(float(value))
        for order in pair.engram.cfg.engram.orders:
            table = by_bucket(times_read(pair, order), gate)
            tables.setdefault(f"{order}-grams", []).append(table)
    found = {name: summary(values) for name, values in numbers.items()}
    for name, of_pairs in tables.items():
        found[name] = {"by count": over_pairs(of_pairs)}
    return found


def tables_of(found):
    """Return {"2-grams": ..., "3-grams": ...} of what was found."""
    return {name: table for name, table in found.items() if name.endswith("-grams")}


def say_gates(found):
    name = list(tables_of(found))[-1].removesuffix("s")
    mean, sd, token, gram, written = (found[key]["mean"] for key in (
        "mean", "sd", "by the token", "by the n-gram", "by its writing too"))
    return [f"The gate is {mean:.2f} on average (sd {sd:.2f} between tokens). Where a "
            f"{name} recurs, the token explains {token:.1%} of the gate's variance, the "
            f"{name} {gram:.1%}, and the {name} as it is written {written:.1%}; the wider "
            "context explains the rest"]


def draw_gates(axes, found):
    for (name, table), style in zip(tables_of(found).items(), STYLES):
        draw_buckets(axes, table["by count"], style, name)
    axes.set(xlabel="times training read the n-gram", ylabel="mean gate", ylim=(0, 1),
             title="How far the gate opens, by how often training read the n-gram")
    axes.legend()


# ---- logitlens: how early the answer is there ----------------------------------------

@torch.no_grad()
def lens(pair, model):
    """Return KL(final || block) in nats per token for the output of each block, read
    through the final norm and the head. The last one is 0."""
    kept, sums = [], np.zeros(len(model.blocks))

    def keep(module, args, out):
        kept.append(out)

    def log_probs(h):
        return F.linear(model.norm(h), model.embed.weight).float().log_softmax(-1)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
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
    # [blocks, pairs]
    engram = np.array([lens(pair, pair.engram) for pair in pairs]).T
    moe = np.array([lens(pair, pair.moe) for pair in pairs]).T
    found = {}
    for name, curves in (("engram", engram), ("moe", moe), ("engram - moe", engram - moe)):
        found[name] = [summary(block) for block in curves.tolist()]
    return found


def say_logitlens(found):
    gap = found["engram - moe"][:-1]
    blocks = [f"block {i} {says(number)}" for i, number in enumerate(gap)]
    return ["Distance of a block's output from the final prediction (KL, nats per token), "
            f"Engram minus its twin: {', '.join(blocks)}"]


def draw_logitlens(axes, found):
    blocks = range(len(found["engram"]))
    for name, style in zip(("engram", "moe"), STYLES):
        points(axes, blocks, [number["values"] for number in found[name]], style,
               MODELS[name])
    axes.set(ylabel="KL(final || block), nats per token", xlabel="output of block",
             title="How far each block is from the final prediction", xticks=blocks)
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


# ---- the command ---------------------------------------------------------------------

# {name: (find(pairs), say(found), draw(axes, found), whether it needs the twin)}
ANALYSES = {
    "knockout": (knockout, say_knockout, draw_knockout, True),
    "gates": (gates, say_gates, draw_gates, False),
    "logitlens": (logitlens, say_logitlens, draw_logitlens, True),
    "zipf": (zipf, say_zipf, draw_zipf, False)}


def write_results(path, found):
    """Write NAME.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(json.dumps(found).encode()))


def read_results(path):
    """Return the content of NAME.json."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        fail(f"{path} is damaged ({error}): run without --plot")
    if not isinstance(found, dict):
        fail(f"{path} is damaged (it holds no dict): run without --plot")
    return found


def draw_picture(path, draw):
    """Draw NAME.png beside NAME.json."""
    figure = new_figure(figsize=(7.5, 4.5))
    draw(figure.subplots())
    path = path.with_suffix(".png")
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    print(f"picture: {path}")


def main(argv=None):
    parser = make_parser(__doc__, "python -m experiments.analyze NAME [options]")
    add = parser.add_argument
    names = ("report", *ANALYSES)
    add("name", choices=names, metavar="NAME", help=", ".join(names))
    add("--out_dir", nargs="+", default=["out"], help="folders of train.py (default: out)")
    add("--plot", action="store_true", help="compute nothing; read --results, by default "
        "experiments/results, the results that came with the code")
    add("--results", help="folder of NAME.json and NAME.png (default: the first out_dir, "
        "of zipf the folder of the data)")
    add("--dataset", default="python", help="zipf: prepared data (default: %(default)s)")
    add("--data_dir", default="data", help="zipf: where it lies (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.name == "report":
        twin = (Path(args.out_dir[0]) / "moe" / "ckpt.pt").exists()
        print(*report(load_pair(args.out_dir[0], twin)), sep="\n")
        return
    find, say, draw, twin = ANALYSES[args.name]
    folder = args.out_dir[0]
    if args.name == "zipf":
        folder = Path(args.data_dir) / args.dataset
    if args.plot:
        folder = COMMITTED
    path = Path(args.results or folder) / f"{args.name}.json"
    if args.name == "zipf" and not args.plot:
        write_results(path, zipf(args.dataset, args.data_dir))
    elif not args.plot:
        pairs = load_pairs(args.out_dir, twin)
        headers = [pair.saved["header"] for pair in pairs]
        write_results(path, {"headers": headers, **find(pairs)})
    found = read_results(path)
    try:
        lines = say(found)
    except (KeyError, TypeError, IndexError) as error:
        fail(f"{path} is damaged ({type(error).__name__}: {error}): run without --plot")
    print(*lines, f"numbers: {path}", sep="\n")
    draw_picture(path, partial(draw, found=found))


if __name__ == "__main__":
    run_script(main)
