"""
Two tasks on made-up text, for what ordinary text cannot show at this size.

    python -m experiments.tasks phonebooks       # who stores facts, experts or the table?
    python -m experiments.tasks recall           # how many blocks does it take to find a name?
    python -m experiments.tasks recall --plot    # from experiments/results, no training
    python -m experiments.tasks recall --seeds 0 # only the data: then train.py --dataset recall

The idea: we know of each token what it takes to predict it. So we can ask of each kind of
token by itself who has learnt it.

Phone books. A column is a list of 64 values for 64 names; each value occurs once, so the
column alone says nothing. A local entry is written "name column value": the 2-gram names
it, and a table can hold it. A context entry is written "topic, 3 or 4 random tokens,
column, value": no 2-gram or 3-gram holds both, so attention must fetch the topic, and only
the feed-forward layers can store the value. phonebooks20 has 20 % local entries. Names (and
topics) come in four families, and a column gives each family 16 values of its own; without
that hint nothing learnt to fetch the topic. No entry is written twice in a sequence, so
copying gains nothing.

Named recall. 2,000 of the 4,096 pairs of 64 tokens are names. A sequence says "name value"
for ten names, values drawn anew, and then asks for all of them in another order. The ten
share twelve tokens, so that one token of a name does not tell it. Only the names stay the
same; what belongs to them must be found in the context.
"""
import base64
import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np

from common import make_parser, run_script
from experiments.analyze import COMMITTED, STYLES, draw_picture, interval, points
from experiments.analyze import read_results, write_results
from experiments.sweep import Arm, Sweep, finished_runs, home, last, run_all, settle
from model import load_checkpoint, token_losses
from runs import crossing
from train import Config, autocast, load_data

SHAPE = "--preset laptop --dtype float32 --data_dir data --n_embd 64 --n_head 4"
BOOKS = (f"{SHAPE} --block_size 128 --batch_size 16 --n_layer 2 --n_expert 16 --expert_hidden 16 "
         "--shared_hidden 16 --balance_step 0.001 --engram_conv_kernel 0")
RECALL = (f"{SHAPE} --block_size 64 --batch_size 32 --n_expert 4 --expert_hidden 64 "
          "--shared_hidden 64 --engram_blocks 0 --engram_conv_kernel 0 --rho 0.99 "
          "--engram_rows 4096 --conv_dilation 1")
RHOS = {"1": Arm("--model moe", "rho 1, MoE-only twin")}
for rho in ("0.9", "0.75", "0.5", "0.25", "0"):
    RHOS[rho] = Arm(f"--model engram --rho {rho}", f"rho {rho}")
# what is added to a plain model of 1, 2 or 3 blocks
ADDED = {"nothing": "--model moe",
         "a table of tokens": "--model engram --engram_orders 1 --engram_heads 8",
         "a table of n-grams": "--model engram",
         "a convolution": "--model moe --conv_in 0",
         "both": "--model engram --conv_in 0"}
DEPTHS = {}
for blocks in "123":
    for added, flags in ADDED.items():
        DEPTHS[f"{blocks} {added}"] = Arm(f"{flags} --n_layer {blocks}", added)
LOCAL = (0, 20, 50, 80, 100)


def sweeps(task):
    """Return {name: Sweep} of a task; a name is also that of its data set."""
    if task == "recall":
        return {"recall": Sweep(RECALL, DEPTHS, "1 nothing", steps=1000, evaluations=10,
                                dataset="recall", seeds=5)}
    found = {}
    for share in LOCAL:
        # can the experts alone, and the table alone, learn their book at all?
        arms = RHOS if 0 < share < 100 else {rho: RHOS[rho] for rho in ("1", "0")}
        found[f"phonebooks{share}"] = Sweep(BOOKS, arms, "1", steps=1200, evaluations=8,
                                            dataset=f"phonebooks{share}", seeds=2)
    return found


# ---- the text --------------------------------------------------------------------------

def phone_books(share, columns=64):
    """Return the size of the vocabulary, the kinds of tokens, and draw(rng): a sequence of 128
    tokens, and for each the number of its kind, 0 for those that no one can know."""
    rng, book = np.random.default_rng(1), np.zeros((columns, 64), int)
    for column in book:
        for family in range(4):
            column[family::4] = 16 * family + rng.permutation(16)
    # ids: 64 values, 64 names, 64 topics, the columns, 63 fillers, end of text
    name, topic, first, filler = 64, 128, 192, 192 + columns
    n_local = round(share / 100 * columns)

    def draw(rng):
        ids, kinds = [], []
        for entry in rng.permutation(columns * 64)[:43].tolist():
            column, who = divmod(entry, 64)
            if column < n_local:
                before = [name + who]
            else:
                between = filler + rng.integers(63, size=3 + rng.integers(2))
                before = [topic + who, *between.tolist()]
            ids += [*before, first + column, int(book[column, who])]
            kinds += [0] * (len(before) + 1) + [1 if column < n_local else 2]
        return ids[:128], kinds[:128]

    return filler + 64, ["local", "context"], draw


def named_recall():
    """The same, of 64 tokens. The kind of an answer is its distance from what it repeats."""
    rng = np.random.default_rng(1)
    is_name = (rng.permutation(4096) < 2000).reshape(64, 64)
    # ids: 64 of which names consist, 64 values, the mark between statements and questions
    value, ask = 64, 128

    def draw(rng):
        found = []
        while len(found) < 10:
            a, b = rng.permutation(64)[:6], rng.permutation(64)[:6]
            found = np.argwhere(is_name[np.ix_(a, b)])
        stated = rng.permutation(found)[:10]
        triples = np.stack([a[stated[:, 0]], b[stated[:, 1]], value + rng.integers(64, size=10)], 1)
        order = rng.permutation(10)
        ids = [*triples.ravel(), ask, *triples[order].ravel()]
        kinds = [0] * len(ids)
        for place, which in enumerate(order):
            distance = 31 + 3 * (place - which)
            kinds[33 + 3 * place] = 1 + (distance > 20) + (distance > 40)
        return ids + [ask + 1] * (64 - len(ids)), kinds + [0] * (64 - len(kinds))

    return ask + 2, ["near", "middle", "far"], draw


def make(name, data_dir="data", n_tokens=2_560_000):
    """Write a data set as prepare_data does, and the kinds of its validation tokens."""
    folder = Path(data_dir) / name
    if (folder / "meta.json").exists():
        return
    if name == "recall":
        vocab_size, kinds, draw = named_recall()
    else:
        vocab_size, kinds, draw = phone_books(int(name.removeprefix("phonebooks")))
    folder.mkdir(parents=True, exist_ok=True)
    # a tokenizer that is never used on text: token 7 is " 7"
    tokens = [base64.b64encode(f" {i}".encode()).decode() for i in range(vocab_size - 1)]
    tok = {"kind": "bpe", "pattern": r"\S+", "tokens": tokens}
    tok["sha256"] = hashlib.sha256(json.dumps(tok).encode()).hexdigest()
    meta = {"name": name, "args": {}, "vocab_size": vocab_size, "eot": vocab_size - 1,
            "tokenizer": tok, "kinds": kinds}
    for seed, (split, n) in enumerate((("train", n_tokens), ("val", 65536))):
        rng, drawn = np.random.default_rng(100 + seed), []
        while not drawn or len(drawn) * len(drawn[0][0]) <= n:
            drawn.append(draw(rng))
        # whole sequences, and one token more, the target of the last one
        ids, kind_of = (np.concatenate(part)[:n + 1] for part in zip(*drawn))
        raw = ids.astype("<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(raw)
        meta[split] = {"tokens": len(ids), "documents": len(drawn), "size": len(raw),
                       "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "val_kinds.bin").write_bytes(kind_of.astype(np.uint8).tobytes())
    (folder / "meta.json").write_text(json.dumps(meta))


# ---- what was learnt -------------------------------------------------------------------

def switch_off(path, settings):
    """Add to each run of NAME.json what is known with the memory switched off."""
    content = read_results(path)
    for run in content["runs"]:
        checkpoint = home(settings, run["flags"], run["seed"]) / "engram" / "ckpt.pt"
        if checkpoint.exists():
            saved, model = load_checkpoint(checkpoint)
            cfg = Config(**saved["header"]["config"])
            data = load_data(cfg, model.cfg.block_size)
            off = token_losses(model, data.val_x, data.val_y, 64, autocast(cfg), memory=False)
            run["off"] = data.score(off.double().numpy())
    write_results(path, content)


def known(runs, kind, when=last):
    """Return the share of the tokens of a kind that each run knows."""
    return [when(run)[kind]["known"] for run in runs.values()]


def percent(values):
    """Return a share and half its 95 % interval in words."""
    mean, half = interval(values)
    return f"{mean:.0%} ± {half:.0%}" if len(values) > 1 else f"{mean:.0%} (n=1)"


def table_of_books(found):
    lines = ["| book | arm | P_tot | n | loss | local known | context known | memory off: local, "
             "context | bits stored per parameter |", "|---|---|---|---|---|---|---|---|---|"]
    for name, (_, runs) in found.items():
        share = int(name.removeprefix("phonebooks")) / 100
        for arm, seeds in runs.items():
            size = next(iter(seeds.values()))["header"]["accounting"]["P_tot"]
            cells, off, bits = [], [], 0.0
            for kind, part in (("local", share), ("context", 1 - share)):
                if part > 0:
                    cells.append(percent(known(seeds, kind)))
                    nats = np.mean([last(run)[kind]["loss"] for run in seeds.values()])
                    # a value has 6 bits, and 4,096 entries have one each
                    bits += 4096 * part * max(0, 6 - nats / np.log(2)) / size
                    if all("off" in run for run in seeds.values()):
                        off.append(percent(known(seeds, kind, lambda run: run["off"])))
                else:
                    cells.append("")
            loss = np.mean([last(run)["val_loss"] for run in seeds.values()])
            lines.append(f"| {share:.0%} local | {RHOS[arm].title} | {size:,} | {len(seeds)} | "
                         f"{loss:.3f} | {' | '.join(cells)} | {', '.join(off)} | {bits:.3f} |")
    return lines


def table_of_recall(found):
    lines = ["| what is added | blocks | n | known: near | middle | far | half of the middle ones "
             "known after |", "|---|---|---|---|---|---|---|"]
    for arm, runs in found["recall"][1].items():
        blocks, _, added = arm.partition(" ")
        # curves fall; so count what is not known
        ends = []
        for run in runs.values():
            curve = [{"tokens": record["tokens"], "open": 1 - record["middle"]["known"]}
                     for record in run["records"]]
            ends.append(crossing(curve, 0.5, "open"))
        reached = [end for end in ends if end is not None]
        when = f"{len(reached)} of {len(ends)} runs"
        if reached:
            when += f", {np.mean(reached) / 1e6:.2f}M tokens"
        cells = [percent(known(runs, kind)) for kind in ("near", "middle", "far")]
        lines.append(f"| {added} | {blocks} | {len(runs)} | {' | '.join(cells)} | {when} |")
    return lines


def draw_books(axes, found):
    for (name, (_, runs)), (colour, _) in zip(found.items(), STYLES):
        if len(runs) > 2:
            share = name.removeprefix("phonebooks")
            for kind, line in (("local", "--"), ("context", "-")):
                points(axes, [float(arm) for arm in runs], [known(r, kind) for r in runs.values()],
                       (colour, line), f"{kind} entries, {share} % local")
    axes.set(xlabel="share rho of the sparse parameters that experts keep",
             ylabel="share of the entries known", title="Who stores the phone books?")
    axes.legend(fontsize=8)


def draw_recall(axes, found):
    runs = found["recall"][1]
    for added, style in zip(ADDED, STYLES):
        blocks = [blocks for blocks in "123" if f"{blocks} {added}" in runs]
        columns = [known(runs[f"{n} {added}"], "middle") for n in blocks]
        points(axes, list(map(int, blocks)), columns, style, f"{added} is added")
    axes.set(xlabel="blocks", xticks=(1, 2, 3), ylabel="share of the answers known",
             title="How many blocks does it take to find what belongs to a name?")
    axes.legend(fontsize=8)


TASKS = {"phonebooks": (table_of_books, draw_books), "recall": (table_of_recall, draw_recall)}


def main(argv=None):
    parser = make_parser(__doc__, "python -m experiments.tasks TASK [options]")
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, help="seeds per arm (default: 5 of recall, 2)")
    parser.add_argument("--plot", action="store_true", help="train nothing; show "
                        "experiments/results, the results that came with the code")
    args = parser.parse_args(argv)
    found, (table, draw) = {}, TASKS[args.task]
    folder = COMMITTED if args.plot else Path("runs/results")
    for name, sweep in sweeps(args.task).items():
        path = folder / f"{name}.json"
        if args.seeds is not None:
            sweep = sweep._replace(seeds=args.seeds)
        if not args.plot:
            make(name)
            if sweep.seeds:
                run_all(path, sweep, sweep.arms, name)
                switch_off(path, settle(sweep, name))
        if path.exists():
            found[name] = sweep, finished_runs(path, sweep)
    print(*table(found), sep="\n")
    draw_picture(folder / f"{args.task}.json", partial(draw, found=found))


if __name__ == "__main__":
    run_script(main)
