"""
Two tasks on made-up text, for what ordinary text of this size cannot show.

    python -m experiments.sweep recall         # how many blocks does it take to find a name?
    python -m experiments.sweep phonebooks50   # who stores facts, experts or the table?
    python -c "from experiments.tasks import make; make('recall')"       # the text alone

The idea: we know what it takes to predict each token. So a log tells kinds of tokens apart.

Phone books. A column lists a value for each of 64 names. A local entry is written "name,
column, value": a 2-gram names it, so a table can hold it. A context entry is written
"topic, 3 or 4 random tokens, column, value": no 2-gram or 3-gram holds both, so attention
must fetch the topic, and only the feed-forward layers can store the value. In phonebooks20
20 % of the columns are local. Each value stands in a column once, so the column alone says
nothing. Names and topics come in four families, each with 16 values of its own; without
such a hint no model learnt to fetch the topic. A sequence has no entry twice, to copy.

Named recall. 2,000 of the 4,096 pairs of 64 tokens are names. A sequence says "name, value"
for ten of them, and then asks for all ten in another order. Names stay, but values are drawn
anew. The ten share twelve tokens, so one token of a name does not tell it.
"""
import base64
import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np

from experiments.analyze import STYLES, points
from runs import crossing

# ---- the text --------------------------------------------------------------------------

def phone_books(share):
    """Return the size of the vocabulary, T = 128, the kinds of tokens, and draw(rng): a
    sequence of T tokens, and for each the number of its kind, 0 for what no one can know."""
    rng = np.random.default_rng(1)
    book = np.zeros((64, 64), int)
    for column in book:
        for family in range(4):
            column[family::4] = 16 * family + rng.permutation(16)
    n_local = round(share / 100 * 64)
    # ids: 64 values, 64 names, 64 topics, 64 columns, 63 fillers, end of text
    name, topic, first_column, filler = 64, 128, 192, 256

    def draw(rng):
        ids, kinds = [], []
        # an entry has three tokens or more, so 43 of them fill a sequence
        for entry in rng.permutation(64 * 64)[:43].tolist():
            column, who = divmod(entry, 64)
            if column < n_local:
                before, kind = [name + who], 1
            else:
                between = filler + rng.integers(63, size=3 + rng.integers(2))
                before, kind = [topic + who, *between], 2
            ids += [*before, first_column + column, book[column, who]]
            kinds += [0] * len(before) + [0, kind]
        return ids[:128], kinds[:128]

    return 320, 128, ["local", "context"], draw


def named_recall():
    """The same, T = 64. The kind of an answer is its distance from what it repeats."""
    rng = np.random.default_rng(1)
    is_name = (rng.permutation(4096) < 2000).reshape(64, 64)
    # ids: 64 of which names consist, 64 values, a mark before the questions, end of text
    value, ask, end = 64, 128, 129

    def draw(rng):
        found = []
        while len(found) < 10:
            a, b = rng.permutation(64)[:6], rng.permutation(64)[:6]
            found = np.argwhere(is_name[np.ix_(a, b)])
        i, j = rng.permutation(found)[:10].T
        triples = np.stack([a[i], b[j], value + rng.integers(64, size=10)], axis=1)
        order = rng.permutation(10)
        ids = [*triples.ravel(), ask, *triples[order].ravel(), end, end, end]
        kinds = np.zeros(64, int)
        distance = 31 + 3 * (np.arange(10) - order)
        kinds[33:61:3] = 1 + (distance > 20) + (distance > 40)
        return ids, kinds

    return 130, 64, ["near", "middle", "far"], draw


# {name of a data set: what makes it}
TASKS = {"recall": named_recall}
for share in (20, 50, 80):
    TASKS[f"phonebooks{share}"] = partial(phone_books, share)


def make(name, data_dir="data", n_tokens=2_560_000):
    """Write a data set as prepare_data does, and the kinds of its validation tokens."""
    folder = Path(data_dir) / name
    vocab_size, T, kinds, draw = TASKS[name]()
    folder.mkdir(parents=True, exist_ok=True)
    # a tokenizer that is never used on text: token 7 is " 7"
    tokens = [base64.b64encode(f" {i}".encode()).decode() for i in range(vocab_size - 1)]
    tok = {"kind": "bpe", "pattern": r"\S+", "tokens": tokens}
    tok["sha256"] = hashlib.sha256(json.dumps(tok).encode()).hexdigest()
    meta = {"name": name, "vocab_size": vocab_size, "eot": vocab_size - 1,
            "tokenizer": tok, "kinds": kinds}
    for split, n, seed in (("train", n_tokens, 100), ("val", 65536, 101)):
        rng = np.random.default_rng(seed)
        # whole sequences, and one token more, the target of the last one
        drawn = [draw(rng) for _ in range(n // T + 1)]
        ids, kind_of = (np.concatenate(part)[:n + 1] for part in zip(*drawn))
        raw = ids.astype("<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(raw)
        meta[split] = {"sha256": hashlib.sha256(raw).hexdigest()}
    kind_of.astype(np.uint8).tofile(folder / "val_kinds.bin")
    (folder / "meta.json").write_text(json.dumps(meta))


# ---- what was learnt -------------------------------------------------------------------

def known(seeds, kind):
    """Return the share of the tokens of a kind that each run knows at its end."""
    return [run["records"][-1][kind]["known"] for run in seeds.values()]


def percents(shares):
    return ", ".join(f"{share:.0%}" for share in shares)


def half_known(seeds, kind):
    """Return the million tokens after which each run knew half, or all of them if never."""
    found = []
    for run in seeds.values():
        # crossing() looks for a fall, so look at what is not known
        curve = [{"tokens": record["tokens"], "open": 1 - record[kind]["known"]}
                 for record in run["records"]]
        found.append((crossing(curve, 0.5, "open") or curve[-1]["tokens"]) / 1e6)
    return found


def when_half(seeds, kind):
    """Return in words after how many tokens half was known, and in how many runs."""
    reached = 0
    for run in seeds.values():
        reached += max(record[kind]["known"] for record in run["records"]) > 0.5
    if reached == 0:
        return "never"
    return f"{np.mean(half_known(seeds, kind)):.2f}M ({reached} of {len(seeds)})"


def table_of_books(sweep, runs):
    """Return a table in Markdown: what each arm knows of each book."""
    lines = ["| arm | P_tot | loss | local known | memory off | half after | context known | "
             "memory off | half after | bits per parameter, local + context |", "|" + "---|" * 10]
    share = int(sweep.dataset.removeprefix("phonebooks")) / 100
    for arm, seeds in runs.items():
        ends = [run["records"][-1] for run in seeds.values()]
        size = next(iter(seeds.values()))["header"]["accounting"]["P_tot"]
        loss, bits = np.mean([end["val_loss"] for end in ends]), []
        cells = [sweep.arms[arm].title, f"{size:,}", f"{loss:.3f}"]
        for kind, part in (("local", share), ("context", 1 - share)):
            off = [end["memory_off"][kind]["known"] for end in ends if "memory_off" in end]
            cells += [percents(known(seeds, kind)), percents(off), when_half(seeds, kind)]
            # a value is worth 6 bits, and there are 4,096 entries
            nats = np.mean([end[kind]["loss"] for end in ends])
            bits.append(4096 * part * max(0, 6 - nats / np.log(2)) / size)
        lines.append(f"| {' | '.join(cells)} | {bits[0]:.3f} + {bits[1]:.3f} |")
    return lines


def draw_books(axes, sweep, runs):
    for kind, style in zip(("local", "context"), STYLES):
        columns = [half_known(seeds, kind) for seeds in runs.values()]
        points(axes, [float(arm) for arm in runs], columns, style, f"{kind} entries")
    axes.set(xlabel="share rho of the sparse parameters that experts keep",
             ylabel="millions of tokens until half are known", title=sweep.heading, ylim=0)
    axes.legend()


def table_of_recall(sweep, runs):
    """Return a table in Markdown: which answers each arm knows, by distance."""
    lines = ["| arm | near | middle | far | half after |", "|" + "---|" * 5]
    for arm, seeds in runs.items():
        cells = [percents(known(seeds, kind)) for kind in ("near", "middle", "far")]
        lines.append(f"| {sweep.arms[arm].title} | {' | '.join(cells)} | "
                     f"{when_half(seeds, 'middle')} |")
    return lines


def draw_recall(axes, sweep, runs):
    # the name of an arm is a number of blocks, and what is added
    added = dict.fromkeys(arm[2:] for arm in runs)
    for name, style in zip(added, STYLES):
        arms = [arm for arm in runs if arm[2:] == name]
        columns = [known(runs[arm], "middle") for arm in arms]
        points(axes, [int(arm[0]) for arm in arms], columns, style, name)
    axes.set(xlabel="blocks", xticks=(1, 2, 3), ylabel="share of the answers known",
             ylim=(-0.05, 1.05), title=sweep.heading)
    axes.legend()
