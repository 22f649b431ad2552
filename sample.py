"""
Look at what train.py made: text from a model, and the twins side by side.

    python sample.py --prompt "def main("        # the Engram model of out/
    python sample.py --model moe --seed 1
    python sample.py --table                     # the table and loss.png again, from the logs

The idea: cached decoding. Each token is computed once; keys, values, the last n-gram and the
convolution's tail are carried on (model.Cache).
"""
from pathlib import Path
import argparse
import codecs
import json

import torch
import torch.nn.functional as F

from model import GPT, Cache, GPTConfig
from prepare_data import Offline, encoding, fail


def load_checkpoint(path):
    """-> what train.py saved at path: weights, shape, tokenizer and the state of training."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["model"], saved["shape"], saved["run"], saved["header"]          # all there?
        return saved
    except FileNotFoundError:
        fail(f"no checkpoint at {path}; train first: python train.py")
    except Exception as error:      # torch and pickle raise many kinds for a truncated file
        fail(f"{path} is not a readable checkpoint ({type(error).__name__}: {str(error):.80}); "
             "restore it, or begin anew in another --out_dir")


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=0.8, top_k=50, generator=None):
    """Continue idx [1, T], up to the end of the context; yields each token id as soon as it is
    known. temperature 0 takes the likeliest."""
    cache = Cache(model.cfg)
    for _ in range(min(max_new_tokens, model.cfg.block_size - idx.size(1))):
        logits = model(idx, cache=cache)[0][:, -1].float()
        if temperature < 1e-3:
            idx = logits.argmax(-1, keepdim=True)
        else:
            least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            probs = (logits.masked_fill(logits < least, -torch.inf) / temperature).softmax(-1)
            idx = torch.multinomial(probs, 1, generator=generator)
        yield idx.item()


def complete(model, enc, prompt="", seed=0, **how):
    """Yield text that continues prompt, or begins a document; stops at an end of text. Bytes that
    are not yet whole characters wait for the rest of theirs."""
    model.eval()
    device = model.embed.weight.device
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids = [enc.eot_token] + enc.encode_ordinary(prompt)
    if len(ids) >= model.cfg.block_size:
        fail(f"the prompt has {len(ids)} tokens with the end of text before it, the context "
             f"{model.cfg.block_size}: shorten it")
    generator = torch.Generator(device).manual_seed(seed)
    for token in generate(model, torch.tensor([ids], device=device), generator=generator, **how):
        if token == enc.eot_token:
            break
        yield decoder.decode(enc.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


@torch.no_grad()
def token_losses(model, x, y, batch_size, autocast):
    """-> nats for each token [n, T], in fp32, on the CPU."""
    model.eval()
    device, losses = model.embed.weight.device, []
    for x, y in zip(x.split(batch_size), y.split(batch_size)):
        with autocast:
            logits = model(x.to(device))[0].float().flatten(0, 1)
        nats = F.cross_entropy(logits, y.to(device).flatten(), reduction="none")
        losses.append(nats.view(y.shape).cpu())
    model.train()
    return torch.cat(losses)


# ---- the twins, from their logs alone -----------------------------------------------------------

def read_logs(out_dir):
    """-> {model: (header, records)} of the runs in out_dir that have a record."""
    runs = {}
    for name in ("engram", "moe", "dense"):
        path = Path(out_dir) / name / "log.jsonl"
        try:
            lines = [json.loads(line) for line in open(path)] if path.exists() else []
        except (OSError, ValueError) as error:
            fail(f"{path} is not a readable log ({error}); --resume of its run writes it anew")
        if len(lines) > 1:
            runs[name] = lines[0], lines[1:]
    if not runs:
        fail(f"no log in {out_dir}; train first: python train.py")
    return runs


def crossing(records, target):
    """-> (tokens, seconds) at which the validation loss first reached target, linear between
    evaluations; None if it never did."""
    for before, after in zip([None, *records], records):
        if after["val_loss"] <= target:
            if before is None:
                return after["tokens"], after["seconds"]
            share = (before["val_loss"] - target) / (before["val_loss"] - after["val_loss"])
            return tuple(before[k] + share * (after[k] - before[k]) for k in ("tokens", "seconds"))


def compare(out_dir):
    """-> lines: a table of the runs in out_dir, and what the memory was worth."""
    runs = read_logs(out_dir)
    titles = ("", "P_tot, all but the embedding", "P_act, used per token", "tokens/s, training",
              "validation, nats per token", "validation, bits per byte")
    columns = [(name, f"{h['accounting']['P_tot']:,}", f"{h['accounting']['P_act']:,}",
                f"{r[-1]['tokens'] / r[-1]['seconds']:,.0f}", f"{r[-1]['val_loss']:.4f}",
                f"{r[-1]['val_bpb']:.4f}") for name, (h, r) in runs.items()]
    lines = [""] + [f"{row[0]:30s}" + "".join(f"{c:>12s}" for c in row[1:])
                    for row in zip(titles, *columns)]
    if "engram" in runs and "moe" in runs:
        (ha, a), (hb, b) = runs["engram"], runs["moe"]
        free = dict.fromkeys("resume model out_dir data_dir dataset preset".split())
        same = lambda h, r: {**h["config"], **free, "data": h["data"]["train"],
                             "tokens": r[-1]["tokens"]}
        x, y = same(ha, a), same(hb, b)
        if x != y:
            return lines + ["these are no twins: they differ in "
                            + ", ".join(f"{k} ({x[k]}, {y[k]})" for k in x if x[k] != y[k])]
        gap, at = a[-1]["val_loss"] - b[-1]["val_loss"], crossing(a, b[-1]["val_loss"])
        lines.append(f"difference {gap:+.4f} nats per token (engram - moe; one pair of seeds)")
        lines.append("engram did not reach the twin's final loss" if at is None else
                     f"engram passed the twin's final loss at {at[0] / b[-1]['tokens']:.0%} of the "
                     f"tokens and {at[1] / b[-1]['seconds']:.0%} of the wall clock")
    return lines


def plot(out_dir):
    """Write out_dir/loss.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for (name, (_, records)), style in zip(read_logs(out_dir).items(), ("-", "--", ":")):
        axes.plot(*zip(*((r["tokens"], r["val_loss"]) for r in records)), style, label=name)
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(out_dir) / "loss.png", dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out_dir", default="out", help="of train.py (default: %(default)s)")
    add("--model", default="engram", choices=("engram", "moe", "dense"))
    add("--prompt", default="", help="text to continue (default: none, a document from its start)")
    add("--max_new_tokens", type=int, default=200, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: the likeliest (default: %(default)s)")
    add("--top_k", type=int, default=50, help="draw from so many (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--table", action="store_true", help="tabulate and plot the runs of out_dir instead")
    args = parser.parse_args(argv)
    if args.table:
        plot(args.out_dir)
        return print(*compare(args.out_dir), sep="\n")
    for name, low, high in (("max_new_tokens", 1, 1e9), ("top_k", 1, 1e9), ("temperature", 0, 100),
                            ("seed", 0, 2 ** 63 - 1)):
        if not low <= getattr(args, name) <= high:
            fail(f"{name} {getattr(args, name)}: must be from {low} to {high:g}")
    saved = load_checkpoint(Path(args.out_dir) / args.model / "ckpt.pt")
    model = GPT(GPTConfig(**saved["shape"]), saved["model"]["canonical"])
    model.load_state_dict(saved["model"])
    try:
        enc = encoding(saved["tokenizer"])
    except (Offline, ValueError) as error:
        fail(error)
    print(args.prompt, end="")
    for text in complete(model, enc, args.prompt, args.seed, max_new_tokens=args.max_new_tokens,
                         temperature=args.temperature, top_k=args.top_k):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
