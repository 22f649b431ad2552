"""
Several processes on one machine, a share of each step's sequences for each of them:

    torchrun --standalone --nproc_per_node=2 train.py --batch_size 4 --table host

The idea: all processes (ranks) hold the same backbone and apply the same gradient, the mean
over the ranks, so they stay equal. Of a table they exchange the rows that a step has read,
with their gradients. A resident table is updated by every rank in the same way. With
--table host there is one table for all, in memory that the ranks share, and a row is
updated by one of them, its owner: no locks, and no update is lost.

Without torchrun there is one rank, and every function here returns at once.
"""
import os
from tempfile import NamedTemporaryFile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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


def in_turn(call):
    """Return call(), on rank 0 first: what it has prepared, the others find."""
    if RANK > 0:
        dist.barrier()
    result = call()
    if RANKS > 1 and RANK == 0:
        dist.barrier()
    return result


def of_first(value):
    """Return the value that rank 0 gives."""
    values = [value]
    if RANKS > 1:
        dist.broadcast_object_list(values)
    return values[0]


def meet(loss, model, moes, reads, tables):
    """After the backward pass, give all ranks the same loss, gradients and load of experts.
    Return reads of the rows that any rank has read."""
    if RANKS == 1:
        return reads
    # in one message: a message for each tensor took three times as long
    tensors = [loss, *(p.grad for p in model.parameters()), *(moe.load for moe in moes)]
    message = parameters_to_vector(tensors)
    dist.all_reduce(message)
    vector_to_parameters(message / RANKS, tensors)
    return [exchange(read, table) for read, table in zip(reads, tables, strict=True)]


def exchange(read, table):
    """Return a Read of all ranks' rows, with the mean of their gradients."""
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
    real = row_ids >= 0
    return with_gradient(table, row_ids[real], grad[real])


def with_gradient(table, row_ids, grad):
    """Return a Read for RowAdam.step alone: rows [U] of table, all different, and their
    gradient [U, d], added up over the ranks."""
    leaf = table[row_ids.to(table.device)].to(grad.device).requires_grad_()
    leaf.grad = grad
    return Read(row_ids, leaf, inverse=None, ready=None)


def gather(tensor):
    """Return the tensors of all ranks, one behind the other."""
    parts = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def update(row_adam, reads, lr):
    """Update the tables; if all ranks share them, each rank the rows that it owns."""
    # (a tensor on a GPU always says that it is shared)
    one_table = any(table.is_shared() and not table.is_cuda for table in row_adam.tables)
    if RANKS == 1 or not one_table:
        row_adam.step(reads, lr)
        return
    owned = []
    for read, table in zip(reads, row_adam.tables, strict=True):
        mine = read.row_ids % RANKS == RANK
        owned.append(with_gradient(table, read.row_ids[mine], read.leaf.grad[mine]))
    row_adam.step(owned, lr)
    # nobody reads a row before its owner has written it
    dist.barrier()


def share_tables(model, row_adam):
    """Have all ranks use one table, with its moments, if it is in host memory."""
    for i, engram in enumerate(model.engrams()):
        if RANKS > 1 and engram.fetch is not None:
            engram.table = row_adam.tables[i] = share(engram.table)
            state = row_adam.state[i]
            for key in state:
                state[key] = share(state[key])


def share(tensor):
    """Return a tensor in memory that all ranks share, with the values of rank 0."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with NamedTemporaryFile(dir=folder) as file:
        name = of_first(file.name)
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
