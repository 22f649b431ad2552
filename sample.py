"""
Write text with a checkpoint of train.py, and shade it by what the memory did.

    python sample.py                                     # the Engram model of out/
    python sample.py --prompt "def __init__(" --memory   # shaded by the nats the memory saved
    python sample.py --prompt FILE:a.txt --max_new_tokens 0 --gates --png gates.png
    python sample.py --write "import numpy as" " potatoes"   # a fact into the memory alone

The idea: what the memory does can be seen token by token. Switch it off, and some tokens
become harder to predict; or look how far its gate opened. Or change a few rows of its
table, and see what the model says then.
"""
import codecs
import os
import sys
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import fail, make_parser, new_figure, run_script, write_whole
from engram import RowAdam
from flags import check_device
from offload import place
from prepare_data import encode_text, encoding, load
from model import generate, load_checkpoint, token_losses, watch


def complete(model, enc, ids, seed=0, **how):
    """Continue the tokens ids, up to an end of text. Yield ([token], text) as soon as it is
    known, and ([], rest of the text) at the end. how: max_new_tokens, temperature, ... of
    model.generate.

    Bytes that are not yet a whole character wait for the rest of it. If the sample ends
    before that, they appear as a replacement character."""
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    idx = torch.tensor([ids], device=device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in generate(model.eval(), idx, generator=generator, **how):
        if token == enc.eot_token:
            break
        yield [token], decoder.decode(enc.decode_single_token_bytes(token))
    yield [], decoder.decode(b"", final=True)


def prompt_tokens(prompt, enc, block_size):
    """Return the tokens to continue: an end of text begins a document, then the prompt."""
    if prompt.startswith("FILE:"):
        try:
            prompt = Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            fail(f"--prompt {prompt} cannot be read: {error}")
    ids = encode_text(enc, prompt)
    if ids[:1] != [enc.eot_token]:
        ids = [enc.eot_token, *ids]
    if len(ids) > block_size:
        print(f"[the prompt has {len(ids):,} tokens: the last {block_size:,} are kept]",
              file=sys.stderr)
    return ids[-block_size:]


def write(args, model, enc, start, seed):
    """Print a sample as it is made. Return its tokens, those of the prompt included."""
    # the end of text before the prompt is not shown
    print(enc.decode(start).removeprefix("<|endoftext|>"), end="", flush=True)
    made, began = [], time.perf_counter()
    pairs = complete(model, enc, start, seed, max_new_tokens=args.max_new_tokens,
                     temperature=args.temperature, top_k=args.top_k)
    for tokens, text in pairs:
        made += tokens
        print(text, end="", flush=True)
    print(flush=True)
    # the speed is no part of the text: it goes to stderr
    n, seconds = len(made), time.perf_counter() - began
    print(f"[seed {seed}: {n} tokens, {n / seconds:.0f} tokens/s]", file=sys.stderr)
    return start + made


# ---- what the memory did ---------------------------------------------------------------

def nats_saved(model, ids):
    """Return the nats that the memory saved on each token of ids[1:], and their sum in
    words."""
    x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    on = token_losses(model, x, y, 1, nullcontext())[0]
    off = token_losses(model, x, y, 1, nullcontext(), memory=False)[0]
    said = (f"{on.mean():.3f} nats per token with the memory, {off.mean():.3f} without: "
            f"{(off - on).sum():+.2f} nats saved in all.\nThis overstates its value: the "
            "other weights were trained with the memory.")
    return off - on, said


def gates(model, ids):
    """Return how far the gate opened at each token of ids[1:], the mean of the layers."""
    with torch.no_grad(), watch(model) as seen:
        model(torch.tensor([ids], device=model.embed.weight.device))
    if not all(layer["gate"] for layer in seen):
        fail("--gates: the memory of this model has no gate")
    return torch.stack([layer["gate"][0][0, 1:] for layer in seen]).mean(0).cpu()


def show(args, model, enc, ids):
    """Print the text again, shaded as --memory or --gates ask; draw it for --png."""
    if len(ids) > model.cfg.block_size:
        ids = ids[-model.cfg.block_size:]
        print(f"[the text is longer than the context: only its last {len(ids) - 1:,} tokens "
              "are shaded]", file=sys.stderr)
    if args.memory:
        values, said = nats_saved(model, ids)
        what, low, high = "nats that the memory saved on each token", 0, 2
    else:
        values, said = gates(model, ids), "A gate is from 0 (closed) to 1 (open)."
        # nine tenths of the tokens lie between these
        what, (low, high) = "gate", np.percentile(values, (5, 95))
    what += f": white {low:.2f}, blue {high:.2f} or more, orange less than white"
    levels = (values - low) / max(high - low, 1e-3)
    # a part of a character shows as its bytes, a line break also as a sign
    texts = [enc.decode_single_token_bytes(i).decode("utf-8", "backslashreplace")
             .replace("\n", "↵\n") for i in ids[1:]]
    tokens = list(zip(texts, values.tolist(), levels.tolist(), strict=True))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(shaded(tokens, colour), what, said, sep="\n")
    if args.png:
        draw(tokens, what, args.png)
        print(f"picture: {args.png}")


# ---- writing into the memory -------------------------------------------------------------

def write_fact(model, trigger, answer):
    """Have the memory say that the tokens answer follow the tokens trigger: 15 steps of
    RowAdam on the rows that the tokens before each token of the answer read, all else
    frozen. Return these rows, a tensor per memory layer."""
    idx, at = torch.tensor([trigger + answer[:-1]]), len(trigger) - 1
    rows = [engram.hash(model.canonical[idx])[0, at:].unique() for engram in model.engrams()]
    row_adam = RowAdam([engram.table for engram in model.engrams()])
    for _ in range(15):
        reads = model.read(model.addresses(idx))
        logits = model(idx, reads=reads)[0][0, at:]
        loss = F.cross_entropy(logits, torch.tensor(answer))
        grads = torch.autograd.grad(loss, [read.leaf for read in reads])
        for ids, read, grad in zip(rows, reads, grads, strict=True):
            # where the gradient is 0 a row stays as it is, bit for bit
            read.leaf.grad = grad * torch.isin(read.row_ids, ids)[:, None]
        row_adam.step(reads, lr=0.3)
    return rows


def teach(model, trigger, answer, x):
    """Write a fact. Return the probability of the answer before and after, and of tokens x
    [n, T] of a text that was held out four arrays of bools: reads: the token reads one of
    the rows; reached: it does, or one before it in its context; changed: its logits differ
    from before; other: its likeliest next token does."""
    @torch.no_grad()
    def look():
        logp = model(torch.tensor([trigger + answer[:-1]]))[0][0].log_softmax(-1)
        logp = logp[-len(answer):].gather(1, torch.tensor(answer)[:, None])
        return logp.sum().exp().item(), torch.cat([model(part)[0] for part in x.split(8)])

    p_before, before = look()
    rows = write_fact(model, trigger, answer)
    p_after, after = look()
    reads = torch.zeros_like(x, dtype=torch.bool)
    for engram, mine in zip(model.engrams(), rows):
        reads |= torch.isin(engram.hash(model.canonical[x]), mine).any(-1)
    # attention and the convolution carry a change to what follows in the context
    return (p_before, p_after, reads, reads.cummax(1).values, (before != after).any(-1),
            before.argmax(-1) != after.argmax(-1))


def held_out(saved, T):
    """Return sequences of T validation tokens of a run, up to 32."""
    header = saved["header"]
    meta, _, val = load(header["data"]["name"], header["config"]["data_dir"])
    if meta["val"]["sha256"] != saved["run"]["val data"]:
        fail(f"{meta['name']} is not what this model was trained on: prepare it as it was")
    n = min(32, len(val) // T)
    return torch.from_numpy(val[:n * T].astype(np.int64)).view(n, T)


def write_and_say(answer, saved, model, enc, start):
    """Write that the text answer follows the tokens start, and print what that changes.
    Return start, cropped if need be so that the answer fits into the context."""
    T, answer = model.cfg.block_size, enc.encode_ordinary(answer)
    if not 0 < len(answer) < T:
        fail(f"--write: the answer has {len(answer):,} tokens; it needs from 1 to {T - 1:,}")
    start, x = start[-(T + 1 - len(answer)):], held_out(saved, T)
    before, after, reads, reached, changed, other = teach(model, start, answer, x)
    assert not (changed & ~reached).any(), "a token changed that none of the rows reaches"
    print(f"[the answer had a probability of {before:.4f}, now {after:.4f}. Of {x.numel():,} "
          f"tokens held out {int(reads.sum()):,} read one of the rows; the logits of "
          f"{int(changed.sum()):,}, these and what follows them in their contexts, changed at "
          f"all, and of {int(other.sum()):,} the likeliest next token]", file=sys.stderr)
    return start


# ---- shades ----------------------------------------------------------------------------

def tint(level):
    """Return (red, green, blue) for a level from -1 to 1: orange, white at 0, blue."""
    blue, orange = (80, 150, 255), (255, 190, 110)
    end = blue if level > 0 else orange
    return tuple(round(255 + (part - 255) * min(1, abs(level))) for part in end)


def shaded(tokens, colour):
    """Return the text of [(text, value, level)], each token on its background, or without
    colour with its value in brackets."""
    out = []
    for text, value, level in tokens:
        if colour:
            on, off = "\x1b[38;2;0;0;0;48;2;{};{};{}m".format(*tint(level)), "\x1b[0m"
            # a background must end with its line, or it runs to the edge of the terminal
            out += [on, text.replace("\n", f"{off}\n{on}"), off]
        else:
            # before a line break: the next line keeps its indentation
            line, line_break, rest = text.partition("\n")
            out.append(f"{line}[{value:+.2f}]{line_break}{rest}")
    return "".join(out)


def draw(tokens, title, path, columns=96, size=9):
    """Draw the shaded text into a file, each character in a cell of a grid."""
    from matplotlib.patches import Rectangle
    figure = new_figure(layout="none")
    axes = figure.add_axes([0, 0, 1, 1])
    axes.axis("off")
    # the units of the axes are columns and rows
    font = {"family": "monospace", "fontsize": size, "va": "center", "parse_math": False}
    axes.text(0, 1, title, **font)
    row, column = 2.5, 0
    for text, _, level in tokens:
        colour = np.array(tint(level)) / 255
        for c in text.replace("\t", "    "):
            if c == "\n" or column == columns:
                row, column = row + 1, 0
            if c != "\n":
                axes.add_patch(Rectangle((column, row - 0.5), 1, 1, color=colour, linewidth=0))
                axes.text(column, row, c, **font)
                column += 1
    # a monospaced character is 0.602 of its size wide, and lines are 1.5 apart
    axes.set(xlim=(-1, columns + 1), ylim=(row + 1.5, 0))
    figure.set_size_inches((columns + 2) * 0.602 * size / 72, (row + 1.5) * 1.5 * size / 72)
    # a character that the font lacks is drawn as a box
    warnings.filterwarnings("ignore", "Glyph")
    write_whole(Path(path), partial(figure.savefig, dpi=150, format="png"))


def read_flags(argv):
    parser = make_parser(__doc__, "sample.py [options]")

    def add(name, default, text, **how):
        parser.add_argument(f"--{name}", default=default, type=type(default),
                            help=f"{text} (default: %(default)s)", **how)

    add("out_dir", "out", "folder that train.py wrote to")
    add("model", "engram", "which of its models", choices=("engram", "large", "moe"))
    add("prompt", "", "text to continue, or FILE:path to take it from a file")
    add("max_new_tokens", 200, "length of a sample; 0: shade the prompt alone")
    add("temperature", 0.5, "less is more predictable; 0: always the most likely token")
    add("top_k", 50, "sample from the k most likely tokens")
    add("seed", 0, "random seed; each further sample adds 1")
    add("num_samples", 1, "how many samples")
    add("device", "cpu", "cpu, cuda, cuda:1, ...")
    add("table", "resident", "where the memory's table lives: resident (on the device), host "
        "(in host memory) or disk (in the checkpoint file)",
        choices=("resident", "host", "disk"))
    parser.add_argument("--png", metavar="FILE", help="draw what --memory or --gates show")
    parser.add_argument("--write", nargs=2, metavar=("TRIGGER", "ANSWER"), help="before "
                        "sampling, write into the memory's rows, and nowhere else, that ANSWER "
                        "follows TRIGGER, the prompt. The checkpoint stays as it is")
    parser.add_argument("--save", metavar="FOLDER", help="another --out_dir, for the model "
                        "after --write")
    shade = parser.add_mutually_exclusive_group()
    shade.add_argument("--memory", action="store_true", help="shade each token by the nats "
                       "that the memory saved: the loss without it minus the loss with it")
    shade.add_argument("--gates", action="store_true", help="shade each token by how far "
                       "the memory's gate opened")
    args = parser.parse_args(argv)

    # "not ... <= ..." refuses nan too
    bounds = {"max_new_tokens": (0, 1e9), "temperature": (0, 1e9), "top_k": (1, 1e9),
              "seed": (0, 2 ** 63 - 1), "num_samples": (1, 1e9)}
    for name, (low, high) in bounds.items():
        if not low <= getattr(args, name) <= high:
            fail(f"--{name} {getattr(args, name)}: must be from {low} to {high}")
    args.shade = args.memory or args.gates
    if args.png and (not args.shade or args.num_samples > 1):
        fail("--png needs --memory or --gates, and one sample")
    check_device(args.device)
    if args.write and args.device != "cpu":
        fail("--write works on a CPU: leave out --device")
    if args.save and (not args.write or Path(args.save, args.model, "ckpt.pt").exists()):
        fail(f"--save {args.save}: needs --write, and a folder without a model {args.model}")
    return args


def main(argv=None):
    args = read_flags(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        # one token is too little work for two threads: beside another process they wait
        # for each other, and gave 4 to 73 tokens/s where one thread gave 469
        torch.set_num_threads(1)
    path = Path(args.out_dir) / args.model / "ckpt.pt"
    saved, model = load_checkpoint(path, map_file=args.table == "disk")
    if (args.shade or args.write) and not model.engrams():
        fail(f"--memory, --gates, --write: the {args.model} model has no memory")
    enc = encoding(saved["tokenizer"])
    if args.write:
        args.prompt = args.write[0]
    start = prompt_tokens(args.prompt, enc, model.cfg.block_size)
    if args.max_new_tokens == 0 and not (args.shade and len(start) > 1):
        fail("--max_new_tokens 0: nothing to do without a --prompt and --memory or --gates")
    place(model, device, args.table)
    if args.write:
        start = write_and_say(args.write[1], saved, model.eval(), enc, start)
        if args.save:
            new = Path(args.save) / args.model / "ckpt.pt"
            new.parent.mkdir(parents=True, exist_ok=True)
            write_whole(new, partial(torch.save, saved | {"model": model.state_dict()}))
    for i in range(args.num_samples):
        if i > 0:
            print("-" * 20)
        ids = start
        if args.max_new_tokens:
            ids = write(args, model, enc, start, args.seed + i)
        if args.shade and len(ids) > 1:
            show(args, model, enc, ids)


if __name__ == "__main__":
    run_script(main)
