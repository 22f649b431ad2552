"""
Train a transformer with Engram and its MoE-only twin of equal parameters and compute, and compare.

    python train.py                          # both twins; on a CPU: Python's source, 7 to 8 minutes
    python train.py --model engram --steps 2000 --rho 0.5 --out_dir out2
    python train.py --resume                 # the same command again, after a crash or Ctrl-C

The idea: a share of the sparse parameters sits in experts or in a table. Total and active ones,
data and steps being equal, the gap between the curves is the memory's, up to the noise of seeds.
"""
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
import argparse
import ctypes
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import time

import numpy as np
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from engram import EngramConfig, RowAdam, canonical_ids, opt
from model import GPT, GPTConfig, make_twins
from prepare_data import (DEFAULT_MB, Offline, fail, load, lock, prepare, script, token_bytes,
                          write_whole)
from sample import compare, load_checkpoint, plot, report, token_losses, watch


@dataclass
class Config:
    """Flags, with GPTConfig's and EngramConfig's. Defaults stand here once: the laptop preset's."""
    model: str = opt("both", "both twins, or one: engram, moe, or dense (as wide as is active)",
                     ("both", "engram", "moe", "dense"))
    preset: str = opt("auto", "auto: gpu where there is CUDA", ("auto", "laptop", "gpu"))
    dataset: str = opt("auto", "python, tinystories, openwebtext or a name of your own; auto: "
                       "tinystories on CUDA, else python")
    data_dir: str = opt("data", "where prepare_data.py writes")
    out_dir: str = opt("out", "logs, checkpoints and loss.png go here")
    device: str = opt("auto", "cpu, cuda, cuda:1, ...")
    dtype: str = opt("auto", "bfloat16: by autocast; auto: the faster one now; to compare, name it",
                     ("auto", "float32", "bfloat16"))
    compile: bool = opt(False, "torch.compile; compiling comes first, so not for short runs")
    seed: int = opt(0, "of the initial weights and the data order")
    steps: int = opt(1200, "optimiser steps, capped at one pass over the data")
    tokens_per_step: int = opt(2048, "tokens per optimiser step")
    batch_size: int = opt(8, "sequences per micro-batch; the rest of a step is accumulated")
    lr: float = opt(4e-3, "peak learning rate of the backbone")
    table_lr: float = opt(5.0, "learning rate of the tables over the backbone's (paper: 5)")
    weight_decay: float = opt(0.1, "of the matrices; tables, norms and biases have none")
    warmup: float = opt(0.05, "share of the steps")
    min_lr: float = opt(0.05, "share of the peak that cosine decay ends at")
    grad_clip: float = opt(1.0, "bound on the global norm, gathered table rows included")
    balance_step: float = opt(0.01, "step of the experts' selection bias")
    balance_loss: float = opt(0.0, "weight of the balance loss; never in the reported loss")
    rho: float = opt(0.75, "share of the sparse budget that stays with experts")
    eval_every: int = opt(150, "steps between evaluations, each followed by a checkpoint")
    eval_tokens: int = opt(65536, "validation tokens, always the same")
    resume: bool = opt(False, "go on from the checkpoints in out_dir")


# What the gpu preset changes: sized for 24 GB, never run by us on such a card.
GPU = dict(n_layer=8, n_head=8, n_embd=512, block_size=512, n_expert=32, expert_hidden=256,
           shared_hidden=512, engram_blocks=(1, 4), engram_heads=8, engram_width=32,
           steps=1500, tokens_per_step=32768, batch_size=32, lr=1e-3, balance_step=0.002,
           eval_tokens=524288)


# ---- flags --------------------------------------------------------------------------------------

def parse(argv):
    """-> Config, GPTConfig (with its EngramConfig). Later wins: defaults, preset, flags given."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for owner, prefix in ((Config, ""), (GPTConfig, ""), (EngramConfig, "engram_")):
        for f in (f for f in fields(owner) if "help" in f.metadata):
            kind = {bool: {"action": argparse.BooleanOptionalAction},
                    tuple: {"type": int, "nargs": "+"}}.get(
                    type(f.default), {"type": type(f.default), "choices": f.metadata["choices"]})
            text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
            parser.add_argument(f"--{prefix}{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    device, preset = given.get("device", "auto"), given.get("preset", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"device {device!r} is not usable here ({str(error).splitlines()[0]}); try cpu")
    if preset == "auto":
        preset = "gpu" if device.startswith("cuda") else "laptop"
    values = {**(GPU if preset == "gpu" else {}), **given, "device": device, "preset": preset}
    take = lambda owner, prefix="": owner(**{f.name: values[prefix + f.name] for f in fields(owner)
                                             if prefix + f.name in values})
    try:
        values["engram"] = take(EngramConfig, "engram_")
        cfg, shape = take(Config), take(GPTConfig)
        check(cfg, shape)
    except ValueError as error:
        fail(error)
    return cfg, shape


def check(cfg, shape):
    for names, low, high in (("steps tokens_per_step batch_size eval_every eval_tokens", 1, 1e12),
                             ("lr table_lr grad_clip", 1e-12, 1e12), ("warmup min_lr", 0, 1),
                             ("seed weight_decay balance_step balance_loss", 0, 1e12)):
        for name in names.split():
            if not low <= getattr(cfg, name) <= high:
                raise ValueError(f"{name} {getattr(cfg, name)}: must be from {low} to {high}")
    micro = cfg.batch_size * shape.block_size
    if cfg.tokens_per_step % micro:
        raise ValueError(f"tokens_per_step {cfg.tokens_per_step} is not a multiple of batch_size * "
                         f"block_size = {cfg.batch_size} * {shape.block_size} = {micro}")


def keep_freed_memory():
    """glibc hands large freed blocks back to the system, and each step maps and clears its
    activations anew: a quarter of its time on a CPU. Have it keep them."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-4, 0)               # M_MMAP_MAX: no mappings of their own
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)     # M_TRIM_THRESHOLD: 2 GB


def faster_dtype(device):
    """bfloat16 where a matmul in it is at least 1.2x as fast. Some CPUs only emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        timer = Timer("a @ a", globals={"a": torch.randn(1024, 1024, device=device, dtype=dtype)},
                      num_threads=torch.get_num_threads())
        seconds[dtype] = min(timer.blocked_autorange(min_run_time=0.1).times)
    return "bfloat16" if seconds[torch.float32] > 1.2 * seconds[torch.bfloat16] else "float32"


def autocast(cfg):
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, cfg.dtype == "bfloat16")


# ---- data ---------------------------------------------------------------------------------------

def find_data(cfg):
    """-> name of the data set, prepared if need be; what was done otherwise than asked, or None."""
    name = cfg.dataset
    if name == "auto":
        name = "tinystories" if cfg.device.startswith("cuda") else "python"
    if name in DEFAULT_MB and not (Path(cfg.data_dir) / name / "meta.json").exists():
        try:
            prepare(name, data_dir=cfg.data_dir)
        except Offline as error:
            if cfg.dataset != "auto":
                raise
            note = f"{name}: {error}; using python instead"
            print(note)
            return find_data(replace(cfg, dataset="python"))[0], note
    return name, None


class Data:
    """Token sequences of a prepared data set: one pass in an order set by the seed, a validation
    set that never changes, and what is known about its tokens."""

    def __init__(self, cfg, shape):
        self.name, self.note, self.T = *find_data(cfg), shape.block_size
        self.meta, self.train, val = load(self.name, cfg.data_dir)
        blocks = (len(self.train) - 1) // self.T
        n = min(max(1, cfg.eval_tokens // self.T), (len(val) - 1) // self.T)
        if n < 1 or blocks < cfg.tokens_per_step // self.T:
            fail(f"{self.name}: {len(self.train):,} tokens to train on, {len(val):,} to validate: "
                 f"too few for a step of {cfg.tokens_per_step:,} or a sequence of {self.T}")
        self.order = np.random.default_rng(cfg.seed).permutation(blocks)
        starts = np.linspace(0, len(val) - 1 - self.T, n).astype(int)
        self.val_x, self.val_y = self.sequences(val, starts)
        sequences = cfg.tokens_per_step // self.T
        if cfg.steps > blocks // sequences:
            print(f"steps {cfg.steps} capped at {blocks // sequences}, one pass over the "
                  f"{len(self.train):,} tokens of {self.name}: on repeated data tables overfit")
            cfg.steps = blocks // sequences
        pieces = token_bytes(self.meta["tokenizer"])
        self.canonical = canonical_ids(pieces, shape.engram.compress)
        self.bytes = torch.tensor([len(b) for b in pieces])
        self.bytes[self.meta["eot"]] = 0                          # the separator is not text
        self.count(cfg.steps * sequences)

    def sequences(self, tokens, starts):
        rows = np.stack([tokens[s:s + self.T + 1] for s in starts]).astype(np.int64)
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())

    def batch(self, step, n):
        """-> x, y [n, T]. A function of seed and step alone: nothing to save or restore."""
        return self.sequences(self.train, self.order[step * n:(step + 1) * n] * self.T)

    def count(self, n):
        """seen [n_val, T]: how often each validation token's 2-gram (it and the token before)
        stands in the first n sequences of the order, those that training sees. copyable [n_val, T]:
        never there, but earlier in the same context. Mostly in-context copying (induction) predicts
        these: their loss shows whether it has formed."""
        pairs = (self.val_x * len(self.bytes) + self.val_y).numpy()
        unique, where = np.unique(pairs, return_inverse=True)
        times = np.zeros(len(unique), np.int64)
        for i in range(0, n, 4096):                               # memory stays flat
            x, y = self.sequences(self.train, self.order[i:min(i + 4096, n)] * self.T)
            trained, k = np.unique((x * len(self.bytes) + y).numpy(), return_counts=True)
            _, ours, theirs = np.intersect1d(unique, trained, True, return_indices=True)
            times[ours] += k[theirs]
        self.seen = torch.from_numpy(times[where].reshape(pairs.shape))
        self.copyable = self.seen == 0
        for row, p in zip(self.copyable, pairs):
            row[np.unique(p, return_index=True)[1]] = False       # its first time in this context

    def score(self, losses):
        """token_losses of the validation set -> what is reported of them."""
        losses = losses.double()
        copy = losses[self.copyable].mean().item() if self.copyable.any() else None
        return {"val_loss": losses.mean().item(), "copy_loss": copy,
                "val_bpb": losses.sum().item() / math.log(2) / self.bytes[self.val_y].sum().item()}


# ---- evaluation: the same tokens every time -----------------------------------------------------

def evaluate(model, tables, data, cfg):
    """-> losses and, per memory layer, signs that it is alive: mean, spread and percentiles of the
    gate, |what it adds| / |h|, share of the table's rows that training has touched."""
    with watch(model) as seen:
        record = data.score(token_losses(model, data.val_x, data.val_y, cfg.batch_size,
                                         autocast(cfg)))
    for layer, state in zip(seen, tables.state, strict=True):
        gate, added = torch.cat([g.flatten() for g, _ in layer]), [a for _, a in layer]
        low, high = np.percentile(gate.cpu(), (5, 95))
        for name, value in (("gate_mean", gate.mean()), ("gate_std", gate.std()), ("gate_p5", low),
                            ("gate_p95", high), ("out_over_h", sum(added) / len(added)),
                            ("rows_touched", (state["visits"] > 0).float().mean())):
            record.setdefault(name, []).append(float(value))
    return record


# ---- one model ----------------------------------------------------------------------------------

def optimisers(model, cfg):
    """AdamW for the backbone, row-wise Adam for the tables. One group per reason."""
    groups = [dict(params=[], weight_decay=cfg.weight_decay),     # matrices
              dict(params=[], weight_decay=0.0)]                  # norms, biases, conv taps
    for name, p in model.named_parameters():
        groups[p.ndim < 2 or name.endswith(".conv")]["params"].append(p)
    return (torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True),
            RowAdam([engram.table for engram in model.engrams()]))       # no decay, see there


def learning_rate(step, cfg):
    warmup = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * (1 + math.cos(math.pi * share)) / 2)


def describe(name, model, cfg, data):
    """-> the first record of a log: all that is needed to understand and repeat the run."""
    here = shlex.quote(str(Path(__file__).resolve().parent))
    git = f"git -C {here} describe --always --dirty 2>&-"               # nothing outside of git
    known = {k: v for k, v in data.meta.items() if k not in ("tokenizer", "args")}
    return {"command": shlex.join(["train.py", *sys.argv[1:]]), "model": name,
            "config": asdict(cfg), "shape": asdict(model.cfg), "accounting": model.accounting(),
            "parameters_by_kind": model.parameters_by_kind(), "data": {**known, "note": data.note},
            "copyable_tokens": int(data.copyable.sum()), "commit": subprocess.getoutput(git),
            "python": platform.python_version(), "torch": str(torch.__version__),
            "device": device_name(cfg.device), "threads": torch.get_num_threads()}


def check_finite(loss, step, path):
    if not math.isfinite(loss):
        kept = f"{path} is the last good checkpoint" if path.exists() else "no checkpoint yet"
        fail(f"the loss is {loss} at step {step}; {kept}; try a lower --lr")


def start(path, run, shape, cfg, data):
    """-> model, backbone and table optimisers, state of training: new, or as the checkpoint at
    path has them, which is refused unless it is of this run."""
    torch.manual_seed(cfg.seed)
    saved, model = load_checkpoint(path) if path.exists() else (None, GPT(shape, data.canonical))
    if saved and (differ := [f"{k} {v!r} there, {run.get(k)!r} here"
                             for k, v in saved["run"].items() if v != run.get(k)]):
        fail(f"{path} is of another run: {'; '.join(differ)}")
    model.to(cfg.device)
    backbone, tables = optimisers(model, cfg)
    header = describe(path.parent.name, model, cfg, data)
    if not saved:
        return model, backbone, tables, 0, 0.0, [], header
    backbone.load_state_dict(saved["backbone"])
    tables.state = [{k: v.to(cfg.device) for k, v in state.items()} for state in saved["tables"]]
    saved["header"].setdefault("resumed", []).append(
        {k: header[k] for k in ("command", "commit", "torch", "device", "threads")})
    return model, backbone, tables, *(saved[k] for k in ("step", "seconds", "records", "header"))


def write_log(path, header, records):
    lines = [json.dumps(record) + "\n" for record in [header, *records]]
    write_whole(path, lambda file: file.write("".join(lines).encode()))


def train(name, shape, cfg, data):
    """Train one model -> the model. Under out_dir/name: log.jsonl (a header, then a record per
    evaluation) and ckpt.pt, both whole at any moment."""
    out, device = Path(cfg.out_dir) / name, torch.device(cfg.device)
    path, free = out / "ckpt.pt", "resume model preset out_dir data_dir dataset device".split()
    run = {**{k: v for k, v in asdict(cfg).items() if k not in free}, **asdict(shape),
           "tokenizer": data.meta["tokenizer"]["sha256"],
           **{split: data.meta[split]["sha256"] for split in ("train", "val")}}
    model, backbone, tables, step, seconds, records, header = start(path, run, shape, cfg, data)
    forward = torch.compile(model) if cfg.compile else model
    if records:         # a log that was lost or damaged: the checkpoint has it whole
        write_log(out / "log.jsonl", header, records)
    sequences = cfg.tokens_per_step // shape.block_size
    micro = [slice(i, i + cfg.batch_size) for i in range(0, sequences, cfg.batch_size)]
    moes = [block.moe for block in model.blocks if shape.n_expert]
    bar = tqdm(total=cfg.steps, initial=step, desc=name, unit="step", leave=False,
               mininterval=0.1 if sys.stderr.isatty() else 10)
    while step < cfg.steps:
        train_loss, uneven, began, first = 0.0, 0.0, time.perf_counter(), step
        while step == first or step % cfg.eval_every and step < cfg.steps:

            # ---- forward and backward
            x, y = (t.to(device) for t in data.batch(step, sequences))
            reads = model.read(x)           # once a step: the addresses need the tokens alone
            loss = 0.0
            for part in micro:
                with autocast(cfg):
                    _, nats, balance = forward(x[part], y[part], [r.micro(part) for r in reads])
                ((nats + cfg.balance_loss * balance) / len(micro)).backward()
                loss += nats.detach() / len(micro)
            check_finite(loss := loss.item(), step, path)         # a GPU is waited for here alone

            # ---- update
            missing = [n for n, p in model.named_parameters() if p.grad is None]
            assert not missing, f"no gradient reached {missing}"
            leaves = [read.leaf for read in reads]
            torch.nn.utils.clip_grad_norm_([*model.parameters(), *leaves], cfg.grad_clip)
            lr = learning_rate(step, cfg)
            for group in backbone.param_groups:
                group["lr"] = lr
            backbone.step()
            tables.step(reads, lr * cfg.table_lr)
            backbone.zero_grad()
            uneven += sum(moe.move_bias(cfg.balance_step) for moe in moes) / max(1, len(moes))
            step, train_loss = step + 1, train_loss + loss
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        # ---- evaluate, save, log
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent, steps = time.perf_counter() - began, step - first
        seconds += spent                    # of training alone
        records.append({"step": step, "tokens": step * cfg.tokens_per_step, "seconds": seconds,
                        "tokens_per_s": steps * cfg.tokens_per_step / spent, "lr": lr,
                        "train_loss": train_loss / steps, "load_max": float(uneven) / steps,
                        "peak_bytes": peak_bytes(device),
                        **evaluate(model, tables, data, cfg)})
        check_finite(records[-1]["val_loss"], step, path)
        # the log first: a checkpoint is never ahead of it
        write_log(out / "log.jsonl", header, records)
        write_whole(path, lambda f: torch.save({
            "model": model.state_dict(), "backbone": backbone.state_dict(), "tables": tables.state,
            "step": step, "seconds": seconds, "records": records,
            "tokenizer": data.meta["tokenizer"], "shape": asdict(shape), "run": run,
            "header": header}, f))
    bar.close()
    return model


def peak_bytes(device):
    """Most memory held so far: on the GPU by its tensors, on a CPU by the process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else \
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def main(argv=None):
    keep_freed_memory()
    cfg, shape = parse(argv)
    out, names = Path(cfg.out_dir), ("engram", "moe") if cfg.model == "both" else (cfg.model,)
    with lock(*(out / name for name in names)):
        there = [out / name / "ckpt.pt" for name in names if (out / name / "ckpt.pt").exists()]
        if there and not cfg.resume:
            fail(f"{there[0]} exists: --resume goes on with it, another --out_dir begins anew")
        if cfg.resume and not there:
            fail(f"nothing to resume: no {out / names[0] / 'ckpt.pt'}; leave out --resume")
        if cfg.dtype == "auto":     # timed once a run: a resumed one goes on as it began
            cfg.dtype = load_checkpoint(there[0])[0]["run"]["dtype"] if there else \
                faster_dtype(cfg.device)
        try:
            data = Data(cfg, shape)
            shape.vocab_size = data.meta["vocab_size"]
            shapes, lines = make_twins(shape, cfg.rho)
        except (Offline, ValueError) as error:
            fail(error)
        print(*lines, f"{data.name}: {cfg.steps} steps x {cfg.tokens_per_step} tokens, {cfg.dtype} "
              f"on {device_name(cfg.device)}", sep="\n", flush=True)
        try:
            models = {name: train(name, shapes[name], cfg, data) for name in names}
        except KeyboardInterrupt:
            again = shlex.join(["python", *sys.argv] + ["--resume"] * (not cfg.resume))
            kept = any((out / name / "ckpt.pt").exists() for name in names)
            print(f"\nstopped; the last checkpoint is kept, go on with: {again}" if kept else
                  f"\nstopped before the first checkpoint (step {cfg.eval_every}); begin anew",
                  file=sys.stderr)
            sys.exit(130)
        plot(out)
        print(*compare(out), f"curves: {out / 'loss.png'}",
              *report(models, data, cfg.batch_size, autocast(cfg)), sep="\n")


if __name__ == "__main__":
    script(main)
