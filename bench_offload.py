"""
What does it cost to keep Engram's table in host memory? Predict it, then measure it.

    python bench_offload.py                      # two minutes on two CPU cores
    python bench_offload.py --link_gbps 0        # without the simulated link
    python bench_offload.py --full --out gpu     # more tables; on a GPU the paper's too
    python bench_offload.py --plot --out DIR     # draw DIR/offload.json again

The idea: row numbers are known before the forward pass, so the transfer runs beside the
blocks before the memory. Exposed is max(0, bytes / bandwidth - compute before the memory).

Arms take turns in one process on the same random tokens (nearly every row read is a new
one, the worst case). Ratios and differences are taken within a round. Without a GPU, host
and device memory are the same RAM, so a link is SIMULATED: a gather takes at least bytes /
--link_gbps.

experiments/README.md says what the columns of a table mean.
"""
import json
import time
from pathlib import Path

import numpy as np
import torch

from common import (commit, fail, free_memory, keep_freed_memory, machine_name,
                    make_parser, new_figure, run_script, write_whole)
from engram import Engram, EngramConfig, RowAdam
from model import GPT, Cache, GPTConfig
from offload import Fetch

# Dense backbones (shared_hidden is their feed-forward layer) with one memory, in block 1.
# prompt: sequences, tokens; rows: of the tables, then those of --full.
CPU = {"shape": dict(n_layer=6, n_head=4, n_embd=256, shared_hidden=1024, vocab_size=4096),
       "width": 32, "dtype": torch.float32, "prompt": (2, 256),
       "rows": (100_000, 4_000_000),
       "full": (10_000, 100_000, 1_000_000, 4_000_000, 16_000_000)}
GPU = {"shape": dict(n_layer=12, n_head=16, n_embd=2048, shared_hidden=5632,
                     vocab_size=32768),
       "width": 80, "dtype": torch.bfloat16, "prompt": (16, 512),
       "rows": (1_000_000, 20_000_000),
       "full": (1_000_000, 5_000_000, 20_000_000, 50_000_000)}
# The paper's setting: about 4B parameters, a memory as in Engram-27B (d_mem 1,280).
PAPER = GPU | {"shape": dict(n_layer=36, n_head=20, n_embd=2560, shared_hidden=9728,
                             vocab_size=65536)}
# tokens decoded in a sample
NEW = 32
# the arms: synchronous is read at the place of use
WITHOUT, RESIDENT, SYNCHRONOUS, PREFETCHED = ("no Engram", "resident", "synchronous",
                                              "prefetched")


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
    """A dense backbone of random weights with a memory, and the arms that take turns on it:
    each has a table, and a Fetch if that table is in host memory."""

    def __init__(self, setup, device, rows, gbps):
        """rows: of the table. gbps: speed of the simulated link, 0 for none."""
        self.device, self.gbps, dtype = device, gbps, setup["dtype"]
        # use() puts our memory in the place of the backbone's, which has one row
        self.cfg = GPTConfig(**setup["shape"], n_expert=0, block_size=1024,
                             engram=EngramConfig(rows=1))
        V, self.at = self.cfg.vocab_size, 1
        with torch.device(device):
            self.model = GPT(self.cfg, np.arange(V)).to(dtype).eval()
        cfg = EngramConfig(heads=8, width=setup["width"], rows=rows // 16)
        self.engram = Engram(cfg, 1, self.cfg.n_embd, V, V - 1, "meta")
        shape, self.engram.table = self.engram.table.shape, None
        self.engram.to(device, dtype)
        # write every page: those that never were written are all one page of zeros
        host = torch.full(shape, 0.02, dtype=dtype)
        # on a CPU, the resident table is the same one
        self.arms = {WITHOUT: None, RESIDENT: (host.to(device), None),
                     SYNCHRONOUS: (host, SlowFetch(False, gbps)),
                     PREFETCHED: (host, SlowFetch(True, gbps))}

    def use(self, arm):
        """Give the model the memory of an arm."""
        for block in self.model.blocks:
            block.engram = None
        if arm != WITHOUT:
            self.engram.table, self.engram.fetch = self.arms[arm]
            self.model.blocks[self.at].engram = self.engram

    def batches(self, shapes):
        """Return random tokens, a batch per shape (B, T)."""
        return [torch.randint(self.cfg.vocab_size, shape, device=self.device)
                for shape in shapes]

    def ms(self, work, *args):
        """Return how many ms work(self, *args) takes."""
        began = self.now()
        work(self, *args)
        return self.now() - began

    def now(self):
        """Return the time in ms at which all that is queued on the device is done."""
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() * 1e3


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- what is timed ---------------------------------------------------------------------

@torch.inference_mode()
def prompts(bench, batches):
    for idx in batches:
        bench.model(idx)


@torch.inference_mode()
def decoding(bench, tokens):
    """Decode a text whose tokens are [B, 1] each."""
    cache = Cache(bench.cfg)
    for token in tokens:
        # to the host, as it must where the next token depends on it
        bench.model(token, cache=cache)[0].argmax(-1).tolist()


def make_training(bench):
    """Return work that trains a step on each batch: AdamW for the backbone, RowAdam for the
    rows."""
    bench.use(RESIDENT)
    tables = {bench.arms[arm][0] for arm in (RESIDENT, PREFETCHED)}
    row_adams = {table: RowAdam([table]) for table in tables}
    adam = torch.optim.AdamW(bench.model.parameters(), lr=1e-5, fused=True)

    def training(bench, batches):
        for idx in batches:
            reads = bench.model.read(idx)
            bench.model(idx, idx.roll(-1, 1), reads)[1].backward()
            adam.step()
            adam.zero_grad()
            if reads:
                row_adams[bench.engram.table].step(reads, 1e-5)

    return training


@torch.inference_mode()
def first_blocks(bench, batches, n_blocks):
    for idx in batches:
        rope = bench.model.cos[:idx.size(1)], bench.model.sin[:idx.size(1)]
        x = bench.model.embed(idx)
        for block in bench.model.blocks[:n_blocks]:
            x = block(x, rope)


@torch.inference_mode()
def transfer(bench, table, row_ids):
    """Read these rows, and nothing else."""
    fetch = Fetch(prefetch=False)
    for ids in row_ids:
        _, _, ready = fetch.start(table, ids)
        ready()


def measure_rounds(bench, work, n, shapes, arms=None):
    """Return {arm: ms [n]}: the arms in turn, each round with new tokens."""
    times = {arm: [] for arm in arms or bench.arms}
    order = list(times)
    # the first two rounds warm up
    for i in range(n + 2):
        batches, first = bench.batches(shapes), i % len(order)
        for arm in order[first:] + order[:first]:
            bench.use(arm)
            times[arm].append(bench.ms(work, batches))
    return {arm: np.array(ms[2:]) for arm, ms in times.items()}


def predict(bench, n, shapes):
    """Return, from medians, in ms: compute before the memory, transfer, what the memory's
    matrices should add, and what a prefetch should leave exposed; and the bytes read."""
    table, batches = bench.arms[PREFETCHED][0], bench.batches(shapes)
    row_ids = [bench.engram.hash(idx).unique() for idx in batches]
    bench.use(WITHOUT)
    ms = []
    for _ in range(min(n, 16)):
        ms.append((bench.ms(transfer, table, row_ids),
                   bench.ms(first_blocks, batches, bench.at),
                   bench.ms(first_blocks, batches, bench.cfg.n_layer)))
    transfer_ms, before, all_blocks = np.median(ms, axis=0).tolist()
    sizes = [len(ids) * table[0].nbytes for ids in row_ids]
    # over a simulated link a transfer takes at least bytes / bandwidth
    if bench.gbps:
        transfer_ms = max(transfer_ms, sum(sizes) / bench.gbps / 1e6)
    share = count(bench.engram) / count(bench.model.blocks)
    return {"bytes": sum(sizes), "largest": max(sizes), "before_ms": before,
            "transfer_ms": transfer_ms, "memory_ms": all_blocks * share,
            "exposed_ms": max(0.0, transfer_ms - before)}


# ---- what is compared and printed ------------------------------------------------------

def interval_of_median(x):
    """Return the median of x and its 95 % interval, by order statistics."""
    x = np.sort(x)
    low = max(0, int((len(x) - 1) / 2 - 0.98 * len(x) ** 0.5))
    return [float(np.median(x)), float(x[low]), float(x[-1 - low])]


def describe_link(gbps):
    return f"SIMULATED link of {gbps:.2g} GB/s" if gbps else "no simulated link"


def compare(bench, what, work, n, shapes, passes=1):
    """Predict, measure and print one table, of n rounds on batches of these shapes. Return
    it. passes: 3 with a backward, which costs twice a forward."""
    p, tokens = predict(bench, n, shapes), sum(B * T for B, T in shapes)
    table = bench.arms[PREFETCHED][0]
    # what is predicted is printed before anything is measured
    size = f"{p['bytes'] / tokens:,.0f} B per token, {p['bytes'] / 1e6:.2f} MB"
    lines = [f"{what}, n={n}; table of {len(table):,} rows = {table.numel():,} parameters, "
             f"{table.nbytes / 1e6:,.0f} MB",
             f"  predicted: {size}, {describe_link(bench.gbps)}: {p['transfer_ms']:.2f} ms; "
             f"compute before the memory {p['before_ms']:.2f} ms",
             f"  {'':18s}{'tokens/s':>9s}{'p10':>8s}{'p90':>8s}{'lost, % (95 %)':>23s}"
             f"{'added ms':>9s}{'predicted':>10s}{'on device':>13s}"]
    print("", *lines, sep="\n", flush=True)
    # what each arm should add, in ms, and the bytes that it holds on the device
    expected = {WITHOUT: (0.0, 0), RESIDENT: (p["memory_ms"] * passes, table.nbytes),
                SYNCHRONOUS: (p["transfer_ms"], p["largest"]),
                PREFETCHED: (p["exposed_ms"], p["largest"])}
    times, arms = measure_rounds(bench, work, n, shapes), {}
    without, resident = times[WITHOUT], times[RESIDENT]
    for arm, ms in times.items():
        base = without if arm in (WITHOUT, RESIDENT) else resident
        speed = np.percentile(tokens / ms * 1e3, (50, 10, 90)).tolist()
        lost = interval_of_median(100 - 100 * without / ms)
        exposed = interval_of_median(100 - 100 * resident / ms)
        added = interval_of_median(ms - base)
        should, held = expected[arm]
        arms[arm] = {"tokens_per_s": speed, "lost_percent": lost,
                     "lost_to_resident_percent": exposed, "added_ms": added,
                     "predicted_ms": should, "bytes_on_device": held,
                     "ms": ms.round(3).tolist()}
        columns = ("  {:18s}{:9,.0f}{:8,.0f}{:8,.0f}{:6.1f} ({:5.1f} to {:5.1f})"
                   "{:9.2f}{:10.2f}{:10,.1f} MB")
        lines.append(columns.format(arm, *speed, *lost, added[0], should, held / 1e6))
    memory = arms[RESIDENT]["lost_percent"][0]
    middle, low, high = arms[PREFETCHED]["lost_to_resident_percent"]
    lines.append(f"  the memory itself costs {memory:.1f} %, the transfer that a prefetch "
                 f"leaves exposed {middle:.1f} % ({low:.1f} to {high:.1f})")
    print(*lines[3:], sep="\n", flush=True)
    return {"what": what, "n": n, "parameters": table.numel(),
            "bytes_per_token": p["bytes"] / tokens, "simulated_gbps": bench.gbps,
            "predicted": p, "arms": arms, "lines": lines}


def crossover(bench, n, shapes):
    """Put the memory in one block after the other: how much compute hides the read?"""
    lines = [f"crossover, n={n}, {describe_link(bench.gbps)}: exposed transfer of a "
             "prefetch, over resident",
             "  block  compute before  transfer  predicted  measured ms (95 %)"]
    print("", *lines, sep="\n", flush=True)
    points = []
    for at in range(bench.cfg.n_layer):
        bench.at = at
        p = predict(bench, n, shapes)
        times = measure_rounds(bench, prompts, n, shapes, (RESIDENT, PREFETCHED))
        p["measured_ms"] = interval_of_median(times[PREFETCHED] - times[RESIDENT])
        points.append({"block": at, **p})
        lines.append("{:7d}{:16.2f}{:10.2f}{:11.2f}{:10.2f} ({:.2f} to {:.2f})".format(
            at, p["before_ms"], p["transfer_ms"], p["exposed_ms"], *p["measured_ms"]))
        print(lines[-1], flush=True)
    return {"simulated_gbps": bench.gbps, "n": n, "points": points, "lines": lines}


def draw(cross, path):
    points = cross["points"]
    before = [point["before_ms"] for point in points]
    middle, low, high = np.array([point["measured_ms"] for point in points]).T
    figure = new_figure(figsize=(7, 5))
    axes = figure.subplots()
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.plot(before, [point["exposed_ms"] for point in points], label="predicted")
    axes.errorbar(before, middle, (middle - low, high - middle), fmt="ko", capsize=3,
                  label="measured")
    axes.set(xlabel="compute of the blocks before the memory (ms)",
             ylabel="exposed transfer of a prefetch (ms)",
             title="A prefetch is free once the blocks before it take longer than the "
                   f"transfer\n({describe_link(cross['simulated_gbps'])})")
    axes.legend()
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


# ---- the command -----------------------------------------------------------------------

def measure(args, setup):
    """Run everything but the paper's setting. Return its figures."""
    sizes = setup["full" if args.full else "rows"]
    prompt, half, gbps = [setup["prompt"]], max(6, args.rounds // 2), args.link_gbps
    if gbps is None:
        # over this link 2/3 of the compute before the memory hide the transfer of a prompt
        p = predict(Bench(setup, args.device, sizes[-1], 0), half, prompt)
        gbps = float(f"{1.5 * p['bytes'] / p['before_ms'] / 1e6:.2g}")
    tables, others, size = [], [], "{} x {} tokens".format(*setup["prompt"])
    for rows in sizes:
        bench = Bench(setup, args.device, rows, gbps)
        tables.append(compare(bench, f"prompts, {size}", prompts, args.rounds, prompt))
    for B in [1, 8, 64] if args.full else [1]:
        others.append(compare(bench, f"decoding, batch {B}", decoding, half, [(B, 1)] * NEW))
    others.append(compare(bench, f"a training step, {size}", make_training(bench),
                          args.rounds, prompt, passes=3))
    # over a link four times slower it takes two to three blocks to hide the transfer
    bench = Bench(setup, args.device, sizes[0], gbps / 4)
    return {"backbone": setup["shape"], "prompts": tables, "others": others,
            "crossover": crossover(bench, half, prompt)}


def paper(args):
    """Run the paper's setting: a dense backbone of about 4B, 512 prompts of 100 to 1,024
    tokens. Ours: the 16 prompts of a batch have one length, and the table takes half of the
    free memory of the GPU or of the host, whichever is less (in the paper, 100B)."""
    free = min(free_memory(), torch.cuda.mem_get_info()[0])
    rows = free // 2 // (PAPER["width"] * PAPER["dtype"].itemsize)
    bench = Bench(PAPER, args.device, rows, args.link_gbps)
    lengths = np.linspace(100, 1024, 32).astype(int).tolist()
    what = f"the paper's setting, {count(bench.model) / 1e9:.2f}B dense"
    return [compare(bench, f"{what}: prefill of 512 prompts", prompts, 5,
                    [(16, T) for T in lengths]),
            compare(bench, f"{what}: decoding, batch 64", decoding, 9, [(64, 1)] * NEW)]


def read_flags(argv):
    parser = make_parser(__doc__, "bench_offload.py [options]")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("--full", action="store_true", help="more tables, for which training takes 6 GB of "
        "memory (on a GPU 24 GB); on a GPU the paper's setting too")
    add("--link_gbps", type=float, help="speed of the SIMULATED link, 0: none (default: on "
        "a CPU such that 2/3 of the compute before the memory hide a transfer)")
    add("--rounds", type=int, default=32, help="turns of each arm (default: 32)")
    add("--device", default=devices[-1], choices=devices)
    add("--out", default="out_offload", help="folder for results (default: out_offload)")
    add("--plot", action="store_true", help="only draw --out/offload.json again")
    args = parser.parse_args(argv)
    if args.device != "cpu" and args.link_gbps is None:
        args.link_gbps = 0
    if not 0 <= (args.link_gbps or 0) < float("inf"):
        fail(f"--link_gbps {args.link_gbps}: must be 0 or more")
    if args.rounds < 6:
        fail(f"--rounds {args.rounds}: an interval needs 6 or more")
    return args


def main(argv=None):
    args, began = read_flags(argv), time.time()
    path, picture = Path(args.out) / "offload.json", Path(args.out) / "crossover.png"
    if args.plot:
        return draw(json.loads(path.read_text())["crossover"], picture)
    setup = GPU
    if args.device == "cpu":
        setup = CPU
        keep_freed_memory()
        # a core for the worker
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"commit": commit(), "device": machine_name(args.device),
              "torch": str(torch.__version__), "threads": torch.get_num_threads(),
              "args": vars(args), **measure(args, setup)}
    save(result, path)
    draw(result["crossover"], picture)
    if args.full and args.device != "cpu":
        result["paper"] = paper(args)
        save(result, path)
    print(f"all figures: {path}; {time.time() - began:.0f} s")


def save(result, path):
    write_whole(path, lambda file: file.write(json.dumps(result, indent=1).encode()))


if __name__ == "__main__":
    run_script(main)
