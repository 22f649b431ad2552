"""
Write text with a checkpoint of train.py, and shade it by what the memory did.

    python sample.py                                     # the Engram model of out/
    python sample.py --prompt "def __init__(" --memory   # shaded by the nats the memory saved
    python sample.py --prompt FILE:a.txt --max_new_tokens 0 --gates --png gates.png

The idea: what the memory does can be seen token by token. Switch it off, and some tokens
become harder to predict; or look how far its gate opened.
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

from common import fail, make_parser, new_figure, run_script, write_whole
from flags import check_device
from model import generate, load_checkpoint, token_losses
from offload import check_rows, place
from prepare_data import Offline, encode_text, encoding
from train import watch


def complete(model, enc, ids, seed=0, *, max_new_tokens, **how):
    """Continue the tokens ids. Yield (token, text) as soon as it is known; an end of text is
    the last. how: temperature, top_k, ... of model.generate.

    Bytes that are not yet a whole character wait for the rest of it. If the sample ends
    before that, they appear as a replacement character."""
    model.eval()
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    idx = torch.tensor([ids], device=device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = generate(model, idx, max_new_tokens, generator=generator, **how)
    for n, token in enumerate(tokens, start=1):
        if token == enc.eot_token:
            yield token, decoder.decode(b"", final=True)
            return
        token_bytes = enc.decode_single_token_bytes(token)
        yield token, decoder.decode(token_bytes, final=n == max_new_tokens)


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
    ids, began = list(start), time.perf_counter()
    how = {name: getattr(args, name)
           for name in ("max_new_tokens", "temperature", "top_k")}
    for token, text in complete(model, enc, start, seed, **how):
        ids.append(token)
        print(text, end="", flush=True)
    print(flush=True)
    # the rest is no part of the text: it goes to stderr
    n, seconds = len(ids) - len(start), time.perf_counter() - began
    why = "end of text" if ids[-1] == enc.eot_token else "max_new_tokens"
    print(f"[seed {seed}: {n} tokens, {n / seconds:.0f} tokens/s; stopped: {why}]",
          file=sys.stderr)
    if len(ids) > model.cfg.block_size + 1:
        print(f"[the context of {model.cfg.block_size:,} tokens was full: it went on from its "
              "last half]", file=sys.stderr)
    return ids[:-1] if ids[-1] == enc.eot_token else ids


# ---- what the memory did ---------------------------------------------------------------

def nats_saved(model, ids, n_new):
    """Return the nats that the memory saved on each token of ids[1:], and lines that add them
    up, for the prompt and for the last n_new tokens."""
    x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    on = token_losses(model, x, y, 1, nullcontext())[0]
    off = token_losses(model, x, y, 1, nullcontext(), memory=False)[0]
    begin, lines = max(0, len(on) - n_new), []
    for name, part in (("prompt", slice(0, begin)), ("sample", slice(begin, None))):
        if len(on[part]):
            lines.append(f"{name}: {len(on[part])} tokens, {on[part].mean():.3f} nats per "
                         f"token with the memory, {off[part].mean():.3f} without: "
                         f"{(off - on)[part].sum():+.2f} nats saved in all")
    lines.append("This overstates its value: the other weights were trained with the memory.")
    return off - on, lines


def gates(model, ids):
    """Return how far the gate opened at each token of ids[1:], the mean of the layers."""
    with torch.no_grad(), watch(model) as seen:
        model(torch.tensor([ids], device=model.embed.weight.device))
    layers = [layer["gate"][0][0, 1:].cpu() for layer in seen if layer["gate"]]
    if not layers:
        fail("--gates: the memory of this model has no gate")
    return torch.stack(layers).mean(0)


def show(args, record, model, enc, ids, n_new):
    """Print the text again, shaded as --memory or --gates ask; draw it for --png. record: the
    last evaluation of the run. The last n_new tokens are not the prompt's."""
    if len(ids) < 2:
        print("[there is no text to shade]", file=sys.stderr)
        return
    if len(ids) > model.cfg.block_size:
        ids = ids[-model.cfg.block_size:]
        print(f"[the text is longer than the context: only its last {len(ids) - 1:,} tokens "
              "are shaded]", file=sys.stderr)
    if args.memory:
        values, lines = nats_saved(model, ids, n_new)
        what, form, low, high = "nats that the memory saved on each token", "+.2f", 0, 2
    else:
        values, lines = gates(model, ids), []
        what, form = "gate, from 0 (closed) to 1 (open)", ".2f"
        # nine tenths of the validation tokens lie between these
        low, high = np.mean(record["gate_p5"]), np.mean(record["gate_p95"])
        if high - low < 0.05:
            lines = ["The gate barely varies, so the colours exaggerate small differences."]
        high = max(high, low + 1e-3)
    title = f"{what}: white {low:.2f}, blue {high:.2f} or more, orange less than white"
    spans = spans_of(enc, ids[1:], values)
    print(shaded(spans, low, high, has_colours(), form))
    print(title if has_colours() else f"in brackets: {what}", *lines, sep="\n")
    if args.png:
        draw(spans, low, high, title, args.png)
        print(f"picture: {args.png}")


# ---- shades ----------------------------------------------------------------------------

def spans_of(enc, ids, values):
    """Return [(text of a token, its value)]. A part of a character shows as its bytes."""
    spans = []
    for i, value in zip(ids, values, strict=True):
        text = enc.decode_single_token_bytes(i).decode("utf-8", "backslashreplace")
        spans.append((text, float(value)))
    return spans


def has_colours():
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def tint(level):
    """Return (red, green, blue) for a level from -1 to 1: orange, white at 0, blue."""
    blue, orange = (80, 150, 255), (255, 190, 110)
    end = blue if level > 0 else orange
    return tuple(round(255 + (part - 255) * min(1, abs(level))) for part in end)


def shaded(spans, low, high, colour, form="+.2f"):
    """Return the text of spans with each token on a background: low is white, high blue.
    Without colour, its value follows it in brackets, printed in that form."""
    out = []
    for text, value in spans:
        text = text.replace("\n", "↵\n")
        if colour:
            # a background must end with its line, or it runs to the edge of the terminal
            red, green, blue = tint((value - low) / (high - low))
            on, off = f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}m", "\x1b[0m"
            out += [on, text.replace("\n", f"{off}\n{on}"), off]
        else:
            # before a line break: the next line keeps its indentation
            end = text.rfind("\n") if "\n" in text else len(text)
            out.append(f"{text[:end]}[{value:{form}}]{text[end:]}")
    return "".join(out)


def grid(spans, columns, row=0):
    """Return [(row, column, character, value)] of the text, in lines of that many columns."""
    cells, column = [], 0
    for text, value in spans:
        for c in text.replace("\t", "    ").replace("\n", "↵\n"):
            if c == "\n" or column == columns:
                row, column = row + 1, 0
            if c != "\n":
                cells.append((row, column, c, value))
                column += 1
    return cells


def draw(spans, low, high, title, path, size=9):
    """Draw the shaded text into a file, each character in a cell of a grid."""
    from matplotlib.patches import Rectangle
    lines = "".join(text for text, _ in spans).split("\n")
    widest = max(len(line) for line in lines) + 1          # with the sign of a line break
    columns = max(len(title), min(90, widest))
    cells = grid(spans, columns, row=2)
    rows = cells[-1][0] + 1.5
    # the units of the axes are columns and rows: a character of the monospaced font is
    # 0.602 of its size wide, and lines are 1.5 apart
    figure = new_figure(figsize=((columns + 2) * 0.602 * size / 72, rows * 1.5 * size / 72))
    figure.set_layout_engine("none")
    axes = figure.add_axes([0, 0, 1, 1], xlim=(-1, columns + 1), ylim=(rows, 0))
    axes.axis("off")
    font = {"family": "monospace", "fontsize": size, "va": "center", "parse_math": False}
    axes.text(0, 0.8, title, **font)
    for row, column, c, value in cells:
        face = [part / 255 for part in tint((value - low) / (high - low))]
        axes.add_patch(Rectangle((column, row - 0.5), 1, 1, facecolor=face, linewidth=0))
        axes.text(column, row, c, **font)
    # a character that the font lacks is drawn as a box
    warnings.filterwarnings("ignore", "Glyph")
    write_whole(Path(path), partial(figure.savefig, dpi=150, format="png"))


# ---- the command -----------------------------------------------------------------------

def read_flags(argv):
    parser = make_parser(__doc__, "sample.py [options]")

    def add(name, default, text, **how):
        parser.add_argument(f"--{name}", default=default, type=type(default),
                            help=f"{text} (default: %(default)s)", **how)

    add("out_dir", "out", "folder that train.py wrote to")
    add("model", "engram", "which of its models", choices=("engram", "large", "moe"))
    parser.add_argument("--prompt", default="", help="text to continue, or FILE:path to take "
                        "it from a file (default: none, a document from its beginning)")
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
    shade = parser.add_mutually_exclusive_group()
    shade.add_argument("--memory", action="store_true", help="shade each token by the nats "
                       "that the memory saved: the loss without it minus the loss with it")
    shade.add_argument("--gates", action="store_true", help="shade each token by how far "
                       "the memory's gate opened")
    args = parser.parse_args(argv)

    # refuse what is impossible; "not ... >=" refuses nan too
    least = {"max_new_tokens": 0, "temperature": 0, "top_k": 1, "seed": 0, "num_samples": 1}
    for name, low in least.items():
        if not getattr(args, name) >= low:
            fail(f"--{name} {getattr(args, name)}: must be {low} or more")
    if args.seed >= 2 ** 63:
        fail(f"--seed {args.seed}: must be below 2 ** 63")
    args.shade = args.memory or args.gates
    if args.png and (not args.shade or args.num_samples > 1):
        fail("--png needs --memory or --gates, and one sample")
    if args.max_new_tokens == 0 and not (args.shade and args.prompt):
        fail("--max_new_tokens 0: nothing to do without a --prompt and --memory or --gates")
    check_device(args.device)
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
    if args.shade and not model.engrams():
        fail(f"--memory and --gates show a memory, and the {args.model} model has none")
    try:
        enc = encoding(saved["tokenizer"])
    except (Offline, ValueError) as error:
        fail(error)
    start = prompt_tokens(args.prompt, enc, model.cfg.block_size)
    place(model, device, args.table)
    if device.type not in ("cpu", "cuda"):
        check_rows(model, torch.tensor([start]))
    for i in range(args.num_samples):
        if i > 0:
            print("-" * 20)
        ids = start
        if args.max_new_tokens:
            ids = write(args, model, enc, start, args.seed + i)
        if args.shade:
            show(args, saved["records"][-1], model, enc, ids, len(ids) - len(start))


if __name__ == "__main__":
    run_script(main)
