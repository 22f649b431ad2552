"""
Experiments of many runs: train what is missing, then print a table and draw a picture.

    python -m experiments.sweep allocation         # 18 runs; the results go to runs/results
    python -m experiments.sweep controls --seeds 8 --arms bigrams ungated
    python -m experiments.sweep memory --plot      # from experiments/results, no training

The idea: the folder of a run is a hash of all that determines it (flags, seed, data, torch,
machine). A run goes through train.py as a user's would, and stays under runs/. So no sweep
trains what another has trained, and an interrupted one continues where it was. After a
change to the code, delete runs/.

An arm is one row of a table: a set of flags, trained with several seeds. One arm of each
sweep is the reference. Every other arm is compared with it seed by seed, for runs of one
seed see the same data in the same order.
"""
from common import (default_device, fail, machine_name, make_parser, new_figure, run_script,
                    write_whole)

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from experiments.analyze import COMMITTED, interval, load_run, open_data, save_figure
from model import token_losses
from prepare_data import Offline, load, prepare
from runs import crossing, read_log
from train import autocast

ROOT = Path(__file__).resolve().parent.parent
LAPTOP = "--preset laptop --dtype bfloat16 --data_dir data"
# long enough for in-context copying to form
JUMP = "--preset laptop --dtype float32 --data_dir data --n_head 2 --eval_tokens 32768"
# small, in the hope that experts earn their keep (they hardly do: README.md)
SMALL = ("--preset laptop --dtype float32 --data_dir data/v1024 --n_embd 64 --n_head 2 "
         "--n_expert 32 --expert_hidden 64 --shared_hidden 64 --tokens_per_step 1024 "
         "--batch_size 4 --eval_tokens 32768")


class Arm(NamedTuple):
    flags: str          # for train.py, beside those of the sweep
    title: str
    again: str = ""     # "off" or "shuffled": a run of these flags, evaluated once more so


ENGRAM = Arm("--model engram --rho 0.75", "Engram")
MOE = Arm("--model moe", "MoE-only twin")
UNFAIR = ("¹ Not a fair control: its convolution has dilation 1, Engram's has dilation 3. "
          "With dilation 1 in-context copying forms early. Fair controls are under way.")


def engram_arm(flags, title, again=""):
    return Arm(f"{ENGRAM.flags} {flags}".strip(), title, again)


TWINS = {"engram": ENGRAM, "moe": MOE}
TWINS_AND_CONTROLS = TWINS | {
    "fewer": Arm("--model moe --n_expert 6", "MoE-only, 3/4 of the experts"),
    "token": Arm("--model engram --engram_orders 1 --engram_heads 8",
                 "table addressed by the current token alone¹")}
RATES = {f"{name} {lr}": Arm(f"{arm.flags} --lr {lr}", f"{arm.title}, rate {lr}")
         for name, arm in TWINS.items() for lr in ("0.002", "0.004", "0.008")}
# Routers of dropped experts are active parameters too. The width of the shared expert makes
# up for them, so that P_act stays that of rho 1 (test_experiments.py asserts it).
ALLOCATION = {
    "1": Arm("--model moe", "rho 1, MoE-only twin"),
    "0.9": Arm("--model engram --rho 0.9 --shared_hidden 63", "rho 0.9"),
    "0.75": Arm("--model engram --rho 0.75", "rho 0.75"),
    "0.5": Arm("--model engram --rho 0.5 --shared_hidden 66", "rho 0.5"),
    "0.25": Arm("--model engram --rho 0.25 --shared_hidden 69", "rho 0.25"),
    "0": Arm("--model engram --rho 0 --shared_hidden 72", "rho 0")}
CONTROLS = TWINS | {
    "one row": engram_arm("--engram_rows 1", "one row per head (capacity 1)"),
    "token": engram_arm("--engram_orders 1 --engram_heads 8", "current token alone¹"),
    "bigrams": engram_arm("--engram_orders 2 --engram_heads 8", "2-grams only"),
    "raw": engram_arm("--no-engram_compress", "no compression"),
    "ungated": engram_arm("--engram_gate off", "no gate"),
    "shuffled": engram_arm("", "rows shuffled at inference", "shuffled"),
    "off": engram_arm("", "memory off at inference", "off")}
ROWS = [2 ** k for k in (12, 14, 17, 20)]
MEMORY = {str(n): engram_arm(f"--engram_rows {n}", f"{n:,} rows per head") for n in ROWS}
# d_mem is 132; that of orders 2 and 3 is 128
FOUR = "--engram_orders 2 3 4 --engram_width 11"
PARTS = {
    "engram": ENGRAM,
    "4-grams": engram_arm(FOUR, "2- to 4-grams"),
    "stop": engram_arm("--engram_stop_at_eot", "look-back stops at end of text"),
    "rate 1": engram_arm("--table_lr 1", "table rate x1"),
    "v4.1": engram_arm(f"{FOUR} --engram_conv_kernel 0 --engram_stop_at_eot --no-engram_bias",
                       "DeepSeek-V4.1's variant")}
PLACEMENT = {"1": engram_arm("", "in block 1"),
             "0 1 2": engram_arm("--engram_blocks 0 1 2", "in block 0 1 2")}


@dataclass
class Sweep:
    base: str                        # flags that all arms share
    arms: dict                       # {name: Arm}
    reference: str
    say: Callable | None = None      # say(sweep, runs): what was found, in a sentence
    draw: Callable | None = None     # draw(axes, sweep, runs)
    heading: str = ""                # title of the picture
    x: Callable | None = None        # x(header): where draw_along puts an arm
    x_label: str = ""
    steps: int = 1500
    evaluations: int = 4
    seeds: int = 3
    first_seed: int = 11
    vocab_size: int = 1024


def sweeps():
    """Return {name: Sweep}."""
    # seed 10 chooses rates, and is used for nothing else
    rates = dict(reference="moe 0.004", seeds=1, first_seed=10)
    laptop = dict(base=LAPTOP, vocab_size=4096)
    curves = dict(reference="moe", draw=draw_curves)
    return {
        "twins": Sweep(
            arms=TWINS_AND_CONTROLS, say=say_twins, steps=1200, evaluations=8,
            heading="Same parameters, same compute: Engram against its MoE-only twin",
            **laptop, **curves),
        "twins_long": Sweep(
            arms=TWINS, say=say_twins, steps=4800, evaluations=16, seeds=1,
            heading="The same, trained four times as long", **laptop, **curves),
        "twins_rates": Sweep(arms=RATES, steps=1200, evaluations=8, **laptop, **rates),
        "rates": Sweep(SMALL, RATES, **rates),
        "experts": Sweep(SMALL, {"half": Arm("--model moe --n_expert 16", "16 experts"),
                                 "moe": Arm("--model moe", "32 experts")}, "half"),
        "allocation": Sweep(
            SMALL, ALLOCATION, "1", draw=draw_along, x=rho_reached,
            heading="Which share of the sparse parameters should experts keep?",
            x_label="share of the sparse parameters in experts (rho)"),
        "controls": Sweep(SMALL, CONTROLS, "engram", draw=draw_arms,
                          heading="What is lost without one part of Engram"),
        "memory": Sweep(SMALL, MEMORY, str(ROWS[0]), say_memory, draw_along,
                        "What more rows bring at the same compute", rows_per_head,
                        "rows per head"),
        "jump": Sweep(JUMP, TWINS, "moe", say_jump, draw_curves,
                      "When in-context copying forms", steps=2400, evaluations=32,
                      vocab_size=4096),
        "parts": Sweep(SMALL, PARTS, "engram"),
        "placement": Sweep(SMALL, PLACEMENT, "1")}


# ---- runs ----------------------------------------------------------------------------

def settle(sweep, dataset):
    """Prepare the data. Return what all runs of a sweep share; it goes into their
    hashes."""
    device = default_device()
    folder = sweep.base.split("--data_dir ")[1].split()[0]
    try:
        if not (Path(folder) / dataset / "meta.json").exists():
            prepare(dataset, data_dir=folder, vocab_size=sweep.vocab_size)
        meta = load(dataset, folder)[0]
    except (Offline, ValueError) as error:
        fail(error)
    if meta["vocab_size"] > sweep.vocab_size:
        fail(f"{folder}/{dataset} has {meta['vocab_size']} token ids, more than "
             f"{sweep.vocab_size}: delete it")
    every = -(-sweep.steps // sweep.evaluations)
    return {"flags": f"{sweep.base} --device {device} --dataset {dataset} --steps "
                     f"{sweep.steps} --eval_every {every}",
            "data": [meta[split]["sha256"] for split in ("train", "val")],
            "torch": str(torch.__version__), "device": machine_name(device)}


def home(settings, flags, seed):
    """Return the folder of one run."""
    known = json.dumps([settings, flags, seed], sort_keys=True)
    return Path("runs") / hashlib.sha256(known.encode()).hexdigest()[:12]


def finished(settings, arm, seed):
    """Return the run of an arm as it stands in NAME.json, or None if it has not ended."""
    out = home(settings, arm.flags, seed)
    log = read_log(out / arm.flags.split()[1] / "log.jsonl")
    if log is None:
        return None
    header, records = log
    if records[-1]["step"] < header["config"]["steps"]:
        return None
    if arm.again:
        if not (out / "after.json").exists():
            return None
        loss = json.loads((out / "after.json").read_text())[arm.again]
        end = records[-1]
        bpb = end["val_bpb"] * loss / end["val_loss"]
        records = [{**end, "val_loss": loss, "val_bpb": bpb}]
    return {"flags": arm.flags, "seed": seed, "header": header, "records": records}


def run_one(settings, flags, seed):
    """Train one run, or finish it, on one thread. If it has a memory, evaluate it once
    more."""
    out, model = home(settings, flags, seed), flags.split()[1]
    out.mkdir(parents=True, exist_ok=True)
    if not finished(settings, Arm(flags, ""), seed):
        command = [sys.executable, ROOT / "train.py", *settings["flags"].split(),
                   *flags.split(), "--seed", str(seed), "--out_dir", out]
        if (out / model / "ckpt.pt").exists():
            command.append("--resume")
        with open(out / "printed.txt", "w") as printed:
            done = subprocess.run(command, stdout=printed, stderr=printed,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode in (130, -2):
            raise KeyboardInterrupt
        if done.returncode:
            fail(f"{flags} ended with exit code {done.returncode}: see {out}/printed.txt")
    if model == "engram" and not (out / "after.json").exists():
        save_text(out / "after.json", json.dumps(after(out)))


def after(out):
    """Return the loss of a finished run with its memory off, and with its rows shuffled.
    They are shuffled within each head's own part of the table, so their sizes and
    statistics are right, and only their addresses are wrong."""
    saved, model, cfg = load_run(out / "engram" / "ckpt.pt")
    data = open_data(saved, cfg)

    def loss(memory):
        nats = token_losses(model, data.val_x, data.val_y, cfg.batch_size, autocast(cfg),
                            memory)
        return float(nats.double().mean())

    off, generator = loss(memory=False), torch.Generator().manual_seed(0)
    for engram in model.engrams():
        starts, sizes = engram.offsets.flatten().tolist(), engram.primes.flatten().tolist()
        for start, size in zip(starts, sizes):
            part = engram.table[start:start + size]
            part.copy_(part[torch.randperm(size, generator=generator).to(part.device)])
    return {"off": off, "shuffled": loss(memory=True)}


def save_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def collect(path, name, settings, sweep):
    """Write the finished runs of a sweep to path, and return them."""
    runs = {}
    for arm in sweep.arms:
        for seed in range(sweep.first_seed, sweep.first_seed + 64):
            run = finished(settings, sweep.arms[arm], seed)
            if run:
                runs[arm, seed] = {"arm": arm, **run}
    lines = ",\n".join(json.dumps(run) for run in runs.values())
    save_text(path, f'{{"name": "{name}", "settings": {json.dumps(settings)}, "runs": [\n'
                    f'{lines}\n]}}\n')
    return runs


def run_all(path, name, sweep, args):
    """Train what is missing, and write path after each run."""
    settings = settle(sweep, args.dataset)
    unknown = [arm for arm in args.arms or () if arm not in sweep.arms]
    if unknown:
        fail(f"{name} has no arm {', '.join(unknown)}: choose from {', '.join(sweep.arms)}")
    have = collect(path, name, settings, sweep)
    wanted = {sweep.reference, *(args.arms or sweep.arms)}
    # a dict keeps the order; an arm that is evaluated once more needs no run of its own
    todo = {}
    for seed in range(sweep.first_seed, sweep.first_seed + sweep.seeds):
        for arm in sweep.arms:
            if arm in wanted and (arm, seed) not in have:
                todo[sweep.arms[arm].flags, seed] = None
    with ThreadPoolExecutor(2 if "--device cpu" in settings["flags"] else 1) as pool:
        jobs = [pool.submit(run_one, settings, *run) for run in todo]
        try:
            for job in tqdm(as_completed(jobs), name, len(jobs), unit="run", smoothing=0):
                job.result()
                collect(path, name, settings, sweep)
        finally:
            pool.shutdown(cancel_futures=True)


def read(path):
    """Return the content of NAME.json."""
    if not path.exists():
        fail(f"there is no {path}: run without --plot")
    return json.loads(path.read_text())


# ---- statistics ----------------------------------------------------------------------

def last(run, key="val_loss"):
    return run["records"][-1][key]


def gaps(runs, arm, other):
    """Return the last loss of one arm minus that of another, for each seed that both
    have."""
    return [last(run) - last(runs[other][seed]) for seed, run in runs[arm].items()
            if seed in runs.get(other, ())]


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
    """Return the lines of a table in Markdown, an arm a row, and its footnote if there is
    one."""
    lines = ["| arm | P_tot | P_act | n | loss (sd) | minus the reference, paired, 95 % | "
             "bits per byte |", "|---|---|---|---|---|---|---|"]
    for arm, seeds in runs.items():
        losses = [last(run) for run in seeds.values()]
        loss = f"{statistics.mean(losses):.3f}"
        if len(losses) > 1:
            loss += f" ({statistics.stdev(losses):.3f})"
        against = "reference"
        if arm != sweep.reference:
            against = verdict(gaps(runs, arm, sweep.reference))
        size = header_of(seeds)["accounting"]
        bpb = statistics.mean(last(run, "val_bpb") for run in seeds.values())
        lines.append(f"| {sweep.arms[arm].title} | {size['P_tot']:,} | {size['P_act']:,} | "
                     f"{len(seeds)} | {loss} | {against} | {bpb:.3f} |")
    if "¹" in "".join(lines):
        lines += ["", UNFAIR]
    return lines


def header_of(seeds):
    return next(iter(seeds.values()))["header"]


def rho_reached(header):
    """Return the routed experts' share of P_sparse."""
    shape, count = header["shape"], header["parameters_by_kind"]
    idle = count["routed experts"] * (1 - shape["top_k"] / shape["n_expert"])
    return idle / header["accounting"]["P_sparse"]


def rows_per_head(header):
    return header["shape"]["engram"]["rows"][0]


# ---- what a sweep found, in a sentence -----------------------------------------------

def pairs_of(runs):
    """Return the records of Engram and of its twin, for each seed that both have."""
    both = runs.get("engram", {}).keys() & runs.get("moe", {}).keys()
    return [(runs["engram"][seed]["records"], runs["moe"][seed]["records"])
            for seed in sorted(both)]


def say_twins(sweep, runs):
    """Say where Engram's curve passes its twin's last loss."""
    pairs = pairs_of(runs)
    if not pairs:
        return "No pair of twins has ended yet"
    shares = []
    for engram, twin in pairs:
        tokens = crossing(engram, twin[-1]["val_loss"])
        if tokens is not None:
            shares.append(tokens / twin[-1]["tokens"])
    said = (f"Engram minus its twin: {verdict(gaps(runs, 'engram', 'moe'))}. Engram reached "
            f"its twin's last loss in {len(shares)} of {len(pairs)} pairs")
    if shares:
        said += f", after {statistics.mean(shares):.0%} of the tokens"
    return said


def slope(rows, losses):
    """Return the slope of the least-squares line through (log2 rows, loss)."""
    return float(np.polyfit(np.log2(rows), losses, 1)[0])


def say_memory(sweep, runs):
    """Say what a doubling of the rows brings: by a line through all points of a seed, and
    from point to point."""
    slopes = []
    for seed in next(iter(runs.values())):
        ends = [seeds[seed] for seeds in runs.values() if seed in seeds]
        if len(ends) > 2:
            slopes.append(slope([rows_per_head(run["header"]) for run in ends],
                                [last(run) for run in ends]))
    steps = []
    for before, arm in zip(list(runs)[:-1], list(runs)[1:]):
        doublings = np.log2(int(arm) / int(before))
        steps.append(verdict([gap / doublings for gap in gaps(runs, arm, before)]))
    return (f"Loss per doubling of the rows: {verdict(slopes)}; from point to point: "
            f"{'; '.join(steps)}")


def copying_after(records):
    """Return after how many million tokens copyable tokens cost 1 nat less than at the first
    evaluation; None if they never do."""
    tokens = crossing(records, records[0]["copy_loss"] - 1, "copy_loss")
    return None if tokens is None else tokens / 1e6


def in_words(millions):
    return "never" if millions is None else f"{millions:.1f}"


def say_jump(sweep, runs):
    """Say when in-context copying appeared, in each twin of each pair."""
    pairs = pairs_of(runs)
    if not pairs:
        return "No pair of twins has ended yet"
    # [(Engram, its twin)] in millions of tokens; None where it never happens
    ends = []
    for engram, moe in pairs:
        ends.append((copying_after(engram), copying_after(moe)))
    both = [engram - moe for engram, moe in ends if engram and moe]
    engram, moe = (", ".join(map(in_words, column)) for column in zip(*ends))
    return (f"In-context copying appears after {engram} million tokens with Engram, {moe} "
            f"with its twin (in both in {len(both)} of {len(pairs)} pairs); difference "
            f"{verdict(both)}. Loss, Engram minus its twin: "
            f"{verdict(gaps(runs, 'engram', 'moe'))}")


# ---- pictures ------------------------------------------------------------------------

LINES = (("tab:blue", "-"), ("tab:orange", "--"), ("black", ":"), ("tab:green", "-."))


def draw_curves(axes, sweep, runs):
    """Draw a loss against tokens: every seed thin, the mean bold."""
    key, label = "val_loss", "validation loss"
    if sweep.say is say_jump:
        key, label = "copy_loss", "loss on copyable tokens"
    for (arm, seeds), (colour, style) in zip(runs.items(), LINES):
        curves = []
        for run in seeds.values():
            curve = [record[key] for record in run["records"]]
            curves.append(curve)
            millions = [record["tokens"] / 1e6 for record in run["records"]]
            axes.plot(millions, curve, style, color=colour, lw=0.8, alpha=0.6)
        axes.plot(millions, np.mean(curves, axis=0), style, color=colour, lw=2.5,
                  label=f"{sweep.arms[arm].title} (n={len(seeds)})")
    axes.set(xlabel="training tokens (millions)", ylabel=f"{label} (nats per token)")
    axes.legend()


def draw_along(axes, sweep, runs):
    """Draw each arm's loss minus the reference's against sweep.x: every seed a dot, the
    mean with its 95 % interval."""
    places, means = [], []
    for arm, seeds in runs.items():
        values = gaps(runs, arm, sweep.reference)
        if values:
            mean, half = interval(values)
            places.append(sweep.x(header_of(seeds)))
            means.append(mean)
            axes.plot([places[-1]] * len(values), values, "o", color="tab:orange", ms=4)
            axes.errorbar(places[-1], mean, half, fmt="s", color="tab:blue", mfc="none",
                          capsize=4)
    axes.plot(places, means, color="tab:blue", lw=1)
    axes.axhline(0, color="black", lw=0.6)
    if max(places) > 100 * min(places) > 0:
        axes.set_xscale("log", base=2)
    # ticks at the values that were reached
    axes.set_xticks(places, [f"{at:,}" if at > 1 else f"{at:.2f}" for at in places])
    axes.set(xlabel=sweep.x_label, ylabel=against(sweep))


def draw_arms(axes, sweep, runs):
    """Draw a row per arm, the one with the largest difference on top. Arms that were not
    trained but evaluated once more are grey, for they cannot be compared with the
    others."""
    found = {arm: gaps(runs, arm, sweep.reference) for arm in runs if arm != sweep.reference}
    order = sorted((arm for arm in found if found[arm]), key=lambda arm: np.mean(found[arm]))
    labels = []
    for i, arm in enumerate(order):
        colour = "grey" if sweep.arms[arm].again else "tab:blue"
        mean, half = interval(found[arm])
        axes.plot(found[arm], [i] * len(found[arm]), "o", color=colour, ms=4, alpha=0.6)
        axes.errorbar(mean, i, xerr=half, fmt="s", color=colour, mfc="none", capsize=4)
        labels.append(f"{sweep.arms[arm].title} (n={len(found[arm])})")
    axes.set_yticks(range(len(order)), labels)
    axes.axvline(0, color="black", lw=0.6)
    axes.set(xlabel=f"{against(sweep)}. Grey: Engram, disturbed after training")


def against(sweep):
    title = sweep.arms[sweep.reference].title
    return f"loss minus that of {title}\n(nats per token, same seed)"


# ---- the command ---------------------------------------------------------------------

def finished_runs(path, sweep):
    """Return {arm: {seed: run}} of NAME.json, in the order of the sweep's arms."""
    runs = {arm: {} for arm in sweep.arms}
    for run in sorted(read(path)["runs"], key=lambda run: run["seed"]):
        if run["arm"] in runs:
            runs[run["arm"]][run["seed"]] = run
    runs = {arm: seeds for arm, seeds in runs.items() if seeds}
    if sweep.reference not in runs or len(runs) < 2:
        fail(f"{path} has no finished pair of {sweep.reference} and another arm: it has "
             f"{', '.join(runs) or 'none'}")
    return runs


def main(argv=None):
    parser = make_parser(__doc__, "python -m experiments.sweep NAME [options]")
    add = parser.add_argument
    add("name", choices=sweeps(), metavar="NAME", help=", ".join(sweeps()))
    add("--seeds", type=int, help="seeds per arm (default: 3; 1 where rates are chosen)")
    add("--arms", nargs="+", help="train only these and the reference (default: all)")
    add("--steps", type=int, help="steps per run (default: the sweep's own)")
    add("--dataset", default="python", help="prepared if need be (default: %(default)s)")
    add("--reference", help="print a table that compares with this arm, and nothing else")
    add("--plot", action="store_true", help="train nothing; read --results, by default "
        "experiments/results, the results that came with the code")
    add("--results", help="folder of NAME.json and NAME.png (default: runs/results)")
    args = parser.parse_args(argv)
    sweep = sweeps()[args.name]
    for name in ("seeds", "steps"):
        value = getattr(args, name)
        if value is not None:
            if value < 1:
                fail(f"--{name} {value}: must be 1 or more")
            sweep = replace(sweep, **{name: value})
    folder = Path(args.results or (COMMITTED if args.plot else "runs/results"))
    path = folder / f"{args.name}.json"
    if not args.plot:
        if folder.resolve() == COMMITTED:
            fail(f"{folder} holds the results that came with the code: give another --results")
        folder.mkdir(parents=True, exist_ok=True)
        run_all(path, args.name, sweep, args)
    if args.reference:
        sweep = replace(sweep, reference=args.reference)
    runs = finished_runs(path, sweep)
    lines = table(sweep, runs)
    print(*lines, sep="\n")
    if args.reference:
        return
    if sweep.say:
        print("", sweep.say(sweep, runs), sep="\n")
    print(f"runs: {path}")
    if sweep.draw:
        figure = new_figure(figsize=(7.5, 4.5))
        axes = figure.subplots()
        sweep.draw(axes, sweep, runs)
        axes.set_title(sweep.heading)
        if "¹" in "".join(lines):
            figure.supxlabel("¹ not a fair control: see experiments/README.md", fontsize=8)
        save_figure(path.with_suffix(".png"), figure)


if __name__ == "__main__":
    run_script(main)
