"""
Look at what train.py made: text, what the memory does to it, and the twins side by side.

    python sample.py --prompt "def main("                  # the Engram model of out/
    python sample.py --prompt "def main(" --memory         # shaded by the nats the memory saved
    python sample.py --prompt "import os" --max_new_tokens 0 --gates --png gates.png
    python sample.py --compare                             # table and loss.png again, from the logs

The idea: cached decoding. Each token is computed once; keys, values, the last n-gram and the
convolution's tail are carried on (model.Cache).
"""
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
import argparse
import codecs
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
import zipfile

import numpy as np
import torch
import torch.nn.functional as F

from engram import lookup, place
from model import GPT, Cache, GPTConfig
from prepare_data import Offline, encoding, fail, script


def load_checkpoint(path, new=torch.empty):
    """-> what train.py saved at path, and the model with its weights, on the CPU. new: makes the
    tables that are copied into; None: they stay in the file. With new not torch.empty, the file is
    mapped, not read (but once for its checksums): do not write to it while that lasts."""
    try:
        if damaged := zipfile.ZipFile(path).testzip():
            raise ValueError(f"{damaged} has another checksum")
        saved = torch.load(path, "cpu", mmap=new is not torch.empty, weights_only=True)
        model = GPT(GPTConfig(**saved["shape"]), saved["model"]["canonical"],
                    new or partial(torch.empty, device="meta"))          # no table is made
        if any(p.dtype != saved["model"][name].dtype for name, p in model.state_dict().items()):
            raise ValueError("its numbers are of another type")
        model.load_state_dict(saved["model"], assign=not new)
        saved["run"], saved["records"][-1], saved["tokenizer"]                    # all there?
        if (name := saved["header"]["model"]) != path.parent.name:
            raise ValueError(f"it holds a model {name}")
        return saved, model
    except FileNotFoundError:
        there = [p.parent.name for p in sorted(path.parent.parent.glob("*/ckpt.pt"))]
        fail(f"no checkpoint at {path}; " + (f"there is one of: {', '.join(there)} (--model)"
                                             if there else "train first: python train.py"))
    except Exception as error:      # torch, pickle and zipfile raise many kinds for a damaged file
        if "allocate memory" in str(error):
            raise
        fail(f"{path} is not a readable checkpoint of train.py ({type(error).__name__}: "
             f"{' '.join(str(error).split()):.150}); restore it, or use another --out_dir")


# ---- text ---------------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=0.8, top_k=50, top_p=1.0, generator=None,
             memory=True):
    """Continue idx [1, T], up to the end of the context; yields each token id as soon as it is
    known. temperature 0 takes the likeliest; top_p keeps the likeliest that together have it."""
    cache = Cache(model.cfg)
    reads = model.read(idx, cache) if memory else []
    for _ in range(min(max_new_tokens, model.cfg.block_size - idx.size(1))):
        logits = model(idx, reads=reads, cache=cache)[0][:, -1].float()
        if temperature < 1e-3:
            idx = logits.argmax(-1, keepdim=True)
        else:
            logits, ids = logits.topk(min(top_k, logits.size(-1)))               # sorted
            probs = (logits / temperature).softmax(-1)
            probs[probs.cumsum(-1) - probs >= top_p] = 0                         # the first stays
            idx = ids.gather(-1, torch.multinomial(probs, 1, generator=generator))
        reads = model.read(idx, cache) if memory else []     # under way while the caller prints
        yield idx.item()


def complete(model, enc, ids, seed=0, **how):
    """Yield (token, text) that continue ids (an end of text and a prompt); an end of text is the
    last. Bytes that are not yet a whole character wait for the rest of it."""
    model.eval()
    device = model.embed.weight.device
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    generator = torch.Generator(device).manual_seed(seed)
    for token in generate(model, torch.tensor([ids], device=device), generator=generator, **how):
        if token == enc.eot_token:
            yield token, ""
            return
        yield token, decoder.decode(enc.decode_single_token_bytes(token))


# ---- what the memory does -----------------------------------------------------------------------

@torch.no_grad()
def token_losses(model, x, y, batch_size, autocast, memory=True):
    """x, y [n, T] -> nats for each token [n, T], fp32, on the CPU; with the memory or without."""
    training = model.training
    model.eval()
    device, losses = model.embed.weight.device, []
    for x, y in zip(torch.as_tensor(x).split(batch_size), torch.as_tensor(y).split(batch_size)):
        with autocast:
            logits = model(x.to(device), reads=None if memory else [])[0].float().flatten(0, 1)
        nats = F.cross_entropy(logits, y.to(device).flatten(), reduction="none")
        losses.append(nats.view(y.shape).cpu())
    model.train(training)
    return torch.cat(losses)


@contextmanager
def watch(model):
    """-> per memory layer a list that grows with each forward pass by (alpha [B, T], |what the
    memory adds| / |h|)."""
    def look(log, engram, args, out):
        h, read = args[:2]
        log.append((engram.gate(h, lookup(read)).float().squeeze(-1), out.norm() / h.norm()))

    seen = [[] for _ in model.engrams()]
    hooks = [engram.register_forward_hook(partial(look, log))
             for engram, log in zip(model.engrams(), seen)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def evaluate(model, tables, data, batch_size, autocast):
    """-> losses on the validation set, the same tokens every time, and per memory layer signs that
    it is alive: mean, spread and percentiles of the gate, |what it adds| / |h|, share of the
    table's rows that training (tables: RowAdam) has touched. Nothing touches the training RNG."""
    with watch(model) as seen:
        losses = token_losses(model, data.val_x, data.val_y, batch_size, autocast)
    record = data.score(losses.double().numpy())
    for layer, state in zip(seen, tables.state, strict=True):
        gate, added = torch.cat([g.flatten() for g, _ in layer]), [a for _, a in layer]
        low, high = np.percentile(gate.cpu(), (5, 95))
        for name, value in (("gate_mean", gate.mean()), ("gate_std", gate.std()), ("gate_p5", low),
                            ("gate_p95", high), ("out_over_h", sum(added) / len(added)),
                            ("rows_touched", (state["visits"] > 0).float().mean())):
            record.setdefault(name, []).append(float(value))
    return record


def peak_bytes(device):
    """Most memory held so far: on the GPU by its tensors, on a CPU by the process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else \
        f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, " \
        f"{os.cpu_count()} cores"


def spans_of(enc, ids, values):
    """-> [(text of a token, its value)]. A token that is a part of a character shows its bytes."""
    return [(enc.decode_single_token_bytes(i).decode("utf-8", "backslashreplace"), float(v))
            for i, v in zip(ids, values)]


def has_colours():
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def tint(level):
    """level -1 to 1 -> (r, g, b): white at 0, blue for more, orange (lighter in grey) for less."""
    end = (80, 150, 255) if level > 0 else (255, 190, 110)
    return tuple(round(255 + (e - 255) * min(1, abs(level))) for e in end)


def shaded(spans, low, high, colour):
    """-> one string: tokens on a background by (value - low) / (high - low), or, without colour,
    followed by their values."""
    out = []
    for text, value in spans:
        head, line, tail = text.rpartition("\n")
        head = head.replace("\n", "↵\n") + "↵" * len(line)
        if colour:
            on = "\x1b[38;2;0;0;0;48;2;{};{};{}m".format(*tint((value - low) / (high - low)))
            out.append(f"{on}{head}\x1b[0m{line}{on}{tail}\x1b[0m")
        else:
            out.append(f"{head}[{value:+.2f}]{line}{tail}" if line else f"{tail}[{value:+.2f}]")
    return "".join(out)


def grid(spans, columns, row=0):
    """-> [(row, column, character, value)] of the text, in lines of at most columns."""
    cells, column = [], 0
    for text, value in spans:
        for c in text.replace("\t", "    ").replace("\n", "↵\n"):
            if c == "\n" or column == columns:
                row, column = row + 1, 0
            if c != "\n":
                cells.append((row, column, c, value))
                column += 1
    return cells


def paint(axes, cells, low, high, size):
    """Each character on its background, in axes whose units are columns and rows."""
    from matplotlib.patches import Rectangle
    axes.axis("off")
    for row, column, c, value in cells:
        face = [v / 255 for v in tint((value - low) / (high - low))]
        axes.add_patch(Rectangle((column, row - 0.5), 1, 1, facecolor=face, linewidth=0))
        axes.text(column, row, c, family="monospace", fontsize=size, va="center", parse_math=False)


def draw(spans, low, high, title, path, columns=90, size=9):
    """The same as a picture: a grid of characters, each token on its background."""
    from matplotlib.figure import Figure
    columns = max(len(title), min(columns, max(len(t) for t in
                                               "".join(t for t, _ in spans).split("\n")) + 1))
    cells = grid(spans, columns, 2)
    # a character of the monospaced font is 0.602 of its size wide; lines are 1.5 apart
    rows = cells[-1][0] + 1.5
    figure = Figure(figsize=((columns + 2) * 0.602 * size / 72, rows * 1.5 * size / 72))
    axes = figure.add_axes([0, 0, 1, 1], xlim=(-1, columns + 1), ylim=(rows, 0))
    axes.text(0, 0.8, title, family="monospace", fontsize=size, va="center", parse_math=False)
    paint(axes, cells, low, high, size)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        fail(f"{path} could not be written: {error.strerror}")


FULL = 2.0         # nats saved at which a token is fully shaded


def show(args, saved, model, enc, ids, n_prompt):
    """The text once more, shaded as --memory or --gates ask; as a picture with --png."""
    colour = has_colours()
    if args.memory:
        xy = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
        on, off = (token_losses(model, *xy, 1, nullcontext(), m)[0] for m in (True, False))
        gain = off - on
        low, high, title = 0, FULL, (f"nats that the memory saved on each token (off minus on): "
                                     f"white 0, blue {FULL:g} or more, orange lost")
        spans = spans_of(enc, ids[1:], gain)
        parts = (("prompt", slice(n_prompt)), ("what it wrote", slice(n_prompt, None)))
        lines = [f"{name}: {len(on[part])} tokens, {on[part].mean():.3f} nats per token with the "
                 f"memory, {off[part].mean():.3f} without: {gain[part].sum():+.2f} saved"
                 for name, part in parts if len(on[part])]
    else:
        with torch.no_grad(), watch(model) as seen:
            model(torch.tensor([ids]))
        record = saved["records"][-1]
        low, high = (sum(record[k]) / len(seen) for k in ("gate_p5", "gate_p95"))
        title = (f"gate, mean of memory layers: white {low:.2f}, blue {high:.2f} (5th and 95th "
                 "percentile on validation), orange less")
        lines = ["the gate hardly moves: shades show small differences"] * (high - low < 0.05)
        spans = spans_of(enc, ids[1:], sum(layer[0][0][0] for layer in seen)[1:] / len(seen))
        high = max(high, low + 1e-3)
    print(shaded(spans, low, high, colour), title, *lines, sep="\n")
    if args.png:
        draw(spans, low, high, title, args.png)
        print(f"picture: {args.png}")


# ---- the end of a run ---------------------------------------------------------------------------

BUCKETS = ((0, "never"), (1, "1-9"), (10, "10-99"), (100, "100-999"), (1000, "1,000 or more"))


def report(models, data, batch_size, autocast):
    """-> lines: what the memory did for models["engram"], beside models["moe"] if that is there.
    data: prepare_data.Data, whose seen [n, T] says how often training saw each token's 2-gram."""
    enc, x, y = encoding(data.meta["tokenizer"]), data.val_x, data.val_y
    if "engram" not in models:
        (name, model), = models.items()
        return ["", f"A sample of {name}:", "".join(
            text for _, text in complete(model, enc, [enc.eot_token], max_new_tokens=100))]
    colour = has_colours()
    model = models["engram"]
    on = token_losses(model, x, y, batch_size, autocast)
    arms = {"off - on": token_losses(model, x, y, batch_size, autocast, memory=False)}
    if "moe" in models:
        arms["moe - engram"] = token_losses(models["moe"], x, y, batch_size, autocast)
    loss, off = on.mean(), arms["off - on"].mean()
    lines = ["", f"Memory switched off, same weights: {loss:.4f} -> {off:.4f} nats "
             f"({off - loss:+.4f}; not its worth, as the rest was trained with it)",
             f"{'2-gram seen in training':24s}{'tokens':>8s}{'engram':>9s}"
             + "".join(f"{name:>14s}" for name in arms)]
    ends = [low for low, _ in BUCKETS[1:]] + [math.inf]
    for (low, name), end in zip(BUCKETS, ends):
        here = torch.from_numpy((data.seen >= low) & (data.seen < end))
        if here.any():
            lines.append(f"{name:>24s}{here.float().mean():8.1%}{on[here].mean():9.3f}" + "".join(
                f"{(arm - on)[here].mean():+14.3f}" for arm in arms.values()))
    spans = spans_of(enc, y[0, :40].tolist(), (arms["off - on"] - on)[0])
    how = "shaded by" if colour else "followed by"
    lines += ["", f"Validation text, each token {how} the nats the memory saved on it"
              + f" (blue: {FULL:g} or more, orange: lost)" * colour + ":",
              shaded(spans, 0, FULL, colour)]
    ids = x[0, :13].tolist()
    for memory in (True, False):
        text = "".join(t for _, t in complete(model, enc, ids, max_new_tokens=50, memory=memory))
        lines += ["", f"Its first 12 tokens continued, memory {'on' if memory else 'off'}:",
                  enc.decode(ids[1:]) + text]
    return lines


# 97.5th percentile of Student's t by degrees of freedom, from 1 on
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131)


def interval(values):
    """-> mean of the values and half the width of its 95 % interval (t); of one value, nan."""
    if len(values) < 2:
        return values[0], math.nan
    t = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]         # beyond the table: a little wide
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


# ---- the twins, from their logs alone -----------------------------------------------------------

def read_log(path):
    """-> header, records (at least one) of a run's log; None where there is none yet."""
    try:
        lines = [json.loads(line) for line in open(path)] if path.exists() else []
        if len(lines) < 2:
            return None
        header, *records = lines
        header["model"], header["shape"], header["config"]["seed"], header["data"]["train"]
        keys = "step tokens seconds val_loss val_bpb peak_bytes".split()
        numbers = [header["accounting"][k] for k in ("P_tot", "P_act")] + [
            header["config"][k] for k in ("lr", "steps", "eval_every")] + [
            record[k] for record in records for k in keys]
        if not all(0 < n < math.inf for n in numbers):
            raise ValueError("numbers that no run has")
        return header, records
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} is not a readable log ({type(error).__name__}: {error}); delete it, and "
             "--resume of its run writes it anew")


def read_logs(out_dir):
    """-> {model: (header, records)} of the runs in out_dir that have a record."""
    runs = {}
    for name in ("engram", "moe", "dense"):
        path = Path(out_dir) / name / "log.jsonl"
        if run := read_log(path):
            runs[name] = run
            if run[0]["model"] != name:
                fail(f"{path} is the log of a model {run[0]['model']}; --resume writes it anew")
    if not runs:
        fail(f"no log in {out_dir}; train first: python train.py")
    return runs


def crossing(records, target, key="val_loss"):
    """-> (tokens, seconds) at which the loss of that name first reached target, linear between
    evaluations; None if it never did."""
    for before, after in zip([None, *records], records):
        if after[key] <= target:
            if before is None:
                return after["tokens"], after["seconds"]
            share = (before[key] - target) / (before[key] - after[key])
            return tuple(before[k] + share * (after[k] - before[k]) for k in ("tokens", "seconds"))


def compare(out_dir):
    """-> lines: a table of the runs in out_dir, and what the memory was worth."""
    runs = read_logs(out_dir)
    titles = ("", "P_tot, all but the embedding", "P_act, used per token", "tokens/s, training",
              "validation, nats per token", "validation, bits per byte")
    columns = [(name, f"{h['accounting']['P_tot']:,}", f"{h['accounting']['P_act']:,}",
                f"{r[-1]['tokens'] / r[-1]['seconds']:,.0f}", f"{r[-1]['val_loss']:.4f}",
                f"{r[-1]['val_bpb']:.4f}") for name, (h, r) in runs.items()]
    lines = [""] + [f"{row[0]:30s}" + "".join(f"{c:>12s}" for c in row[1:])
                    for row in zip(titles, *columns)]
    if "engram" in runs and "moe" in runs:
        (ha, a), (hb, b) = runs["engram"], runs["moe"]
        free = "resume model out_dir data_dir dataset preset engram n_expert shared_hidden".split()
        same = lambda h, r: {k: v for k, v in {
            **h["config"], **h["shape"], "data": h["data"]["train"], "tokens": r[-1]["tokens"],
            }.items() if k not in free}
        x, y = same(ha, a), same(hb, b)
        for key in ("P_tot", "P_act"):
            p, q = ha["accounting"][key], hb["accounting"][key]
            if abs(p / q - 1) > 0.01:
                x[key], y[key] = p, q
        if differ := [f"{k} ({v}, {y.get(k)})" for k, v in x.items() if v != y.get(k)]:
            return lines + [f"these are no twins: they differ in {', '.join(differ)}"]
        gap, at = a[-1]["val_loss"] - b[-1]["val_loss"], crossing(a, b[-1]["val_loss"])
        lines.append(f"difference {gap:+.4f} nats per token (engram - moe; n=1, seed {x['seed']})")
        lines.append("engram did not reach the twin's final loss" if at is None else
                     f"engram passed the twin's final loss at {at[0] / b[-1]['tokens']:.0%} of the "
                     f"tokens and {at[1] / b[-1]['seconds']:.0%} of the training time")
    return lines


def plot(out_dir):
    """Write out_dir/loss.png."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for (name, (_, records)), style in zip(read_logs(out_dir).items(), ("-", "--", ":")):
        axes.plot(*zip(*((r["tokens"], r["val_loss"]) for r in records)), style, label=name)
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    axes.legend()
    try:
        figure.savefig(Path(out_dir) / "loss.png", dpi=120)
    except OSError as error:
        fail(f"{out_dir}/loss.png could not be written: {error.strerror}")


def write(args, model, enc, start, seed):
    """Print one sample as it is made -> its ids, those of start (the prompt) included."""
    ids, began = list(start), time.perf_counter()
    print("-" * 20 + "\n" if seed > args.seed else "", args.prompt or "", sep="", end="")
    for token, text in complete(model, enc, ids, seed, max_new_tokens=args.max_new_tokens,
                                temperature=args.temperature, top_k=args.top_k, top_p=args.top_p):
        ids.append(token)
        print(text, end="", flush=True)
    print(flush=True)
    n, seconds, why = len(ids) - len(start), time.perf_counter() - began, "max_new_tokens reached"
    if ids[-1] == enc.eot_token:
        ids, why = ids[:-1], "end of text"
    elif len(ids) == model.cfg.block_size:
        why = f"the context of {len(ids)} tokens is full"
    print(f"[seed {seed}: {n} tokens, {n / seconds:.0f} tokens/s; stopped: {why}]",
          file=sys.stderr)                                      # it is not part of the text
    return ids


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out_dir", default="out", help="of train.py (default: %(default)s)")
    add("--model", default="engram", choices=("engram", "moe", "dense"),
        help="whose checkpoint (default: %(default)s)")
    add("--prompt", help="text to continue (default: none, a document from its start)")
    add("--max_new_tokens", type=int, default=200, help="0: prompt alone (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: the likeliest (default: %(default)s)")
    add("--top_k", type=int, default=50, help="draw from so many (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest that together have this "
        "probability (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draws; one more each (default: %(default)s)")
    add("--num_samples", type=int, default=1, help="one after the other (default: %(default)s)")
    add("--table", default="resident", choices=("resident", "host", "disk"), help="where the "
        "memory's table lives: disk leaves it in the checkpoint (default: %(default)s)")
    add("--png", metavar="FILE", help="draw what --memory or --gates show")
    modes = parser.add_mutually_exclusive_group()
    for flag, what in (("--memory", "shade each token by the nats the memory saved on it"),
                       ("--gates", "shade each token by how far the gate opened"),
                       ("--compare", "tabulate and plot the runs of out_dir instead")):
        modes.add_argument(flag, action="store_true", help=what)
    args = parser.parse_args(argv)
    if args.compare:
        plot(args.out_dir)
        return print(*compare(args.out_dir), f"curves: {args.out_dir}/loss.png", sep="\n")
    for name, low, high in (("max_new_tokens", 0, 1e9), ("top_k", 1, 1e9), ("temperature", 0, 100),
                            ("top_p", 1e-9, 1), ("num_samples", 1, 1e6), ("seed", 0, 2 ** 62)):
        if not low <= getattr(args, name) <= high:
            fail(f"{name} {getattr(args, name)}: must be from {low:g} to {high:g}")
    if args.png is not None and (not (args.memory or args.gates) or args.num_samples > 1):
        fail("--png needs --memory or --gates, and one sample")
    if args.prompt == "":
        fail("the prompt is empty; leave --prompt out and a document begins from its start")
    saved, model = load_checkpoint(Path(args.out_dir) / args.model / "ckpt.pt",
                                   None if args.table == "disk" else torch.empty)
    place(model, "cpu", args.table)
    block_size, prompt = model.cfg.block_size, args.prompt or ""
    if (args.memory or args.gates) and not model.engrams():
        fail(f"{args.model} has no memory to show; --memory and --gates are for --model engram")
    try:
        enc = encoding(saved["tokenizer"])
        prompt.encode()
    except UnicodeEncodeError as error:
        fail(f"the prompt is not valid UTF-8 at character {error.start}")
    except (Offline, ValueError) as error:
        fail(error)
    start = [enc.eot_token] + enc.encode_ordinary(prompt)
    if len(start) >= block_size:
        fail(f"the prompt has {len(start)} tokens with the end of text before it, the context "
             f"{block_size}: shorten it")
    if not args.max_new_tokens and not (prompt and (args.memory or args.gates)):
        fail("max_new_tokens 0 is for --memory or --gates on a --prompt: nothing to do")
    for i in range(args.num_samples):
        ids = write(args, model, enc, start, args.seed + i) if args.max_new_tokens else start
        if args.memory or args.gates:
            show(args, saved, model, enc, ids, len(start) - 1)


if __name__ == "__main__":
    script(main)
