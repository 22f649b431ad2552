"""
What every script needs and no reader must know: how errors end, how files are written,
what the machine is. It imports none of our other files.
"""
import argparse
import ctypes
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import field, fields
from pathlib import Path


def fail(message):
    """Print one line on stderr and exit with code 2. Every mistake of a user ends so."""
    # of several processes the first says it
    if os.environ.get("RANK", "0") == "0":
        # on a terminal a progress bar may stand in the current line
        start = "\n" if sys.stderr.isatty() else ""
        print(f"{start}error: {message}", file=sys.stderr)
    raise SystemExit(2)


def run_script(main):
    """Run main(). Ctrl-C, or a reader of the output that has gone, end it quietly."""
    # a terminal may not know every character
    sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # as in `python sample.py | head`: the last flush must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        fail(error)


def write_whole(path, write):
    """Call write(file), then rename the file to path: there is never half a file at path.
    The name in between holds the process's id, so two runs cannot mix their files."""
    # a link stays a link
    path = path.resolve()
    if path.exists() and not path.is_file():
        fail(f"{path} is no ordinary file: give another name")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides a full disk, and even Ctrl-C, behind errors of its own
        cause = error
        while cause.__context__ is not None:
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        fail(f"{path} could not be written ({cause}); what was there before is kept")
    finally:
        with suppress(OSError):
            part.unlink()


def write_json(path, value):
    """Write value as JSON, all of it or nothing, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(json.dumps(value).encode()))


def commit():
    """Return the git commit that is checked out here, "-dirty" if files have changed."""
    here = shlex.quote(str(Path(__file__).resolve().parent))
    return subprocess.getoutput(f"git -C {here} describe --always --dirty 2>&-")


def default_device():
    """Return the accelerator that can be used here, or "cpu"."""
    import torch
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def machine_name(device):
    """Return what a log says of the hardware. device: "cpu", "cuda", ..."""
    import torch
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    name = f"{platform.machine()} with {capability}, {os.cpu_count()} cores"
    return name if device == "cpu" else f"{device}, {name}"


def to_device(tensor, device):
    """Copy a tensor from the host to a device. A GPU copies from pinned memory when its turn
    comes; for any other memory the host may have to wait until then."""
    if str(device).startswith("cuda"):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def peak_bytes(device):
    """Return the most memory held so far, by the process or by an accelerator's tensors."""
    import torch
    if device != "cpu":
        return torch.accelerator.max_memory_allocated(torch.device(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory():
    """Return the bytes of host memory that can be had; 0 where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    kilobytes = meminfo.read_text().partition("MemAvailable:")[2].split()[0]
    return int(kilobytes) * 1024


def keep_freed_memory():
    """Have glibc keep large freed blocks. By default each step maps and clears its
    activations anew, which takes a quarter of a step on a CPU (LOG.md)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-4, 0)
        # M_TRIM_THRESHOLD: keep up to 2 GB
        libc.mallopt(-1, 2 ** 31 - 1)


def new_figure(layout="constrained", **size):
    """Return a matplotlib Figure. It is drawn into a file, so no backend is needed; the
    one that a notebook leaves in the environment must not be looked for."""
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure
    return Figure(layout=layout, **size)


def make_parser(doc, usage):
    """Return an argument parser whose --help shows doc, and whose errors are one line."""
    parser = argparse.ArgumentParser(description=doc, usage=usage, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    return parser


def opt(default, help, choices=None, least=None, most=sys.float_info.max, group=None):
    """Return a dataclass field that train.py turns into a flag, with its choices or limits."""
    return field(default=default, metadata=dict(help=help, choices=choices, least=least,
                                                most=most, group=group))


def check_fields(config):
    """Raise ValueError for a field of a dataclass that breaks its choices or limits."""
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata
        if limits.get("choices") and value not in limits["choices"]:
            raise ValueError(f"{f.name} {value!r}: must be one of {limits['choices']}")
        least, most = limits.get("least"), limits.get("most")
        # infinity is above the largest float, and nan fails each comparison
        if least is not None and not least <= value <= most:
            upper = f", at most {most}" if most < sys.float_info.max else ""
            raise ValueError(f"{f.name} {value}: must be at least {least}{upper}")
