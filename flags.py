""" Turn dataclasses into flags, and flags into dataclasses. There is one set of defaults,
the fields'.

    python train.py --help

The idea: every field that engram.opt() describes becomes a flag, help text and all.
"""
import math
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import fields

import torch
from torch.utils.benchmark import Timer

from common import default_device, fail, make_parser

GROUPS = ("run", "data", "optimiser", "memory", "model")


def parse(argv, doc, owners, presets):
    """Return {flag: value} of what stands in argv, and of the preset where argv says
    nothing.

    owners: [(dataclass, prefix of its flags, their group)]; presets: {name: {flag: value}}."""
    parser = make_parser(doc, "train.py [options]")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for owner, prefix, group_of_owner in owners:
        for f in fields(owner):
            if "help" in f.metadata:
                group = groups[f.metadata["group"] or group_of_owner]
                add_flag(group, prefix + f.name, f.default, f.metadata, presets)
    given = vars(parser.parse_args(argv))
    # what "auto" means here
    device = given.get("device", "auto")
    if device == "auto":
        device = default_device()
    check_device(device)
    name = given.get("preset", "auto")
    if name == "auto":
        name = "gpu" if device.startswith("cuda") else "laptop"
    return {**presets[name], **given, "device": device, "preset": name}


def add_flag(group, name, default, metadata, presets):
    text = f"{metadata['help']} (default: {shown(default)}"
    for preset, values in presets.items():
        if name in values:
            text += f"; {preset} preset: {shown(values[name])}"
    kind = {"default": SUPPRESS, "help": (text + ")").replace("%", "%%")}
    if isinstance(default, bool):
        group.add_argument(f"--{name}", action=BooleanOptionalAction, **kind)
    elif isinstance(default, tuple):
        group.add_argument(f"--{name}", type=int, nargs="+", metavar="N", **kind)
    elif metadata["choices"]:
        group.add_argument(f"--{name}", choices=metadata["choices"], **kind)
    else:
        metavar = type(default).__name__.upper()
        group.add_argument(f"--{name}", type=type(default), metavar=metavar, **kind)


def shown(value):
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return value


def build(owner, values, prefix=""):
    """Return the dataclass owner with those values that are given."""
    names = [f.name for f in fields(owner) if prefix + f.name in values]
    return owner(**{name: values[prefix + name] for name in names})


def check_device(device):
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        # the first sentence of what torch says, which can be pages
        why = str(error).strip().splitlines()[0].split(". ")[0]
        fail(f"device {device!r} is not usable here ({why:.150}); try --device cpu")


def check_numbers(cfg, block_size):
    """Raise ValueError for numbers in a train.Config that make no sense."""
    for name in ("steps", "tokens_per_step", "batch_size", "eval_every", "eval_tokens",
                 "large"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} {getattr(cfg, name)}: must be 1 or more")
    for name in ("lr", "table_lr", "embed_lr", "grad_clip", "weight_decay", "balance_step",
                 "seed"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"{name} {getattr(cfg, name)}: must be 0 or more")
    if cfg.lr == 0:
        raise ValueError("lr 0: must be above 0")
    if cfg.seed >= 2 ** 63:
        raise ValueError(f"seed {cfg.seed}: must be below 2 ** 63")
    for name in ("warmup_share", "min_lr_share"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"{name} {getattr(cfg, name)}: is a share, from 0 to 1")
    at_once = cfg.batch_size * block_size
    if cfg.tokens_per_step % at_once:
        raise ValueError(f"tokens_per_step {cfg.tokens_per_step} is not a multiple of "
                         f"batch_size * block_size = {cfg.batch_size} * {block_size} = {at_once}")


def faster_dtype(device):
    """Return bfloat16 where its matmul is 1.2 times as fast; some CPUs emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(1024, 1024, device=device, dtype=dtype)
        timer = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
        seconds[dtype] = min(timer.blocked_autorange(min_run_time=0.1).times)
    faster = seconds[torch.float32] > 1.2 * seconds[torch.bfloat16]
    return "bfloat16" if faster else "float32"
