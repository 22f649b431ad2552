"""
Experiments of many runs: train what is missing, then a table and a figure. Optional reading.

    python sweep.py twins            # 2 hours on 2 cores; interrupted, it goes on where it was
    python sweep.py twins --plot     # table and figure again from results/twins/, no training

The idea: a run is named by what it is, goes through train.py as a user's would, and leaves its log
under results/. A run whose log is there is never run again.
"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import argparse
import os
import shutil
import statistics
import subprocess
import sys

from prepare_data import fail, prepare, script
from sample import crossing, read_log

HERE = Path(__file__).resolve().parent
RATES, TUNING_SEED, SEEDS = (0.002, 0.004, 0.008), 10, (11, 12, 13, 14, 15)
ARMS = {  # the fair result and its controls: name -> flags, whose rate it takes, what it is
    "engram": ("--model engram", "engram", "Engram"),
    "moe": ("--model moe", "moe", "MoE-only twin"),
    "fewer": ("--model moe --n_expert 6", "moe", "MoE-only, 3/4 of the experts"),
    "token": ("--model engram --engram_orders 1 --engram_heads 8", "engram",
              "table addressed by the current token alone")}
SAME = "--preset laptop --device cpu --dtype bfloat16 --dataset python"
LONG = "--steps 4800 --eval_every 300"
# 97.5th percentile of Student's t by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values):
    """-> mean of the values and half the width of its 95 % interval (t)."""
    half = T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


# ---- runs ---------------------------------------------------------------------------------------

def name_of(arm, rate, seed, long):
    return f"{arm}{'_long' * long}_lr{rate:g}_seed{seed}"


def log_of(folder, arm, rate, seed, long=False):
    """-> (header, records) of a finished run, or None."""
    path = folder / f"{name_of(arm, rate, seed, long)}.jsonl"
    if not (run := read_log(path)):
        return None
    cfg = run[0]["config"]
    if (run[0]["model"], cfg["lr"], cfg["seed"]) != (ARMS[arm][0].split()[1], rate, seed):
        fail(f"{path} is the log of another run: {run[0].get('command')}; delete it")
    whole = len(run[1]) == -(-cfg["steps"] // cfg["eval_every"])
    return run if whole and run[1][-1]["step"] == cfg["steps"] else None


def check_alike(folder):
    """Runs of other data, another torch or another machine do not belong in one table."""
    kinds = {}
    for path in sorted(folder.glob("*.jsonl")):
        if not (run := read_log(path)):
            continue
        header, cfg = run[0], run[0]["config"]
        kind = {k: cfg.get(k) for k in ("preset", "dtype", "tokens_per_step", "table_lr")}
        kind.update({k: header.get(k) for k in ("torch", "device", "threads")},
                    **{k: header["data"].get(k, {}).get("sha256") for k in ("train", "val")})
        kinds.setdefault(str(kind), path.name)
    if len(kinds) > 1:
        fail(f"{' and '.join(kinds.values())} are not alike: {' and '.join(kinds)}; begin anew in "
             "another folder (--results)")


def run(folder, arm, rate, seed, long=False):
    """Train one run, or finish it, unless it is there: one thread on a CPU."""
    if log_of(folder, arm, rate, seed, long):
        return
    flags = f"{ARMS[arm][0]} --lr {rate:g} --seed {seed} {SAME} {LONG * long}".split()
    name = name_of(arm, rate, seed, long)
    out, model = Path("runs") / name, flags[1]
    resume = ["--resume"] * (out / model / "ckpt.pt").exists()
    out.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.txt", "w") as printed:
        done = subprocess.run(
            [sys.executable, HERE / "train.py", *flags, "--out_dir", out, *resume], stdout=printed,
            stderr=printed, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode in (130, -2):
        raise KeyboardInterrupt
    if done.returncode:
        fail(f"{name} ended with exit code {done.returncode}: see {out}.txt")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(out / model / "log.jsonl", folder / f"{name}.jsonl")
    print(f"{name}: {log_of(folder, arm, rate, seed, long)[1][-1]['val_loss']:.4f}", flush=True)


def run_twins(folder):
    if not Path("data/python/meta.json").exists():
        prepare("python")                  # once, before two runs would
    with ThreadPoolExecutor(2) as pool:
        each = lambda runs: list(pool.map(lambda r: run(folder, *r), runs))
        each([(arm, rate, TUNING_SEED) for rate in RATES for arm in ("engram", "moe")])
        best = best_rates(folder)
        each([(arm, best[arm], seed) for seed in SEEDS for arm in ("engram", "moe")])
        each([(arm, best[ARMS[arm][1]], seed) for seed in SEEDS for arm in ("fewer", "token")])
        each([(arm, best[arm], SEEDS[0], True) for arm in ("engram", "moe")])


# ---- from the logs ------------------------------------------------------------------------------

def best_rates(folder):
    """-> {model: its best rate on the tuning seed}. An end of the range is not taken on trust."""
    best = {}
    for arm in ("engram", "moe"):
        runs = {rate: log_of(folder, arm, rate, TUNING_SEED) for rate in RATES}
        if missing := [rate for rate, r in runs.items() if not r]:
            fail(f"no finished log of {arm} at the rates {missing} in {folder}; run without --plot")
        best[arm] = min(RATES, key=lambda rate: runs[rate][1][-1]["val_loss"])
        if best[arm] in (RATES[0], RATES[-1]):
            fail(f"the best rate of {arm} is {best[arm]:g}, an end of {RATES}: try one beyond it")
    return best


def twins(folder, picture):
    """Draw the curves -> the table's lines, in Markdown, and what belongs to it."""
    check_alike(folder)
    best = best_rates(folder)
    runs = {arm: {seed: r for seed in SEEDS if (r := log_of(folder, arm, best[ARMS[arm][1]], seed))}
            for arm in ARMS}
    if len(runs["engram"]) < 2 or runs["engram"].keys() != runs["moe"].keys():
        fail(f"{folder} needs both twins of the same seeds, at least two; run without --plot")
    shares = []
    for (_, a), (_, b) in zip(runs["engram"].values(), runs["moe"].values()):
        if at := crossing(a, b[-1]["val_loss"]):
            shares.append([at[0] / b[-1]["tokens"], at[1] / b[-1]["seconds"]])
    draw(runs, shares, picture)
    return [*table(runs), "", *remarks(runs, shares), *tuning(folder), *long_run(folder, best)]


def last(runs, arm, key="val_loss", seeds=None):
    """-> the final value of each seed."""
    return [runs[arm][seed][1][-1][key] for seed in seeds or runs[arm]]


def paired(runs, arm, other):
    """-> mean and half width of the interval of arm - other over the seeds that both have, n."""
    seeds = [s for s in runs[arm] if s in runs[other]]
    gaps = [a - b for a, b in zip(*(last(runs, x, seeds=seeds) for x in (arm, other)))]
    return (*interval(gaps), len(gaps)) if len(gaps) > 1 else None


def table(runs):
    lines = ["| model | P_tot | P_act | seeds | loss (sd) | minus the twin's, paired, 95 % | "
             "bits per byte |", "|---|---|---|---|---|---|---|"]
    for arm, (_, _, title) in ARMS.items():
        if not (gap := paired(runs, arm, "moe")):
            continue
        count, losses = next(iter(runs[arm].values()))[0]["accounting"], last(runs, arm)
        against = "-" if arm == "moe" else f"{gap[0]:+.3f} ± {gap[1]:.3f}"
        mean, sd = statistics.mean(losses), statistics.stdev(losses)
        bpb = statistics.mean(last(runs, arm, "val_bpb"))
        lines.append(f"| {title} | {count['P_tot']:,} | {count['P_act']:,} | {gap[2]} | {mean:.3f} "
                     f"({sd:.3f}) | {against} | {bpb:.3f} |")
    return lines


def remarks(runs, shares):
    reached = f"Twin's final loss reached in {len(shares)} of {len(runs['moe'])} pairs"
    if shares:
        tokens, clock = ([f"{f(x):.0%}" for f in (statistics.mean, min, max)] for x in zip(*shares))
        reached += (f", at {tokens[0]} of the tokens ({tokens[1]} to {tokens[2]}) and {clock[0]} "
                    f"of the training time ({clock[1]} to {clock[2]})")
    ends = lambda values: tuple(f(values) for f in (min, max))
    both = ("engram", "moe")
    lines = [reached + ".", "Final losses: Engram {:.2f} to {:.2f}, twin {:.2f} to {:.2f}.".format(
        *(v for arm in both for v in ends(last(runs, arm))))]
    if gap := paired(runs, "engram", "token"):
        lines.append(f"Engram minus the {ARMS['token'][2]}, {gap[2]} pairs: {gap[0]:+.3f} ± "
                     f"{gap[1]:.3f} nats.")
    lines.append("Peak memory of the process: {:.1f} to {:.1f} GB.".format(
        *ends([b / 1e9 for arm in runs for b in last(runs, arm, "peak_bytes")])))
    if None not in last(runs, "engram", "copy_loss") + last(runs, "moe", "copy_loss"):
        lines.append("Loss at the end on copyable tokens (`copy_loss`, on {:,} to {:,}): Engram "
                     "{:.1f} to {:.1f}, twin {:.1f} to {:.1f}.".format(
                         *ends([header["copyable_tokens"] for header, _ in runs["moe"].values()]),
                         *(v for arm in both for v in ends(last(runs, arm, "copy_loss")))))
    return lines


def tuning(folder):
    for arm in ("engram", "moe"):
        tried = {rate: log_of(folder, arm, rate, TUNING_SEED)[1][-1]["val_loss"] for rate in RATES}
        yield (f"Learning rates tried, {ARMS[arm][2]}, seed {TUNING_SEED}: "
               + ", ".join(f"{rate:g} {loss:.3f}" for rate, loss in tried.items()) + ".")


def long_run(folder, best):
    runs = [log_of(folder, arm, best[arm], SEEDS[0], long=True) for arm in ("engram", "moe")]
    if all(runs):
        a, b = (records[-1] for _, records in runs)
        at = crossing(runs[0][1], b["val_loss"])
        reached = f"at {at[0] / b['tokens']:.0%} of the tokens" if at else "never"
        yield (f"At {a['tokens'] / 1e6:.1f}M tokens (n=1, seed {SEEDS[0]}): {a['val_loss']:.3f} "
               f"and {b['val_loss']:.3f}, {a['val_loss'] - b['val_loss']:+.3f}, twin's loss "
               f"reached {reached}; copy_loss " + " and ".join(
                   "none" if r["copy_loss"] is None else f"{r['copy_loss']:.1f}"
                   for r in (a, b))
               + f", on {runs[0][0]['copyable_tokens']:,} tokens.")


def draw(runs, shares, picture):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    means = {}
    for arm, colour, style in (("engram", "tab:blue", "-"), ("moe", "tab:orange", "--"),
                               ("token", "black", ":")):
        if not runs[arm]:
            continue
        curves = [[r["val_loss"] for r in records] for _, records in runs[arm].values()]
        x = [r["tokens"] / 1e6 for r in next(iter(runs[arm].values()))[1]]
        for curve in curves if arm != "token" else []:
            axes.plot(x, curve, style, color=colour, lw=0.6, alpha=0.5)
        means[arm] = [statistics.mean(losses) for losses in zip(*curves)]
        axes.plot(x, means[arm], style, color=colour, lw=1.5 if arm == "token" else 2.5,
                  label=ARMS[arm][2])
    if len(shares) == len(runs["moe"]):
        share, y = statistics.mean(s[0] for s in shares), means["moe"][-1]
        axes.annotate("", (share * x[-1], y), (x[-1], y), arrowprops=dict(arrowstyle="->", lw=1.5))
        axes.text(share * x[-1] - 0.03, y - 0.05, f"same loss at {share:.0%}\nof the tokens",
                  ha="right", va="top")
    n = len(runs["engram"])
    axes.set(xlabel="training tokens (millions)", ylabel="validation loss (nats per token)",
             title=f"Python source, 2M parameters, equal compute: {n} seeds thin, mean bold",
             ylim=(min(means["engram"]) - 0.15, means["moe"][1]))
    axes.legend()
    figure.savefig(picture, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("twins",), help="twins: the fair result")
    parser.add_argument("--plot", action="store_true", help="train nothing")
    parser.add_argument("--results", default="results", help="where logs, table and figure go "
                        "(default: %(default)s)")
    args = parser.parse_args(argv)
    folder = Path(args.results) / args.name
    if not args.plot:
        run_twins(folder)
    lines = twins(folder, f"{folder}.png")
    Path(f"{folder}.md").write_text("\n".join(lines) + "\n")
    print(*lines, f"picture: {folder}.png", sep="\n")


if __name__ == "__main__":
    script(main)
