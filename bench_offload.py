"""
What does it cost to keep Engram's table in host memory? Predict it, measure it, explain it.

    python bench_offload.py                      # two to three minutes on two CPU cores
    python bench_offload.py --link_gbps 0        # without the simulated link
    python bench_offload.py --full --out gpu     # on a GPU also the paper's setting; ten minutes
    python bench_offload.py --zipf               # would a cache of hot rows help?

The idea: addresses are known before the forward pass, so the transfer runs beside the blocks before
the memory, and what is left exposed is max(0, bytes / bandwidth - compute before the memory).

The arms take turns in one process on the same random tokens (nearly every row read is another one,
the worst case): no Engram; table resident on the device; in host memory and read synchronously, at
the place of use; the same, prefetched. Ratios and differences are paired, within a round. Without
a GPU host and device memory are the same RAM, so a link is SIMULATED: a gather takes at least
bytes / --link_gbps.
"""
from functools import partial
from pathlib import Path
import argparse
import json
import time

import numpy as np
import torch

from engram import Engram, EngramConfig, Fetch, RowAdam, canonical_ids, mapped
from model import GPT, Cache, GPTConfig
from prepare_data import (fail, free_memory, keep_freed_memory, load, need_memory, script,
                          token_bytes)
from train import device_name

# Dense backbones (shared_hidden: their feed-forward layer) with one memory, in the second block.
# rows: of its table, then those of --full; prompts: sequences x tokens.
CPU = dict(n_layer=6, n_head=4, n_embd=256, shared_hidden=1024, vocab_size=4096), dict(
    width=32, dtype=torch.float32, prompts=(2, 256), rows=(100_000, 4_000_000),
    full=(10_000, 100_000, 1_000_000, 4_000_000, 16_000_000))
GPU = dict(n_layer=12, n_head=16, n_embd=2048, shared_hidden=5632, vocab_size=32768), dict(
    width=80, dtype=torch.bfloat16, prompts=(16, 512), rows=(1_000_000, 20_000_000),
    full=(1_000_000, 5_000_000, 20_000_000, 50_000_000))
# The paper's setting: about 4B parameters (3.80), a memory as in Engram-27B (d_mem 1,280).
PAPER = dict(n_layer=36, n_head=20, n_embd=2560, shared_hidden=9728, vocab_size=65536), dict(
    width=80, dtype=torch.bfloat16)
PUBLISHED = {"4B": (9031.62, 8858.28), "8B": (6315.52, 6140.02)}    # tokens/s: none, offloaded
NEW = 32                                                            # tokens decoded in a sample


class Link(Fetch):
    """A Fetch whose gather takes at least bytes / gbps, as over a slower link: SIMULATED."""

    def __init__(self, prefetch, gbps):
        super().__init__(prefetch)
        self.gbps = gbps

    def gather(self, table, rows, leaf, now):
        began = time.perf_counter()
        event = super().gather(table, rows, leaf, now)
        if self.gbps:
            time.sleep(max(0, leaf.nbytes / self.gbps / 1e9 - (time.perf_counter() - began)))
        return event


class Bench:
    """A backbone of random weights, and the arms that take turns on it."""

    def __init__(self, shape, how, device):
        self.device, self.dtype, self.width = device, how["dtype"], how["width"]
        self.cfg = GPTConfig(**shape, n_expert=0, block_size=1152, engram=self.memory(16))
        with torch.device(device):
            self.model = GPT(self.cfg, np.arange(self.cfg.vocab_size)).to(self.dtype).eval()
        self.at, self.gbps = 1, 0

    def memory(self, rows):
        return EngramConfig(blocks=(1,), heads=8, width=self.width, rows=max(1, rows // 16))

    def engram(self, rows, new):
        """A memory of about so many rows in a table made by new. Every page of it is written: those
        that never were all map to one page of zeros, and a gather from that would be a lie."""
        with torch.device(self.device):
            module = Engram(self.memory(rows), 1, self.cfg.n_embd, self.cfg.vocab_size,
                            self.cfg.vocab_size - 1, partial(torch.empty, device="meta"))
        module.to(self.dtype).table = table = new(*module.table.shape, dtype=self.dtype)
        some = (torch.randn(min(len(table), 1 << 18), self.width) * 0.02).to(self.dtype)
        for part in table.split(len(some)):
            part.copy_(some[:len(part)])
        return module

    def set_table(self, rows, on_device=None, folder=None):
        """The arms for a table of so many rows; on_device: fewer, where the resident arm cannot
        hold them all; folder: where the disk arm's file goes."""
        self.arms = {"no Engram": (None, None)}
        self.use("no Engram")                             # the last tables go before these come
        host = resident = self.engram(rows, partial(torch.empty, device="cpu"))
        if self.device != "cpu":
            resident = self.engram(on_device or rows, partial(torch.empty, device=self.device))
        self.arms |= {"resident": (resident, None), "synchronous": (host, Link(False, self.gbps)),
                      "prefetched": (host, Link(True, self.gbps))}
        if folder:
            disk = self.engram(rows, partial(mapped, folder))
            self.arms["disk, prefetched"] = disk, Link(True, self.gbps)

    def use(self, arm):
        module, fetch = self.arms[arm]
        for i, block in enumerate(self.model.blocks):
            block.engram = module if i == self.at else None
        if module:
            module.fetch = fetch

    def ids(self, B, T):
        return torch.randint(self.cfg.vocab_size, (B, T), device=self.device)

    def read(self, idx, cache=None):
        return self.model.read(idx, cache) if self.model.engrams() else []

    def timed(self, run):
        """-> milliseconds of run()."""
        sync = torch.cuda.synchronize if self.device != "cpu" else lambda: None
        sync()
        began = time.perf_counter()
        run()
        sync()
        return (time.perf_counter() - began) * 1e3

    # ---- what is timed, on batches of token ids [B, T]

    @torch.inference_mode()
    def prompts(self, *batches):
        return self.timed(lambda: [self.model(idx, reads=self.read(idx)) for idx in batches])

    @torch.inference_mode()
    def decoding(self, idx):
        """The last NEW tokens, one by one. An id goes to the host at each step, as it must where
        the next token depends on it; here that is given (greedy random weights repeat)."""
        cache, start = Cache(self.cfg), idx[:, :-NEW]
        self.model(start, reads=self.read(start, cache), cache=cache)

        def steps():
            for token in idx[:, -NEW:].split(1, dim=1):
                reads = self.read(token, cache)
                self.model(token, reads=reads, cache=cache)[0].argmax(-1).tolist()
        return self.timed(steps)

    def training(self, idx):
        """Forward, backward, AdamW for the backbone, RowAdam for the rows, where they are."""
        def step():
            reads = self.read(idx)
            self.model(idx, idx.roll(-1, 1), reads)[1].backward()
            self.adam.step()
            if reads:
                self.tables[self.model.blocks[self.at].engram].step(reads, 1e-5)
            self.adam.zero_grad()
        return self.timed(step)

    def prepare_training(self):
        self.tables = {m: RowAdam([m.table]) for m, _ in self.arms.values() if m}
        self.use("no Engram")
        parameters = [p for part in (self.model, *self.tables) for p in part.parameters()]
        self.adam = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    # ---- predict and measure

    @torch.inference_mode()
    def predict(self, batches):
        """-> bytes moved, and in ms, from medians: compute before the memory, transfer, what the
        memory's matrices should add, and what a prefetch should leave exposed."""
        host, bare, on_gpu = self.arms["prefetched"][0], Fetch(False), self.device != "cpu"
        rows = [host.hash(self.model.canonical[idx]).unique() for idx in batches]
        leaves = [torch.empty(len(r), self.width, dtype=self.dtype, device=r.device) for r in rows]
        self.use("no Engram")

        def compute(blocks):
            for idx in batches:
                rope = self.model.cos[:idx.size(1)], self.model.sin[:idx.size(1)]
                x = self.model.embed(idx)
                for block in blocks:
                    x = block(x, rope)[0]

        def gather():
            for r, leaf in zip(rows, leaves):
                now = torch.cuda.current_stream().record_event() if on_gpu else None
                bare.gather(host.table, r.to(host.table.device), leaf, now)

        parts = (lambda: compute(self.model.blocks), gather,
                 lambda: compute(self.model.blocks[:self.at]))
        every, bare_ms, before = np.median([[self.timed(f) for f in parts] for _ in range(9)], 0)
        size = sum(leaf.nbytes for leaf in leaves)
        transfer = max(size / self.gbps / 1e6 if self.gbps else 0, bare_ms)
        share = sum(p.numel() for p in host.parameters()) / sum(
            p.numel() for p in self.model.blocks.parameters())
        return {"bytes": size, "before_ms": float(before), "transfer_ms": float(transfer),
                "memory_ms": float(every * share), "exposed_ms": max(0.0, float(transfer - before))}

    def rounds(self, sample, n, make, arms=None):
        """-> {arm: ms [n]}: the arms in turn, each round with tokens of its own from make()."""
        times = {arm: [] for arm in arms or self.arms}
        for i in range(n + 2):                            # the first two warm up
            batches, order = make(), list(times)
            for arm in order[i % len(order):] + order[:i % len(order)]:
                self.use(arm)
                times[arm].append(sample(*batches))
        return {arm: np.array(ms[2:]) for arm, ms in times.items()}

    def compare(self, what, sample, n, make, tokens, forward=None, passes=1):
        """Predict, print, measure, print -> one table. make() -> batches of a sample, which counts
        for so many tokens; forward() -> those it passes to the model; passes: 3 with a backward."""
        p, table = self.predict((forward or make)()), self.arms["prefetched"][0].table
        expected = {"no Engram": 0.0, "resident": p["memory_ms"] * passes,
                    "synchronous": p["transfer_ms"]}
        t = dict(what=what, n=n, rows=len(table), parameters=table.numel(), bytes=table.nbytes,
                 bytes_per_token=p["bytes"] / tokens, simulated_gbps=self.gbps, predicted=p,
                 arms={})
        print(*heading(t), sep="\n", flush=True)
        times = self.rounds(sample, n, make)
        none, resident = times["no Engram"], times["resident"]
        for arm, ms in times.items():
            t["arms"][arm] = dict(
                tokens_per_s=np.percentile(tokens / ms * 1e3, (50, 10, 90)).tolist(),
                lost_percent=median_of(100 - 100 * none / ms),
                lost_to_resident_percent=median_of(100 - 100 * resident / ms),
                added_ms=median_of(ms - (none if arm in ("no Engram", "resident") else resident)),
                predicted_ms=expected.get(arm, p["exposed_ms"]), ms=ms.round(3).tolist(),
                table_bytes_on_device=0 if ms is none else p["bytes"] if ms is not resident else
                self.arms["resident"][0].table.nbytes)
        print(*figures(t), sep="\n", flush=True)
        return t


# ---- the same, in words -------------------------------------------------------------------------

def heading(t):
    p = t["predicted"]
    return ["", f"{t['what']}; table of {t['rows']:,} rows = {t['parameters']:,} parameters, "
            f"{t['bytes'] / 1e6:,.0f} MB",
            f"  predicted: {t['bytes_per_token']:,.0f} B per token, {p['bytes'] / 1e6:.2f} MB, "
            f"{link(t['simulated_gbps'])}: {p['transfer_ms']:.2f} ms; compute before the memory "
            f"{p['before_ms']:.2f} ms"]


def figures(t):
    """lost: against no Engram. added: resident over no Engram, the others over resident."""
    row = "  {:18s}{:9,.0f}{:8,.0f}{:8,.0f}{:8.1f} ({:5.1f} to {:5.1f}){:9.2f}{:10.2f}".format
    own, left = (t["arms"][arm] for arm in ("resident", "prefetched"))
    return [f"  {'':18s}{'tokens/s':>9s}{'p10':>8s}{'p90':>8s}{'lost, % (95 %)':>24s}"
            f"{'added ms':>9s}{'predicted':>10s}",
            *(row(arm, *a["tokens_per_s"], *a["lost_percent"], a["added_ms"][0], a["predicted_ms"])
              for arm, a in t["arms"].items()),
            f"  the memory's own arithmetic costs {own['lost_percent'][0]:.1f} %, the transfer "
            "that a prefetch leaves exposed {:.1f} % ({:.1f} to {:.1f})".format(
                *left["lost_to_resident_percent"])]


def crossing(p):
    return (f"{p['block']:7d}{p['before_ms']:16.2f}{p['transfer_ms']:10.2f}{p['exposed_ms']:11.2f}"
            "{:9.2f} ({:.2f} to {:.2f})".format(*p["measured_ms"]))


def link(gbps):
    return f"SIMULATED link of {gbps:.2g} GB/s" if gbps else "no simulated link"


def median_of(x):
    """-> median and its 95 % interval by order statistics."""
    x, reach = np.sort(x), 0.98 * len(x) ** 0.5
    low, high = int(len(x) / 2 - reach), int(np.ceil(len(x) / 2 + reach))
    return [float(np.median(x)), float(x[max(0, low)]), float(x[min(len(x) - 1, high)])]


# ---- what is compared ---------------------------------------------------------------------------

def crossover(bench, n, make):
    """The memory in one block after the other: how much compute does it take to hide the read?"""
    points = []
    print(f"\ncrossover, {link(bench.gbps)}: exposed transfer of a prefetch (over resident), ms\n"
          "  block  compute before  transfer  predicted  measured (95 %)")
    for bench.at in range(bench.cfg.n_layer):
        p = bench.predict(make())
        times = bench.rounds(bench.prompts, n, make, ("resident", "prefetched"))
        exposed = median_of(times["prefetched"] - times["resident"])
        points.append(dict(block=bench.at, **p, measured_ms=exposed))
        print(crossing(points[-1]), flush=True)
    return dict(simulated_gbps=bench.gbps, n=n, points=points)


def paper(device, gbps):
    """The paper's setting, as far as it is told: a dense backbone of about 4B, bf16, one memory in
    the second block, 512 prompts of Uniform(100, 1024) tokens, as many table parameters as 70 % of
    free memory holds. Ours: prompts sorted by length, 16 a batch, padded with end of text to the
    batch's longest (only real tokens count); the resident arm has 20M rows on the device."""
    bench = Bench(*PAPER, device)
    bench.gbps = gbps
    bench.set_table(int(0.7 * free_memory() / 2 / bench.width), on_device=20_000_000)
    lengths = torch.from_numpy(np.random.default_rng(0).integers(100, 1025, 512)).sort().values

    def make():
        batches = [bench.ids(16, int(n[-1])) for n in lengths.split(16)]
        for idx, n in zip(batches, lengths.to(device).split(16)):
            idx[torch.arange(idx.size(1), device=device) >= n[:, None]] = bench.cfg.vocab_size - 1
        return batches

    size = sum(p.numel() for p in bench.model.parameters()) / 1e9
    return [bench.compare(f"the paper's setting, {size:.2f}B dense: prefill of 512 prompts",
                          bench.prompts, 6, make, int(lengths.sum())),
            bench.compare("the paper's setting: decoding, batch 64", bench.decoding, 10,
                          lambda: [bench.ids(64, 512)], 64 * NEW, lambda: [bench.ids(64, 1)] * NEW)]


def measure(args, out):
    (shape, how), device = CPU if args.device == "cpu" else GPU, args.device
    sizes, (B, T) = sorted(args.rows or how["full" if args.full else "rows"]), how["prompts"]
    # host memory: at most the largest table, its moments, and those of the disk arm
    need_memory(sizes[-1] * how["width"] * how["dtype"].itemsize * (5 if args.disk else 3),
                f"training a table of {sizes[-1]:,} rows")
    bench = Bench(shape, how, device)
    make, folder, tables = lambda: [bench.ids(B, T)], out if args.disk else None, []
    half = max(6, args.rounds // 2)
    bench.gbps = args.link_gbps or 0
    if args.link_gbps is None and device == "cpu":
        bench.set_table(sizes[-1])   # 2/3 of a prompt's compute before the memory hide its transfer
        p = bench.predict(make())
        bench.gbps = float(f"{1.5 * p['bytes'] / p['before_ms'] / 1e6:.2g}")
    for rows in sizes:
        bench.set_table(rows, folder=folder)
        tables.append(bench.compare(f"prompts, {B} x {T} tokens", bench.prompts, args.rounds, make,
                                    B * T))
    others = [bench.compare(f"decoding, batch {n}", bench.decoding, half,
                            lambda: [bench.ids(n, 2 * NEW)], n * NEW,
                            lambda: [bench.ids(n, 1)] * NEW) for n in ((1, 8, 64)[:3 ** args.full])]
    bench.prepare_training()
    others.append(bench.compare(f"a training step, {B} x {T} tokens", bench.training, args.rounds,
                                make, B * T, passes=3))
    if args.link_gbps is None:
        bench.gbps /= 4         # so that it takes two to three blocks to hide the transfer
    bench.tables = bench.adam = None
    bench.set_table(sizes[0])
    cross = crossover(bench, half, make)
    draw(tables, cross, out)
    if args.full and device != "cpu":
        del bench
        others += paper(device, args.link_gbps or 0)
    return dict(backbone=shape, prompts=tables, others=others, crossover=cross)


# ---- would a cache help? ------------------------------------------------------------------------

def zipf(args, out):
    """n-grams are Zipfian: which share of the reads of a prepared corpus would a cache of the
    hottest rows serve? They are chosen on the first half of the text and judged on the second. A
    prompt of 1,024 tokens reads each of its rows once, as Engram.read does."""
    meta, train, _ = load(args.zipf, args.data_dir)
    if len(train) < 4096:
        fail(f"{args.zipf}: {len(train):,} tokens to train on are too few for hit rates, 4,096")
    canonical = canonical_ids(token_bytes(meta["tokenizer"]))
    engram = Engram(EngramConfig(heads=8, rows=CPU[1]["rows"][-1] // 16), 1, 8,
                    int(canonical.max()) + 1, int(canonical[-1]),
                    partial(torch.empty, device="meta"))
    prompts = torch.from_numpy(canonical[train[:len(train) // 2048 * 2048]]).view(-1, 1024)
    counts = torch.zeros(2, len(engram.table), dtype=torch.int64)
    for half, part in zip(counts, prompts.chunk(2)):
        for some in part.split(64):
            rows = engram.hash(some).flatten(1).sort(dim=1).values              # [64, 1024 * M]
            new = rows.diff(dim=1, prepend=rows[:, :1] - 1) > 0
            half += torch.bincount(rows[new], minlength=len(half))
    hits = counts[1][counts[0].argsort(descending=True)].cumsum(0) / counts[1].sum()
    sizes = [int(10 ** (k / 4)) for k in range(8, 40) if 10 ** (k / 4) < len(hits)]
    result = dict(dataset=args.zipf, tokens=prompts.numel(), reads=int(counts.sum()),
                  rows=len(hits), rows_read=int((counts.sum(0) > 0).sum()), cache_rows=sizes,
                  hit_rate=[float(hits[n - 1]) for n in sizes])
    print(*served(result), sep="\n")
    plot(out / "zipf.png", [("hot rows of one half, reads of the other", "-", sizes,
                             result["hit_rate"])], xscale="log", ylim=(0, 1), xlabel="rows cached",
         ylabel="share of reads served", title=served(result)[0])
    return result


def served(r):
    return [f"{r['dataset']}: {r['tokens']:,} tokens read {r['reads']:,} rows, {r['rows_read']:,} "
            f"different ones of {r['rows']:,}"] + [
        f"  a cache of the {n:9,} hottest rows serves {rate:6.1%} of the reads"
        for n, rate in list(zip(r["cache_rows"], r["hit_rate"]))[::4]]


# ---- pictures and the command -------------------------------------------------------------------

def plot(path, curves, **how):
    """curves: (label, style, x, y), where a y is a number or [median, low, high]."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="grey", linewidth=0.8)
    for label, style, x, y in curves:
        middle, low, high = np.array([v if isinstance(v, list) else [v] * 3 for v in y]).T
        axes.errorbar(x, middle, (middle - low, high - middle), fmt=style, capsize=3, label=label)
    axes.set(**how)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def draw(tables, cross, out):
    """Throughput lost against table size, beside the paper's two points; the crossover."""
    curves = [(arm, "o-", [t["parameters"] for t in tables],
               [t["arms"][arm]["lost_percent"] for t in tables])
              for arm in tables[0]["arms"] if arm != "no Engram"]
    curves += [(f"the paper's {name}, prefetched, H800", style, [1e11], [100 - 100 * its / none])
               for (name, (none, its)), style in zip(PUBLISHED.items(), ("k^", "kv"))]
    plot(out / "lost.png", curves, xscale="log", xlabel="table parameters",
         ylabel="throughput lost against no Engram (%)",
         title="prompts on this machine, " + link(tables[0]["simulated_gbps"]))
    x, predicted, measured = zip(*((p["before_ms"], p["exposed_ms"], p["measured_ms"])
                                   for p in cross["points"]))
    plot(out / "crossover.png", [("predicted", "-", x, predicted), ("measured", "ko", x, measured)],
         xlabel="compute before the memory (ms)", ylabel="exposed transfer (ms)",
         title="prefetched prompts, " + link(cross["simulated_gbps"]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--full", action="store_true", help="more tables and batches; on a GPU the paper's setting")
    add("--disk", action="store_true", help="one more arm: the table in a mapped file under --out")
    add("--link_gbps", type=float, help="speed of the SIMULATED link, 0: none (default: on a GPU 0,"
        " else such that 2/3 of the compute before the memory hide a prompt's transfer)")
    add("--rows", type=int, nargs="+", help="of the tables (default: by device)")
    add("--rounds", type=int, default=32, help="turns of each arm; half of it in decoding and at "
        "the crossover (default: %(default)s)")
    add("--device", default=("cpu", "cuda")[gpu], choices=("cpu", "cuda")[:1 + gpu],
        help="cuda where there is a GPU (default here: %(default)s)")
    add("--out", default="out_offload", help="JSON and plots go here (default: %(default)s)")
    add("--zipf", nargs="?", const="python", metavar="NAME", help="instead: hit rate of a cache of "
        "hot rows, on a prepared data set (default: python)")
    add("--data_dir", default="data", help="where prepare_data.py writes (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, low, high in (("link_gbps", 0, 1e6), ("rounds", 6, 1e4), ("rows", 16, 1e12)):
        given = getattr(args, name)
        for value in [] if given is None else given if isinstance(given, list) else [given]:
            if not low <= value <= high:
                fail(f"{name} {value}: must be from {low:g} to {high:g}")
    keep_freed_memory()
    if args.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))     # a core for the worker
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    began, name = time.time(), "zipf" if args.zipf else "offload"
    result = dict(device=device_name(args.device), threads=torch.get_num_threads(),
                  torch=str(torch.__version__), args=vars(args),
                  **(zipf if args.zipf else measure)(args, out))
    (out / f"{name}.json").write_text(json.dumps(result, indent=1))
    print(f"all figures: {out / name}.json; {time.time() - began:.0f} s")


if __name__ == "__main__":
    script(main)
