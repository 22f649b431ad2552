"""
Turn dataclasses into flags, and flags into dataclasses. There is one set of defaults,
the fields'.

    python train.py --help

The idea: every field that common.opt() describes becomes a flag, help text and all.
"""
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
    # "cpu:0" is "cpu"
    if torch.device(device).type == "cpu":
        device = "cpu"
    name = given.get("preset", "auto")
    if name == "auto":
        name = "gpu" if device.startswith("cuda") else "laptop"
    return {**presets[name], **given, "device": device, "preset": name}


def add_flag(group, name, default, metadata, presets):
    text = f"{metadata['help']} (default: {shown(default)}"
    for preset, values in presets.items():
        if name in values:
            text += f"; {preset} preset: {shown(values[name])}"
    kind = {"type": type(default), "metavar": type(default).__name__.upper()}
    if isinstance(default, bool):
        kind = {"action": BooleanOptionalAction}
    elif isinstance(default, tuple):
        kind = {"type": int, "nargs": "+", "metavar": "N"}
    elif metadata["choices"]:
        kind = {"choices": metadata["choices"]}
    # no default here: only what was given counts
    help = (text + ")").replace("%", "%%")
    group.add_argument(f"--{name}", default=SUPPRESS, help=help, **kind)


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


def faster_dtype(device):
    """Return bfloat16 where its matmul is 1.2 times as fast; some CPUs emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(1024, 1024, device=device, dtype=dtype)
        timer = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
        seconds[dtype] = min(timer.blocked_autorange(min_run_time=0.1).times)
    faster = seconds[torch.float32] > 1.2 * seconds[torch.bfloat16]
    return "bfloat16" if faster else "float32"
