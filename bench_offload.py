"""
What does it cost to keep Engram's table in host memory? Predict it, then measure it.

    python bench_offload.py                      # two to four minutes on two CPU cores
    python bench_offload.py --link_gbps 0        # without the simulated link
    python bench_offload.py --full --out gpu     # more tables; on a GPU also the paper's setting
    python bench_offload.py --plot --out DIR     # draw the pictures of DIR/offload.json again

The idea: row numbers are known before the forward pass, so the transfer runs beside the blocks
before the memory. What is left exposed is max(0, bytes / bandwidth - compute before the memory).

Four arms take turns in one process on the same random tokens (nearly every row read is a new one,
the worst case): no Engram; the table resident on the device; in host memory and read at the place
of use (synchronous); the same, prefetched. Ratios and differences are taken within a round. Without
a GPU, host and device memory are the same RAM, so a link is SIMULATED: a gather takes at least
bytes / --link_gbps.
"""
from common import (commit, fail, free_memory, keep_freed_memory, machine_name, make_parser,
                    new_figure, run_script, write_whole)

import json
import os
import time
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

from engram import Engram, EngramConfig, RowAdam
from model import GPT, Cache, GPTConfig
from offload import Fetch

# Dense backbones (shared_hidden is their feed-forward layer) with one memory, in the second block.
# prompts: sequences x tokens; rows: of its tables, then those of --full.
CPU = {"shape": dict(n_layer=6, n_head=4, n_embd=256, shared_hidden=1024, vocab_size=4096),
       "width": 32, "dtype": torch.float32, "prompts": (2, 256), "rows": (100_000, 4_000_000),
       "full": (10_000, 100_000, 1_000_000, 4_000_000, 16_000_000)}
GPU = {"shape": dict(n_layer=12, n_head=16, n_embd=2048, shared_hidden=5632, vocab_size=32768),
       "width": 80, "dtype": torch.bfloat16, "prompts": (16, 512),
       "rows": (1_000_000, 20_000_000), "full": (1_000_000, 5_000_000, 20_000_000, 50_000_000)}
# The paper's setting: about 4B parameters, a memory as in Engram-27B (d_mem 1,280).
PAPER = {"shape": dict(n_layer=36, n_head=20, n_embd=2560, shared_hidden=9728, vocab_size=65536),
         "width": 80, "dtype": torch.bfloat16}
NEW = 32                                                 # tokens decoded in a sample
WITHOUT, RESIDENT, SYNCHRONOUS, PREFETCHED = "no Engram", "resident", "synchronous", "prefetched"
ON_DISK = "disk, prefetched"


class SlowFetch(Fetch):
    """A Fetch whose gather takes at least bytes / gbps, as over a slower link: SIMULATED."""

    def __init__(self, prefetch, gbps):
        super().__init__(prefetch)
        self.gbps = gbps

    def gather(self, table, row_ids, leaf, arrived):
        began = time.perf_counter()
        event = super().gather(table, row_ids, leaf, arrived)
        if self.gbps:
            spent = time.perf_counter() - began
            time.sleep(max(0, leaf.nbytes / self.gbps / 1e9 - spent))
        return event


# ---- what is set up ----------------------------------------------------------------------

class Bench:
    """A dense backbone of random weights, and arms that take turns on it: each a memory (or
    None) for block self.at, and a Fetch (or None, where the table is resident)."""

    def __init__(self, setup, device):
        self.device, self.dtype, self.width = device, setup["dtype"], setup["width"]
        self.cfg = GPTConfig(**setup["shape"], n_expert=0, block_size=1024, engram=self.memory(16))
        with torch.device(device):
            self.model = GPT(self.cfg, np.arange(self.cfg.vocab_size)).to(self.dtype).eval()
        self.at, self.gbps, self.arms = 1, 0, {WITHOUT: (None, None)}

    def memory(self, rows):
        return EngramConfig(blocks=(1,), heads=8, width=self.width, rows=max(1, rows // 16))

    def engram(self, rows, device, folder=None):
        """Return a memory with a table of about so many rows on device, or in a file in folder.

        Every page of the table is written: those that never were all map to one page of zeros, and
        a gather from that would be a lie."""
        last = self.cfg.vocab_size - 1
        module = Engram(self.memory(rows), 1, self.cfg.n_embd, last + 1, last, "meta")
        shape, module.table = module.table.shape, None
        module.to(self.device, self.dtype)
        if folder is None:
            module.table = torch.empty(shape, dtype=self.dtype, device=device).fill_(0.02)
        else:
            module.table = mapped(shape, self.dtype, folder).fill_(0.02)
        return module

    def set_table(self, rows, on_device=None, folder=None):
        """Make the arms for a table of so many rows. on_device: fewer, where the resident arm
        cannot hold them all; folder: for a table in a file, one more arm."""
        self.arms = {WITHOUT: (None, None)}
        self.use(WITHOUT)      # the last tables go before the next ones come
        host = resident = self.engram(rows, "cpu")
        if self.device != "cpu":
            resident = self.engram(on_device or rows, self.device)
        self.arms[RESIDENT] = resident, None
        self.arms[SYNCHRONOUS] = host, SlowFetch(False, self.gbps)
        self.arms[PREFETCHED] = host, SlowFetch(True, self.gbps)
        if folder is not None:
            self.arms[ON_DISK] = self.engram(rows, "cpu", folder), SlowFetch(True, self.gbps)

    def use(self, arm):
        module, fetch = self.arms[arm]
        for i, block in enumerate(self.model.blocks):
            block.engram = module if i == self.at else None
        if module is not None:
            module.fetch = fetch

    def ids(self, B, T):
        return torch.randint(self.cfg.vocab_size, (B, T), device=self.device)


def mapped(shape, dtype, folder):
    """Return a tensor in a file in folder. The file has no name: it goes with the process."""
    size = shape.numel() * dtype.itemsize
    with TemporaryFile(dir=folder) as file:
        # on a full disk fail here, where the system can tell, and not when a page is written
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        data = np.memmap(file, np.uint8, "r+", shape=size)
    return torch.from_numpy(data).view(dtype).view(shape)


# ---- what is timed -----------------------------------------------------------------------

def milliseconds(bench, run):
    """Call run(), everything queued on the device included; return how long it took."""
    if bench.device != "cpu":
        torch.accelerator.synchronize()
    began = time.perf_counter()
    run()
    if bench.device != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - began) * 1e3


@torch.inference_mode()
def time_prompts(bench, batches):
    def run():
        for idx in batches:
            bench.model(idx)
    return milliseconds(bench, run)


@torch.inference_mode()
def time_decoding(bench, tokens):
    """Decode tokens, [B, 1] each, after as many others. An id goes to the host at each step, as it
    must where the next token depends on it; here that is given (random weights repeat)."""
    cache = Cache(bench.cfg)
    bench.model(bench.ids(len(tokens[0]), len(tokens)), cache=cache)

    def run():
        for token in tokens:
            bench.model(token, cache=cache)[0].argmax(-1).tolist()
    return milliseconds(bench, run)


class Training:
    """A training step: forward, backward, AdamW for the backbone, RowAdam for the rows."""

    def __init__(self, bench):
        # the table in a file is for reading: what training writes there slows the others down
        bench.arms.pop(ON_DISK, None)
        bench.use(WITHOUT)
        modules = {module for module, _ in bench.arms.values() if module is not None}
        self.tables = {module: RowAdam([module.table]) for module in modules}
        parameters = [p for part in (bench.model, *modules) for p in part.parameters()]
        self.adam = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def __call__(self, bench, batches):
        def run():
            for idx in batches:
                reads = bench.model.read(idx)
                bench.model(idx, idx.roll(-1, 1), reads)[1].backward()
                self.adam.step()
                self.adam.zero_grad()
                if reads:
                    self.tables[bench.model.blocks[bench.at].engram].step(reads, 1e-5)
        return milliseconds(bench, run)


def measure_rounds(bench, time_one, n, make, arms=None):
    """Return {arm: ms [n]}: the arms in turn, each round with tokens of its own from make()."""
    times = {arm: [] for arm in arms or bench.arms}
    order = list(times)
    for i in range(n + 2):      # the first two rounds warm up
        batches, first = make(), i % len(order)
        for arm in order[first:] + order[:first]:
            bench.use(arm)
            times[arm].append(time_one(bench, batches))
    return {arm: np.array(ms[2:]) for arm, ms in times.items()}


@torch.inference_mode()
def predict(bench, batches, n):
    """Return, from medians of n measurements (at most 16), in ms: compute before the memory,
    transfer, what the memory's matrices should add, and what a prefetch should leave exposed. And
    the bytes of all reads, and of the largest."""
    host, fetch = bench.arms[PREFETCHED][0], Fetch(bench.device != "cpu")
    row_ids = [host.hash(bench.model.canonical[idx]).unique() for idx in batches]
    bench.use(WITHOUT)

    def compute(blocks):
        for idx in batches:
            rope = bench.model.cos[:idx.size(1)], bench.model.sin[:idx.size(1)]
            x = bench.model.embed(idx)
            for block in blocks:
                x = block(x, rope)

    def transfer():
        for ids in row_ids:
            fetch.start(host.table, ids)[2]()

    blocks = bench.model.blocks
    ms = [[milliseconds(bench, transfer), milliseconds(bench, lambda: compute(blocks[:bench.at])),
           milliseconds(bench, lambda: compute(blocks))] for _ in range(min(n, 16))]
    alone, before, all_blocks = np.median(ms, axis=0).tolist()
    sizes = [len(ids) * bench.width * bench.dtype.itemsize for ids in row_ids]
    # over a simulated link a transfer takes at least bytes / bandwidth
    over_link = sum(sizes) / bench.gbps / 1e6 if bench.gbps else 0
    whole = max(over_link, alone)
    share = count(host) / count(blocks)
    return {"bytes": sum(sizes), "largest": max(sizes), "before_ms": before, "transfer_ms": whole,
            "memory_ms": all_blocks * share, "exposed_ms": max(0.0, whole - before)}


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- what is printed ---------------------------------------------------------------------

COLUMNS = """
tokens/s: median, then 10th and 90th percentile of the rounds. lost: throughput against no Engram,
with the 95 % interval of its median. added: ms, resident over no Engram, the others over resident.
predicted: what was expected to be added, before anything was compared. on device: bytes there."""


def interval_of_median(x):
    """Return the median of x and its 95 % interval, by order statistics."""
    x = np.sort(x)
    low = max(0, int((len(x) - 1) / 2 - 0.98 * len(x) ** 0.5))
    return [float(np.median(x)), float(x[low]), float(x[-1 - low])]


def describe_link(gbps):
    return f"SIMULATED link of {gbps:.2g} GB/s" if gbps else "no simulated link"


def compare(bench, what, time_one, n, make, tokens, passes=1):
    """Predict, measure and print one table. Return its figures, with the lines that were printed.

    make() returns the batches of a sample, which counts for so many tokens. passes: 3 with a
    backward, which costs twice a forward."""
    p = predict(bench, make(), n)
    host, resident = (bench.arms[arm][0].table for arm in (PREFETCHED, RESIDENT))
    table = {"what": what, "n": n, "parameters": host.numel(),
             "bytes_per_token": p["bytes"] / tokens, "simulated_gbps": bench.gbps,
             "predicted": p}
    # what is predicted is printed before anything is measured
    table["lines"] = lines_of_prediction(table, len(host), host.nbytes)
    print("", *table["lines"], sep="\n", flush=True)
    times = measure_rounds(bench, time_one, n, make)
    expected = {WITHOUT: 0.0, RESIDENT: p["memory_ms"] * passes, SYNCHRONOUS: p["transfer_ms"]}
    held = {WITHOUT: 0, RESIDENT: resident.nbytes}
    arms = {}
    for arm, ms in times.items():
        base = times[WITHOUT if arm in (WITHOUT, RESIDENT) else RESIDENT]
        arms[arm] = {
            "tokens_per_s": np.percentile(tokens / ms * 1e3, (50, 10, 90)).tolist(),
            "lost_percent": interval_of_median(100 - 100 * times[WITHOUT] / ms),
            "lost_to_resident_percent": interval_of_median(100 - 100 * times[RESIDENT] / ms),
            "added_ms": interval_of_median(ms - base),
            "predicted_ms": expected.get(arm, p["exposed_ms"]),
            "bytes_on_device": held.get(arm, p["largest"]), "ms": ms.round(3).tolist()}
    lines = lines_of_arms(arms)
    print(*lines, sep="\n", flush=True)
    return {**table, "arms": arms, "lines": table["lines"] + lines}


def lines_of_prediction(table, rows, size):
    p = table["predicted"]
    return [f"{table['what']}, n={table['n']}; table of {rows:,} rows = "
             f"{table['parameters']:,} parameters, {size / 1e6:,.0f} MB",
             f"  predicted: {table['bytes_per_token']:,.0f} B per token, {p['bytes'] / 1e6:.2f} "
             f"MB, {describe_link(table['simulated_gbps'])}: {p['transfer_ms']:.2f} ms; compute "
             f"before the memory {p['before_ms']:.2f} ms"]


def lines_of_arms(arms):
    lines = [f"  {'':18s}{'tokens/s':>9s}{'p10':>8s}{'p90':>8s}{'lost, % (95 %)':>23s}"
             f"{'added ms':>9s}{'predicted':>10s}{'on device':>13s}"]
    for arm, a in arms.items():
        lines.append("  {:18s}{:9,.0f}{:8,.0f}{:8,.0f}{:6.1f} ({:5.1f} to {:5.1f}){:9.2f}{:10.2f}"
                     "{:10,.1f} MB".format(arm, *a["tokens_per_s"], *a["lost_percent"],
                                           a["added_ms"][0], a["predicted_ms"],
                                           a["bytes_on_device"] / 1e6))
    lines.append("  the memory itself costs {:.1f} %, the transfer that a prefetch leaves exposed "
                 "{:.1f} % ({:.1f} to {:.1f})".format(
                     arms[RESIDENT]["lost_percent"][0],
                     *arms[PREFETCHED]["lost_to_resident_percent"]))
    return lines


def conclusion(table):
    """Return the sentence that says what a table of prompts means."""
    slow, (middle, low, high) = (table["arms"][arm]["lost_to_resident_percent"]
                                 for arm in (SYNCHRONOUS, PREFETCHED))
    text = (f"Against a resident table, reads at the place of use lost {slow[0]:.1f} % of the "
            f"throughput, prefetched ones {middle:.1f} % ({low:.1f} to {high:.1f}).")
    if high - low > 2:
        text += (" That interval is too wide to tell 1 % from nothing: run it on an idle machine, "
                 "or with more --rounds.")
    return text


def crossover(bench, n, make):
    """Put the memory in one block after the other: how much compute hides the read?"""
    points = []
    lines = [f"crossover, n={n}, {describe_link(bench.gbps)}: exposed transfer of a prefetch, "
             "over resident",
             "  block  compute before  transfer  predicted  measured ms (95 %)"]
    print("", *lines, sep="\n", flush=True)
    for at in range(bench.cfg.n_layer):
        bench.at = at
        p = predict(bench, make(), n)
        times = measure_rounds(bench, time_prompts, n, make, (RESIDENT, PREFETCHED))
        p["measured_ms"] = interval_of_median(times[PREFETCHED] - times[RESIDENT])
        points.append({"block": at, **p})
        lines.append("{:7d}{:16.2f}{:10.2f}{:11.2f}{:10.2f} ({:.2f} to {:.2f})".format(
            at, p["before_ms"], p["transfer_ms"], p["exposed_ms"], *p["measured_ms"]))
        print(lines[-1], flush=True)
    return {"simulated_gbps": bench.gbps, "n": n, "points": points, "lines": lines}


def draw(result, out):
    """Draw throughput lost against table size, and the crossover."""
    def new_axes():
        figure = new_figure(figsize=(7, 5))
        axes = figure.subplots()
        axes.axhline(0, color="grey", linewidth=0.8)
        return figure, axes

    def errorbar(axes, x, y, style, label):
        middle, low, high = np.array(y).T
        axes.errorbar(x, middle, (middle - low, high - middle), fmt=style, capsize=3, label=label)

    def save(figure, axes, name):
        axes.legend()
        write_whole(out / name, lambda file: figure.savefig(file, dpi=110, format="png"))
        print(f"picture: {out / name}")

    tables, cross = result["prompts"], result["crossover"]
    figure, axes = new_axes()
    for arm in tables[0]["arms"]:
        if arm != WITHOUT:
            errorbar(axes, [t["parameters"] for t in tables],
                     [t["arms"][arm]["lost_percent"] for t in tables], "o-", arm)
    axes.set(xscale="log", xlabel="table parameters",
             ylabel="throughput lost against no Engram (%)")
    axes.set_title("What a memory costs in throughput, by the size of its table\n"
                   f"(prompts, {describe_link(tables[0]['simulated_gbps'])})", fontsize=10)
    save(figure, axes, "lost.png")
    figure, axes = new_axes()
    before = [point["before_ms"] for point in cross["points"]]
    axes.plot(before, [point["exposed_ms"] for point in cross["points"]], "-", label="predicted")
    errorbar(axes, before, [point["measured_ms"] for point in cross["points"]], "ko", "measured")
    axes.set(xlabel="compute of the blocks before the memory (ms)",
             ylabel="exposed transfer of a prefetch (ms)")
    axes.set_title("A prefetch is free once the blocks before it take longer than the transfer\n"
                   f"({describe_link(cross['simulated_gbps'])})", fontsize=10)
    save(figure, axes, "crossover.png")


# ---- the command -------------------------------------------------------------------------

def measure(args, out):
    """Run everything but the paper's setting. Return its figures."""
    setup, half = CPU if args.device == "cpu" else GPU, max(6, args.rounds // 2)
    sizes, (B, T) = sorted(args.rows or setup["full" if args.full else "rows"]), setup["prompts"]
    # the table and, in training, its two moments
    need = 3 * sizes[-1] * setup["width"] * setup["dtype"].itemsize
    if 0 < free_memory() < need:
        fail(f"not enough memory: training a table of {sizes[-1]:,} rows takes {need / 1e9:,.1f} "
             f"GB, {free_memory() / 1e9:.1f} GB are free; give fewer --rows")
    bench, folder = Bench(setup, args.device), out if args.disk else None

    def prompts():
        return [bench.ids(B, T)]

    # the link: as given; on a CPU, one over which 2/3 of the compute before the memory hide it
    bench.gbps = args.link_gbps or 0
    if args.link_gbps is None and args.device == "cpu":
        bench.set_table(sizes[-1])
        p = predict(bench, prompts(), half)
        bench.gbps = float(f"{1.5 * p['bytes'] / p['before_ms'] / 1e6:.2g}")
    tables, others = [], []
    for rows in sizes:
        bench.set_table(rows, folder=folder)
        tables.append(compare(bench, f"prompts, {B} x {T} tokens", time_prompts, args.rounds,
                              prompts, B * T))
        if len(tables) == 1:
            print(COLUMNS)
    batches = [1, 8, 64] if args.full else [1]
    for batch in batches:
        def tokens(batch=batch):
            return bench.ids(batch, NEW).split(1, dim=1)
        others.append(compare(bench, f"decoding, batch {batch}", time_decoding, half, tokens,
                              batch * NEW))
    others.append(compare(bench, f"a training step, {B} x {T} tokens", Training(bench),
                          args.rounds, prompts, B * T, passes=3))
    # over a link four times slower it takes two to three blocks to hide the transfer
    if args.link_gbps is None:
        bench.gbps /= 4
    bench.set_table(sizes[0])
    cross = crossover(bench, half, prompts)
    print("", conclusion(tables[-1]), sep="\n")
    return {"backbone": setup["shape"], "prompts": tables, "others": others, "crossover": cross}


def paper(args):
    """Run the paper's setting, as far as it is told: a dense backbone of about 4B, bf16, one memory
    in the second block, 512 prompts of Uniform(100, 1024) tokens, and as many table parameters as
    70 % of free memory holds. Ours: prompts sorted by length, 16 a batch, padded with end of text
    (only real tokens count); the resident arm has 20M rows on the device."""
    bench = Bench(PAPER, args.device)
    bench.gbps = args.link_gbps or 0
    bench.set_table(int(0.7 * free_memory() / 2 / bench.width), on_device=20_000_000)
    lengths = np.sort(np.random.default_rng(0).integers(100, 1025, 512))

    def prompts():
        batches = []
        for some in np.split(lengths, 32):
            idx = bench.ids(16, int(some[-1]))
            for text, length in zip(idx, some):
                text[length:] = bench.cfg.vocab_size - 1
            batches.append(idx)
        return batches

    def tokens():
        return bench.ids(64, NEW).split(1, dim=1)

    size = count(bench.model) / 1e9
    return [compare(bench, f"the paper's setting, {size:.2f}B dense: prefill of 512 prompts",
                    time_prompts, 5, prompts, int(lengths.sum())),
            compare(bench, "the paper's setting: decoding, batch 64", time_decoding, 9, tokens,
                    64 * NEW)]


def read_flags(argv):
    parser, gpu = make_parser(__doc__, "bench_offload.py [options]"), torch.cuda.is_available()
    add = parser.add_argument
    add("--full", action="store_true", help="more tables and batches; on a GPU the paper's setting")
    add("--disk", action="store_true", help="one more arm: the table in a mapped file under --out")
    add("--link_gbps", type=float, help="speed of the SIMULATED link, 0: none (default: on a GPU "
        "0, else such that 2/3 of the compute before the memory hide a prompt's transfer)")
    add("--rows", type=int, nargs="+", help="rows of the tables (default: by device)")
    add("--rounds", type=int, default=32, help="turns of each arm; half of it in decoding and at "
        "the crossover (default: %(default)s)")
    add("--device", default=("cpu", "cuda")[gpu], choices=("cpu", "cuda")[:1 + gpu],
        help="cuda where there is a GPU (default here: %(default)s)")
    add("--out", default="out_offload", help="folder for JSON and plots (default: %(default)s)")
    add("--plot", action="store_true", help="measure nothing, draw --out/offload.json again")
    args = parser.parse_args(argv)
    if args.link_gbps is not None and not 0 <= args.link_gbps < float("inf"):
        fail(f"link_gbps {args.link_gbps}: must be 0 or more")
    if args.rounds < 6:
        fail(f"rounds {args.rounds}: an interval needs 6 or more")
    if args.rows and min(args.rows) < 16:
        fail(f"rows {min(args.rows)}: 16 heads need 16 or more")
    return args


def main(argv=None):
    args = read_flags(argv)
    out, began = Path(args.out), time.time()
    path = out / "offload.json"
    if args.plot:
        if not path.exists():
            fail(f"there is no {path}: run without --plot")
        try:
            return draw(json.loads(path.read_text()), out)
        except (ValueError, KeyError) as error:
            fail(f"{path} is damaged ({type(error).__name__}: {error})")
    if args.device == "cpu":
        keep_freed_memory()
        # a core for the worker
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    out.mkdir(parents=True, exist_ok=True)
    result = {"commit": commit(), "device": machine_name(args.device),
              "torch": str(torch.__version__), "threads": torch.get_num_threads(),
              "args": vars(args), **measure(args, out)}

    def save():
        write_whole(path, lambda file: file.write(json.dumps(result, indent=1).encode()))

    save()
    draw(result, out)
    if args.full and args.device != "cpu":
        result["paper"] = paper(args)
        save()
    print(f"all figures: {path}; {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_script(main)
