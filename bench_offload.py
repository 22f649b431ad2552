"""
What does it cost to keep Engram's table in host memory? Predict it, then measure it.

    python bench_offload.py                      # three minutes on two CPU cores
    python bench_offload.py --link_gbps 0        # without the simulated link
    python bench_offload.py --full --out gpu     # more tables; on a GPU the paper's too

The idea: row numbers are known before the forward pass, so the transfer runs beside the
blocks before the memory. Exposed is max(0, bytes / bandwidth - compute before the memory).

Arms take turns in one process on the same tokens. Ratios and differences are taken within
a round. Random tokens are the worst case: nearly every row that is read is another one. Of
text, if the data set python is prepared, there is a table too. Without a GPU, host and
device memory are the same RAM, so a link is SIMULATED: a gather takes at least bytes /
--link_gbps. What a prefetch brings is compared with rows read again, after the clock stops.

experiments/README.md says what the columns of a table mean.
"""
import random
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import (commit, fail, free_memory, keep_freed_memory, machine_name,
                    make_parser, new_figure, run_script, to_device, write_json)
from engram import Address, Engram, EngramConfig, RowAdam
from model import GPT, Cache, GPTConfig
from offload import Fetch, take
from prepare_data import check, load

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
# tokens decoded in a round
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

    def gather(self, table, row_ids, leaf, free):
        began = time.perf_counter()
        event = super().gather(table, row_ids, leaf, free)
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
        # token ids to take prompts from; None: random tokens
        self.text = None
        # how many reads were compared with rows read again
        self.compared = 0
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
        # all rows differ, or a wrong one would not show
        host = torch.empty(shape, dtype=dtype).uniform_(-0.02, 0.02)
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
        """Return tokens on the host, a batch per shape (B, T)."""
        if self.text is None:
            return [torch.randint(self.cfg.vocab_size, shape) for shape in shapes]
        found = []
        for B, T in shapes:
            starts = torch.randint(len(self.text) - T, (B, 1))
            found.append(self.text[starts + torch.arange(T)])
        return found

    def ms(self, work, *args):
        """Return how many ms work(*args) takes, and what it returns."""
        began = self.now()
        result = work(*args)
        return self.now() - began, result

    def now(self):
        """Return the time in ms at which all that is queued on the device is done."""
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() * 1e3

    def trust(self, reads):
        """Compare rows that were read with the same rows, read again."""
        for read in reads:
            again = self.engram.table[read.row_ids.to(self.engram.table.device)]
            assert torch.equal(read.leaf.detach().cpu(), again.cpu()), "wrong rows were read"
            self.compared += len(again)


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- what is timed ---------------------------------------------------------------------

def forward(bench, idx, targets=None, cache=None):
    """Call the model on tokens that are on the host. Return its loss or logits, and the
    reads."""
    reads = bench.model.read(bench.model.addresses(idx, cache))
    logits, loss = bench.model(to_device(idx, bench.device), targets, reads, cache)
    return logits if loss is None else loss, reads


@torch.inference_mode()
def prompts(bench, batches):
    """Run the model on each batch of prompts. Return the ms that it took."""
    began, reads = bench.now(), []
    for idx in batches:
        reads += forward(bench, idx)[1]
    ms = bench.now() - began
    bench.trust(reads)
    return ms


@torch.inference_mode()
def decode(bench, tokens):
    """Decode a text whose tokens are [B, 1] each. Return the ms that each took."""
    cache, ms = Cache(bench.cfg), [bench.now()]
    for token in tokens:
        # to the host, as it must where the next token depends on it
        forward(bench, token, cache=cache)[0].argmax(-1).tolist()
        ms.append(bench.now())
    return np.diff(ms)


def make_training(bench):
    """Return work that trains a step on each batch: AdamW for the backbone, RowAdam for the
    rows."""
    bench.use(RESIDENT)
    tables = {bench.arms[arm][0] for arm in (RESIDENT, PREFETCHED)}
    row_adams = {table: RowAdam([table]) for table in tables}
    adam = torch.optim.AdamW(bench.model.parameters(), lr=1e-5, fused=True)

    def training(bench, batches):
        began = bench.now()
        for idx in batches:
            loss, reads = forward(bench, idx, idx.roll(-1, 1).to(bench.device))
            loss.backward()
            adam.step()
            adam.zero_grad()
            if reads:
                row_adams[bench.engram.table].step(reads, 1e-5)
        return bench.now() - began

    return training


@torch.inference_mode()
def first_blocks(bench, batches, n_blocks):
    for idx in batches:
        rope = bench.model.cos[:idx.size(1)], bench.model.sin[:idx.size(1)]
        x = bench.model.embed(idx.to(bench.device))
        for block in bench.model.blocks[:n_blocks]:
            x = block(x, rope)


@torch.inference_mode()
def transfer(bench, table, row_ids):
    """Read these rows, and nothing else."""
    fetch = Fetch(prefetch=False)
    for ids in row_ids:
        _, ready = fetch.start(table, ids, bench.device)
        ready()


def measure_rounds(bench, work, n, shapes, arms=None):
    """Return {arm: [n]}, the ms that work(bench, batches) returns: the arms in turn, each
    round with new tokens."""
    times = {arm: [] for arm in arms or bench.arms}
    # the first two rounds warm up
    for _ in range(n + 2):
        batches = bench.batches(shapes)
        # in a random order: who comes later finds rows and weights in a cache
        for arm in random.sample(list(times), len(times)):
            bench.use(arm)
            times[arm].append(work(bench, batches))
    return {arm: np.array(ms[2:]) for arm, ms in times.items()}


def predict(bench, n, shapes):
    """Return, from medians, in ms: compute before the memory, transfer, what the memory's
    matrices should add, and what a prefetch should leave exposed; and the bytes read."""
    table, batches = bench.arms[PREFETCHED][0], bench.batches(shapes)
    row_ids = [bench.engram.address(idx).row_ids for idx in batches]
    bench.use(WITHOUT)
    ms = []
    for _ in range(min(n, 16)):
        ms.append((bench.ms(transfer, bench, table, row_ids)[0],
                   bench.ms(first_blocks, bench, batches, bench.at)[0],
                   bench.ms(first_blocks, bench, batches, bench.cfg.n_layer)[0]))
    transfer_ms, before, all_blocks = np.median(ms, axis=0).tolist()
    sizes = [len(ids) * table[0].nbytes for ids in row_ids]
    # over a simulated link a transfer takes at least bytes / bandwidth
    if bench.gbps:
        transfer_ms = max(transfer_ms, sum(sizes) / bench.gbps / 1e6)
    share = count(bench.engram) / count(bench.model.blocks)
    return {"bytes": sum(sizes), "largest": max(sizes), "before_ms": before,
            "transfer_ms": transfer_ms, "memory_ms": all_blocks * share,
            "exposed_ms": max(0.0, transfer_ms - before)}


def speeds(bench, shapes):
    """Return what the machine can do, in GB/s: gather random rows of the table, copy as many
    bytes in one piece, and on a GPU copy them to it from pageable and pinned memory."""
    table, found = bench.arms[PREFETCHED][0], defaultdict(list)
    for _ in range(20):
        # other rows each time, or they would come from a cache
        row_ids = torch.cat([bench.engram.hash(idx).unique() for idx in bench.batches(shapes)])
        rows = torch.empty(len(row_ids), table.size(1), dtype=table.dtype)
        found["gather of random rows"].append(bench.ms(take, table, row_ids, rows)[0])
        found["copy in one piece"].append(bench.ms(rows.clone)[0])
        if bench.device != "cpu":
            found["pageable copy to the GPU"].append(bench.ms(rows.to, bench.device)[0])
            pinned = rows.pin_memory()
            found["pinned copy to the GPU"].append(bench.ms(pinned.to, bench.device)[0])
    return {name: rows.nbytes / float(np.median(ms)) / 1e6 for name, ms in found.items()}


@torch.inference_mode()
def time_line(bench, idx):
    """Read one prompt with a prefetch. Return [(who, what, begin, end)] in ms: the parts of
    the read, and the blocks beside which they run."""
    bench.use(PREFETCHED)
    spans, start = [], bench.now()

    def timed(who, what, call, *args):
        # of the host: with a GPU, a block's span is the time to queue it
        began = time.perf_counter() * 1e3 - start
        result = call(*args)
        spans.append((who, what, began, time.perf_counter() * 1e3 - start))
        return result

    engram, fetch, blocks = bench.engram, bench.engram.fetch, bench.model.blocks
    row_ids = timed("main thread", "hash", engram.hash, idx)
    unique = partial(row_ids.unique, return_inverse=True)
    address = Address(*timed("main thread", "unique", unique))
    fetch.gather = partial(timed, "worker", "gather", fetch.gather)
    read = engram.read(address)
    for i, block in enumerate(blocks):
        block.forward = partial(timed, "main thread", f"block {i}", block.forward)
    ready = partial(timed, "main thread", "wait", read.ready)
    bench.model(idx.to(bench.device), reads=[read._replace(ready=ready)])
    del fetch.gather
    for block in blocks:
        del block.forward
    return spans


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
    lines = [f"{what}, n={n}; table of {len(table):,} rows = {table.numel():,} parameters, "
             f"{table.nbytes / 1e6:,.0f} MB",
             f"  predicted: {p['bytes'] / tokens:,.0f} B per token, {p['bytes'] / 1e6:.2f} MB, "
             f"{describe_link(bench.gbps)}: {p['transfer_ms']:.2f} ms; "
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
        added = interval_of_median(ms - base)
        should, held = expected[arm]
        arms[arm] = {"tokens_per_s": speed, "lost_percent": lost, "added_ms": added,
                     "predicted_ms": should, "bytes_on_device": held,
                     "ms": ms.round(3).tolist()}
        columns = ("  {:18s}{:9,.0f}{:8,.0f}{:8,.0f}{:6.1f} ({:5.1f} to {:5.1f})"
                   "{:9.2f}{:10.2f}{:10,.1f} MB")
        lines.append(columns.format(arm, *speed, *lost, added[0], should, held / 1e6))
    memory = arms[RESIDENT]["lost_percent"][0]
    middle, low, high = interval_of_median(100 - 100 * resident / times[PREFETCHED])
    lines.append(f"  the memory itself costs {memory:.1f} %, the transfer that a prefetch "
                 f"leaves exposed {middle:.1f} % ({low:.1f} to {high:.1f})")
    print(*lines[3:], sep="\n", flush=True)
    return {"what": what, "n": n, "parameters": table.numel(),
            "bytes_per_token": p["bytes"] / tokens, "simulated_gbps": bench.gbps,
            "predicted": p, "arms": arms, "lines": lines}


def parts(bench, prompt, n):
    """Print what the machine can do, and how long the parts of a prompt's read take."""
    found, mb = speeds(bench, [prompt]), predict(bench, 1, [prompt])["bytes"] / 1e6
    lines = [f"a prompt of {prompt[0]} x {prompt[1]} tokens reads {mb:.2f} MB; this machine:"]
    for name, gbps in found.items():
        lines.append(f"  {name:28s}{gbps:8.2f} GB/s{mb / gbps:9.2f} ms")
    lines.append(f"its parts, with a {describe_link(bench.gbps)}:")
    ms = defaultdict(list)
    for _ in range(n):
        spans = time_line(bench, *bench.batches([prompt]))
        for who, what, begin, end in spans:
            ms[f"{who}, {what}"].append(end - begin)
    for part, values in ms.items():
        lines.append(f"  {part:41s}{np.median(values):9.2f} ms")
    print("", *lines, sep="\n", flush=True)
    return {"gbps": found, "time_line": spans, "lines": lines}


def latency(bench, n):
    """Print the time between two tokens of decoding, n rounds of NEW tokens for each batch."""
    lines = [f"decoding, ms between two tokens (n={n * NEW}): median, 99th percentile, over a "
             f"{describe_link(bench.gbps)}"]
    for B in (1, 8, 64):
        for arm, ms in measure_rounds(bench, decode, n, [(B, 1)] * NEW).items():
            middle, late = np.percentile(ms, (50, 99))
            lines.append(f"  batch {B:3d}  {arm:14s}{middle:10.2f}{late:10.2f}")
    print("", *lines, sep="\n", flush=True)
    return {"n": n * NEW, "lines": lines}


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


def draw(result, folder):
    """Draw the crossover and the time line of one read."""
    cross = result["crossover"]
    before = [point["before_ms"] for point in cross["points"]]
    middle, low, high = np.array([point["measured_ms"] for point in cross["points"]]).T
    figure = new_figure(figsize=(7, 5))
    axes = figure.subplots()
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.plot(before, [point["exposed_ms"] for point in cross["points"]], label="predicted")
    axes.errorbar(before, middle, (middle - low, high - middle), fmt="ko", capsize=3,
                  label="measured")
    axes.set(xlabel="compute of the blocks before the memory (ms)",
             ylabel="exposed transfer of a prefetch (ms)",
             title="A prefetch is free once the blocks before it take longer than the "
                   f"transfer\n({describe_link(cross['simulated_gbps'])})")
    axes.legend()
    figure.savefig(folder / "crossover.png", dpi=110)
    figure = new_figure(figsize=(9, 2))
    axes = figure.subplots()
    spans = result["parts"]["time_line"]
    for who, what, begin, end in spans:
        axes.barh(who, end - begin, left=begin, edgecolor="black")
        # a name needs room
        if end - begin > 0.04 * spans[-1][-1]:
            axes.text((begin + end) / 2, who, what, ha="center", va="center", fontsize=8)
    axes.set(xlabel="ms", title="One prompt: after hash and unique (at the left) the worker "
             "gathers rows while block 0 computes")
    figure.savefig(folder / "time_line.png", dpi=110)
    print(f"pictures: {folder}/crossover.png, {folder}/time_line.png")


def measure(args, setup):
    """Run everything but the paper's setting. Return its figures."""
    sizes = setup["full" if args.full else "rows"]
    prompt, few, gbps = [setup["prompt"]], max(6, args.rounds // 5), args.link_gbps
    if gbps is None:
        # over this link the transfer of a prompt takes 2/3 of the compute before the memory
        p = predict(Bench(setup, args.device, sizes[-1], 0), few, prompt)
        gbps = float(f"{1.5 * p['bytes'] / p['before_ms'] / 1e6:.2g}")
    result, size = {"backbone": setup["shape"], "prompts": []}, "{} x {}".format(*prompt[0])
    for rows in sizes:
        bench = Bench(setup, args.device, rows, gbps)
        result["prompts"].append(compare(bench, f"prompts, {size} random tokens", prompts,
                                         args.rounds, prompt))
    # of the last and largest table
    result["parts"] = parts(bench, *prompt, few)
    # (a tokenizer of another size would not fit)
    if check(Path("data/python")).get("vocab_size", float("inf")) <= bench.cfg.vocab_size:
        bench.text = torch.from_numpy(load("python")[1].astype(np.int64))
        result["text"] = compare(bench, f"prompts, {size} tokens of text", prompts,
                                 args.rounds, prompt)
        bench.text = None
    result["latency"] = latency(bench, few // 2)
    result["training"] = compare(bench, f"a training step, {size} random tokens",
                                 make_training(bench), few, prompt, passes=3)
    print(f"  {bench.compared:,} rows that were read for prompts from this table were "
          "compared with rows read again: all equal")
    # over a link four times slower it takes two to three blocks to hide the transfer
    bench = Bench(setup, args.device, sizes[0], gbps / 4)
    result["crossover"] = crossover(bench, few, prompt)
    return result


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
                    [(16, T) for T in lengths]), latency(bench, 2)]


def read_flags(argv):
    parser = make_parser(__doc__, "bench_offload.py [options]")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("--full", action="store_true", help="more tables, for which training takes 6 GB of "
        "memory (on a GPU 24 GB); on a GPU the paper's setting too")
    add("--link_gbps", type=float, help="speed of the SIMULATED link, 0: none (default: on "
        "a CPU such that 2/3 of the compute before the memory hide a transfer)")
    add("--rounds", type=int, default=80, help="turns of each arm on prompts, of which "
        "there are five times as many as of the rest (default: 80)")
    add("--device", default=devices[-1], choices=devices)
    add("--out", default="out_offload", help="folder for results (default: out_offload)")
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
    folder = Path(args.out)
    setup = CPU if args.device == "cpu" else GPU
    if args.device == "cpu":
        keep_freed_memory()
        # a core for the worker
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    folder.mkdir(parents=True, exist_ok=True)
    result = {"commit": commit(), "device": machine_name(args.device),
              "torch": str(torch.__version__), "threads": torch.get_num_threads(),
              "args": vars(args), **measure(args, setup)}
    write_json(folder / "offload.json", result)
    draw(result, folder)
    if args.full and args.device != "cpu":
        result["paper"] = paper(args)
        write_json(folder / "offload.json", result)
    print(f"all figures: {folder}/offload.json; {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_script(main)
