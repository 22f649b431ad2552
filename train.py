"""
Train a transformer with Engram and its MoE-only twin of equal parameters and compute, and compare.

    python train.py                          # both twins, on a CPU: Python's source, 6 to 8 minutes
    python train.py --model engram --steps 2000 --rho 0.5
    python train.py --resume                 # the same command again, after a crash or Ctrl-C

The idea: the two differ in one thing, whether a share of the sparse parameters sits in routed
experts or in a table that is looked up. Same data in the same order, same steps, same total and
active parameters, so the difference of the two curves is the difference the memory makes.
"""
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from engram import EngramConfig, RowAdam, canonical_ids, lookup, opt
from model import GPT, GPTConfig, load_checkpoint, make_twins
from prepare_data import Offline, encoding, fail, load, prepare, token_bytes


@dataclass
class Config:
    """How to train. The model's shape is GPTConfig's and EngramConfig's; all three become flags.
    Every default stands once, in its dataclass, and is the laptop preset's."""
    model: str = opt("both", "both twins, or one: engram, moe, or dense (equal active FLOPs)")
    preset: str = opt("auto", "laptop, gpu, or auto: gpu where there is CUDA")
    dataset: str = opt("auto", "python, tinystories, openwebtext or a name of your own; auto: "
                       "tinystories on CUDA, else python")
    data_dir: str = opt("data", "where prepare_data.py writes")
    out_dir: str = opt("out", "logs, checkpoints and loss.png go here")
    device: str = opt("auto", "cpu, cuda, cuda:1, ...")
    dtype: str = opt("auto", "float32, bfloat16 (autocast) or auto: the faster, timed at the start")
    compile: bool = opt(False, "torch.compile; about 25 s per model, so not for short runs")
    seed: int = opt(0, "of the initial weights and the data order")
    steps: int = opt(1200, "optimiser steps, capped at one pass over the data")
    tokens_per_step: int = opt(2048, "tokens per optimiser step")
    batch_size: int = opt(8, "sequences per micro-batch; the rest of a step is accumulated")
    lr: float = opt(4e-3, "peak learning rate of the backbone")
    table_lr: float = opt(5.0, "learning rate of the tables, times the backbone's (paper: 5)")
    weight_decay: float = opt(0.1, "of the matrices; tables, norms and biases have none")
    warmup: float = opt(0.05, "share of the steps")
    min_lr: float = opt(0.05, "share of the peak that cosine decay ends at")
    grad_clip: float = opt(1.0, "bound on the global norm, gathered table rows included")
    balance_step: float = opt(0.01, "step of the experts' selection bias")
    balance_loss: float = opt(0.0, "weight of the balance loss; never in the reported loss")
    rho: float = opt(0.75, "share of the sparse budget that stays with experts")
    eval_every: int = opt(100, "steps between evaluations, each followed by a checkpoint")
    eval_tokens: int = opt(65536, "validation tokens, always the same")
    resume: bool = opt(False, "go on from the checkpoints in out_dir")


# What the gpu preset changes: sized for 24 GB, never run by us on such a card.
GPU = dict(n_layer=8, n_head=8, n_embd=512, block_size=512, n_expert=32, expert_hidden=256,
           shared_hidden=512, engram_blocks=(1, 4), engram_heads=8, engram_width=32,
           steps=3000, tokens_per_step=32768, batch_size=32, lr=1e-3, balance_step=0.002,
           eval_every=150, eval_tokens=524288)


# -----------------------------------------------------------------------------
# flags

def parse(argv):
    """-> Config, GPTConfig (with its EngramConfig). Later wins: defaults, preset, flags given."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    owners = ((Config, ""), (GPTConfig, ""), (EngramConfig, "engram_"))
    for owner, prefix in owners:
        for f in fields(owner):
            if "help" not in f.metadata or prefix + f.name == "engram_rows":
                continue
            kind = {bool: {"action": argparse.BooleanOptionalAction},
                    tuple: {"type": int, "nargs": "+"}}.get(type(f.default), {"type": type(f.default)})
            parser.add_argument(f"--{prefix}{f.name}", default=argparse.SUPPRESS, **kind,
                                help=f"{f.metadata['help']} ({f.default})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    device = given.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "gpu" if device.startswith("cuda") else "laptop"
    if preset not in ("laptop", "gpu"):
        fail(f"preset {preset!r}: must be laptop, gpu or auto")
    values = {**(GPU if preset == "gpu" else {}), **given, "device": device, "preset": preset}
    take = lambda owner, prefix: {f.name: values[prefix + f.name] for f in fields(owner)
                                  if prefix + f.name in values}
    try:
        cfg = Config(**take(Config, ""))
        shape = GPTConfig(**take(GPTConfig, ""), engram=EngramConfig(**take(EngramConfig, "engram_")))
    except ValueError as error:
        fail(error)
    check(cfg, shape)
    return cfg, shape


def check(cfg, shape):
    if cfg.model not in ("both", "engram", "moe", "dense"):
        fail(f"model {cfg.model!r}: must be both, engram, moe or dense")
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        fail(f"dtype {cfg.dtype!r}: must be float32, bfloat16 or auto")
    for name in ("steps", "tokens_per_step", "batch_size", "lr", "table_lr", "grad_clip",
                 "eval_every", "eval_tokens"):
        if not getattr(cfg, name) > 0:
            fail(f"{name} {getattr(cfg, name)}: must be above 0")
    for name in ("seed", "weight_decay", "balance_step", "balance_loss"):
        if not getattr(cfg, name) >= 0:
            fail(f"{name} {getattr(cfg, name)}: must be 0 or more")
    for name in ("warmup", "min_lr"):
        if not 0 <= getattr(cfg, name) <= 1:
            fail(f"{name} {getattr(cfg, name)}: is a share, from 0 to 1")
    micro = cfg.batch_size * shape.block_size
    if cfg.tokens_per_step % micro:
        fail(f"tokens_per_step {cfg.tokens_per_step} is not a multiple of batch_size * block_size ="
             f" {cfg.batch_size} * {shape.block_size} = {micro}; try {max(1, cfg.tokens_per_step // micro) * micro}")
    try:
        torch.empty(1, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"device {cfg.device!r} is not usable here ({str(error).splitlines()[0]}); try cpu")


def faster_dtype(device):
    """bfloat16 where a matmul in it is at least 1.2x as fast. Some CPUs only emulate it."""
    def seconds(dtype):
        a, times = torch.randn(1024, 1024, device=device, dtype=dtype), []
        for _ in range(6):
            start = time.perf_counter()
            (a @ a).sum().item()
            times.append(time.perf_counter() - start)
        return sorted(times)[1]
    return "bfloat16" if seconds(torch.float32) > 1.2 * seconds(torch.bfloat16) else "float32"


# -----------------------------------------------------------------------------
# data

class Data:
    """Token sequences of a prepared data set: batches of one pass in an order set by the seed, a
    fixed validation set, and what is known about each validation token."""

    def __init__(self, cfg, shape):
        self.note, name = None, cfg.dataset
        if name == "auto":
            name = "tinystories" if cfg.device.startswith("cuda") else "python"
        if not (Path(cfg.data_dir) / name / "meta.json").exists() \
                and name in ("python", "tinystories", "openwebtext"):
            try:
                prepare(name, data_dir=cfg.data_dir)
            except Offline as error:
                if cfg.dataset != "auto":
                    fail(error)
                self.note = f"{name}: {error}; using python instead"
                print(self.note)
                name = "python"
                if not (Path(cfg.data_dir) / name / "meta.json").exists():
                    prepare(name, data_dir=cfg.data_dir)
        self.meta, self.train, val = load(name, cfg.data_dir)
        self.name, self.T = name, shape.block_size
        blocks = (len(self.train) - 1) // self.T
        self.order = np.random.default_rng(cfg.seed).permutation(blocks)
        n = min(cfg.eval_tokens // self.T, (len(val) - 1) // self.T)
        if n < 1 or blocks < 1:
            fail(f"data set {name}: {len(self.train):,} training and {len(val):,} validation tokens"
                 f" do not hold one sequence of {self.T}; use a smaller --block_size or more text")
        starts = np.linspace(0, len(val) - 1 - self.T, n).astype(int)
        self.val_x, self.val_y = self.sequences(val, starts)
        pieces = token_bytes(self.meta["tokenizer"])
        self.bytes = torch.tensor([len(b) for b in pieces])
        self.bytes[self.meta["eot"]] = 0                          # the separator is not text
        self.canonical = canonical_ids(pieces, shape.engram.compress)
        self.copy = None                                          # set once the steps are known

    def sequences(self, tokens, starts):
        rows = torch.from_numpy(np.stack([tokens[s:s + self.T + 1] for s in starts]).astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def batch(self, step, sequences):
        """-> x, y [sequences, T]. A function of seed and step alone: nothing to save or restore."""
        chosen = self.order[step * sequences:(step + 1) * sequences]
        return self.sequences(self.train, chosen * self.T)

    def copyable(self, sequences):
        """-> bool [n, T]: validation tokens whose 2-gram is in none of the first sequences of the
        order, those that training sees, but stands earlier in the same context. Only in-context
        copying (induction) predicts them well: their loss shows whether it has formed."""
        V = self.meta["vocab_size"]
        pairs = (self.val_x * V + self.val_y).numpy()
        unique = np.unique(pairs)
        seen = np.zeros(len(unique), bool)
        for i in range(0, sequences, 4096):                       # memory stays flat
            x, y = self.sequences(self.train, self.order[i:min(i + 4096, sequences)] * self.T)
            seen[np.isin(unique, (x * V + y).numpy())] = True
        new = ~seen[np.searchsorted(unique, pairs)]
        for row in range(len(pairs)):
            first = np.unique(pairs[row], return_index=True)[1]
            new[row, first] = False
        return torch.from_numpy(new)

    def score(self, losses):
        """token_losses of the validation set -> what is reported of them."""
        bits = losses.double().sum().item() / math.log(2)
        return {"val_loss": losses.double().mean().item(),
                "val_bpb": bits / self.bytes[self.val_y].sum().item(),
                "copy_loss": losses[self.copy].double().mean().item() if self.copy.any() else None}

    def describe(self):
        keys = ("source", "revision", "corpus_sha256", "vocab_size", "train", "val")
        return {"name": self.name, "note": self.note, "val_tokens_used": self.val_y.numel(),
                "copyable_tokens": int(self.copy.sum()), **{k: self.meta[k] for k in keys}}


# -----------------------------------------------------------------------------
# evaluation: touches no training RNG

@torch.no_grad()
def token_losses(model, x, y, batch_size, autocast):
    """-> nats for each token [n, T], on the CPU, in fp32."""
    model.eval()
    device, losses = model.embed.weight.device, []
    for i in range(0, len(x), batch_size):
        with autocast:
            logits = model(x[i:i + batch_size].to(device))[0].float()
        target = y[i:i + batch_size].to(device)
        losses.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none").cpu())
    model.train()
    return torch.cat(losses)


@torch.no_grad()
def vital_signs(model, tables, x, autocast):
    """Is the memory alive? Gate mean and spread, |what it adds| / |h|, share of rows touched."""
    seen = []

    def look(engram, args, out):
        h, read = args[:2]
        alpha = engram.gate(h, lookup(read)).float()
        seen.append(torch.stack([alpha.mean(), alpha.std(), out.norm() / h.norm()]))

    hooks = [engram.register_forward_hook(look) for engram in model.engrams()]
    model.eval()
    with autocast:
        model(x.to(model.embed.weight.device))
    model.train()
    for hook in hooks:
        hook.remove()
    names = ("gate_mean", "gate_std", "out_over_h")
    signs = {n: [round(v, 4) for v in s] for n, s in zip(names, torch.stack(seen).T.tolist())}
    signs["rows_touched"] = [round((s["visits"] > 0).float().mean().item(), 4) for s in tables.state]
    return signs


# -----------------------------------------------------------------------------
# one model

def optimisers(model, cfg):
    """AdamW for the backbone, row-wise Adam for the tables. One group per reason."""
    decay, plain = {}, {}
    for name, p in model.named_parameters():
        (plain if p.ndim < 2 or name.endswith(".conv") else decay)[name] = p
    assert len(decay) + len(plain) == len(list(model.parameters()))
    groups = [dict(params=list(decay.values()), weight_decay=cfg.weight_decay),   # matrices
              dict(params=list(plain.values()), weight_decay=0.0)]   # norms, biases, conv taps
    return (torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True),
            RowAdam([engram.table for engram in model.engrams()]))   # not read: not moved


def learning_rate(step, cfg):
    warmup = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * (1 + math.cos(math.pi * share)) / 2)


def write_whole(path, write):
    """write(file) into a neighbour, flushed to disk and renamed: never half a file at path."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def restore(path, cfg, shape, data):
    """-> the checkpoint at path, refused unless it was made by this same run's command."""
    saved = load_checkpoint(path)
    if saved["tokenizer"]["sha256"] != data.meta["tokenizer"]["sha256"]:
        fail(f"{path} was made with tokenizer {saved['tokenizer']['sha256'][:12]}, the data with "
             f"{data.meta['tokenizer']['sha256'][:12]}; prepare the same data or start anew")
    mine = {**asdict(cfg), **asdict(shape), "data": data.meta["train"]["sha256"]}
    free = ("resume", "model", "out_dir", "data_dir", "dataset", "device", "preset")
    differ = [f"{k} {v!r} there, {mine[k]!r} here" for k, v in saved["config"].items()
              if k not in free and v != mine[k]]
    if differ:
        fail(f"{path} is of another run: {'; '.join(differ)}")
    return saved


def train(name, shape, cfg, data):
    """Train one model; -> its records, one dict per evaluation (step, tokens, seconds, val_loss,
    val_bpb, ...). Everything is under out_dir/name: log.jsonl and ckpt.pt."""
    out = Path(cfg.out_dir) / name
    out.mkdir(parents=True, exist_ok=True)
    path, device = out / "ckpt.pt", torch.device(cfg.device)
    saved = restore(path, cfg, shape, data) if path.exists() else None
    torch.manual_seed(cfg.seed)
    model = GPT(shape, saved["model"]["canonical"] if saved else data.canonical)
    model.to(device)
    backbone, tables = optimisers(model, cfg)
    step, seconds, records = 0, 0.0, []
    if saved:
        model.load_state_dict(saved["model"])
        backbone.load_state_dict(saved["backbone"])
        tables.load_state_dict(saved["tables"])
        torch.set_rng_state(saved["rng"])
        step, seconds, records = saved["step"], saved["seconds"], saved["records"]
    header = {"command": " ".join(sys.argv), "model": name, "config": asdict(cfg),
              "shape": asdict(shape), "accounting": model.accounting(),
              "parameters_by_kind": model.parameters_by_kind(), "data": data.describe(),
              "commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
              "device": device_name(device), "threads": torch.get_num_threads()}
    log = lambda: write_whole(out / "log.jsonl", lambda f: f.writelines(
        (json.dumps(r) + "\n").encode() for r in [header, *records]))
    log()

    forward = torch.compile(model) if cfg.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    sequences = cfg.tokens_per_step // shape.block_size
    micro = [slice(i, i + cfg.batch_size) for i in range(0, sequences, cfg.batch_size)]
    moes = [block.moe for block in model.blocks if shape.n_expert]
    bar = tqdm(total=cfg.steps, initial=step, desc=f"{name:6s}", unit="step", dynamic_ncols=True)
    train_loss, load, since, start = 0.0, 0.0, 0, time.perf_counter()
    while step < cfg.steps:

        # -------------------------------------------------- forward and backward
        x, y = (t.to(device) for t in data.batch(step, sequences))
        reads = model.read(x)              # once a step: the addresses need the tokens alone
        loss = 0.0
        for part in micro:
            with autocast:
                _, nats, balance = forward(x[part], y[part], [r.micro(part) for r in reads])
            ((nats + cfg.balance_loss * balance) / len(micro)).backward()
            loss += nats.item() / len(micro)
        if not math.isfinite(loss):
            bar.close()
            fail(f"{name}: the loss is {loss} at step {step}; {kept(path)}; try a lower --lr")

        # -------------------------------------------------- update
        everything = list(model.parameters()) + [r.leaf for r in reads]
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing, f"no gradient reached {missing}"
        torch.nn.utils.clip_grad_norm_(everything, cfg.grad_clip)
        lr = learning_rate(step, cfg)
        for group in backbone.param_groups:
            group["lr"] = lr
        backbone.step()
        tables.step(reads, lr * cfg.table_lr)
        backbone.zero_grad(set_to_none=True)
        load += sum(moe.move_bias(cfg.balance_step) for moe in moes)
        step, since, train_loss = step + 1, since + 1, train_loss + loss
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if step % cfg.eval_every and step < cfg.steps:
            continue

        # -------------------------------------------------- evaluate, log, save
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent = time.perf_counter() - start
        seconds += spent
        losses = token_losses(model, data.val_x, data.val_y, cfg.batch_size, autocast)
        record = {"step": step, "tokens": step * cfg.tokens_per_step, "seconds": round(seconds, 2),
                  "tokens_per_s": round(since * cfg.tokens_per_step / spent),
                  "lr": lr, "train_loss": round(train_loss / since, 4), **data.score(losses)}
        if moes:
            record["load_max_over_mean"] = round(float(load) / since / len(moes), 3)
        if reads:
            record.update(vital_signs(model, tables, data.val_x[:cfg.batch_size], autocast))
        if not math.isfinite(record["val_loss"]):
            bar.close()
            fail(f"{name}: the validation loss is {record['val_loss']} at step {step}; {kept(path)};"
                 " try a lower --lr")
        records.append(record)
        write_whole(path, lambda f: torch.save({
            "model": model.state_dict(), "backbone": backbone.state_dict(),
            "tables": tables.state_dict(), "rng": torch.get_rng_state(), "step": step,
            "seconds": seconds, "records": records, "shape": asdict(shape),
            "config": {**asdict(cfg), **asdict(shape), "data": data.meta["train"]["sha256"]},
            "tokenizer": data.meta["tokenizer"]}, f))
        log()
        bar.set_postfix_str(f"loss {loss:.3f} val {record['val_loss']:.3f}")
        train_loss, load, since, start = 0.0, 0.0, 0, time.perf_counter()
    bar.close()
    return model, records, header


def kept(path):
    return f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was made yet"


def commit():
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, check=True,
                              capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# -----------------------------------------------------------------------------
# both models

def crossing(records, target):
    """-> (tokens, seconds) at which the validation loss first reached target, linear between
    evaluations; None if it never did."""
    for before, after in zip([None] + records, records):
        if after["val_loss"] <= target:
            if before is None:
                return after["tokens"], after["seconds"]
            share = (before["val_loss"] - target) / (before["val_loss"] - after["val_loss"])
            return tuple(before[k] + share * (after[k] - before[k]) for k in ("tokens", "seconds"))
    return None


def compare(runs):
    """runs: {name: (records, header)} -> lines of a table, and what the memory was worth."""
    rows = [("P_tot, parameters without embedding", lambda r, h: f"{h['accounting']['P_tot']:,}"),
            ("P_act, of these used per token", lambda r, h: f"{h['accounting']['P_act']:,}"),
            ("tokens/s, training", lambda r, h: f"{r[-1]['tokens'] / r[-1]['seconds']:,.0f}"),
            ("validation loss, nats per token", lambda r, h: f"{r[-1]['val_loss']:.4f}"),
            ("validation, bits per byte", lambda r, h: f"{r[-1]['val_bpb']:.4f}")]
    lines = ["", f"{'':36s}" + "".join(f"{name:>14s}" for name in runs)]
    lines += [f"{title:36s}" + "".join(f"{show(*run):>14s}" for run in runs.values())
              for title, show in rows]
    if "engram" in runs and "moe" in runs:
        (a, _), (b, _) = runs["engram"], runs["moe"]
        lines.append(f"difference, engram - moe: {a[-1]['val_loss'] - b[-1]['val_loss']:+.4f} nats "
                     "per token (one pair; a single run varies by about 0.02)")
        at = crossing(a, b[-1]["val_loss"])
        lines.append("engram did not reach the twin's final loss" if at is None else
                     f"engram passed the twin's final loss at {at[0] / b[-1]['tokens']:.0%} of the "
                     f"tokens and {at[1] / b[-1]['seconds']:.0%} of the wall clock")
    return lines


def plot(runs, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for (name, (records, _)), style in zip(runs.items(), ("-", "--", ":")):
        axes.plot([r["tokens"] for r in records], [r["val_loss"] for r in records], style, label=name)
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    axes.legend()
    figure.tight_layout()
    write_whole(path, lambda f: figure.savefig(f, format="png", dpi=120))
    plt.close(figure)


def sample(model, tok, tokens=100, seed=0):
    """-> text that continues an end of text, i.e. starts a document."""
    generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
    enc, device = encoding(tok), model.embed.weight.device
    model.eval()
    ids = model.generate(torch.tensor([[enc.eot_token]], device=device), tokens, generator=generator,
                         stop=enc.eot_token)
    return enc.decode([i for i in ids if i != enc.eot_token])


def main(argv=None):
    cfg, shape = parse(argv)
    out = Path(cfg.out_dir)
    names = ("engram", "moe") if cfg.model == "both" else (cfg.model,)
    for name in names:
        if (out / name / "ckpt.pt").exists() and not cfg.resume:
            fail(f"{out / name / 'ckpt.pt'} exists: add --resume to go on with it, or give another "
                 "--out_dir")
    if cfg.resume and not any((out / name / "ckpt.pt").exists() for name in names):
        fail(f"nothing to resume: no ckpt.pt in {', '.join(str(out / n) for n in names)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"out_dir {out} cannot be used: {error}")
    if cfg.dtype == "auto":
        cfg.dtype = faster_dtype(cfg.device)
    data = Data(cfg, shape)
    shape.vocab_size = data.meta["vocab_size"]
    whole = len(data.order) // (cfg.tokens_per_step // shape.block_size)
    if cfg.steps > whole:
        print(f"steps {cfg.steps} capped at {whole}: one pass over the {len(data.train):,} tokens of "
              f"{data.name}; repeated data makes tables overfit")
        cfg.steps = whole
    if cfg.steps < 1:
        fail(f"{len(data.train):,} training tokens are less than one step of {cfg.tokens_per_step}")
    data.copy = data.copyable(cfg.steps * cfg.tokens_per_step // shape.block_size)
    shapes, lines = shapes_of(shape, cfg)
    print(*lines, f"{data.name}: {cfg.steps} steps x {cfg.tokens_per_step} tokens, {cfg.dtype} on "
          f"{device_name(torch.device(cfg.device))}", sep="\n")
    runs = {}
    for name in names:
        model, records, header = train(name, shapes[name], cfg, data)
        runs[name] = records, header
        if name == names[0]:
            text = sample(model, data.meta["tokenizer"])
    plot(runs, out / "loss.png")
    print(*compare(runs), f"curves: {out / 'loss.png'}; a sample of {names[0]}:", "", text, sep="\n")


def shapes_of(shape, cfg):
    """-> {model: GPTConfig}, lines to print."""
    if cfg.model == "dense":     # as many active FLOPs as the experts of a token have together
        hidden = shape.shared_hidden + (shape.top_k * shape.expert_hidden if shape.n_expert else 0)
        return {"dense": replace(shape, n_expert=0, shared_hidden=hidden, engram=None)}, []
    try:
        return make_twins(shape, cfg.rho)
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
