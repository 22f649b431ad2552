"""
Two tasks on made-up text, for what ordinary text of this size cannot show.

    python -m experiments.sweep recall           # how many blocks does it take to find a name?
    python -m experiments.sweep phonebooks50     # who stores facts, experts or the table?
    python -m experiments.tasks phonebooks50     # the text alone, for train.py --dataset

The idea: we know of each token what it takes to predict it. So a log says of each kind of
token by itself what has been learnt.

Phone books. A column lists a value for each of 64 names. A local entry is written "name,
column, value": a 2-gram names it, so a table can hold it. A context entry is written
"topic, 3 or 4 random tokens, column, value": no 2-gram or 3-gram holds both, so attention
must fetch the topic, and only the feed-forward layers can store the value. In phonebooks20
20 % of the columns are local. Each value stands in a column once, so the column alone says
nothing. Names and topics come in four families, each with 16 values of its own in every
column; without such a hint no model learnt to fetch the topic. No entry is written twice in
a sequence, so copying gains nothing.

Named recall. 2,000 of the 4,096 pairs of 64 tokens are names. A sequence says "name, value"
for ten names, with values drawn anew, and then asks for all of them in another order. The
ten share twelve tokens, so one token of a name does not tell it. Which pairs are names
stays the same; what belongs to them must be found in the context.
"""
import base64
import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np

from common import make_parser, run_script
from experiments.analyze import STYLES, interval, points
from runs import crossing


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


# {name of a data set: what makes it}
TASKS = {"recall": named_recall,
         **{f"phonebooks{share}": partial(phone_books, share) for share in (0, 20, 50, 80, 100)}}


def make(name, data_dir="data", n_tokens=2_560_000):
    """Write a data set as prepare_data does, and the kinds of its validation tokens."""
    folder = Path(data_dir) / name
    vocab_size, kinds, draw = TASKS[name]()
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

def known(runs, kind, where=None):
    """Return the share of the tokens of a kind that each run knows at its end."""
    ends = [run["records"][-1] for run in runs.values()]
    if where:
        ends = [end[where] for end in ends]
    return [end[kind]["known"] for end in ends]


def percent(values):
    """Return a share and half its 95 % interval in words."""
    mean, half = interval(values)
    return f"{mean:.0%} ± {half:.0%}" if len(values) > 1 else f"{mean:.0%} (n=1)"


def say_books(sweep, runs):
    """Say what each arm knows of each book, and how many bits of it a parameter stores."""
    lines, share = [], int(sweep.dataset.removeprefix("phonebooks")) / 100
    for arm, seeds in runs.items():
        parts, bits = [], 0.0
        for kind, part in (("local", share), ("context", 1 - share)):
            if part == 0:
                continue
            said = f"{kind} entries {percent(known(seeds, kind))} known"
            if "moe" not in sweep.arms[arm].flags:
                off = percent(known(seeds, kind, "memory_off"))
                said += f" ({off} with the memory off)"
            parts.append(said)
            # a value is worth 6 bits, and there are 4,096 entries
            nats = np.mean([run["records"][-1][kind]["loss"] for run in seeds.values()])
            bits += 4096 * part * max(0, 6 - nats / np.log(2))
        first, *_ = seeds.values()
        bits /= first["header"]["accounting"]["P_tot"]
        lines.append(f"{sweep.arms[arm].title}: {', '.join(parts)}; {bits:.3f} bits per parameter")
    return lines


def draw_books(axes, sweep, runs):
    for kind, style in zip(("local", "context"), STYLES):
        columns = [known(seeds, kind) for seeds in runs.values()]
        points(axes, [float(arm) for arm in runs], columns, style, f"{kind} entries")
    axes.set(xlabel="share rho of the sparse parameters that experts keep",
             ylabel="share of the entries known", title=sweep.heading)
    axes.legend()


def say_recall(sweep, runs):
    """Say what each arm answers, by distance, and when it knew half."""
    lines = []
    for arm, seeds in runs.items():
        # crossing() looks for a fall, so look at what is not known
        halves = []
        for run in seeds.values():
            curve = [{"tokens": record["tokens"], "open": 1 - record["middle"]["known"]}
                     for record in run["records"]]
            halves.append(crossing(curve, 0.5, "open"))
        halves = [tokens for tokens in halves if tokens is not None]
        shares = [f"{percent(known(seeds, kind))} ({kind})" for kind in ("near", "middle", "far")]
        line = f"{sweep.arms[arm].title}: {', '.join(shares)}"
        if halves:
            line += (f"; half are known after {np.mean(halves) / 1e6:.2f} million tokens in "
                     f"{len(halves)} of {len(seeds)} runs")
        lines.append(line)
    return lines


def draw_recall(axes, sweep, runs):
    added = dict.fromkeys(arm.partition(" ")[2] for arm in runs)
    for name, style in zip(added, STYLES):
        blocks = [n for n in "123" if f"{n} {name}" in runs]
        columns = [known(runs[f"{n} {name}"], "middle") for n in blocks]
        points(axes, list(map(int, blocks)), columns, style, name)
    axes.set(xlabel="blocks", xticks=(1, 2, 3), ylabel="share of the answers known",
             title=sweep.heading)
    axes.legend()


def main(argv=None):
    parser = make_parser(__doc__, "python -m experiments.tasks NAME [options]")
    parser.add_argument("name", choices=TASKS, metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--data_dir", default="data", help="gets a folder NAME (default: data)")
    make(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_script(main)
