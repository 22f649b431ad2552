"""
Experiments of many runs: train what is missing, then print a table and draw a picture.

    python -m experiments.sweep allocation         # 30 runs; the results go to runs/results
    python -m experiments.sweep controls --seeds 8 --arms raw ungated
    python -m experiments.sweep memory --plot      # from experiments/results, no training

The idea: the folder of a run is a hash of all that determines it (flags, seed, data, torch,
machine). So no sweep trains what another has trained, and an interrupted one continues
where it was. After a change to the code, delete runs/.

An arm is one row of a table: a set of flags, trained with several seeds. Every other arm is
compared with the reference seed by seed, for runs of one seed see the same data in the same
order.
"""
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import default_device, fail, machine_name, make_parser, run_script, write_json
from experiments.analyze import (COMMITTED, STYLES, draw_picture, interval, points,
                                 read_results)
from experiments.tasks import TASKS, draw_books, draw_recall, make, table_of_books, table_of_recall
from prepare_data import find, load
from runs import crossing, read_log

ROOT = Path(__file__).resolve().parent.parent
LAPTOP = "--preset laptop --dtype bfloat16 --data_dir data"
SMALL = "--preset small --dtype bfloat16 --data_dir data"


class Arm(NamedTuple):
    flags: str          # for train.py, beside those of the sweep
    title: str


MOE, ENGRAM = Arm("--model moe", "MoE-only twin"), Arm("--model engram", "Engram")
# A control changes one thing: its convolution is Engram's.
TOKEN = "--model engram --engram_orders 1 --engram_heads 8 --engram_conv_dilation 3"
TWINS = {
    "moe": MOE,
    "fewer": Arm("--model moe --n_expert 6", "MoE-only, 3/4 of the experts"),
    "conv": Arm("--model moe --conv_in 1", "MoE-only twin with Engram's convolution alone"),
    "token": Arm(TOKEN, "table addressed by the current token alone"),
    "engram": ENGRAM,
    "large": Arm("--model large", "Engram, 16 times the rows (no twin)")}
# An input embedding of 1,024 x 128 is paid for by narrower experts; what a token uses stays.
UNTIED = "--model moe --untied --expert_hidden 116 --shared_hidden 148"
BASELINES = {
    "moe": MOE,
    "adamw": Arm("--model moe --optimizer adamw --lr 0.004", "MoE-only twin, AdamW"),
    "untied": Arm(f"{UNTIED} --table_lr 1", "MoE-only, untied input embedding"),
    "untied 5": Arm(UNTIED, "MoE-only, untied, five times the rate"),
    "token alone": Arm(f"{TOKEN} --engram_conv_kernel 0", "current token alone, no convolution"),
    "no conv": Arm("--model engram --engram_conv_kernel 0", "Engram without its convolution"),
    "engram": ENGRAM}
RATES = {f"{name} {lr}": Arm(f"{arm.flags} --lr {lr}", f"{arm.title}, rate {lr}")
         for name, arm in (("moe", MOE), ("engram", ENGRAM))
         for lr in ("0.004", "0.008", "0.016")}
for times in (1, 2):                 # else 5
    RATES[f"table {times}"] = Arm(f"--model engram --table_lr {times}",
                                  f"Engram, rate 0.008, its table's {times} times that")
# Experts are whole: 7, 6, 5, 4 and 2 of 8 stay, and 2 are always active.
ALLOCATION = {
    "1": Arm(MOE.flags, "rho 1, MoE-only twin"),
    "0.83": Arm("--model engram --rho 0.83", "rho 0.83"),
    "0.67": Arm("--model engram --rho 0.67", "rho 0.67"),
    "0.5": Arm(ENGRAM.flags, "rho 0.5, Engram"),
    "0.33": Arm("--model engram --rho 0.33", "rho 0.33"),
    "0": Arm("--model engram --rho 0", "rho 0")}
# Plain English: some 3.5 MB of TinyStories, prepared as a data set of this name.
STORIES = {name: TWINS[name] for name in ("moe", "conv", "token", "engram", "large")}
PASSES = {name: TWINS[name] for name in ("moe", "engram", "large")}
# Each changes one thing of Engram; the convolution stays as it is.
CONTROLS = {
    "engram": ENGRAM,
    "one row": Arm("--model engram --engram_rows 1", "one row per head: nothing to remember"),
    "raw": Arm("--model engram --no-engram_compress", "token ids are hashed, not canonical ids"),
    "ungated": Arm("--model engram --engram_gate off", "no gate"),
    "2-grams": Arm("--model engram --engram_orders 2 --engram_heads 8 --engram_conv_dilation 3",
                   "2-grams only"),
    "4-grams": Arm("--model engram --engram_orders 2 3 4 --engram_width 11 "
                   "--engram_conv_dilation 3", "2-, 3- and 4-grams"),
    "block 0": Arm("--model engram --engram_blocks 0", "in block 0 instead of 1"),
    "block 2": Arm("--model engram --engram_blocks 2", "in block 2"),
    "blocks 1 3": Arm("--model engram --engram_blocks 1 3",
                      "half of it in block 1, half in block 3")}
# Trained so long that in-context copying forms. Of eight experts two are always active, so
# two alone are no choice.
LONGER = {
    "moe": MOE,
    "two": Arm("--model moe --n_expert 2", "two experts, no choice"),
    "one row": CONTROLS["one row"],
    "engram": ENGRAM}
# A whole pass over the text, three times as long again. With 52 experts the twin has the
# parameters of the larger table, and its compute.
LONGEST = {"moe": MOE, "half": Arm("--model moe --n_expert 4", "MoE-only, half of the experts"),
           "two": Arm("--model moe --n_expert 2 --shared_hidden 86", "two experts, no choice"),
           "conv": TWINS["conv"], "token": TWINS["token"],
           "engram": ENGRAM, "large": TWINS["large"],
           "slow": Arm("--model engram --table_lr 1", "Engram, its table at the rate of the rest"),
           "many": Arm("--model moe --n_expert 52 --rho 0.06",
                       "MoE-only, 52 experts: the twin of the larger table"),
           "huge": Arm("--model large --large 256", "Engram, 256 times the rows (no twin)")}
MEMORY = {
    "4582": Arm(ENGRAM.flags, "4,582 rows per head (Engram)"),
    "73312": Arm("--model large", "73,312 rows per head (16 times)"),
    "1048576": Arm("--model engram --engram_rows 1048576", "1,048,576 rows per head")}

# Made-up text, see tasks.py
TASK = "--preset laptop --dtype float32 --data_dir data --n_embd 64 --n_head 4"
BOOKS = (f"{TASK} --block_size 128 --batch_size 16 --n_layer 2 --n_expert 16 --expert_hidden 16 "
         "--shared_hidden 16 --balance_step 0.001 --engram_conv_kernel 0")
RHOS = {"1": ALLOCATION["1"]}
for rho in ("0.9", "0.75", "0.5", "0.25", "0"):
    RHOS[rho] = Arm(f"--model engram --rho {rho}", f"rho {rho}")
# All experts stay here, and what is added comes on top; so these are not twins.
RECALL = (f"{TASK} --block_size 64 --batch_size 32 --n_expert 4 --expert_hidden 64 "
          "--shared_hidden 64 --engram_blocks 0 --engram_conv_kernel 0 --rho 0.99 "
          "--engram_rows 4096 --conv_dilation 1")
ADDED = {"nothing added": "--model moe",
         "table of tokens": "--model engram --engram_orders 1 --engram_heads 8",
         "table of n-grams": "--model engram",
         "convolution": "--model moe --conv_in 0",
         "n-grams and convolution": "--model engram --conv_in 0"}
DEPTHS = {}
for blocks in "123":
    for added, flags in ADDED.items():
        title = f"{blocks} block(s), {added}"
        DEPTHS[f"{blocks} {added}"] = Arm(f"{flags} --n_layer {blocks}", title)


class Sweep(NamedTuple):
    base: str                        # flags that all arms share
    arms: dict                       # {name: Arm}
    reference: str
    say: Callable | None = None      # say(sweep, runs): what was found, in lines
    draw: Callable | None = None     # draw(axes, sweep, runs)
    heading: str = ""                # of the picture
    along: bool = False              # are the names of the arms numbers to draw along?
    steps: int = 600
    evaluations: int = 8
    dataset: str = "python"
    seeds: int = 3
    first_seed: int = 21             # seed 10 is for choosing rates and shapes
    table: Callable | None = None    # table(sweep, runs), if not that of losses


def sweeps():
    laptop = partial(Sweep, LAPTOP)
    books = {}
    for share in (20, 50, 80):
        name = f"phonebooks{share}"
        heading = f"When are the phone books known, if {share} % of the entries are local?"
        # the more context entries there are, the longer it takes
        books[name] = Sweep(BOOKS, RHOS, "1", None, draw_books, heading, dataset=name,
                            steps=1200 if share == 80 else 2400, table=table_of_books)
    return {
        "twins": laptop(TWINS, "moe", say_claims, draw_curves, seeds=5),
        "baselines": laptop(BASELINES, "moe", say_claims, draw_differences,
                            "What else lowers the loss", seeds=5),
        "controls": laptop(CONTROLS, "engram", None, draw_differences,
                           "What is lost without one part of Engram"),
        "longer": Sweep(SMALL, LONGER, "moe", say_longer, draw_curves, steps=6000, seeds=5),
        "longest": Sweep(SMALL, LONGEST, "moe", say_longer, draw_curves, steps=18000,
                         evaluations=24),
        "memory": laptop(MEMORY, "4582", say_memory, draw_differences,
                         "What more rows bring at the same compute", along=True),
        "allocation": laptop(ALLOCATION, "1", None, draw_differences,
                             "Which share of the sparse parameters should experts keep?",
                             along=True, seeds=5),
        "shares": Sweep(SMALL, ALLOCATION, "1", None, draw_differences,
                        "Which share should experts keep in a run of a whole pass?",
                        along=True, steps=18000, evaluations=24),
        "recall": Sweep(RECALL, DEPTHS, "1 nothing added", None, draw_recall,
                        "How many blocks does it take to find what belongs to a name?",
                        steps=1000, evaluations=10, dataset="recall", table=table_of_recall),
        **books,
        "stories": laptop(STORIES, "moe", say_claims, draw_curves, dataset="stories"),
        "passes": Sweep(SMALL, PASSES, "moe", say_passes, draw_curves, dataset="stories",
                        steps=4200),
        "rates": laptop(RATES, "moe 0.008", evaluations=4, seeds=1, first_seed=10)}


# ---- runs ----------------------------------------------------------------------------

def settle(sweep):
    """Prepare the data. Return what all runs of a sweep share: a part of their hashes."""
    device = default_device()
    folder = sweep.base.split("--data_dir ")[1].split()[0]
    if sweep.dataset in TASKS and not (Path(folder) / sweep.dataset / "meta.json").exists():
        make(sweep.dataset, folder)
    find(sweep.dataset, folder)
    meta = load(sweep.dataset, folder)[0]
    every = -(-sweep.steps // sweep.evaluations)
    return {"flags": f"{sweep.base} --device {device} --dataset {sweep.dataset} --steps "
                     f"{sweep.steps} --eval_every {every}",
            "data": [meta[split]["sha256"] for split in ("train", "val")],
            "torch": str(torch.__version__), "device": machine_name(device)}


def home(settings, flags, seed):
    """Return the folder of one run."""
    known = json.dumps([settings, flags, seed], sort_keys=True)
    return Path("runs") / hashlib.sha256(known.encode()).hexdigest()[:12]


def finished(settings, flags, seed):
    """Return a run as it stands in NAME.json, or None if it has not ended."""
    log = read_log(home(settings, flags, seed) / flags.split()[1] / "log.jsonl")
    if log is None or log[1][-1]["step"] < log[0]["config"]["steps"]:
        return None
    return {"flags": flags, "seed": seed, "header": log[0], "records": log[1]}


def run_one(settings, flags, seed):
    """Train one run, or finish it, on one thread. Return what went wrong, or None."""
    if finished(settings, flags, seed):
        return None
    out = home(settings, flags, seed)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / "train.py", *settings["flags"].split(),
               *flags.split(), "--seed", str(seed), "--out_dir", out]
    if (out / flags.split()[1] / "ckpt.pt").exists():
        command.append("--resume")
    with open(out / "printed.txt", "w") as printed:
        done = subprocess.run(command, stdout=printed, stderr=printed,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        return f"{flags} ended with exit code {done.returncode}: see {out}/printed.txt"


def collect(path, settings, sweep):
    """Write the finished runs of a sweep to path."""
    runs = []
    for name, arm in sweep.arms.items():
        for seed in range(sweep.first_seed, sweep.first_seed + 64):
            run = finished(settings, arm.flags, seed)
            if run:
                runs.append({"arm": name, **run})
    write_json(path, {"name": path.stem, "settings": settings, "runs": runs})


def run_all(path, sweep, wanted):
    """Train what is missing of the wanted arms, and write path after each run."""
    settings = settle(sweep)
    seeds = range(sweep.first_seed, sweep.first_seed + sweep.seeds)
    pool = ThreadPoolExecutor(2 if "--device cpu" in settings["flags"] else 1)
    try:
        jobs = [pool.submit(run_one, settings, sweep.arms[name].flags, seed)
                for seed in seeds for name in wanted]
        for job in tqdm(as_completed(jobs), path.stem, len(jobs), unit="run"):
            if job.result():
                fail(job.result())
            collect(path, settings, sweep)
    finally:
        pool.shutdown(cancel_futures=True)


# ---- what a sweep found --------------------------------------------------------------

def last(run):
    return run["records"][-1]


def gaps(runs, arm, other):
    """Return the last loss of one arm minus that of another, for the seeds of both."""
    ours, theirs = runs.get(arm, {}), runs.get(other, {})
    return [last(run)["val_loss"] - last(theirs[seed])["val_loss"]
            for seed, run in ours.items() if seed in theirs]


def verdict(values):
    """Return the mean and its interval in words, as "-0.050 ± 0.020 (n=3), lower"."""
    if not values:
        return "no pair"
    if len(values) == 1:
        return f"{values[0]:+.3f}, n=1"
    mean, half = interval(values)
    shows = "undecided"
    if abs(mean) > half:
        shows = "lower" if mean < 0 else "higher"
    return f"{mean:+.3f} ± {half:.3f} (n={len(values)}), {shows}"


def table(sweep, runs):
    """Return the lines of a table in Markdown, an arm a row."""
    lines = ["| arm | P_tot | P_act | n | loss (sd) | minus the reference, paired, 95 % | "
             "bits per byte |", "|---|---|---|---|---|---|---|"]
    for arm, seeds in runs.items():
        losses = [last(run)["val_loss"] for run in seeds.values()]
        loss = f"{statistics.mean(losses):.3f}"
        if len(losses) > 1:
            loss += f" ({statistics.stdev(losses):.3f})"
        against = "reference"
        if arm != sweep.reference:
            against = verdict(gaps(runs, arm, sweep.reference))
        size = next(iter(seeds.values()))["header"]["accounting"]
        bpb = statistics.mean(last(run)["val_bpb"] for run in seeds.values())
        lines.append(f"| {sweep.arms[arm].title} | {size['P_tot']:,} | {size['P_act']:,} | "
                     f"{len(seeds)} | {loss} | {against} | {bpb:.3f} |")
    return lines


def lines_of(sweep, runs):
    """Return what is printed of a sweep: its table, and what was found."""
    lines = (sweep.table or table)(sweep, runs)
    if sweep.say:
        lines += ["", *sweep.say(sweep, runs)]
    return lines


# (arm, what it is compared with, what the difference is worth)
CLAIMS = (("engram", "moe", "Memory instead of experts"),
          ("large", "engram", "More memory at the same compute"),
          ("huge", "large", "16 times as much memory again"),
          ("engram", "token", "N-grams instead of single tokens in the table"),
          ("slow", "moe", "Memory instead of experts, the table at the rate of the rest"),
          ("slow", "engram", "The table at the rate of the rest"),
          ("token", "moe", "A table of single tokens instead of experts"),
          ("conv", "moe", "Engram's convolution without a table"),
          ("moe", "fewer", "Eight experts instead of six"),
          ("moe", "half", "Eight experts instead of four"),
          ("moe", "two", "Eight experts instead of two"),
          ("many", "moe", "52 experts instead of eight"),
          ("large", "many", "The larger table instead of as many parameters in experts"),
          ("one row", "moe", "Engram's module and fewer experts, with nothing to remember"),
          ("engram", "one row", "Something to remember instead of nothing"),
          ("no conv", "token alone", "N-grams instead of single tokens, no convolution"))


def say_claims(sweep, runs):
    """Say what each difference is worth, and where Engram passes its twin's last loss."""
    lines = []
    for arm, other, claim in CLAIMS:
        values = gaps(runs, arm, other)
        if values:
            lines.append(f"{claim}: {verdict(values)}")
    shares, pairs = [], runs.get("engram", {}).keys() & runs["moe"].keys()
    for seed in pairs:
        end = last(runs["moe"][seed])
        tokens = crossing(runs["engram"][seed]["records"], end["val_loss"])
        if tokens is not None:
            shares.append(tokens / end["tokens"])
    if shares:
        lines.append(f"Engram reached its twin's last loss in {len(shares)} of {len(pairs)} "
                     f"runs, after {statistics.mean(shares):.0%} of the tokens")
    return lines


def along_the_way(runs, arm, other):
    """Return in words the mean difference of two arms at eight points along the way."""
    curves = []
    for seed in runs[arm].keys() & runs[other].keys():
        records, theirs = runs[arm][seed]["records"], runs[other][seed]["records"]
        curves.append([a["val_loss"] - b["val_loss"] for a, b in zip(records, theirs)])
    if not curves:
        return "no pair"
    every, parts = max(1, len(records) // 8), []
    for record, gap in list(zip(records, np.mean(curves, axis=0)))[every - 1::every]:
        parts.append(f"{gap:+.3f} after {record['tokens'] / 1e6:.1f}M tokens")
    return ", ".join(parts)


def first_read(runs, arm, other):
    """Return a verdict on the difference in training loss up to the last evaluation of the first
    pass. That is a loss on text that no run had read before, as that of validation is, but
    from the same directories as the text before."""
    found = []
    for seed in runs[arm].keys() & runs[other].keys():
        losses = []
        for run in (runs[arm][seed], runs[other][seed]):
            one_pass = last(run)["tokens"] / run["header"]["passes"]
            losses += [record["train_loss"] for record in run["records"]
                       if record["tokens"] <= one_pass][-1:]
        if len(losses) == 2:
            found.append(losses[0] - losses[1])
    return verdict(found)


def say_longer(sweep, runs):
    """Say what each difference is worth, how some went along the way, and when in-context
    copying formed in each run: when the loss on copyable tokens fell below 6."""
    lines = say_claims(sweep, runs)
    by_seed = ", ".join(f"{gap:+.3f}" for gap in gaps(runs, "engram", "moe"))
    lines.append(f"Engram minus its twin, seed by seed: {by_seed}")
    for arm, other in (("engram", "moe"), ("slow", "moe"), ("token", "moe"),
                       ("large", "engram"), ("large", "many")):
        if arm in runs and other in runs:
            pair = f"{sweep.arms[arm].title} minus {sweep.arms[other].title}"
            lines += [f"{pair}, along the way: {along_the_way(runs, arm, other)}",
                      f"{pair}, on training text when it is read for the first time: "
                      f"{first_read(runs, arm, other)}"]
    for arm, seeds in runs.items():
        when = []
        for run in seeds.values():
            # (a small text may have no copyable tokens)
            tokens = None
            if run["header"]["copyable_tokens"]:
                tokens = crossing(run["records"], 6, "copy_loss")
            when.append(f"{tokens / 1e6:.1f}M" if tokens else "not yet")
        lines.append(f"Copying formed after, {sweep.arms[arm].title}: {', '.join(when)}")
    return lines


def say_passes(sweep, runs):
    """Say what each difference is worth, and how the losses of training and validation go
    on: do tables overfit a text that comes again and again?"""
    lines = say_claims(sweep, runs)
    for arm, seeds in runs.items():
        for kind in ("train_loss", "val_loss"):
            curves = []
            for run in seeds.values():
                curves.append([record[kind] for record in run["records"]])
            parts = [f"{loss:.3f}" for loss in np.mean(curves, axis=0)]
            lines.append(f"{sweep.arms[arm].title}, {kind}: {', '.join(parts)}")
    passes = run["header"]["passes"]
    each = [f"{record['step'] / sweep.steps * passes:.2f}" for record in run["records"]]
    return [*lines, f"after passes: {', '.join(each)}"]


def say_memory(sweep, runs):
    """Say what a doubling of the rows brings: by a line per seed, and between points."""
    doublings = [np.log2(int(arm)) for arm in runs]
    slopes = []
    for seed in set.intersection(*map(set, runs.values())):
        losses = [last(seeds[seed])["val_loss"] for seeds in runs.values()]
        slopes.append(float(np.polyfit(doublings, losses, 1)[0]))
    steps = []
    for before, arm in pairwise(runs):
        width = np.log2(int(arm) / int(before))
        steps.append(verdict([gap / width for gap in gaps(runs, arm, before)]))
    return [f"Loss per doubling of the rows: {verdict(slopes)}; from point to point: "
            f"{'; '.join(steps)}"]


# ---- pictures ------------------------------------------------------------------------

# an arm looks the same in all pictures
CURVE_STYLES = dict(zip([*TWINS, "huge", "many", "slow", "half"], STYLES))
CURVE_STYLES |= {"two": STYLES[1], "one row": STYLES[2]}


def draw_curves(axes, sweep, runs):
    """Draw the loss against tokens: every seed thin, the mean bold."""
    for arm, seeds in runs.items():
        curves, (colour, line) = [], CURVE_STYLES[arm]
        for run in seeds.values():
            curves.append([record["val_loss"] for record in run["records"]])
            millions = [record["tokens"] / 1e6 for record in run["records"]]
            axes.plot(millions, curves[-1], line, color=colour, lw=0.8, alpha=0.6)
        axes.plot(millions, np.mean(curves, axis=0), line, color=colour, lw=2.5,
                  label=f"{sweep.arms[arm].title} (n={len(seeds)})")
    axes.set(xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
    gain, more = gaps(runs, "engram", "moe"), gaps(runs, "large", "engram")
    if gain:
        title = ("At the end, memory instead of experts changes the loss by "
                 f"{np.mean(gain):+.2f} nats per token")
        if more:
            title += f",\nmore memory at the same compute by another {np.mean(more):+.2f}"
        axes.set_title(title)
    axes.legend()


def draw_differences(axes, sweep, runs):
    found = {arm: gaps(runs, arm, sweep.reference) for arm in runs}
    found = {arm: values for arm, values in found.items() if values}
    places, line = range(len(found)), ""
    if sweep.along:
        places, line = [float(arm) for arm in found], "-"
    points(axes, places, found.values(), ("tab:blue", line))
    axes.axhline(0, color="black", lw=0.6)
    if max(places) > 1000:
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [sweep.arms[arm].title for arm in found], rotation=20,
                    ha="right")
    axes.set(title=sweep.heading, ylabel="loss minus that of "
             f"{sweep.arms[sweep.reference].title}\n(nats per token, same seed)")


def finished_runs(path, sweep):
    """Return {arm: {seed: run}} of NAME.json, in the order of the sweep's arms."""
    found, runs = read_results(path)["runs"], {}
    for arm in sweep.arms:
        seeds = {run["seed"]: run for run in found if run["arm"] == arm}
        if seeds:
            runs[arm] = seeds
    if sweep.reference not in runs or len(runs) < 2:
        fail(f"{path} has no finished pair of {sweep.reference} and another arm: it has "
             f"{', '.join(runs) or 'none'}")
    return runs


def main(argv=None):
    parser = make_parser(__doc__, "python -m experiments.sweep NAME [options]")
    add = parser.add_argument
    add("name", choices=sweeps(), metavar="NAME", help=", ".join(sweeps()))
    add("--seeds", type=int, help="seeds per arm (default: the sweep's own)")
    add("--arms", nargs="+", help="train only these and the reference (default: all)")
    add("--steps", type=int, help="steps per run (default: the sweep's own)")
    add("--dataset", help="prepared if need be (default: the sweep's own)")
    add("--reference", help="print a table that compares with this arm, and nothing else")
    add("--plot", action="store_true", help="train nothing; read --results, by default "
        "experiments/results, the results that came with the code")
    add("--results", help="folder of NAME.json and NAME.png (default: runs/results)")
    args = parser.parse_args(argv)
    sweep = sweeps()[args.name]
    sweep = sweep._replace(seeds=args.seeds or sweep.seeds, steps=args.steps or sweep.steps,
                           dataset=args.dataset or sweep.dataset)
    folder = Path(args.results or (COMMITTED if args.plot else "runs/results"))
    path = folder / f"{args.name}.json"
    if not args.plot:
        if folder.resolve() == COMMITTED:
            fail(f"{folder} holds what came with the code: give another --results")
        wanted = dict.fromkeys([sweep.reference, *(args.arms or sweep.arms)])
        if not wanted.keys() <= sweep.arms.keys():
            fail(f"--arms: {args.name} has {', '.join(sweep.arms)}")
        run_all(path, sweep, wanted)
    if args.reference:
        sweep = sweep._replace(reference=args.reference, say=None, draw=None, table=None)
    runs = finished_runs(path, sweep)
    print(*lines_of(sweep, runs), sep="\n")
    print(f"runs: {path}")
    if sweep.draw:
        draw_picture(path, sweep.draw, sweep, runs)


if __name__ == "__main__":
    run_script(main)
