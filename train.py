"""
Train a transformer with Engram, its MoE-only twin of equal parameters and compute, and
Engram with a larger table.

    python train.py                          # all three models
    python train.py --model engram --steps 2000 --rho 0.5 --out_dir out2
    python train.py --resume                 # the same command again, after a crash or Ctrl-C

The idea: the parameters that a token does not use sit all in experts (the twin), or in
part in a table (Engram, see --rho). All else is equal (total and active parameters, data,
steps), so the gap between Engram's curve and the twin's is what the memory is worth, up to the
noise of seeds. The third model shows what more rows add.
"""
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import ranks
from arms import Progress, side_by_side
from common import (check_fields, fail, free_memory, keep_freed_memory, machine_name,
                    new_figure, opt, peak_bytes, run_script, to_device, write_whole)
from engram import EngramConfig, RowAdam, canonical_ids
from flags import build, faster_dtype, parse
from model import GPT, GPTConfig, hash_probe, load_checkpoint, token_losses, watch
from muon import Muon
from offload import place
from prepare_data import Data, find
from runs import HARMLESS, compare, describe, differences, flat, plot, write_log
from twins import count, crowding, shapes_of

data_opt = partial(opt, group="data")
optim_opt = partial(opt, group="optimiser")


@dataclass
class Config:
    """Flags, together with GPTConfig's and EngramConfig's. The laptop preset is the defaults."""
    model: str = opt("all", "moe (the twin), engram, large (engram with more rows, see "
                     "--large), or all of these", ("all", "moe", "engram", "large"))
    preset: str = opt("auto", "set of defaults; auto: gpu where there is CUDA, else "
                      "laptop", ("auto", "laptop", "small", "gpu"))
    out_dir: str = opt("out", "folder for logs, checkpoints and loss.png")
    resume: bool = opt(False, "continue from the checkpoints in out_dir")
    device: str = opt("auto", "cpu, cuda, cuda:1, ...; auto: the accelerator, if any")
    dtype: str = opt("auto", "bfloat16 (by autocast) or float32; auto: time both and "
                     "take the faster; set it explicitly when you compare runs",
                     ("auto", "float32", "bfloat16"))
    table: str = opt("resident", "where the memory's table lives: resident (on the "
                     "device) or host (in host memory; always so for the model large)",
                     ("resident", "host"))
    compile: bool = opt(False, "use torch.compile; compiling takes a while, so it does "
                        "not pay for short runs")
    seed: int = opt(0, "seed of the initial weights and of the order of the data",
                    least=0, most=2 ** 63 - 1)
    eval_every: int = opt(75, "steps between evaluations; each writes a checkpoint", least=1)
    dataset: str = data_opt("auto", "python, tinystories, openwebtext or a name of your own; "
                            "auto: tinystories on an accelerator, else python")
    data_dir: str = data_opt("data", "folder that prepare_data.py writes to")
    eval_tokens: int = data_opt(65536, "validation tokens, the same at every evaluation", least=1)
    steps: int = optim_opt(600, "optimiser steps; after a pass over the data it comes again "
                           "in a new order", least=1)
    tokens_per_step: int = optim_opt(2048, "tokens per optimiser step", least=1)
    batch_size: int = optim_opt(8, "sequences per forward pass; a step's gradients are "
                                "averaged, so this changes memory and speed only", least=1)
    lr: float = optim_opt(8e-3, "peak learning rate", least=1e-12, most=1e6)
    table_lr: float = optim_opt(5.0, "learning rate of the tables and of an --untied embedding, "
                                "in units of lr (paper: 5)", least=0)
    warmup_share: float = optim_opt(0.05, "share of the steps in which the rate rises",
                                    least=0, most=1)
    min_lr_share: float = optim_opt(0.05, "share of lr that the cosine decay ends at",
                                    least=0, most=1)
    weight_decay: float = optim_opt(0.1, "weight decay of matrices; nothing else decays", least=0)
    grad_clip: float = optim_opt(1.0, "largest norm of all gradients together, those of "
                               "rows included", least=1e-12)
    balance_step: float = optim_opt(0.01, "step of the bias that balances the experts; it follows "
                                    "lr", least=0)
    optimizer: str = optim_opt("muon", "of the blocks' matrices, except the router",
                               ("adamw", "muon"))
    rho: float = opt(0.5, "share of the sparse parameters that stays with experts",
                     least=0, most=1, group="memory")
    large: int = opt(16, "how many times the rows of engram's table the model large has", least=1,
                     group="memory")

    def __post_init__(self):
        check_fields(self)


# What the presets change. gpu is sized for a card of 24 GB, and was never run.
SMALL = dict(n_embd=64, n_head=2, expert_hidden=64, shared_hidden=64, tokens_per_step=1024,
             batch_size=4, eval_tokens=32768)
GPU = dict(n_layer=8, n_head=8, n_embd=512, block_size=512, n_expert=32, expert_hidden=256,
           shared_hidden=512, engram_blocks=(1, 4), engram_heads=8, engram_width=32,
           steps=1500, tokens_per_step=32768, batch_size=32, lr=1e-3, balance_step=0.002,
           eval_tokens=524288)
PRESETS = {"laptop": {}, "small": SMALL, "gpu": GPU}


# ---- the loop --------------------------------------------------------------------------

def train(name, shape, cfg, tell):
    """Train one model. Write out_dir/name/log.jsonl (a header line, then one line per
    evaluation) and out_dir/name/ckpt.pt, each atomically.

    shape: the model's GPTConfig; cfg: the run's Config. tell: an arms.Progress, called at
    the start, after each step with its loss, and after each evaluation with its record."""
    data = load_data(cfg, shape.block_size)
    path, device = Path(cfg.out_dir) / name / "ckpt.pt", torch.device(cfg.device)
    model, backbone, row_adam, state = start(name, path, shape, cfg, data)
    # compiled or not, it is the same model; evaluation uses it uncompiled
    forward = torch.compile(model) if cfg.compile else model
    moes = [block.moe for block in model.blocks if block.moe.n_expert]
    # this process's share of a step's sequences is computed a micro-batch at a time
    n = cfg.tokens_per_step // shape.block_size // ranks.RANKS
    micro_batches = [slice(i, i + cfg.batch_size) for i in range(0, n, cfg.batch_size)]
    x, y, addresses = prepare(state["step"], data, model, cfg)
    tell(name, state["step"])
    # since the last evaluation: when it ended, and for each step the loss and the busiest
    # expert's load over the mean
    began, losses, busiest = time.perf_counter(), [], []

    for step in range(state["step"], cfg.steps + 1):

        # ---- evaluate, log and save, unless nothing was trained since the last time
        due = step % cfg.eval_every == 0 or step == cfg.steps
        if due and losses:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            spent = time.perf_counter() - began                    # in training alone
            state["step"], state["seconds"] = step, state["seconds"] + spent
            if ranks.RANK == 0:
                record = (training_record(state, cfg, losses, busiest, spent)
                          | evaluate(model, row_adam, data, cfg.batch_size, autocast(cfg)))
                state["records"].append(record)
                save(path, model, backbone, row_adam, state)
                tell(name, step, None, record)
                plot(cfg.out_dir)
            began, losses, busiest = time.perf_counter(), [], []
        if step == cfg.steps:
            break

        # ---- forward and backward
        # start to fetch the rows that are read: they arrive while the first blocks compute
        reads = model.read(addresses)
        loss = 0.0
        for part in micro_batches:
            # inverse says which of the rows in leaf each position takes. leaf stays whole:
            # there the gradients of all micro-batches add up
            part_reads = [read._replace(inverse=read.inverse[part]) for read in reads]
            with autocast(cfg):
                part_loss = forward(x[part], y[part], part_reads)[1] / len(micro_batches)
            part_loss.backward()
            loss += part_loss.detach()
        # a parameter that is not wired in would stay as it was, in silence
        missing = [key for key, p in model.named_parameters() if p.grad is None]
        assert not missing, f"no gradient reached {missing}"
        # with several processes, average the loss, all gradients and moe.load over them; the
        # reads then cover every row that one of them has read
        reads = ranks.meet(loss, model, moes, reads)
        # From here on x and y are the next step's. Its addresses need tokens alone, so
        # prepare them while a GPU is still at work. The host waits for it at loss.item().
        x, y, addresses = prepare(step + 1, data, model, cfg)
        loss = loss.item()
        check_finite(loss, step, path)

        # ---- update. Gradients of the rows that were read are clipped with all others
        leaves = [read.leaf for read in reads]
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *leaves], cfg.grad_clip)
        lr = learning_rate(step, cfg)
        for optimizer in backbone:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad()
        ranks.update(model, row_adam, reads, lr * cfg.table_lr)
        # balance the experts
        loads = [moe.move_bias(cfg.balance_step * lr / cfg.lr) for moe in moes]
        busiest.append(sum(loads) / max(1, len(moes)))
        losses.append(loss)
        tell(name, step + 1, loss)


def prepare(step, data, model, cfg):
    """Return x and y of a step, and the addresses that x reads. Past the last step there is
    nothing to train: return those of the last one."""
    batch = data.batch(min(step, cfg.steps - 1), ranks.RANK, ranks.RANKS)
    x, y = map(torch.from_numpy, batch)
    return to_device(x, cfg.device), to_device(y, cfg.device), model.addresses(x)


def start(name, path, shape, cfg, data):
    """Return the model, both optimisers and {step, seconds, records, header, run, ...}:
    new ones, or as the checkpoint at path holds them if it is of this run."""
    torch.manual_seed(cfg.seed)
    # what makes this run what it is; a checkpoint of another one is refused
    run = {key: value for key, value in asdict(cfg).items() if key not in HARMLESS}
    run |= flat(asdict(shape))
    run["tokenizer"] = data.meta["tokenizer"]["sha256"]
    run |= {f"{split} data": data.meta[split]["sha256"] for split in ("train", "val")}
    # 4 bytes each for a weight, its gradient and two moments; a table has no such gradient
    size, free = count(shape), free_memory()
    need = 16 * size["parameters"] - 4 * size["table_parameters"]
    # (free is 0 if it is not known)
    if 0 < free < need:
        fail(f"training this model takes up to {need / 1e9:,.1f} GB, {free / 1e9:.1f} GB are "
             "free: ask for fewer --engram_rows, fewer --n_expert, or a smaller --n_embd")
    # the model: new, or, with --resume, as it was saved
    saved = None
    if path.exists():
        saved, model = load_checkpoint(path)
        # --steps may change, but not below what has been trained; the learning rate follows
        expected = saved["run"] | {"steps": max(cfg.steps, saved["step"])}
        differ = differences(expected, run)
        if differ:
            fail(f"{path} is of another run (there, here): {', '.join(differ)}")
    else:
        # (without a memory, canonical ids are not used)
        compress = shape.engram is not None and shape.engram.compress
        model = GPT(shape, canonical_ids(data.token_bytes, compress))
    # move it; a large table always stays in host memory
    place(model, cfg.device, "host" if name == "large" else cfg.table)
    # only now: optimisers refer to tensors that have been moved
    backbone, row_adam = optimisers(model, cfg)
    state = {"step": 0, "seconds": 0.0, "records": [], "run": run, "shape": asdict(shape),
             "header": describe(name, model, cfg, data), "canonical": model.canonical,
             "tokenizer": data.meta["tokenizer"], "hash_probe": hash_probe(model)}
    if saved:
        restore(saved, state, backbone, row_adam)
        if ranks.RANK == 0:
            tqdm.write(f"{name:6s} continues after step {state['step']:,}")
            # after a crash the log may be ahead of the checkpoint
            write_log(path.with_name("log.jsonl"), state)
    # several processes keep one copy of a table in host memory
    ranks.share_tables(model, row_adam)
    return model, backbone, row_adam, state


def restore(saved, state, backbone, row_adam):
    """Put what a checkpoint holds into the state of training and into the optimisers."""
    for optimizer, old in zip(backbone, saved["backbone"], strict=True):
        optimizer.load_state_dict(old)
    for moments, old in zip(row_adam.state, saved["tables"], strict=True):
        for key in moments:
            moments[key].copy_(old[key])
    # keep the header of the first start, and add what is new now
    now, header = state["header"], saved["header"]
    resumed = {key: now[key] for key in ("command", "commit", "torch", "device")}
    resumed |= {"from_step": saved["step"], "steps_before": header["config"]["steps"]}
    header.setdefault("resumed", []).append(resumed)
    header["config"]["steps"] = now["config"]["steps"]
    state |= {key: saved[key] for key in ("step", "seconds", "records", "header")}


def optimisers(model, cfg):
    """Return the backbone's optimisers, AdamW and perhaps Muon, and row-wise Adam, without
    decay, for the tables."""
    # AdamW: matrices decay, norms, biases and taps do not; embed_in has the tables' rate
    matrices, others, embed_in = ({"params": [], "lr_scale": 1.0} for _ in range(3))
    others["weight_decay"] = 0.0
    embed_in["lr_scale"] = cfg.table_lr
    # Muon takes each matrix by itself; these parameters hold several (q, k, v; gate, up)
    parts_of = {"qkv": 3, "w_in": 2}
    muon = {parts: {"params": [], "parts": parts, "lr_scale": 1.0} for parts in (1, 2, 3)}
    # (a table is a buffer, not a parameter: RowAdam has it)
    for name, p in model.named_parameters():
        group = matrices
        if p.ndim < 2 or name.endswith(".taps"):
            group = others
        elif name.startswith("embed_in."):
            group = embed_in
        elif cfg.optimizer == "muon" and name.startswith("blocks.") and "router" not in name:
            parts = next((n for mark, n in parts_of.items() if mark in name), 1)
            group = muon[parts]
        group["params"].append(p)
    backbone = [torch.optim.AdamW([matrices, others, embed_in], lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=cfg.weight_decay, fused=True)]
    if cfg.optimizer == "muon":
        backbone.append(Muon(muon.values(), cfg.weight_decay, getattr(torch, cfg.dtype)))
    return backbone, RowAdam([engram.table for engram in model.engrams()])


def learning_rate(step, cfg):
    """Rise linearly, then fall as a cosine to a share of the peak."""
    warmup = max(1, round(cfg.warmup_share * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    done = (step - warmup) / (cfg.steps - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return cfg.lr * (cfg.min_lr_share + (1 - cfg.min_lr_share) * cosine)


def autocast(cfg):
    device_type = torch.device(cfg.device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


def load_data(cfg, block_size):
    return Data(cfg.dataset, cfg.data_dir, block_size, cfg.tokens_per_step // block_size,
                cfg.steps, cfg.seed, cfg.eval_tokens)


def check_finite(loss, step, path):
    if not math.isfinite(loss):
        kept = f"{path} is the last good checkpoint" if path.exists() else "no checkpoint yet"
        fail(f"the loss is {loss} at step {step}; {kept}; try a lower --lr")


# ---- evaluation ------------------------------------------------------------------------

def evaluate(model, row_adam, data, batch_size, precision):
    """Return the losses on the validation set, always the same tokens, and signs that the
    memory is alive, a number per memory layer: mean, spread and percentiles of the gate,
    |output| / |h|, share of the rows that training has visited. It draws no random numbers,
    so training does not depend on it."""
    with watch(model) as seen:
        losses = token_losses(model, data.val_x, data.val_y, batch_size, precision)
    record = data.score(losses.double().numpy())
    if data.kinds and seen:
        # made-up text, whose tokens have kinds: score it with the memory switched off too
        off = token_losses(model, data.val_x, data.val_y, batch_size, precision, memory=False)
        record["memory_off"] = data.score(off.double().numpy())
    for layer, moments in zip(seen, row_adam.state, strict=True):
        signs = {"out_over_h": np.mean(layer["added"]),
                 "rows_touched": (moments["visits"] > 0).float().mean()}
        if layer["gate"]:
            gate = torch.cat([alpha.flatten() for alpha in layer["gate"]]).cpu()
            low, high = np.percentile(gate, (5, 95))
            signs |= {"gate_mean": gate.mean(), "gate_std": gate.std(), "gate_p5": low,
                      "gate_p95": high}
        for key, value in signs.items():
            record.setdefault(key, []).append(float(value))
    return record


def training_record(state, cfg, losses, busiest, spent):
    """Return what a log says of the training since the last evaluation. This training took
    `spent` seconds."""
    tokens = len(losses) * cfg.tokens_per_step
    return {"step": state["step"], "tokens": state["step"] * cfg.tokens_per_step,
            "seconds": state["seconds"], "tokens_per_s": tokens / spent,
            "lr": learning_rate(state["step"] - 1, cfg), "train_loss": sum(losses) / len(losses),
            "load_max": float(sum(busiest)) / len(busiest),
            "peak_bytes": peak_bytes(cfg.device)}


def save(path, model, backbone, row_adam, state):
    """Write log and checkpoint, if the loss is finite. The log first: a checkpoint is never
    ahead of it."""
    check_finite(state["records"][-1]["val_loss"], state["step"], path)
    write_log(path.with_name("log.jsonl"), state)
    content = {"model": model.state_dict(), "tables": row_adam.state,
               "backbone": [optimizer.state_dict() for optimizer in backbone], **state}
    write_whole(path, partial(torch.save, content))


def read_flags(argv):
    """Return Config and GPTConfig. A flag beats the preset, the preset the default."""
    owners = [(Config, "", "run"), (GPTConfig, "", "model"),
              (EngramConfig, "engram_", "memory")]
    values = parse(argv, __doc__, owners, PRESETS)
    try:
        values["engram"] = build(EngramConfig, values, "engram_")
        cfg, shape = build(Config, values), build(GPTConfig, values)
        if cfg.dataset == "auto":
            cfg.dataset = "python" if cfg.device == "cpu" else "tinystories"
        at_once = ranks.RANKS * cfg.batch_size * shape.block_size
        if cfg.tokens_per_step % at_once:
            raise ValueError(f"tokens_per_step {cfg.tokens_per_step} is not a multiple of "
                             f"processes * batch_size * block_size = {ranks.RANKS} * "
                             f"{cfg.batch_size} * {shape.block_size} = {at_once}")
    except ValueError as error:
        fail(error)
    return cfg, shape


def open_out_dir(cfg):
    """Make the models' folders. Return {model: path of its checkpoint}, and the dtype: timed
    once, then kept when a run is resumed. Without --resume no checkpoint may exist; with it
    one must, and the others start anew."""
    names = ["moe", "engram", "large"] if cfg.model == "all" else [cfg.model]
    paths = {name: Path(cfg.out_dir) / name / "ckpt.pt" for name in names}
    there = [path for path in paths.values() if path.exists()]
    if there and not cfg.resume:
        fail(f"{there[0]} exists: continue with --resume, or use another --out_dir")
    if cfg.resume and not there:
        fail(f"nothing to resume: there is no {paths[names[0]]}; leave out --resume")
    dtype = cfg.dtype
    if dtype == "auto" and there:
        saved, _ = load_checkpoint(there[0], map_file=True)
        dtype = saved["run"]["dtype"]
    elif dtype == "auto":
        dtype = faster_dtype(cfg.device)
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths, dtype


def describe_data(cfg, data, memories):
    """Return lines: how many n-grams share a row of each memory, and how many passes the
    steps are."""
    lines = []
    if memories:
        # (to count the n-grams of more than 20 million tokens takes too much memory)
        n = min(cfg.steps * data.sequences_per_step, data.sequences_per_pass,
                20_000_000 // data.T)
        trained, _ = data.sequences(data.train, data.order[:n] * data.T)
        lines = crowding(memories, trained, data.token_bytes)
    lines += [f"data    {data.name}: {cfg.steps:,} steps x {cfg.tokens_per_step:,} tokens are "
              f"{data.passes:.2f} passes over {len(data.train):,} tokens;",
              f"        validated on {data.val_y.size:,} others"]
    if data.passes > 2:
        lines.append("        large tables overfit beyond about two: watch the validation loss")
    return lines


def main(argv=None):
    keep_freed_memory()
    cfg, shape = read_flags(argv)
    cfg.device = ranks.begin(cfg.device)
    # fail now, not at the first step or plot, if a compiler or matplotlib is missing
    compilers = ((os.environ.get("CXX") or "g++").split()[0], "clang++")
    if cfg.compile and not any(map(shutil.which, compilers)):
        fail("--compile needs a C++ compiler; there is no g++ or clang++ here: leave it out")
    new_figure()
    paths, cfg.dtype = ranks.of_first(partial(open_out_dir, cfg))
    # one process prepares the data, all load it
    ranks.of_first(partial(find, cfg.dataset, cfg.data_dir))
    data = load_data(cfg, shape.block_size)
    shape.vocab_size = data.meta["vocab_size"]
    try:
        shapes, lines = shapes_of(cfg.model, shape, cfg.rho, cfg.large)
    except (ValueError, RuntimeError) as error:
        # torch says in many lines that a shape is too large
        fail(str(error).splitlines()[0])
    if ranks.RANK == 0:
        memories = {name: shapes[name].engram for name in paths if shapes[name].engram}
        lines += describe_data(cfg, data, memories)
        lines.append(f"run     {cfg.dtype} on {machine_name(cfg.device)}")
        print(*lines, sep="\n", flush=True)
    # train one model after the other, or on a CPU side by side
    tell = Progress(paths, cfg.steps)
    jobs = {name: partial(train, name, shapes[name], cfg) for name in paths}
    one_process = ranks.RANKS == 1 and cfg.device == "cpu"
    try:
        if one_process and len(jobs) > 1 and torch.get_num_threads() > 1:
            side_by_side(jobs, tell)
        else:
            for job in jobs.values():
                job(tell)
        tell.bar.close()
    except torch.OutOfMemoryError as error:
        fail(f"{cfg.device} is out of memory ({str(error).split('. GPU')[0]}): ask for a smaller "
             "--batch_size, which computes the same step in more pieces")
    except KeyboardInterrupt:
        # how to go on, as a command to copy
        first = min(cfg.eval_every, cfg.steps)
        message = f"before the first checkpoint (step {first}); start again"
        if any(path.exists() for path in paths.values()):
            flags = [] if cfg.resume else ["--resume"]
            again = shlex.join(["python", *sys.argv, *flags])
            message = f"the last checkpoint is kept, continue with: {again}"
        print(f"\nstopped; {message}", file=sys.stderr)
        raise SystemExit(130) from None
    # the result
    if ranks.RANK == 0:
        plot(cfg.out_dir)
        lines = [*compare(cfg.out_dir), f"curves: {Path(cfg.out_dir) / 'loss.png'}"]
        print("", *lines, sep="\n")


if __name__ == "__main__":
    run_script(main)
