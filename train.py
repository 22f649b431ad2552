"""
Train a transformer with Engram and its MoE-only twin of equal parameters and compute, and compare.

    python train.py                          # both twins; on a CPU: Python's source, 7 to 8 minutes
    python train.py --model engram --steps 2000 --rho 0.5 --out_dir out2
    python train.py --resume                 # the same command again, after a crash or Ctrl-C

The idea: a share of the sparse parameters sits in experts or in a table. Total and active ones,
data and steps being equal, the gap between the curves is the memory's, up to the noise of seeds.
"""
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
import argparse
import json
import math
import platform
import shlex
import sys
import time

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from engram import EngramConfig, RowAdam, canonical_ids, mapped, opt, place, table_parameters
from model import GPT, GPTConfig, make_twins
from prepare_data import (Data, Offline, commit, fail, keep_freed_memory, lock, need_memory,
                          script, write_whole)
from sample import compare, device_name, evaluate, load_checkpoint, peak_bytes, plot, report


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
    table: str = opt("resident", "where the memory's table lives: resident (on the device), host "
                     "(in host memory), disk (in a file under out_dir)",
                     ("resident", "host", "disk"))
    compile: bool = opt(False, "torch.compile; compiling comes first, so not for short runs")
    seed: int = opt(0, "of the initial weights and the data order")
    train_tokens: int = opt(0, "train on so many tokens alone, again and again; 0: all, one pass")
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
                             ("seed weight_decay balance_step balance_loss train_tokens", 0, 1e12)):
        for name in names.split():
            if not low <= getattr(cfg, name) <= high:
                raise ValueError(f"{name} {getattr(cfg, name)}: must be from {low} to {high}")
    micro = cfg.batch_size * shape.block_size
    if cfg.tokens_per_step % micro:
        raise ValueError(f"tokens_per_step {cfg.tokens_per_step} is not a multiple of batch_size * "
                         f"block_size = {cfg.batch_size} * {shape.block_size} = {micro}")


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


# ---- one model ----------------------------------------------------------------------------------

def optimisers(model, cfg, new=torch.empty):
    """AdamW for the backbone, row-wise Adam for the tables. One group per reason."""
    groups = [dict(params=[], weight_decay=cfg.weight_decay),     # matrices
              dict(params=[], weight_decay=0.0)]                  # norms, biases, conv taps
    for name, p in model.named_parameters():
        groups[p.ndim < 2 or name.endswith(".conv")]["params"].append(p)
    return (torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True),
            RowAdam([engram.table for engram in model.engrams()], new=new))      # no decay


def learning_rate(step, cfg):
    warmup = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * (1 + math.cos(math.pi * share)) / 2)


def describe(name, model, cfg, data):
    """-> the first record of a log: all that is needed to understand and repeat the run."""
    known = {k: v for k, v in data.meta.items() if k not in ("tokenizer", "args")}
    return {"command": shlex.join(["train.py", *sys.argv[1:]]), "model": name,
            "config": asdict(cfg), "shape": asdict(model.cfg), "accounting": model.accounting(),
            "parameters_by_kind": model.parameters_by_kind(), "data": {**known, "note": data.note},
            "copyable_tokens": int(data.copyable.sum()), "commit": commit(),
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
    canonical = canonical_ids(data.token_bytes, not shape.engram or shape.engram.compress)
    if shape.engram and cfg.table != "disk":
        each = 4 if cfg.table == "resident" and cfg.device != "cpu" else 13       # with moments
        need_memory((1 + path.exists()) * each * table_parameters(shape.engram), "the table")
    new = partial(mapped, path.parent) if cfg.table == "disk" else torch.empty
    saved, model = load_checkpoint(path, new) if path.exists() else \
        (None, GPT(shape, canonical, new))
    if saved and (differ := [f"{k} {v!r} there, {run.get(k)!r} here"
                             for k, v in saved["run"].items() if v != run.get(k)]):
        fail(f"{path} is of another run: {'; '.join(differ)}")
    place(model, cfg.device, cfg.table)
    backbone, tables = optimisers(model, cfg, new)
    header = describe(path.parent.name, model, cfg, data)
    if not saved:
        return model, backbone, tables, 0, 0.0, [], header
    backbone.load_state_dict(saved["backbone"])
    for state, old in zip(tables.state, saved["tables"], strict=True):
        for name in state:
            state[name].copy_(old[name])
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
    path, free = out / "ckpt.pt", "resume model preset out_dir data_dir dataset device table"
    run = {**{k: v for k, v in asdict(cfg).items() if k not in free.split()}, **asdict(shape),
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
            x, y = (torch.from_numpy(t).to(device) for t in data.batch(step, sequences))
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
                        **evaluate(model, tables, data, cfg.batch_size, autocast(cfg))})
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
            cfg.dtype = load_checkpoint(there[0], None)[0]["run"]["dtype"] if there else \
                faster_dtype(cfg.device)
        try:
            data = Data(cfg, shape.block_size)
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
