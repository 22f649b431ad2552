"""
Read the logs of runs and lay them side by side: the table, the finding, and the picture.

    python train.py --resume     # of a finished run: print its table, draw loss.png

The idea: everything that is said of a run is read from its log, out_dir/MODEL/log.jsonl,
so it can be said again. Two runs are compared only if nothing but the model differs.
"""
import json
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from common import commit, fail, machine_name, new_figure, write_whole
from model import accounting, parameters_by_kind

MODELS = {"moe": "MoE-only twin", "engram": "Engram", "large": "Engram, larger table"}

# Two runs may differ in these: they do not change what is computed, or what they lead to is
# compared itself (shape, rows, hashes of the data).
HARMLESS = ("resume", "model", "preset", "out_dir", "data_dir", "dataset", "device", "table",
            "compile", "batch_size", "eval_every", "large")


def describe(name, model, cfg, data):
    """Return the first line of a log: what one needs to understand and repeat the run."""
    # of the data: where it comes from, its sizes and hashes
    known = {k: v for k, v in data.meta.items() if k not in ("tokenizer", "args")}
    return {"command": shlex.join(["train.py", *sys.argv[1:]]), "model": name,
            "config": asdict(cfg), "shape": asdict(model.cfg),
            "accounting": accounting(model),
            "parameters_by_kind": parameters_by_kind(model),
            "data": known,
            "copyable_tokens": int(data.copyable.sum()), "passes": data.passes,
            "commit": commit(), "python": platform.python_version(),
            "torch": str(torch.__version__), "device": machine_name(cfg.device),
            "threads": torch.get_num_threads()}


def write_log(path, state):
    lines = [json.dumps(record) + "\n" for record in [state["header"], *state["records"]]]
    write_whole(path, lambda file: file.write("".join(lines).encode()))


def read_log(path):
    """Return the header and the records of a log; None where there are no records."""
    if not path.exists():
        return None
    try:
        header, *records = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        fail(f"{path} is not a readable log ({error}); write it again with --resume --model "
             f"{path.parent.name}")
    if not records:
        return None
    return header, records


def read_logs(out_dir):
    """Return {model: (header, records)} of the runs in out_dir."""
    logs = {name: read_log(Path(out_dir) / name / "log.jsonl") for name in MODELS}
    return {name: log for name, log in logs.items() if log}


def flat(shape):
    """Return the fields of a shape in one dict, those of its memory as engram_NAME."""
    fields = {key: value for key, value in shape.items() if key != "engram"}
    memory = shape["engram"] or {}
    return fields | {f"engram_{key}": value for key, value in memory.items()}


def differences(a, b, ignore=()):
    """Return what two dicts differ in, each as "name (value in a, value in b)"."""
    return [f"{key} ({a.get(key)}, {b.get(key)})" for key in {**a, **b}
            if key not in ignore and a.get(key) != b.get(key)]


def twin_differences(engram, moe):
    """Return what two runs (header, records) differ in, though twins must not."""
    known = []
    for header, records in (engram, moe):
        known.append({**header["config"], **header["shape"],
                      "data": header["data"]["train"]["sha256"],
                      "tokens": records[-1]["tokens"]})
    # they may differ in the memory, the number of experts, the width of the shared one
    ignore = (*HARMLESS, "engram", "n_expert", "shared_hidden")
    found = differences(*known, ignore)
    for key in ("P_tot", "P_act"):
        p, q = engram[0]["accounting"][key], moe[0]["accounting"][key]
        if abs(p / q - 1) > 0.01:
            found.append(f"{key} ({p:,}, {q:,})")
    return found


def crossing(records, target, key="val_loss"):
    """Return the tokens at which the loss of that name first reached target, linear
    between evaluations; None if it never did."""
    if records[0][key] <= target:
        return records[0]["tokens"]
    for before, after in zip(records[:-1], records[1:], strict=True):
        if after[key] <= target:
            share = (before[key] - target) / (before[key] - after[key])
            return before["tokens"] + share * (after["tokens"] - before["tokens"])
    return None


def compare(out_dir):
    """Return lines: a table of the runs in out_dir, and what memory was worth instead of
    experts, and more of it."""
    runs = read_logs(out_dir)
    columns = [("", "P_tot, all but the embedding", "P_act, used per token",
                "training tokens", "validation, nats per token",
                "validation, bits per byte")]
    for name, (header, records) in runs.items():
        last, size = records[-1], header["accounting"]
        columns.append((name, f"{size['P_tot']:,}", f"{size['P_act']:,}",
                        f"{last['tokens']:,}", f"{last['val_loss']:.4f}",
                        f"{last['val_bpb']:.4f}"))
    lines = []
    for title, *cells in zip(*columns, strict=True):
        lines.append(f"{title:30s}" + "".join(f"{cell:>12s}" for cell in cells))
    if "engram" not in runs or "moe" not in runs:
        return lines
    differ = twin_differences(runs["engram"], runs["moe"])
    if differ:
        return [*lines, f"these runs are not comparable: they differ in {', '.join(differ)}"]
    (header, engram), (_, moe) = runs["engram"], runs["moe"]
    target, loss = moe[-1]["val_loss"], engram[-1]["val_loss"]
    lines.append(f"Memory instead of experts, Engram minus its twin: {loss - target:+.4f} "
                 f"nats per token (n=1, seed {header['config']['seed']})")
    if "large" in runs and runs["large"][1][-1]["tokens"] == engram[-1]["tokens"]:
        more = runs["large"][1][-1]["val_loss"] - loss
        lines.append("More memory at the same compute, the larger table minus Engram: "
                     f"{more:+.4f}")
    reached = crossing(engram, target)
    if reached is None:
        lines.append("Engram did not reach its twin's final loss")
    elif len(engram) > 1:
        # of a single evaluation nothing can be said
        lines.append("Engram reached its twin's final loss after "
                     f"{reached / moe[-1]['tokens']:.0%} of the tokens")
    return lines


def plot(out_dir):
    """Draw out_dir/loss.png from the logs. Its title says the result so far."""
    figure = new_figure(figsize=(7, 4.5))
    axes = figure.subplots()
    losses, styles = {}, ("--", "-", "-.", ":")          # losses: {model: {step: loss}}
    for (name, (_, records)), style in zip(read_logs(out_dir).items(), styles, strict=False):
        losses[name] = {record["step"]: record["val_loss"] for record in records}
        axes.plot([record["tokens"] / 1e6 for record in records], list(losses[name].values()),
                  style, marker=".", label=MODELS[name])
    axes.set(xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
    axes.legend()
    # compare at the last step that all have
    step = max(set.intersection(*map(set, losses.values())), default=None)
    if step:
        at = {name: curve[step] for name, curve in losses.items()}
        title = ", ".join(f"{MODELS[name]} {loss:.3f}" for name, loss in at.items())
        if "engram" in at and "moe" in at:
            title = ("Memory instead of experts changes the loss by "
                     f"{at['engram'] - at['moe']:+.3f} nats")
            if "large" in at:
                title += f",\nmore memory at the same compute by {at['large'] - at['engram']:+.3f}"
        axes.set_title(f"{title} (step {step:,})", fontsize=10)
    path = Path(out_dir) / "loss.png"
    write_whole(path, lambda file: figure.savefig(file, dpi=120, format="png"))
