"""
Our parts beside those of others, on the same inputs: how many times as fast are ours?

    pip install transformers engram-peft             # the second needs Python 3.12
    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python -m experiments.peers --nanogpt ../nanoGPT       # on an idle machine, 6 minutes

The idea: a speed means little on another machine, a ratio means more. Two candidates take
turns in one process, and each round gives one ratio: the other's time over ours. Above 1
ours is faster. Printed are the median, its 95 % interval, and for what is mostly matrix
products the share of this machine's peak that ours reaches (of a product of 2048 x 2048).
What is not installed is left out.
"""
import importlib.util
import sys
from functools import partial
from timeit import repeat, timeit

import numpy as np
import torch
import torch.nn as nn

from bench_offload import interval_of_median
from common import keep_freed_memory, make_parser, run_script
from engram import Engram, EngramConfig, RowAdam, lookup
from model import GPT, GPTConfig, accounting, generate
from moe import MoE, SwiGLU
from prepare_data import Data
from twins import make_twins

D, V = 256, 4096


def compare(title, ours, theirs, flops=0, dtype=torch.float32, rounds=15):
    """Print how many times as fast ours() is as theirs(). flops: of one call of ours."""
    times = []
    for i in range(rounds + 2):
        order = [ours, theirs]
        if i % 2:
            order.reverse()
        times.append({work: timeit(work, number=1) for work in order})
    mine, others = np.array([(t[ours], t[theirs]) for t in times[2:]]).T
    line = "{:58s}{:6.2f} ({:.2f} to {:.2f})".format(title, *interval_of_median(others / mine))
    if flops:
        a = torch.randn(2048, 2048, dtype=dtype)
        peak = 2 * 2048 ** 3 / min(repeat(lambda: a @ a, number=1, repeat=10))
        line += f"{flops / np.median(mine) / peak:8.0%} of the peak"
    print(line, flush=True)


def forward_backward(module, x, dtype):
    """Return work(): a forward and a backward pass of a module on x."""
    grad = torch.randn_like(x)

    def work():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = module(x)
        y.backward(grad.to(y.dtype))

    return work


def training_step(model, batches, dtype=torch.bfloat16):
    """Return work(): train on the next batch, by AdamW, and the tables by RowAdam."""
    adam = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    engrams = model.engrams() if isinstance(model, GPT) else []
    row_adam = RowAdam([engram.table for engram in engrams])

    def work():
        idx, how = next(batches), {}
        if engrams:
            how["reads"] = model.read(model.addresses(idx))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(idx, idx.roll(-1, 1), **how)[1]
        loss.backward()
        adam.step()
        adam.zero_grad()
        if engrams:
            row_adam.step(how["reads"], 1e-4)

    return work


def random_batches(vocab_size):
    while True:
        yield torch.randint(vocab_size, (8, 256))


# ---- what is compared ------------------------------------------------------------------

def dense_models(nanogpt, name, dtype):
    theirs = nanogpt.GPT(nanogpt.GPTConfig(256, V, 4, 4, D, 0.0, False))
    # their two matrices D x 4D hold as many numbers as our three, D x 8/3 D
    ours = GPT(GPTConfig(V, 256, n_embd=D, n_expert=0, shared_hidden=8 * D // 3, engram=None),
               np.arange(V))
    steps = [training_step(model, random_batches(V), dtype) for model in (ours, theirs)]
    compare(f"dense training step over nanoGPT's, {name}", *steps,
            3 * 8 * 256 * accounting(ours)["flops_per_token"], dtype)


def decoding(nanogpt):
    """Ours has experts and a memory. On one thread, as sample.py decodes."""
    torch.set_num_threads(1)
    start = torch.zeros(1, 1, dtype=torch.long)
    ours = GPT(GPTConfig(V, 512, n_embd=D, expert_hidden=D, shared_hidden=D,
                         engram=EngramConfig(rows=10_000)), np.arange(V)).eval()
    theirs = nanogpt.GPT(nanogpt.GPTConfig(512, V, 4, 4, D, 0.0, False)).eval()
    compare("decoding 512 tokens over nanoGPT's, one thread",
            lambda: list(generate(ours, start, 511)), lambda: theirs.generate(start, 511),
            rounds=9)
    torch.set_num_threads(2)


def experts(other, title, name, dtype):
    """Ours: 16 experts, top 2, and a shared one, all of width D."""
    x, moe = torch.randn(8, 1024, D, requires_grad=True), MoE(D, D, 16, D, 2)
    for p in (*moe.parameters(), *other.parameters()):
        nn.init.normal_(p, std=0.02)
    works = [forward_backward(module, x, dtype) for module in (moe, other)]
    # a token multiplies three experts of three matrices; backward is twice forward
    compare(f"experts over {title}, {name}", *works, 3 * 3 * 3 * 2 * D * D * 8192, dtype)


def engram_over_twin(title, batches):
    shapes = make_twins(GPTConfig(1024), rho=0.5)
    steps = [training_step(GPT(shapes[name], np.arange(1024)), batches)
             for name in ("engram", "moe")]
    compare(f"training step of Engram over its twin, {title}, bf16", *steps, rounds=31)


def memories(rows, peft):
    """Compare a memory layer with engram-peft's, and a table with torch's."""
    engram = Engram(EngramConfig(rows=rows // 16, heads=8, width=32), 1, D, V, V - 1)
    ids, h = torch.randint(V, (8, 256)), torch.randn(8, 256, D, requires_grad=True)
    row_ids, address, row_adam = engram.hash(ids), engram.address(ids), RowAdam([engram.table])

    def ours(address):
        engram(h, engram.read(address)).sum().backward()

    def update():
        read = engram.read(engram.address(ids))
        lookup(read).sum().backward()
        row_adam.step([read], 1e-4)

    if peft:
        layer = peft.EngramLayer(peft.EngramConfig(
            engram_vocab_size_per_ngram=[rows // 2] * 2, embedding_dim=16 * 32, hc_mult=1,
            hidden_size=D, target_layers=[1], compressed_vocab_size=V, pad_id=V - 1,
            enable_tokenizer_compression=False), 1, engram.primes.flatten().tolist())

        def theirs(in_head):
            layer(hidden_states=h, engram_hash_indices=in_head).sum().backward()
            layer.zero_grad()

        in_head = row_ids - engram.offsets.flatten()
        compare(f"memory layer over engram-peft's, {rows:.0e} rows", lambda: ours(address),
                lambda: theirs(in_head))
        compare("  the same, and its addresses", lambda: ours(engram.address(ids)),
                lambda: theirs(torch.from_numpy(layer.hash_mapping.hash(ids)[1])))
    for title, make in (("Adam", partial(torch.optim.Adam, fused=True)),
                        ("SparseAdam", torch.optim.SparseAdam)):
        table = nn.Embedding(len(engram.table), 32, sparse=title == "SparseAdam")
        compare(f"reading and updating a table over {title}'s, {rows:.0e} rows", update,
                partial(update_embedding, table, make(table.parameters()), row_ids))


def update_embedding(table, adam, row_ids):
    table(row_ids).sum().backward()
    adam.step()
    adam.zero_grad()


def optional(name, path=None):
    """Return a module, by its name or its file, or None if it cannot be imported."""
    try:
        if path is None:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError) as error:
        print(f"left out: {name} ({error})")


def main(argv=None):
    parser = make_parser(__doc__, "python -m experiments.peers [options]")
    parser.add_argument("--nanogpt", default="../nanoGPT", help="a clone of nanoGPT")
    args = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(2)
    nanogpt = optional("nanogpt", f"{args.nanogpt}/model.py")
    mixtral = optional("transformers.models.mixtral.modeling_mixtral")
    peft = optional("engram_peft")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if nanogpt:
            dense_models(nanogpt, name, dtype)
        experts(SwiGLU(D, 3 * D), "a dense layer of equal FLOPs", name, dtype)
        if mixtral:
            # it has no shared expert, so it does two thirds of the work
            experts(mixtral.MixtralSparseMoeBlock(mixtral.MixtralConfig(
                hidden_size=D, intermediate_size=D, num_local_experts=16)),
                "transformers' Mixtral block", name, dtype)
    if nanogpt:
        decoding(nanogpt)
    engram_over_twin("random tokens", random_batches(1024))
    data = Data("python", "data", 256, 8, 100, 0, 4096)
    engram_over_twin("text", (torch.from_numpy(data.batch(i)[0]) for i in range(100)))
    for rows in (10 ** 5, 10 ** 6, 10 ** 7):
        memories(rows, peft)


if __name__ == "__main__":
    run_script(main)
