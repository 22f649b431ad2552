"""
Experiments of many runs: train what is missing, then a table and a figure. Optional reading.

    python sweep.py allocation --results mine    # how much to experts, how much to memory?
    python sweep.py controls --results mine --seeds 8 --arms token bigrams    # where undecided
    python sweep.py memory --plot                # from results/memory.json again, no training

The idea: a run is named by a hash of all that makes it (flags, seed, data, torch, machine), goes
through train.py as a user's would, and is kept under runs/. What one sweep has trained no other
trains again, and an interrupted one goes on where it was. After a change to the code delete runs/
and results/NAME.json (each run holds its commit).
"""
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import textwrap

import numpy as np
import torch

from prepare_data import Data, Offline, fail, load, lock, prepare, script, write_whole
from sample import crossing, device_name, interval, load_checkpoint, read_log, token_losses

HERE = Path(__file__).resolve().parent
TUNING_SEED, FIRST_SEED = 10, 11        # the first is for rates and trials, and for nothing else
LAPTOP = "--preset laptop --dtype bfloat16 --data_dir data"
# in-context copying forms within the 4.9M tokens of this sweep (LOG.md)
JUMP = LAPTOP.replace("bfloat16", "float32") + " --n_head 2 --eval_tokens 32768"
# small, so that experts should earn their keep (LOG.md: do they?); a BPE of 1,024 tokens
SMALL = ("--preset laptop --dtype float32 --data_dir data/v1024 --n_embd 64 --n_head 2 "
         "--n_expert 32 --expert_hidden 64 --shared_hidden 64 --tokens_per_step 1024 "
         "--batch_size 4 --eval_tokens 32768")
ENGRAM, MOE = "--model engram --rho 0.75", "--model moe"
BOTH = {"engram": (ENGRAM, "Engram"), "moe": (MOE, "MoE-only twin")}
ROWS = [2 ** k for k in (12, 14, 17, 20)]
# Routers of dropped experts are active parameters too: the shared expert's width at each rho pays
# for them, so that P_act is that of rho 1 (asserted, see say_allocation).
SHARED = {"0.9": 63, "0.75": 64, "0.5": 66, "0.25": 69, "0": 72}


def sweeps(steps=None):
    """-> {name: what it is}. arms: {name: (flags, title, and "off" or "shuffled" if it is a run of
    these flags evaluated once more, so)}; all are compared with the arm reference. say: its finding
    in a sentence; x: the abscissa, from a run's header; curve: draw this loss against tokens."""
    n = steps or 1500
    small, twins = dict(base=SMALL, steps=n), dict(
        base=LAPTOP, steps=steps or 1200, evaluations=8, reference="moe", say=say_twins,
        curve="val_loss")
    rates = dict(reference="moe 0.004", say=say_rates, first=TUNING_SEED, seeds=1, arms={
        f"{model} {lr}": (f"{flags} --lr {lr}", f"{title}, rate {lr}")
        for model, (flags, title) in BOTH.items() for lr in ("0.002", "0.004", "0.008")})
    more = {"": "", ", 4 x the tokens": f" --steps {4 * n}",
            ", a quarter of them 4 times": f" --train_tokens {n // 4 * 1024 + 1}"}
    arms = lambda *rows: {name: (ENGRAM + flags, *title) for name, flags, *title in rows}
    of_four = " --engram_orders 2 3 4 --engram_width 11"   # d_mem 132, of orders 2 and 3: 128
    return {
        "twins": dict(twins, arms={
            **BOTH, "fewer": (f"{MOE} --n_expert 6", "MoE-only, 3/4 of the experts"),
            "token": ("--model engram --engram_orders 1 --engram_heads 8",
                      "table addressed by the current token alone")}),
        "twins_rates": dict(rates, base=LAPTOP, steps=steps or 1200, evaluations=8),
        "twins_long": dict(twins, steps=steps or 4800, evaluations=16, seeds=1, arms=BOTH),
        "rates": dict(small, **rates),
        "experts": dict(small, reference="half", say=say_arms, arms={
            "half": (f"{MOE} --n_expert 16", "16 experts"), "moe": (MOE, "32 experts")}),
        "allocation": dict(small, reference="1", say=say_allocation, x=("rho", share), arms={
            "1": (MOE, "rho 1, MoE-only twin"),
            **{rho: (f"--model engram --rho {rho}" + f" --shared_hidden {wide}" * (wide != 64),
                     f"rho {rho}") for rho, wide in SHARED.items()}}),
        "controls": dict(small, reference="engram", say=say_arms, arms={
            **BOTH, **arms(
                ("one row", " --engram_rows 1", "one row per head (capacity 1)"),
                ("token", " --engram_orders 1 --engram_heads 8", "current token alone"),
                ("bigrams", " --engram_orders 2 --engram_heads 8", "2-grams only"),
                ("raw", " --no-engram_compress", "no compression"),
                ("ungated", " --engram_gate off", "no gate"),
                ("shuffled", "", "rows shuffled at inference", "shuffled"),
                ("off", "", "memory off at inference", "off"))}),
        "jump": dict(base=JUMP, steps=steps or 2400, evaluations=32, reference="moe",
                     say=say_jump, curve="copy_loss", arms=BOTH),
        "memory": dict(small, reference=f"{ROWS[0]}", say=say_memory, x=("rows per head", height),
                       arms=arms(*((f"{rows}", f" --engram_rows {rows}", f"{rows:,} rows per head")
                                   for rows in ROWS))),
        "parts": dict(small, reference="engram", say=say_arms, arms=arms(
            ("engram", "", "Engram"), ("conv", " --engram_conv_kernel 0", "no convolution"),
            ("plain", " --engram_gate plain", "plain gate (paper, eq. 4)"),
            ("4-grams", of_four, "2- to 4-grams"),
            ("stop", " --engram_stop_at_eot", "look-back stops at end of text"),
            ("rate 1", " --table_lr 1", "table rate x1"),
            ("rate 15", " --table_lr 15", "table rate x15"),
            ("v4.1", of_four + " --engram_conv_kernel 0 --engram_stop_at_eot --no-engram_bias",
             "DeepSeek-V4.1's variant"))),
        "placement": dict(small, reference="1", say=say_arms, arms=arms(*(
            (blocks, f" --engram_blocks {blocks}" * (blocks != "1"), f"in block {blocks}")
            for blocks in ("0", "1", "2", "3", "1 3", "0 1 2")))),
        "data": dict(small, reference="moe", say=say_data, arms={
            model + what: (flags + flag, title + what) for what, flag in more.items()
            for model, (flags, title) in BOTH.items()})}


def share(header):
    """rho as it was reached: the routed experts' part of P_sparse."""
    shape, count = header["shape"], header["parameters_by_kind"]
    idle = count["routed experts"] * (1 - shape["top_k"] / shape["n_expert"])
    return idle / header["accounting"]["P_sparse"]


def height(header):
    return header["shape"]["engram"]["rows"][0]


# ---- runs ---------------------------------------------------------------------------------------

def settle(kind, dataset):
    """-> what all runs of a sweep share, the data being prepared; it goes into their hashes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, vocab = kind["base"].split("--data_dir ")[1].split()[0], 4096
    if kind["base"] == SMALL:
        vocab = 1024
    if not (Path(folder) / dataset / "meta.json").exists():
        try:
            prepare(dataset, data_dir=folder, vocab_size=vocab)
        except Offline as error:
            fail(error)
    meta = load(dataset, folder)[0]
    if meta["vocab_size"] > vocab:
        fail(f"{folder}/{dataset} has {meta['vocab_size']} token ids, more than {vocab}: delete it")
    every = -(-kind["steps"] // kind.get("evaluations", 4))
    return {"flags": f"{kind['base']} --device {device} --dataset {dataset} --steps "
                     f"{kind['steps']} --eval_every {every}",
            "data": [meta[split]["sha256"] for split in ("train", "val")],
            "torch": str(torch.__version__), "device": device_name(device)}


def home(settings, flags, seed):
    """The folder of one run."""
    known = json.dumps([settings, flags, seed], sort_keys=True)
    return Path("runs") / hashlib.sha256(known.encode()).hexdigest()[:12]


def finished(settings, flags, seed, again=None):
    """-> the run as it stands in results/NAME.json, or None. again: evaluated once more, so."""
    out = home(settings, flags, seed)
    if not (run := read_log(out / flags.split()[1] / "log.jsonl")):
        return None
    header, records = run
    cfg = header["config"]
    if len(records) < -(-cfg["steps"] // cfg["eval_every"]) or records[-1]["step"] < cfg["steps"]:
        return None
    if again:
        if not (out / "after.json").exists():
            return None
        end, loss = records[-1], json.loads((out / "after.json").read_text())[again]
        records = [{**end, "val_loss": loss, "val_bpb": end["val_bpb"] * loss / end["val_loss"]}]
    return {"flags": flags, "seed": seed, "header": header, "records": records}


def run_one(settings, flags, seed):
    """Train one run, or finish it: one thread on a CPU. Then, with a memory, evaluate it anew."""
    out, model = home(settings, flags, seed), flags.split()[1]
    out.mkdir(parents=True, exist_ok=True)
    if not finished(settings, flags, seed):
        resume = ["--resume"] * (out / model / "ckpt.pt").exists()
        with open(out / "printed.txt", "w") as printed:
            done = subprocess.run(
                [sys.executable, HERE / "train.py", *settings["flags"].split(), *flags.split(),
                 "--seed", str(seed), "--out_dir", out, *resume], stdout=printed, stderr=printed,
                env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode in (130, -2):
            raise KeyboardInterrupt
        if done.returncode:
            fail(f"{flags} ended with exit code {done.returncode}: see {out}/printed.txt")
    if model == "engram" and not (out / "after.json").exists():
        write_whole(out / "after.json", lambda f: f.write(json.dumps(after(out)).encode()))


def after(out):
    """-> the loss of a finished run with its memory off, and with its rows shuffled within each
    head's own part of the table: right sizes and statistics, wrong addresses."""
    from train import Config, autocast
    saved, model = load_checkpoint(out / "engram" / "ckpt.pt")
    cfg = Config(**saved["header"]["config"])
    model.to(cfg.device)
    data = Data(cfg, model.cfg.block_size)
    loss = lambda memory: float(token_losses(model, data.val_x, data.val_y, cfg.batch_size,
                                             autocast(cfg), memory).double().mean())
    off, generator = loss(False), torch.Generator().manual_seed(0)
    for engram in model.engrams():
        for start, size in zip(engram.offsets.flatten().tolist(), engram.primes.flatten().tolist()):
            part = engram.table[start:start + size]
            part.copy_(part[torch.randperm(size, generator=generator).to(part.device)])
    return {"off": off, "shuffled": loss(True)}


def collect(path, name, settings, kind):
    """Write all runs of this sweep that are finished: those in the file, and those under runs/."""
    runs, first = {}, kind.get("first", FIRST_SEED)
    for run in read(path)["runs"] if path.exists() else []:
        if run["flags"] == kind["arms"].get(run["arm"], [None])[0]:
            runs[run["arm"], run["seed"]] = run
    for arm, (flags, _, *again) in kind["arms"].items():
        for seed in range(first, first + 64):
            if (arm, seed) not in runs and (run := finished(settings, flags, seed, *again)):
                runs[arm, seed] = {"arm": arm, **run}
    lines = ",\n".join(json.dumps(run) for run in runs.values())
    text = f'{{"name": "{name}", "settings": {json.dumps(settings)}, "runs": [\n{lines}\n]}}\n'
    write_whole(path, lambda file: file.write(text.encode()))
    return runs


def run_all(path, name, kind, args):
    from tqdm import tqdm
    settings = settle(kind, args.dataset)
    if path.exists() and (there := read(path)["settings"]) != settings:
        differ = [f"{k} {v} there, {settings[k]} here" for k, v in there.items()
                  if v != settings.get(k)]
        fail(f"{path} holds runs that are not like these ({'; '.join(differ)}): give --results "
             "another folder")
    if unknown := [arm for arm in args.arms or () if arm not in kind["arms"]]:
        fail(f"{name} has no arm {', '.join(unknown)}: choose from {', '.join(kind['arms'])}")
    have = collect(path, name, settings, kind)
    first = kind.get("first", FIRST_SEED)
    wanted = {kind["reference"], *(args.arms or kind["arms"])}
    todo = {(flags, seed): None            # a dict: an arm evaluated once more is one run
            for seed in range(first, first + (args.seeds or kind.get("seeds", 3)))
            for arm, (flags, *_) in kind["arms"].items()
            if arm in wanted and (arm, seed) not in have}
    workers = 1 if "--device cuda" in settings["flags"] else 2
    with lock(Path("runs")), ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(run_one, settings, *run) for run in todo]
        try:
            for job in tqdm(as_completed(jobs), name, len(jobs), unit="run", smoothing=0):
                job.result()
                collect(path, name, settings, kind)
        finally:
            pool.shutdown(cancel_futures=True)


def read(path):
    """-> the content of results/NAME.json."""
    try:
        saved = json.loads(path.read_text())
        [(run["flags"], run["records"][-1]["val_loss"]) for run in saved["runs"]]
        saved["settings"]["flags"]
        return saved
    except FileNotFoundError:
        fail(f"there is no {path}: run without --plot")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        fail(f"{path} is damaged ({type(error).__name__}: {error}); delete it, runs/ has the runs")


# ---- statistics ---------------------------------------------------------------------------------

def last(run, key="val_loss"):
    return run["records"][-1][key]


def gaps(runs, arm, other):
    """-> last loss of arm - that of other for each seed that both have."""
    return [last(run) - last(runs[other][seed]) for seed, run in runs[arm].items()
            if seed in runs.get(other, ())]


def verdict(values):
    """-> "-0.050 ± 0.020 (n=3), lower": the mean and its interval, and what it shows."""
    if len(values) < 2:
        return f"{values[0]:+.3f}, n=1" if values else "no pair"
    mean, half = interval(values)
    shows = "undecided" if abs(mean) <= half else "lower" if mean < 0 else "higher"
    return f"{mean:+.3f} ± {half:.3f} (n={len(values)}), {shows}"


def table(kind, runs):
    lines = ["| arm | P_tot | P_act | n | loss (sd) | minus the reference, paired, 95 % | "
             "bits per byte |", "|---|---|---|---|---|---|---|"]
    for arm, seeds in runs.items():
        losses = [last(run) for run in seeds.values()]
        count = next(iter(seeds.values()))["header"]["accounting"]
        sd = f" ({statistics.stdev(losses):.3f})" if len(losses) > 1 else ""
        against = "reference" if arm == kind["reference"] else \
            verdict(gaps(runs, arm, kind["reference"]))
        bpb = statistics.mean(last(run, "val_bpb") for run in seeds.values())
        lines.append(f"| {kind['arms'][arm][1]} | {count['P_tot']:,} | {count['P_act']:,} | "
                     f"{len(seeds)} | {statistics.mean(losses):.3f}{sd} | {against} | "
                     f"{bpb:.3f} |")
    return lines


# ---- what a sweep found, in one sentence --------------------------------------------------------

def say_arms(kind, runs):
    """Which arms the intervals part from the reference."""
    found = {arm: verdict(gaps(runs, arm, kind["reference"])) for arm in runs
             if arm != kind["reference"]}
    lists = {word: [arm for arm, text in found.items() if text.endswith(word)]
             for word in ("higher", "lower", "undecided", "n=1", "no pair")}
    return f"loss against that of {kind['arms'][kind['reference']][1]}: " + "; ".join(
        f"{word}: {', '.join(arms)}" for word, arms in lists.items() if arms)


def say_rates(kind, runs):
    mean = lambda arm: statistics.mean(map(last, runs[arm].values()))
    arms = [[arm for arm in runs if arm.startswith(model)] for model in BOTH]
    return f"lowest: {', '.join(min(of, key=mean) for of in arms if of)}"


def say_data(kind, runs):
    """Engram minus the twin that saw the same tokens."""
    return "Engram minus twin: " + "; ".join(
        f"{kind['arms'][arm][1][6:].strip(', ') or 'as always'}: "
        f"{verdict(gaps(runs, arm, arm.replace('engram', 'moe')))}"
        for arm in runs if arm.startswith("engram"))


def records_of(runs):
    """-> [(Engram's records, its twin's)] of the seeds that both have."""
    both = runs.get("engram", {}).keys() & runs.get("moe", {}).keys()
    return [(runs["engram"][seed]["records"], runs["moe"][seed]["records"])
            for seed in sorted(both)]


def say_twins(kind, runs):
    """Where Engram's curve passes the twin's last loss."""
    pairs = records_of(runs)
    at = [place[0] / twin[-1]["tokens"] for engram, twin in pairs
          if (place := crossing(engram, twin[-1]["val_loss"]))]
    return "not finished" if not pairs else (
        f"Engram minus twin {verdict(gaps(runs, 'engram', 'moe'))}; twin's loss reached in "
        f"{len(at)} of {len(pairs)}" + (f", at {statistics.mean(at):.0%} of the tokens" if at
                                       else ""))


def say_allocation(kind, runs):
    """The protocol's question: is rho 0.75 below both ends?"""
    if not all(arm in runs for arm in ("0", "0.75", "1")):
        return "not finished"
    counts = [next(iter(seeds.values()))["header"]["accounting"] for seeds in runs.values()]
    for key in ("P_tot", "P_act"):
        values = [count[key] for count in counts]
        assert max(values) <= 1.005 * min(values), f"{key} differs between arms: {values}"
    ends = [verdict(gaps(runs, "0.75", end)) for end in ("1", "0")]
    inside = all(end.endswith("lower") for end in ends)
    return (f"rho 0.75 minus rho 1: {ends[0]}; minus rho 0: {ends[1]}: "
            f"{'a' if inside else 'no'} minimum inside is shown")


def say_memory(kind, runs):
    """Slope of the loss against log2(rows), a line for each seed by least squares."""
    slopes = []
    for seed in next(iter(runs.values())):
        xy = [(height(r[seed]["header"]), last(r[seed])) for r in runs.values() if seed in r]
        if len(xy) > 2:
            slopes.append(slope(*zip(*xy)))
    return f"loss per doubling of the rows: {verdict(slopes)}"


def slope(rows, losses):
    """Of the least-squares line through (log2 rows, loss)."""
    return float(np.polyfit(np.log2(rows), losses, 1)[0])


def say_jump(kind, runs):
    """How many tokens until copyable tokens cost 1 nat less than at the first evaluation."""
    def jumped(records):
        at = crossing(records, records[0]["copy_loss"] - 1, "copy_loss")
        return at and at[0] / 1e6

    if not (pairs := records_of(runs)):
        return "not finished"
    ends = [[jumped(records) for records in pair] for pair in pairs]
    both = [engram - moe for engram, moe in ends if engram and moe]
    engram, moe = (", ".join(f"{at:.1f}" if at else "never" for at in one) for one in zip(*ends))
    return (f"copyable tokens a nat cheaper after, in M tokens: Engram {engram}; twin {moe}; both "
            f"in {len(both)} of {len(pairs)} pairs, difference {verdict(both)}; loss, Engram minus "
            f"twin {verdict(gaps(runs, 'engram', 'moe'))}")


# ---- pictures -----------------------------------------------------------------------------------

COLOURS = ("tab:blue", "tab:orange", "black", "tab:green")


def draw_curves(axes, kind, runs):
    """Validation loss against tokens: every seed thin, the mean bold."""
    key = kind["curve"]
    for (arm, seeds), colour, style in zip(runs.items(), COLOURS, ("-", "--", ":", "-.")):
        curves = [[record[key] for record in run["records"]] for run in seeds.values()]
        x = [record["tokens"] / 1e6 for record in next(iter(seeds.values()))["records"]]
        for curve in curves:
            axes.plot(x, curve, style, color=colour, lw=0.6, alpha=0.5)
        axes.plot(x, [statistics.mean(losses) for losses in zip(*curves)], style, color=colour,
                  lw=2.5, label=f"{kind['arms'][arm][1]} (n={len(seeds)})")
    what = {"val_loss": "validation loss", "copy_loss": "loss on tokens whose 2-gram is new in "
            "training\nbut repeats in the context"}[key]
    axes.set(xlabel="training tokens (millions)", ylabel=f"{what} (nats per token)")
    axes.legend()


def draw_arms(axes, kind, runs):
    """Loss minus the reference's of the same seed: every seed a dot, the mean with its interval;
    along x if the sweep has one, else a row an arm."""
    (name, of), arms = kind.get("x", ("", None)), [arm for arm in runs if arm != kind["reference"]]
    for i, arm in enumerate(runs if of else arms):
        if not (values := gaps(runs, arm, kind["reference"])):
            continue
        at = of(next(iter(runs[arm].values()))["header"]) if of else -i
        mean, half = interval(values)
        dots, bar = ([at] * len(values), values), (at, mean)
        if not of:
            dots, bar = dots[::-1], bar[::-1]
        axes.plot(*dots, "o", color="tab:orange", ms=4, zorder=3)
        axes.errorbar(*bar, **{"yerr" if of else "xerr": half}, fmt="s", color="tab:blue", ms=6,
                      mfc="none", capsize=4)
    lost = f"loss minus that of {kind['arms'][kind['reference']][1]}\n(nats per token, same seed)"
    if of:
        axes.set(xlabel=name, ylabel=lost, **{"xscale": "log"} if of is height else {})
        axes.axhline(0, color="black", lw=0.6)
    else:
        axes.set(xlabel=lost, yticks=range(0, -len(arms), -1))
        axes.set_yticklabels([f"{kind['arms'][arm][1]} (n={len(runs[arm])})" for arm in arms])
        axes.axvline(0, color="black", lw=0.6)


def draw(path, kind, runs, finding):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    (draw_curves if "curve" in kind else draw_arms)(axes, kind, runs)
    figure.suptitle("\n".join(textwrap.wrap(finding, 95)), fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def report(path, kind, reference=None):
    """Draw the figure beside path -> the lines of the Markdown table, and the finding. With another
    reference: the table alone."""
    saved = read(path)["runs"]
    runs = {arm: {r["seed"]: r for r in saved if r["arm"] == arm} for arm in kind["arms"]}
    runs = {arm: dict(sorted(seeds.items())) for arm, seeds in runs.items() if seeds}
    kind = {**kind, "reference": reference or kind["reference"]}
    if kind["reference"] not in runs or len(runs) < 2:
        fail(f"{path} has no finished pair of {kind['reference']} and another arm: it has "
             f"{', '.join(runs) or 'none'}")
    if any(record.get(kind.get("curve", "val_loss")) is None for run in saved
           for record in run["records"]):
        fail(f"{path}: no {kind['curve']}, as no token is copyable: more --eval_tokens are needed")
    lines = table(kind, runs)
    if reference:
        return lines
    finding = kind["say"](kind, runs)
    draw(path, kind, runs, finding)
    return [*lines, "", finding, f"picture: {path.with_suffix('.png')}"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", help=", ".join(sweeps()))
    add("--seeds", type=int, help="per arm (default: 3, of rates 1)")
    add("--arms", nargs="+", help="train these alone, and the reference (default: all)")
    add("--steps", type=int, help="per run (default: the sweep's own)")
    add("--dataset", default="python", help="prepared if need be (default: %(default)s)")
    add("--results", default="results", help="where NAME.json and NAME.png go (default: "
        "%(default)s)")
    add("--reference", help="compare with this arm: the table alone (default: the sweep's own)")
    add("--plot", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    kinds = sweeps(args.steps)
    if args.name not in kinds:
        fail(f"there is no sweep {args.name}: choose from {', '.join(kinds)}")
    for name, low, high in (("seeds", 1, 64), ("steps", 8, 1e9)):
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            fail(f"--{name} {getattr(args, name)}: must be from {low} to {high:g}")
    kind, folder = kinds[args.name], Path(args.results)
    path = folder / f"{args.name}.json"
    if not args.plot:
        with lock(folder):
            run_all(path, args.name, kind, args)
    print(*report(path, kind, args.reference), sep="\n")


if __name__ == "__main__":
    script(main)
