"""
What does it cost to keep Engram's table in host memory? Predict it, then measure it.

    python bench_offload.py                      # two to four minutes on two CPU cores
    python bench_offload.py --link_gbps 0        # without the simulated link
    python bench_offload.py --full --out gpu     # more tables; on a GPU the paper's too
    python bench_offload.py --plot --out DIR     # draw DIR/offload.json again

The idea: row numbers are known before the forward pass, so the transfer runs beside the
blocks before the memory. Exposed is max(0, bytes / bandwidth - compute before the memory).

Arms take turns in one process on the same random tokens (nearly every row read is a new
one, the worst case). Ratios and differences are taken within a round. Without a GPU, host
and device memory are the same RAM, so a link is SIMULATED: a gather takes at least bytes /
--link_gbps.
"""
import json
import os
import time
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch

from common import (commit, fail, free_memory, keep_freed_memory, machine_name,
                    make_parser, new_figure, run_script, write_whole)
from engram import Engram, EngramConfig, RowAdam
from model import GPT, Cache, GPTConfig
from offload import Fetch

# Dense backbones (shared_hidden is their feed-forward layer) with one memory, in block 1.
# prompts: sequences x tokens; rows: of the tables, then those of --full.
CPU = {"shape": dict(n_layer=6, n_head=4, n_embd=256, shared_hidden=1024, vocab_size=4096),
       "width": 32, "dtype": torch.float32, "prompts": (2, 256),
       "rows": (100_000, 4_000_000),
       "full": (10_000, 100_000, 1_000_000, 4_000_000, 16_000_000)}
GPU = {"shape": dict(n_layer=12, n_head=16, n_embd=2048, shared_hidden=5632,
                     vocab_size=32768),
       "width": 80, "dtype": torch.bfloat16, "prompts": (16, 512),
       "rows": (1_000_000, 20_000_000),
       "full": (1_000_000, 5_000_000, 20_000_000, 50_000_000)}
# The paper's setting: about 4B parameters, a memory as in Engram-27B (d_mem 1,280).
PAPER = {"shape": dict(n_layer=36, n_head=20, n_embd=2560, shared_hidden=9728,
                       vocab_size=65536),
         "width": 80, "dtype": torch.bfloat16}
# tokens decoded in a sample
NEW = 32
# the arms: synchronous is read at the place of use, disk is a mapped file
WITHOUT, RESIDENT, SYNCHRONOUS = "no Engram", "resident", "synchronous"
PREFETCHED, ON_DISK = "prefetched", "disk, prefetched"


# ---- what is set up --------------------------------------------------------------------

class SlowFetch(Fetch):
    """A Fetch whose gather takes at least bytes / gbps, as over a slower link."""

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


class Bench:
    """A dense backbone of random weights, and arms that take turns on it: each a memory (or
    None) for block self.at, and a Fetch (or None, where the table is resident)."""

    def __init__(self, setup, device):
        self.device, self.dtype, self.width = device, setup["dtype"], setup["width"]
        self.cfg = GPTConfig(**setup["shape"], n_expert=0, block_size=1024,
                             engram=self.memory(16))
        with torch.device(device):
            model = GPT(self.cfg, np.arange(self.cfg.vocab_size))
        self.model = model.to(self.dtype).eval()
        self.at, self.gbps, self.arms = 1, 0, {WITHOUT: (None, None)}

    def memory(self, rows):
        return EngramConfig(blocks=(1,), heads=8, width=self.width, rows=max(1, rows // 16))

    def engram(self, rows, device, folder=None):
        """Return a memory whose table is on device, or in a file in folder."""
        last = self.cfg.vocab_size - 1
        module = Engram(self.memory(rows), 1, self.cfg.n_embd, last + 1, last, "meta")
        shape, module.table = module.table.shape, None
        module.to(self.device, self.dtype)
        if folder is None:
            table = torch.empty(shape, dtype=self.dtype, device=device)
        else:
            # the file loses its name here, and goes with the process
            with NamedTemporaryFile(dir=folder) as file:
                # a full disk is found here, not when a page is written
                os.posix_fallocate(file.fileno(), 0, shape.numel() * self.dtype.itemsize)
                table = torch.from_file(file.name, True, shape.numel(), dtype=self.dtype)
        # write every page: those that never were written are all one page of zeros
        module.table = table.view(shape).fill_(0.02)
        return module

    def set_table(self, rows, on_device=None, folder=None):
        """Make the arms for a table of so many rows. on_device: fewer, where the resident
        arm cannot hold them all; folder: for a table in a file, one more arm."""
        # the last tables go before the next ones come
        self.arms = {WITHOUT: (None, None)}
        self.use(WITHOUT)
        host = resident = self.engram(rows, "cpu")
        if self.device != "cpu":
            resident = self.engram(on_device or rows, self.device)
        self.arms[RESIDENT] = resident, None
        self.arms[SYNCHRONOUS] = host, SlowFetch(False, self.gbps)
        self.arms[PREFETCHED] = host, SlowFetch(True, self.gbps)
        if folder:
            disk = self.engram(rows, "cpu", folder)
            self.arms[ON_DISK] = disk, SlowFetch(True, self.gbps)

    def use(self, arm):
        """Give the model the memory of an arm."""
        module, fetch = self.arms[arm]
        for block in self.model.blocks:
            block.engram = None
        self.model.blocks[self.at].engram = module
        if module is not None:
            module.fetch = fetch

    def ids(self, B, T):
        return torch.randint(self.cfg.vocab_size, (B, T), device=self.device)

    def now(self):
        """Return the time in ms at which all that is queued on the device is done."""
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() * 1e3


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- what is timed ---------------------------------------------------------------------

@torch.inference_mode()
def time_prompts(bench, batches):
    """Return how many ms the forward passes take."""
    began = bench.now()
    for idx in batches:
        bench.model(idx)
    return bench.now() - began


@torch.inference_mode()
def time_decoding(bench, tokens):
    """Return how many ms it takes to decode tokens, [B, 1] each, after as many others."""
    cache = Cache(bench.cfg)
    bench.model(bench.ids(len(tokens[0]), len(tokens)), cache=cache)
    began = bench.now()
    for token in tokens:
        # to the host, as it must where the next token depends on it
        bench.model(token, cache=cache)[0].argmax(-1).tolist()
    return bench.now() - began


class Training:
    """Steps of training: AdamW for the backbone, RowAdam for the rows."""

    def __init__(self, bench):
        # what training writes to a table in a file would slow the other arms down
        bench.arms.pop(ON_DISK, None)
        bench.use(WITHOUT)
        self.tables, parameters = {}, list(bench.model.parameters())
        for module in {bench.arms[arm][0] for arm in (RESIDENT, PREFETCHED)}:
            self.tables[module] = RowAdam([module.table])
            parameters += module.parameters()
        self.adam = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def time(self, bench, batches):
        """Return how many ms a step on each batch takes."""
        began = bench.now()
        for idx in batches:
            reads = bench.model.read(idx)
            bench.model(idx, idx.roll(-1, 1), reads)[1].backward()
            self.adam.step()
            self.adam.zero_grad()
            if reads:
                self.tables[bench.model.blocks[bench.at].engram].step(reads, 1e-5)
        return bench.now() - began


def measure_rounds(bench, time_one, n, make, arms=None):
    """Return {arm: ms [n]}: the arms in turn, each round with new tokens from make()."""
    times = {arm: [] for arm in arms or bench.arms}
    order = list(times)
    # the first two rounds warm up
    for i in range(n + 2):
        batches, first = make(), i % len(order)
        for arm in order[first:] + order[:first]:
            bench.use(arm)
            times[arm].append(time_one(bench, batches))
    return {arm: np.array(ms[2:]) for arm, ms in times.items()}


@torch.inference_mode()
def time_blocks(bench, batches, n_blocks):
    """Return how many ms the first blocks take."""
    began = bench.now()
    for idx in batches:
        rope = bench.model.cos[:idx.size(1)], bench.model.sin[:idx.size(1)]
        x = bench.model.embed(idx)
        for block in bench.model.blocks[:n_blocks]:
            x = block(x, rope)
    return bench.now() - began


@torch.inference_mode()
def time_transfer(bench, table, row_ids):
    """Return how many ms it takes to read these rows, and nothing else."""
    fetch = Fetch(prefetch=False)
    began = bench.now()
    for ids in row_ids:
        _, _, ready = fetch.start(table, ids)
        ready()
    return bench.now() - began


def predict(bench, batches, n):
    """Return, from medians, in ms: compute before the memory, transfer, what the memory's
    matrices should add, and what a prefetch should leave exposed; and the bytes read."""
    host = bench.arms[PREFETCHED][0]
    row_ids = [host.hash(bench.model.canonical[idx]).unique() for idx in batches]
    bench.use(WITHOUT)
    ms = []
    for _ in range(min(n, 16)):
        ms.append((time_transfer(bench, host.table, row_ids),
                   time_blocks(bench, batches, bench.at),
                   time_blocks(bench, batches, bench.cfg.n_layer)))
    transfer, before, all_blocks = np.median(ms, axis=0).tolist()
    sizes = [len(ids) * bench.width * bench.dtype.itemsize for ids in row_ids]
    # over a simulated link a transfer takes at least bytes / bandwidth
    if bench.gbps:
        transfer = max(transfer, sum(sizes) / bench.gbps / 1e6)
    share = count(host) / count(bench.model.blocks)
    return {"bytes": sum(sizes), "largest": max(sizes), "before_ms": before,
            "transfer_ms": transfer, "memory_ms": all_blocks * share,
            "exposed_ms": max(0.0, transfer - before)}


# ---- what is compared and printed ------------------------------------------------------

COLUMNS = """
tokens/s: median, then 10th and 90th percentile of the rounds. lost: throughput against no
Engram, with the 95 % interval of its median. added: ms, resident over no Engram, the others
over resident. predicted: what was expected to be added, before anything was compared. on
device: bytes there."""


def interval_of_median(x):
    """Return the median of x and its 95 % interval, by order statistics."""
    x = np.sort(x)
    low = max(0, int((len(x) - 1) / 2 - 0.98 * len(x) ** 0.5))
    return [float(np.median(x)), float(x[low]), float(x[-1 - low])]


def describe_link(gbps):
    return f"SIMULATED link of {gbps:.2g} GB/s" if gbps else "no simulated link"


def compare(bench, what, time_one, n, make, tokens, passes=1):
    """Predict, measure and print one table. Return it. make() returns the batches of a
    sample of so many tokens. passes: 3 with a backward, which costs twice a forward."""
    p = predict(bench, make(), n)
    host, resident = (bench.arms[arm][0].table for arm in (PREFETCHED, RESIDENT))
    table = {"what": what, "n": n, "parameters": host.numel(),
             "bytes_per_token": p["bytes"] / tokens, "simulated_gbps": bench.gbps,
             "predicted": p}
    # what is predicted is printed before anything is measured
    lines = lines_of_prediction(table, host)
    print("", *lines, sep="\n", flush=True)
    times = measure_rounds(bench, time_one, n, make)
    # the arms that are not named are prefetched
    expected = {WITHOUT: 0.0, RESIDENT: p["memory_ms"] * passes,
                SYNCHRONOUS: p["transfer_ms"]}
    held = {WITHOUT: 0, RESIDENT: resident.nbytes}
    table["arms"] = {arm: figures(arm, times, tokens) for arm in times}
    for arm, figure in table["arms"].items():
        figure["predicted_ms"] = expected.get(arm, p["exposed_ms"])
        figure["bytes_on_device"] = held.get(arm, p["largest"])
    more = lines_of_arms(table["arms"])
    print(*more, sep="\n", flush=True)
    table["lines"] = lines + more
    return table


def figures(arm, times, tokens):
    """Return what the times of all arms say of one of them."""
    ms, without, resident = times[arm], times[WITHOUT], times[RESIDENT]
    base = without if arm in (WITHOUT, RESIDENT) else resident
    return {"tokens_per_s": np.percentile(tokens / ms * 1e3, (50, 10, 90)).tolist(),
            "lost_percent": interval_of_median(100 - 100 * without / ms),
            "lost_to_resident_percent": interval_of_median(100 - 100 * resident / ms),
            "added_ms": interval_of_median(ms - base), "ms": ms.round(3).tolist()}


def lines_of_prediction(table, host):
    p = table["predicted"]
    return [f"{table['what']}, n={table['n']}; table of {len(host):,} rows = "
            f"{table['parameters']:,} parameters, {host.nbytes / 1e6:,.0f} MB",
            f"  predicted: {table['bytes_per_token']:,.0f} B per token, "
            f"{p['bytes'] / 1e6:.2f} MB, {describe_link(table['simulated_gbps'])}: "
            f"{p['transfer_ms']:.2f} ms; compute before the memory {p['before_ms']:.2f} ms"]


def lines_of_arms(arms):
    lines = [f"  {'':18s}{'tokens/s':>9s}{'p10':>8s}{'p90':>8s}{'lost, % (95 %)':>23s}"
             f"{'added ms':>9s}{'predicted':>10s}{'on device':>13s}"]
    for arm, a in arms.items():
        speed = "{:9,.0f}{:8,.0f}{:8,.0f}".format(*a["tokens_per_s"])
        lost = "{:6.1f} ({:5.1f} to {:5.1f})".format(*a["lost_percent"])
        lines.append(f"  {arm:18s}{speed}{lost}{a['added_ms'][0]:9.2f}"
                     f"{a['predicted_ms']:10.2f}{a['bytes_on_device'] / 1e6:10,.1f} MB")
    exposed, low, high = arms[PREFETCHED]["lost_to_resident_percent"]
    memory = arms[RESIDENT]["lost_percent"][0]
    lines.append(f"  the memory itself costs {memory:.1f} %, the transfer that a prefetch "
                 f"leaves exposed {exposed:.1f} % ({low:.1f} to {high:.1f})")
    return lines


def conclusion(table):
    """Return the sentence that says what a table of prompts means."""
    slow = table["arms"][SYNCHRONOUS]["lost_to_resident_percent"][0]
    middle, low, high = table["arms"][PREFETCHED]["lost_to_resident_percent"]
    said = (f"Against a resident table, reads at the place of use lost {slow:.1f} % of the "
            f"throughput, prefetched ones {middle:.1f} % ({low:.1f} to {high:.1f}).")
    if high - low > 2:
        said += " That interval is too wide to tell 1 % from nothing: give more --rounds."
    return said


def crossover(bench, n, make):
    """Put the memory in one block after the other: how much compute hides the read?"""
    lines = [f"crossover, n={n}, {describe_link(bench.gbps)}: exposed transfer of a "
             "prefetch, over resident",
             "  block  compute before  transfer  predicted  measured ms (95 %)"]
    print("", *lines, sep="\n", flush=True)
    points = []
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


def save(result, path):
    write_whole(path, lambda file: file.write(json.dumps(result, indent=1).encode()))


def draw(cross, path):
    before = [point["before_ms"] for point in cross["points"]]
    predicted = [point["exposed_ms"] for point in cross["points"]]
    middle, low, high = np.array([point["measured_ms"] for point in cross["points"]]).T
    figure = new_figure(figsize=(7, 5))
    axes = figure.subplots()
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.plot(before, predicted, "-", label="predicted")
    axes.errorbar(before, middle, (middle - low, high - middle), fmt="ko", capsize=3,
                  label="measured")
    axes.set(xlabel="compute of the blocks before the memory (ms)",
             ylabel="exposed transfer of a prefetch (ms)")
    axes.set_title("A prefetch is free once the blocks before it take longer than the "
                   f"transfer\n({describe_link(cross['simulated_gbps'])})", fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


# ---- the command -----------------------------------------------------------------------

def measure(args, out):
    """Run everything but the paper's setting. Return its figures."""
    setup = CPU if args.device == "cpu" else GPU
    sizes = sorted(args.rows or setup["full" if args.full else "rows"])
    # the table and, in training, its two moments
    need = 3 * sizes[-1] * setup["width"] * setup["dtype"].itemsize
    if 0 < free_memory() < need:
        fail(f"not enough memory: training a table of {sizes[-1]:,} rows takes "
             f"{need / 1e9:,.1f} GB, {free_memory() / 1e9:.1f} are free; give fewer --rows")
    (B, T), half = setup["prompts"], max(6, args.rounds // 2)
    bench = Bench(setup, args.device)
    bench.gbps = args.link_gbps or 0
    # by default, on a CPU: a link over which 2/3 of the compute before the memory hide it
    if args.link_gbps is None and args.device == "cpu":
        bench.set_table(sizes[-1])
        p = predict(bench, [bench.ids(B, T)], half)
        bench.gbps = float(f"{1.5 * p['bytes'] / p['before_ms'] / 1e6:.2g}")
    tables, others = [], []
    for rows in sizes:
        bench.set_table(rows, folder=out if args.disk else None)
        tables.append(compare(bench, f"prompts, {B} x {T} tokens", time_prompts,
                              args.rounds, lambda: [bench.ids(B, T)], B * T))
        if len(tables) == 1:
            print(COLUMNS)
    for batch in [1, 8, 64] if args.full else [1]:
        others.append(compare(bench, f"decoding, batch {batch}", time_decoding, half,
                              partial(new_tokens, bench, batch), batch * NEW))
    training = Training(bench)
    others.append(compare(bench, f"a training step, {B} x {T} tokens", training.time,
                          args.rounds, lambda: [bench.ids(B, T)], B * T, passes=3))
    # over a link four times slower it takes two to three blocks to hide the transfer
    if args.link_gbps is None:
        bench.gbps /= 4
    bench.set_table(sizes[0])
    cross = crossover(bench, half, lambda: [bench.ids(B, T)])
    print("", conclusion(tables[-1]), sep="\n")
    return {"backbone": setup["shape"], "prompts": tables, "others": others,
            "crossover": cross}


def new_tokens(bench, B):
    """Return the tokens [B, 1] of each step of decoding."""
    return bench.ids(B, NEW).split(1, dim=1)


def padded_prompts(bench, lengths):
    """Return prompts of these lengths, 16 a batch, padded with end of text."""
    batches = []
    for some in np.split(lengths, len(lengths) // 16):
        idx = bench.ids(16, int(some[-1]))
        for text, length in zip(idx, some):
            text[length:] = bench.cfg.vocab_size - 1
        batches.append(idx)
    return batches


def paper(args):
    """Run the paper's setting: a dense backbone of about 4B, 512 prompts of Uniform(100,
    1024) tokens, a table that fills 70 % of free memory. Ours: prompts are sorted by
    length, only real tokens count, and the resident table has 20M rows."""
    bench = Bench(PAPER, args.device)
    bench.gbps = args.link_gbps or 0
    bench.set_table(int(0.7 * free_memory() / 2 / bench.width), on_device=20_000_000)
    lengths = np.sort(np.random.default_rng(0).integers(100, 1025, 512))
    what = f"the paper's setting, {count(bench.model) / 1e9:.2f}B dense"
    return [compare(bench, f"{what}: prefill of 512 prompts", time_prompts, 5,
                    partial(padded_prompts, bench, lengths), int(lengths.sum())),
            compare(bench, f"{what}: decoding, batch 64", time_decoding, 9,
                    partial(new_tokens, bench, 64), 64 * NEW)]


def read_flags(argv):
    parser = make_parser(__doc__, "bench_offload.py [options]")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("--full", action="store_true", help="more tables; on a GPU the paper's setting too")
    add("--disk", action="store_true", help="one more arm: a table in a mapped file")
    add("--link_gbps", type=float, help="speed of the SIMULATED link, 0: none (default: on "
        "a CPU such that 2/3 of the compute before the memory hide a transfer)")
    add("--rows", type=int, nargs="+", help="rows of the tables (default: by device)")
    add("--rounds", type=int, default=32, help="turns of each arm (default: 32)")
    add("--device", default=devices[-1], choices=devices)
    add("--out", default="out_offload", help="folder for results (default: out_offload)")
    add("--plot", action="store_true", help="only draw --out/offload.json again")
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
    path, picture = out / "offload.json", out / "crossover.png"
    if args.plot:
        try:
            return draw(json.loads(path.read_text())["crossover"], picture)
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{path} is damaged ({type(error).__name__}: {error})")
    if args.device == "cpu":
        keep_freed_memory()
        # a core for the worker
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    out.mkdir(parents=True, exist_ok=True)
    result = {"commit": commit(), "device": machine_name(args.device),
              "torch": str(torch.__version__), "threads": torch.get_num_threads(),
              "args": vars(args), **measure(args, out)}
    save(result, path)
    draw(result["crossover"], picture)
    if args.full and args.device != "cpu":
        result["paper"] = paper(args)
        save(result, path)
    print(f"all figures: {path}; {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_script(main)
