"""
Several processes on one machine, a share of each step's sequences for each of them:

    torchrun --standalone --nproc_per_node=2 train.py --batch_size 4 --table host

The idea: all processes (ranks) hold the same backbone and apply the same gradient, the mean
over the ranks, so they stay equal. Of a table they exchange the rows that a step has read,
with their gradients. A resident table is updated by every rank in the same way. With
--table host there is one table for all, in memory that the ranks share; rank 0 updates it
and keeps its moments, and the others wait.

Without torchrun there is one rank, and every function here returns at once.
"""
import os
from tempfile import NamedTemporaryFile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

from engram import Read

RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def begin(device):
    """Join the other ranks. Return the device of this one."""
    if RANKS > 1:
        cuda = device.startswith("cuda")
        dist.init_process_group("nccl" if cuda else "gloo")
        if cuda:
            # what nccl sends goes by way of the current device
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    return device


def of_first(call):
    """Return call() of rank 0; the others wait for it."""
    values = [call() if RANK == 0 else None]
    if RANKS > 1:
        dist.broadcast_object_list(values)
    return values[0]


def meet(loss, model, moes, reads):
    """After the backward pass, give all ranks the same loss, gradients and load of experts.
    Return reads of the rows that any rank has read."""
    if RANKS == 1:
        return reads
    # in one message: a message for each tensor took three times as long
    tensors = [loss, *(p.grad for p in model.parameters()), *(moe.load for moe in moes)]
    message = parameters_to_vector(tensors)
    dist.all_reduce(message)
    means = (message / RANKS).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))
    return [exchange(read) for read in reads]


def exchange(read):
    """Return a Read of all ranks' rows, with the mean of their gradients. It is for
    RowAdam.step alone: its leaf has no values."""
    grad = read.leaf.grad
    # ranks have read different numbers of rows: fill up to the longest with row -1
    longest = torch.tensor(len(grad), device=grad.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = int(longest) - len(grad)
    row_ids = gather(F.pad(read.row_ids.to(grad.device), (0, missing), value=-1))
    grads = gather(F.pad(grad, (0, 0, 0, missing))) / RANKS
    # each row once, as in Engram.read
    row_ids, inverse = row_ids.unique(return_inverse=True)
    grad = grads.new_zeros(len(row_ids), grads.size(1)).index_add_(0, inverse, grads)
    row_ids, grad = row_ids[row_ids >= 0], grad[row_ids >= 0]
    leaf = torch.empty_like(grad, requires_grad=True)
    leaf.grad = grad
    return Read(row_ids, leaf, inverse=None, ready=None)


def gather(tensor):
    """Return the tensors of all ranks, one behind the other."""
    parts = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def one_table(model):
    """Do all ranks share a table in host memory?"""
    return RANKS > 1 and any(engram.fetch for engram in model.engrams())


def update(model, row_adam, reads, lr):
    """Update the tables. One that all ranks share is updated by rank 0."""
    if RANK == 0 or not one_table(model):
        row_adam.step(reads, lr)
    if one_table(model):
        # nobody reads a row before it is written
        dist.barrier()


def share_tables(model, row_adam):
    """Have all ranks use one table, if it is in host memory. Its moments stay with rank 0."""
    if one_table(model):
        for i, engram in enumerate(model.engrams()):
            engram.table = row_adam.tables[i] = share(engram.table)
            if RANK > 0:
                row_adam.state[i] = None


def share(tensor):
    """Return a tensor in memory that all ranks share, with the values of rank 0."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with NamedTemporaryFile(dir=folder) as file:
        name = of_first(lambda: file.name)
        if RANK == 0:
            # too little room is found here, not when a page is written
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        dist.barrier()
        shared = torch.from_file(name, True, tensor.numel(), dtype=tensor.dtype)
        shared = shared.view(tensor.shape)
        if RANK == 0:
            shared.copy_(tensor)
        # the file loses its name, and goes with the last rank
        dist.barrier()
    return shared
