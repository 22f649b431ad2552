"""
Where Engram's table lives: on the model's device or in host memory.

    python train.py --table host         # the same losses, the table in host memory
    python bench_offload.py              # what that costs: predicted, then measured

The idea: fetch a layer's rows while the blocks before the memory compute, and wait only at
the place of use. What takes part, in the order in which it appears:

    leaf            the small tensor [U, d] on the model's device that the forward pass
                    reads. It is empty at first. A Read carries it (engram.py).
    free            an event, that is, a mark in the compute queue, the GPU's list of work of
                    the model. Work queued earlier may still use the memory that torch gave
                    to leaf; behind the mark nothing does.
    worker          a thread beside the main one. It gathers rows of the table in host
                    memory, so that the main thread can go on and start the blocks.
    staging buffer  where the worker puts the rows for a GPU. It is pinned (the system may
                    not move it): only from pinned memory can a GPU copy while it computes.
    copy stream     a queue of the GPU for this copy alone. In the compute queue the copy
                    would wait for the blocks queued before it.
    copied          another mark, in the copy stream behind the copy. At the place of use the
                    compute queue waits for it. The main thread waits for the worker only.

Time runs to the right; the forward pass of a step with the memory in block 1:

    main thread   start() | queue block 0 | ready() waits | queue block 1 ...
    worker                | gather -> staging buffer      |
    copy stream                                           | copy to leaf, copied |
    compute queue             | block 0 ==================== | waits             | memory ...

On a CPU there are neither queues nor copies: the worker gathers straight into leaf, and
ready() waits for the worker. The table itself is not pinned: the GPU never touches it.
"""
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from common import fail
from engram import lookup


class Fetch:
    """Reads the rows of a table that is not on the model's device. Every read has a
    staging buffer and a leaf of its own, so several can be under way; one worker serves
    them in order."""

    def __init__(self, prefetch=True):
        """prefetch False: gather at the place of use, where everything waits for it. That
        is the baseline which bench_offload.py compares with."""
        self.worker = ThreadPoolExecutor(1, "prefetch") if prefetch else None
        self.copy_stream = None

    def start(self, table, row_ids, device):
        """Begin to read rows [U] of table [R, d], both on the host. Call it when the update
        of the step before has ended, and call ready() before the next update.

        Return leaf [U, d] on device, and ready(). Do not use leaf before ready() has been
        called; ready() also raises what went wrong in the worker."""
        leaf = table.new_empty(len(row_ids), table.size(1), device=device)
        free = torch.cuda.current_stream(device).record_event() if leaf.is_cuda else None
        # Engram.read() makes leaf require a gradient, and then it cannot be written to; the
        # worker writes to the same memory by a detached tensor
        job = partial(self.gather, table, row_ids, leaf.detach(), free)
        gathered = self.worker.submit(job).result if self.worker else job
        return leaf, partial(self.finish, gathered, leaf)

    def gather(self, table, row_ids, leaf, free):
        """Fill leaf. For a GPU, return the event behind the copy that fills it. free: see
        the top of this file."""
        if leaf.device.type == "cpu":
            take(table, row_ids, leaf)
            return None
        # a leaf that was made in inference mode can only be written to in that mode, and the
        # worker thread is not in it
        with torch.inference_mode(leaf.is_inference()):
            if leaf.is_cuda:
                return self.copy_to_gpu(table, row_ids, leaf, free)
            # another accelerator: an ordinary copy
            leaf.copy_(table[row_ids])

    def copy_to_gpu(self, table, row_ids, leaf, free):
        """Gather into a staging buffer, and queue its copy. Return the event behind it."""
        if self.worker is None:
            # no prefetch: overlap nothing, wait until the GPU has done all queued before
            torch.cuda.current_stream(leaf.device).synchronize()
        staging = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True)
        take(table, row_ids, staging)
        if self.copy_stream is None:
            self.copy_stream = torch.cuda.Stream(leaf.device)
        with torch.cuda.stream(self.copy_stream):
            self.copy_stream.wait_event(free)
            leaf.copy_(staging, non_blocking=True)
            # leaf's memory is kept until this copy ends, even if leaf is dropped (for
            # pinned memory, as staging's, torch does that by itself)
            leaf.record_stream(self.copy_stream)
            return self.copy_stream.record_event()

    # a compiler cannot wait for a thread
    @torch.compiler.disable
    def finish(self, gathered, leaf):
        """Wait for the worker and, on a GPU, queue what comes next behind the copy."""
        copied = gathered()
        if copied is not None:
            torch.cuda.current_stream(leaf.device).wait_event(copied)


def take(table, row_ids, out):
    """Copy rows of table [R, d] to out [U, d], both on the CPU.

    By numpy, because torch's index_select would start a second team of OpenMP threads in
    the worker, which spin beside the model's (training ran at 0.65 of its speed on two
    cores). numpy knows no bfloat16, so it gets bytes. With mode="clip" numpy writes to
    out directly; row numbers are in range by construction."""
    table_bytes = table.view(torch.uint8).numpy()
    out_bytes = out.view(torch.uint8).numpy()
    np.take(table_bytes, row_ids.numpy(), axis=0, out=out_bytes, mode="clip")


def place(model, device, where="resident", prefetch=True):
    """Move a GPT to device. where: the place of its tables. "resident" moves them too;
    "host" and "disk" leave them on the CPU, or in the file that load_checkpoint mapped."""
    tables, fetch = [engram.table for engram in model.engrams()], None
    if where != "resident":
        # take the tables off the model while the rest moves
        fetch = Fetch(prefetch)
        for engram in model.engrams():
            engram.table = None
    model.to(device)
    for engram, table in zip(model.engrams(), tables, strict=True):
        engram.fetch = fetch
        if fetch is not None:
            engram.table = table
    # an accelerator that nobody has tried may err in silence
    if torch.device(device).type not in ("cpu", "cuda"):
        repeatable = torch.Generator().manual_seed(0)
        check_rows(model, torch.randint(model.cfg.vocab_size, (8, 256), generator=repeatable))


def check_rows(model, idx):
    """Refuse a device that reads other rows for tokens idx [B, T] than the CPU does.
    Outside cpu and cuda, index_select() has had silent errors."""
    for engram, address in zip(model.engrams(), model.addresses(idx), strict=True):
        found = lookup(engram.read(address)).cpu()
        want = engram.table.cpu()[address.row_ids][address.inverse].flatten(2)
        if not torch.equal(found, want):
            fail(f"device {model.embed.weight.device} reads other rows of the table than the "
                 "CPU does, so it cannot be used: take --device cpu")
