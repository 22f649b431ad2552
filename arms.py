"""
Train several models with one command, and show how far they are.

The idea: on a CPU two models that share no thread train faster side by side than one after
the other on all threads, and hardly notice what else the machine does. So each gets a
process of its own, and tells the first process where it stands.
"""
import multiprocessing
import os
import queue
import signal
from contextlib import suppress

import torch
from tqdm import tqdm

from common import fail, keep_freed_memory, run_script
from ranks import RANK

TWIN = "moe"


class Progress:
    """One bar for all models together, and a line per evaluation. Call it to tell it where
    a model stands."""

    def __init__(self, names, steps):
        self.steps, self.done = steps, dict.fromkeys(names, 0)
        self.losses, self.twin, self.waiting = {}, {}, []
        # the twin has been evaluated up to this step; if it is not trained here, do not wait
        self.twin_step = 0 if TWIN in names else steps
        # disable=None: no bar where stderr is no terminal
        self.bar = tqdm(total=steps * len(names), unit="step", leave=False,
                        disable=True if RANK > 0 else None)

    def __call__(self, name, step, loss=None, record=None):
        """loss: of the last step; record: of an evaluation."""
        self.bar.update(step - self.done[name])
        self.done[name] = step
        if loss is not None:
            self.losses[name] = f"{loss:.3f}"
            self.bar.set_postfix(self.losses, refresh=False)
        if name == TWIN and loss is None:
            # at its start, and after an evaluation
            self.twin_step = step
        if record is not None:
            self.waiting.append((name, record))
            if name == TWIN:
                self.twin[step] = record["val_loss"]
        # a line waits for the twin's loss at its step, to show the gap
        while self.waiting and self.waiting[0][1]["step"] <= self.twin_step:
            self.write(*self.waiting.pop(0))

    def write(self, name, record):
        step, loss = record["step"], record["val_loss"]
        line = (f"{name:6s} step {step:,} of {self.steps:,}, {record['tokens'] / 1e6:.2f}M "
                f"tokens: train loss {record['train_loss']:.4f}, validation {loss:.4f}, "
                f"{record['tokens_per_s']:,.0f} tokens/s")
        if name != TWIN and step in self.twin:
            line += f", {loss - self.twin[step]:+.4f} against {TWIN}"
        self.bar.write(line)


def side_by_side(jobs, tell):
    """Run jobs, {name: job}, a process and a share of the threads each. A job is called
    with a function that hands its arguments on to tell, here."""
    threads = max(1, torch.get_num_threads() // len(jobs))
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    children = {name: context.Process(target=child, args=(job, told, threads))
                for name, job in jobs.items()}
    # Ctrl-C is for this process, which then stops the others
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for process in children.values():
        process.start()
    signal.signal(signal.SIGINT, before)
    try:
        running = True
        while running or not told.empty():
            running = any(process.is_alive() for process in children.values())
            with suppress(queue.Empty):
                tell(*told.get(timeout=0.2))
            for name, process in children.items():
                code = process.exitcode or 0
                if code > 0:
                    # it has said why
                    raise SystemExit(code)
                if code < 0:
                    fail(f"the process that trained {name} was killed (signal {-code}; 9 is "
                         "often a lack of memory): --resume goes on, --model trains one at a "
                         "time")
    finally:
        for process in children.values():
            # its files are whole at any moment
            process.terminate()
            process.join()


def child(job, told, threads):
    """Run one job. End at once if the first process is no more."""
    def tell(*message):
        if not multiprocessing.parent_process().is_alive():
            # nobody is left to read the queue, so do not wait for that
            os._exit(1)
        told.put(message)

    torch.set_num_threads(threads)
    keep_freed_memory()
    run_script(lambda: job(tell))
