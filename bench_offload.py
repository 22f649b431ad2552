"""
What does it cost to keep Engram's table in host memory? Predict it, then measure it.

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
bytes / --link_gbps. Where none is, predictions rest on the transfer timed alone.
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
from prepare_data import (commit, fail, free_memory, keep_freed_memory, load, lock, need_memory,
                          script, token_bytes, write_whole)
from sample import device_name

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

    def __init__(self, shape, setup, device):
        self.device, self.dtype, self.width = device, setup["dtype"], setup["width"]
        self.cfg = GPTConfig(**shape, n_expert=0, block_size=1024, engram=self.memory(16))
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
        module.to(self.dtype).table = new(*module.table.shape, dtype=self.dtype).fill_(0.02)
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

    def timed(self, run, *batches):
        """-> milliseconds of run(*batches)."""
        sync = torch.cuda.synchronize if self.device != "cpu" else lambda: None
        sync()
        began = time.perf_counter()
        run(*batches)
        sync()
        return (time.perf_counter() - began) * 1e3

    # ---- what is timed, on batches of token ids [B, T]

    @torch.inference_mode()
    def prompts(self, *batches):
        def run():
            for idx in batches:
                self.model(idx)
        return self.timed(run)

    @torch.inference_mode()
    def decoding(self, *tokens):
        """tokens [B, 1] one by one, after as many others. An id goes to the host at each step, as
        it must where the next token depends on it; here that is given (random weights repeat)."""
        cache = Cache(self.cfg)
        self.model(self.ids(len(tokens[0]), len(tokens)), cache=cache)

        def run():
            for token in tokens:
                self.model(token, cache=cache)[0].argmax(-1).tolist()
        return self.timed(run)

    def training(self, idx):
        """Forward, backward, AdamW for the backbone, RowAdam for the rows, where they are."""
        def run():
            reads = self.model.read(idx)
            self.model(idx, idx.roll(-1, 1), reads)[1].backward()
            self.adam.step()
            if reads:
                self.tables[self.model.blocks[self.at].engram].step(reads, 1e-5)
            self.adam.zero_grad()
        return self.timed(run)

    def prepare_training(self):
        """Without the disk arm, which is for reading: what it writes slows the others down."""
        self.arms.pop("disk, prefetched", None)
        self.use("no Engram")
        modules = {module for module, _ in self.arms.values() if module}
        self.tables = {module: RowAdam([module.table]) for module in modules}
        parameters = [p for part in (self.model, *self.tables) for p in part.parameters()]
        self.adam = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    # ---- predict and measure

    @torch.inference_mode()
    def predict(self, batches, n):
        """-> bytes moved by all reads and by the largest; and from medians of n (at most 16), in
        ms: compute before the memory, transfer, what the memory's matrices should add, and what a
        prefetch should leave exposed."""
        host, bare = self.arms["prefetched"][0], Fetch(self.device != "cpu")
        rows = [host.hash(self.model.canonical[idx]).unique() for idx in batches]
        self.use("no Engram")

        def compute(blocks):
            for idx in batches:
                rope = self.model.cos[:idx.size(1)], self.model.sin[:idx.size(1)]
                x = self.model.embed(idx)
                for block in blocks:
                    x = block(x, rope)[0]

        def transfer():
            for r in rows:
                if event := bare(host.table, r)[2]():
                    event.synchronize()

        ms = [[self.timed(transfer), self.timed(compute, self.model.blocks[:self.at]),
               self.timed(compute, self.model.blocks)] for _ in range(min(n, 16))]
        alone, before, every = np.median(ms, axis=0).tolist()
        sizes = [len(r) * self.width * self.dtype.itemsize for r in rows]
        whole = max(sum(sizes) / self.gbps / 1e6 if self.gbps else 0, alone)
        share = sum(p.numel() for p in host.parameters()) / sum(
            p.numel() for p in self.model.blocks.parameters())
        return {"bytes": sum(sizes), "largest": max(sizes), "before_ms": before,
                "transfer_ms": whole, "memory_ms": every * share,
                "exposed_ms": max(0.0, whole - before)}

    def rounds(self, sample, n, make, arms=None):
        """-> {arm: ms [n]}: the arms in turn, each round with tokens of its own from make()."""
        times = {arm: [] for arm in arms or self.arms}
        for i in range(n + 2):                            # the first two warm up
            batches, order = make(), list(times)
            for arm in order[i % len(order):] + order[:i % len(order)]:
                self.use(arm)
                times[arm].append(sample(*batches))
        return {arm: np.array(ms[2:]) for arm, ms in times.items()}

    def compare(self, what, sample, n, make, tokens, passes=1):
        """Predict, print, measure, print -> one table, with what was printed. make() -> batches of
        a sample, which counts for so many tokens; passes: 3 with a backward."""
        p, lines, arms = self.predict(make(), n), [], {}
        host, resident = (self.arms[arm][0].table for arm in ("prefetched", "resident"))
        expected = {"no Engram": 0.0, "resident": p["memory_ms"] * passes,
                    "synchronous": p["transfer_ms"]}

        def say(line):
            lines.append(line)
            print(line, flush=True)

        print()
        say(f"{what}, n={n}; table of {len(host):,} rows = {host.numel():,} parameters, "
            f"{host.nbytes / 1e6:,.0f} MB")
        say(f"  predicted: {p['bytes'] / tokens:,.0f} B per token, {p['bytes'] / 1e6:.2f} MB, "
            f"{link(self.gbps)}: {p['transfer_ms']:.2f} ms; compute before the memory "
            f"{p['before_ms']:.2f} ms")
        say(f"  {'':18s}{'tokens/s':>9s}{'p10':>8s}{'p90':>8s}{'lost, % (95 %)':>23s}"
            f"{'added ms':>9s}{'predicted':>10s}{'on device':>13s}")
        times = self.rounds(sample, n, make)
        for arm, ms in times.items():
            over = times["no Engram" if arm in ("no Engram", "resident") else "resident"]
            held = {"no Engram": 0, "resident": resident.nbytes}.get(arm, p["largest"])
            a = arms[arm] = dict(
                tokens_per_s=np.percentile(tokens / ms * 1e3, (50, 10, 90)).tolist(),
                lost_percent=median_of(100 - 100 * times["no Engram"] / ms),
                lost_to_resident_percent=median_of(100 - 100 * times["resident"] / ms),
                added_ms=median_of(ms - over), predicted_ms=expected.get(arm, p["exposed_ms"]),
                bytes_on_device=held, ms=ms.round(3).tolist())
            say("  {:18s}{:9,.0f}{:8,.0f}{:8,.0f}{:6.1f} ({:5.1f} to {:5.1f}){:9.2f}{:10.2f}"
                "{:10,.1f} MB".format(arm, *a["tokens_per_s"], *a["lost_percent"],
                                      a["added_ms"][0], a["predicted_ms"], held / 1e6))
        say("  the memory itself costs {:.1f} %, the transfer that a prefetch leaves exposed "
            "{:.1f} % ({:.1f} to {:.1f})".format(arms["resident"]["lost_percent"][0],
                                                 *arms["prefetched"]["lost_to_resident_percent"]))
        return dict(what=what, n=n, parameters=host.numel(), bytes_per_token=p["bytes"] / tokens,
                    simulated_gbps=self.gbps, predicted=p, arms=arms, lines=lines)


def link(gbps):
    return f"SIMULATED link of {gbps:.2g} GB/s" if gbps else "no simulated link"


def median_of(x):
    """-> median and its 95 % interval by order statistics."""
    x = np.sort(x)
    low = max(0, int((len(x) - 1) / 2 - 0.98 * len(x) ** 0.5))
    return [float(np.median(x)), float(x[low]), float(x[-1 - low])]


# ---- what is compared ---------------------------------------------------------------------------

def crossover(bench, n, make):
    """The memory in one block after the other: how much compute does it take to hide the read?"""
    points = []
    lines = [f"crossover, n={n}, {link(bench.gbps)}: exposed transfer of a prefetch, over resident",
             "  block  compute before  transfer  predicted  measured ms (95 %)"]
    print("", *lines, sep="\n", flush=True)
    for at in range(bench.cfg.n_layer):
        bench.at = at
        p = bench.predict(make(), n)
        times = bench.rounds(bench.prompts, n, make, ("resident", "prefetched"))
        p["measured_ms"] = median_of(times["prefetched"] - times["resident"])
        points.append(dict(block=at, **p))
        lines.append("{:7d}{:16.2f}{:10.2f}{:11.2f}{:10.2f} ({:.2f} to {:.2f})".format(
            at, p["before_ms"], p["transfer_ms"], p["exposed_ms"], *p["measured_ms"]))
        print(lines[-1], flush=True)
    return dict(simulated_gbps=bench.gbps, n=n, points=points, lines=lines)


def measure(args, out):
    (shape, setup), device = CPU if args.device == "cpu" else GPU, args.device
    sizes, (B, T) = sorted(args.rows or setup["full" if args.full else "rows"]), setup["prompts"]
    need_memory(3 * sizes[-1] * setup["width"] * setup["dtype"].itemsize,
                f"training a table of {sizes[-1]:,} rows")
    bench, half = Bench(shape, setup, device), max(6, args.rounds // 2)
    make, folder, tables = lambda: [bench.ids(B, T)], out if args.disk else None, []
    bench.gbps = args.link_gbps or 0
    if args.link_gbps is None and device == "cpu":
        bench.set_table(sizes[-1])     # 2/3 of the compute before the memory hide the transfer
        p = bench.predict(make(), half)
        bench.gbps = float(f"{1.5 * p['bytes'] / p['before_ms'] / 1e6:.2g}")
    for rows in sizes:
        bench.set_table(rows, folder=folder)
        tables.append(bench.compare(f"prompts, {B} x {T} tokens", bench.prompts, args.rounds, make,
                                    B * T))
    others = [bench.compare(f"decoding, batch {n}", bench.decoding, half,
                            lambda: bench.ids(n, NEW).split(1, dim=1), n * NEW)
              for n in ((1, 8, 64) if args.full else (1,))]
    bench.prepare_training()
    others.append(bench.compare(f"a training step, {B} x {T} tokens", bench.training, args.rounds,
                                make, B * T, passes=3))
    bench.tables = bench.adam = None
    if args.link_gbps is None:
        bench.gbps /= 4         # so that it takes two to three blocks to hide the transfer
    bench.set_table(sizes[0])
    cross = crossover(bench, half, make)
    return dict(backbone=shape, prompts=tables, others=others, crossover=cross)


def paper(args):
    """The paper's setting, as far as it is told: a dense backbone of about 4B, bf16, one memory in
    the second block, 512 prompts of Uniform(100, 1024) tokens, as many table parameters as 70 % of
    free memory holds. Ours: prompts sorted by length, 16 a batch, padded with end of text to the
    batch's longest (only real tokens count); the resident arm has 20M rows on the device."""
    bench = Bench(*PAPER, args.device)
    bench.gbps = args.link_gbps or 0
    bench.set_table(int(0.7 * free_memory() / 2 / bench.width), on_device=20_000_000)
    lengths = torch.from_numpy(np.random.default_rng(0).integers(100, 1025, 512)).sort().values

    def make():
        batches = [bench.ids(16, int(n[-1])) for n in lengths.split(16)]
        for idx, n in zip(batches, lengths.to(args.device).split(16)):
            padding = torch.arange(idx.size(1), device=args.device) >= n[:, None]
            idx[padding] = bench.cfg.vocab_size - 1
        return batches

    size = sum(p.numel() for p in bench.model.parameters()) / 1e9
    return [bench.compare(f"the paper's setting, {size:.2f}B dense: prefill of 512 prompts",
                          bench.prompts, 5, make, int(lengths.sum())),
            bench.compare("the paper's setting: decoding, batch 64", bench.decoding, 9,
                          lambda: bench.ids(64, NEW).split(1, dim=1), 64 * NEW)]


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
    result["lines"] = [
        f"{args.zipf}: {prompts.numel():,} tokens read {result['reads']:,} rows, "
        f"{result['rows_read']:,} different ones of {len(hits):,}"] + [
        f"  a cache of the {n:9,} hottest rows serves {rate:6.1%} of the reads"
        for n, rate in list(zip(sizes, result["hit_rate"]))[::4]]
    print(*result["lines"], sep="\n")
    return result


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
    write_whole(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    print(f"picture: {path}")


def draw_zipf(r, out):
    plot(out / "zipf.png", [("hot rows of one half, reads of the other", "-", r["cache_rows"],
                             r["hit_rate"])], xscale="log", ylim=(0, 1), xlabel="rows cached",
         ylabel="share of reads served", title=f"{r['dataset']}, {r['rows']:,} rows")


def draw(result, out):
    """Throughput lost against table size, beside the paper's two points; the crossover."""
    tables, cross = result["prompts"], result["crossover"]
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
    for name, low, high in (("link_gbps", 1e-3, 1e6), ("rounds", 6, 1e4), ("rows", 16, 1e12)):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not low <= value <= high and (name, value) != ("link_gbps", 0):
                fail(f"{name} {value}: must be from {low:g} to {high:g}")
    if args.device == "cpu":
        keep_freed_memory()
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))     # a core for the worker
    out, began, zipfian = Path(args.out), time.time(), args.zipf is not None
    path = out / ("zipf.json" if zipfian else "offload.json")
    result = dict(commit=commit(), device=device_name(args.device), torch=str(torch.__version__),
                  threads=torch.get_num_threads(), args=vars(args))

    def save(more):
        result.update(more)
        write_whole(path, lambda file: file.write(json.dumps(result, indent=1).encode()))

    with lock(out):
        save((zipf if zipfian else measure)(args, out))
        (draw_zipf if zipfian else draw)(result, out)
        if args.full and args.device != "cpu":
            save({"paper": paper(args)})
    print(f"all figures: {path}; {time.time() - began:.0f} s")


if __name__ == "__main__":
    script(main)
