"""
Prepare text: encode documents with a byte-level BPE into train.bin and val.bin (uint16
ids), and describe them in meta.json.

    python prepare_data.py                          # Python's own source: no network
    python prepare_data.py tinystories --max_mb 200
    python prepare_data.py openwebtext --tokenizer gpt2
    python prepare_data.py a.txt b.txt --name mine

The idea: a corpus is a generator of (split, document), where split 0 is train and 1 is
validation. It runs once for each purpose (to measure, to train the tokenizer on a sample,
to encode), so the whole text is never in memory.

Text files are UTF-8. The marker <|endoftext|>, on a line of its own, separates documents.
In a .jsonl file each line is an object whose field "text" is one document.
"""
import base64
import hashlib
import heapq
import importlib.util
import json
import math
import os
import re
import sysconfig
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common import fail, make_parser, run_script

# ends every document; its id is the last of the vocabulary
EOT = "<|endoftext|>"
MARKER = re.compile(re.escape(EOT) + "\n?")
# --max_mb of each data set; 0 means all
DEFAULT_MB = {"python": 48, "tinystories": 200, "openwebtext": 0}
# text files are read in blocks of about so many characters
CHUNK = 1 << 18
# the tokenizer sees at most so many characters, and so many different words
SAMPLE_CHARS = 12_000_000
MAX_WORDS = 60_000
# seconds after which a silent server is given up
TIMEOUT = 10
# files on the hub: address, bytes, sha256. TinyStories' second file is for validation
STORIES = "datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
DOWNLOADS = {
    "tinystories": [
        (f"{STORIES}/TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
         "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
        (f"{STORIES}/TinyStoriesV2-GPT4-valid.txt", 22_502_601,
         "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")],
    "openwebtext": [
        ("datasets/Skylion007/openwebtext/resolve/79d93d786212f7344586290adb811d4ae6a1762c/"
         "plain_text/train-00000-of-00080.parquet", 302_848_326,
         "caed9f4b7053d7cd4d1a13ce9ec9224d84a3bba1f11579193562a7e31ebe656e")]}
# the requirements and what they need: a fixed list keeps other packages out of the corpus
PACKAGES = """torch torchgen functorch sympy numpy matplotlib mpl_toolkits networkx
    fontTools pygments PIL mpmath pytest _pytest fsspec filelock jinja2 markupsafe packaging
    pyparsing urllib3 idna requests charset_normalizer certifi regex tiktoken tqdm
    typing_extensions contourpy kiwisolver cycler pluggy iniconfig dateutil""".split()
# how common files begin that are not text
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive", b"BZh": "bzip2",
         b"\x28\xb5\x2f\xfd": "zstandard", b"\xfd7zXZ": "xz", b"PAR1": "parquet",
         b"%PDF-": "a PDF", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# folders that hold tests, copies of other packages, tables
SKIP = set("""test tests testing idlelib _vendor vendor vendored extern external
    third_party _antlr encodings pydoc_data site-packages dist-packages""".split())


# ---- tokenizer: our own trainer, tiktoken's encoder ------------------------------------

# A merge never crosses these: contractions, words with the space before, up to 3 digits,
# punctuation, white space. As in GPT-2's, a run of white space leaves its last space to
# the next word, so "\n    return" is "\n   " + " return": indentation costs one token.
PATTERN = (r"'(?:[sdmt]|ll|re|ve)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
           r"|\s+(?!\S)|\s+")


def count_words(texts):
    """Return {word: how often} for the most frequent words."""
    import regex
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, text))
    # words without end (DNA, scripts without spaces) would make each merge slow
    for word in [word for word in counts if len(word) > 100]:
        n = counts.pop(word)
        for i in range(0, len(word), 20):
            counts[word[i:i + 20]] += n
    return dict(counts.most_common(MAX_WORDS))


def train_bpe(texts, n_merges):
    """Return the tokens (bytes) in order of id: the 256 bytes, then one for each merge.

    Each step merges the most frequent pair of neighbours (of equals, that with the smallest
    ids). A word is a string with one character per token, so str.replace is the merge. A
    heap finds the next pair; a count that has fallen is corrected when it comes up."""
    counts = count_words(texts)
    # latin-1 makes one character of each byte
    words = [word.encode().decode("latin-1") for word in counts]
    freqs = list(counts.values())
    # how often each pair occurs, and in which words
    pairs, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for a, b in zip(word, word[1:]):
            pairs[a + b] += freqs[i]
            where[a + b].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    while heap and len(tokens) < 256 + n_merges:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        # a pair seen once is not worth a token: the text is too small for more
        if -n < 2:
            break
        # ab+c and a+bc are one token, as in tiktoken
        joined = tokens[ord(pair[0])] + tokens[ord(pair[1])]
        new = ids.setdefault(joined, len(tokens))
        if new == len(tokens):
            tokens.append(joined)
        for changed in merge(pair, chr(new), words, freqs, pairs, where):
            heapq.heappush(heap, (-pairs[changed], changed))
    return tokens


def merge(pair, new, words, freqs, pairs, where):
    """Replace pair by the character new in all words. Return the pairs that have grown."""
    grown = set()
    for i in where.pop(pair):
        for a, b in zip(words[i], words[i][1:]):
            pairs[a + b] -= freqs[i]
        words[i] = words[i].replace(pair, new)
        for a, b in zip(words[i], words[i][1:]):
            pairs[a + b] += freqs[i]
            if new in (a, b):
                where[a + b].add(i)
                grown.add(a + b)
    return grown


def make_tokenizer(kind, texts, vocab_size):
    """Return a dict that JSON can hold, all that a checkpoint needs to carry."""
    tok = {"kind": kind}
    if kind == "bpe":
        tokens = train_bpe(texts, vocab_size - 257)
        tok["pattern"] = PATTERN
        tok["tokens"] = [base64.b64encode(token).decode() for token in tokens]
    known = json.dumps([tok.get("pattern"), tok.get("tokens")])
    tok["sha256"] = hashlib.sha256(known.encode()).hexdigest()
    return tok


def encoding(tok):
    """Return the tiktoken.Encoding of meta["tokenizer"]."""
    import tiktoken
    if tok["kind"] == "bpe":
        ranks = {base64.b64decode(token): i for i, token in enumerate(tok["tokens"])}
        return tiktoken.Encoding("bpe", pat_str=tok["pattern"], mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks)})
    return tiktoken.get_encoding("gpt2")


def token_bytes(tok):
    """Return the bytes of each id, 0 to vocab_size-1; the last is the end of text."""
    enc = encoding(tok)
    return [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)]


def encode_text(enc, text):
    """Return the ids of a text, in which each marker is the end-of-text id."""
    ids = []
    for part in MARKER.split(text):
        # in pieces: tiktoken cannot take a million blanks at once
        for start in range(0, len(part), CHUNK):
            ids += enc.encode_ordinary(part[start:start + CHUNK])
        ids.append(enc.eot_token)
    return ids[:-1]


# ---- corpus python: the source of Python and of what is installed with this project ----

def key(text):
    """Return 32 bytes that order or split things at random, everywhere in the same way."""
    return hashlib.sha256(text.encode()).digest()


def is_source(raw):
    """Tell source from generated tables, which are digits or have hardly a keyword."""
    words = (b"def ", b"class ", b"return ", b"import ", b"self.")
    keywords = sum(raw.count(word) for word in words)
    n = len(raw.translate(None, b" \n"))
    digits = n - len(raw.translate(None, b" \n0123456789"))
    return n > 0 and (n < 4000 or digits * 4 < n and keywords * 1500 > n)


@cache
def python_files():
    """Return [(hash, package, folder, path, size)] of all source, exact copies once."""
    roots = {"stdlib": sysconfig.get_paths()["stdlib"]}
    for package in PACKAGES:
        # find_spec does not import the package
        spec = importlib.util.find_spec(package)
        if spec is not None:
            roots[package] = [*(spec.submodule_search_locations or []), spec.origin][0]
    files = {}
    for package, root in roots.items():
        root = Path(root)
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            inside = "" if path == root else path.relative_to(root).as_posix()
            name = f"{package}/{inside}"
            if SKIP & set(name.split("/")):
                continue
            raw = path.read_bytes()
            if is_source(raw):
                file = key(name), package, name.rpartition("/")[0], path, len(raw)
                files.setdefault(hashlib.sha256(raw).digest(), file)
    return list(files.values())


def choose(files, max_mb):
    """Return [(split, path)]. Validation is 6 % of each package, in whole directories,
    because neighbours in a directory repeat each other."""
    total, folders = Counter(), Counter()
    for _, package, folder, _, size in files:
        total[package] += size
        folders[package, folder] += size
    # directories of validation, in the order of their hash, as long as they fit
    val, wanted = set(), {package: 0.06 * size for package, size in total.items()}
    for package, folder in sorted(folders, key=lambda pair: key(pair[1])):
        size = folders[package, folder]
        if size <= 1.2 * wanted[package]:
            val.add(folder)
            wanted[package] -= size
    # share the cap: each package gives as much as any other, or all that it has
    sizes = sorted(total.values())
    left = max_mb * 1e6 or sum(sizes)
    for i, size in enumerate(sizes):
        limit = left / (len(sizes) - i)
        if size > limit:
            break
        left -= size
    room = Counter()
    for (package, folder), size in folders.items():
        room[package, folder in val] += min(1, limit / total[package]) * size
    # take the files that fit; the order of their hash mixes the packages
    chosen = []
    for _, package, folder, path, size in sorted(files):
        if size <= room[package, folder in val]:
            room[package, folder in val] -= size
            chosen.append((int(folder in val), path))
    return chosen


# ---- corpora of text files and of downloads --------------------------------------------

def read_blocks(path, errors):
    """Yield the text of a file in blocks of whole lines, so that no marker is cut. In a
    .jsonl file each line is a document."""
    with open(path, encoding="utf-8-sig", errors=errors) as f:
        while lines := f.readlines(CHUNK):
            if "\0" in lines[0]:
                raise ValueError("NUL bytes")
            if Path(path).suffix.lower() == ".jsonl":
                lines = [json.loads(line)["text"] + f"{EOT}\n"
                         for line in lines if line.strip()]
            # JSON can spell halves of characters, which UTF-8 cannot
            yield "".join(lines).encode(errors="replace").decode()


def documents(paths, errors="strict"):
    """Yield the documents of text files. Those longer than CHUNK become several."""
    for path in paths:
        held = ""
        try:
            for block in read_blocks(path, errors):
                *ended, held = MARKER.split(held + block)
                yield from ended
                if len(held) > CHUNK:
                    # in pieces, because one line may be the whole text
                    for start in range(0, len(held), 2 * CHUNK):
                        yield held[start:start + 2 * CHUNK]
                    held = ""
        except (ValueError, KeyError, TypeError) as error:
            fail(f'{path} is not UTF-8 text, or not JSON lines with a "text" ({error}): '
                 "unpack or convert it first")
        yield held


def text_corpus(files):
    """Yield (split, document) of a user's files. Validation is the last 5 % of all text, of
    a small text up to a quarter."""
    total = sum(map(len, documents(files)))
    left = int(total - max(0.05 * total, min(0.25 * total, 4096)))
    for text in documents(files):
        # the document that lies on the border becomes two
        yield 0, text[:left]
        yield 1, text[left:]
        left = max(0, left - len(text))


def hub_corpus(name, downloads, max_mb):
    """Yield (split, document) of a data set on the hub. The cap may cut a story in two."""
    if name == "openwebtext" and importlib.util.find_spec("pyarrow") is None:
        fail("openwebtext comes as parquet, which needs pyarrow: pip install pyarrow")
    for split, (address, size, sha256) in enumerate(DOWNLOADS[name]):
        path, cap = downloads / Path(address).name, int(max_mb * 1e6)
        if split == 0 and 0 < cap < size:
            path, size, sha256 = downloads / f"{max_mb:g}MB-{path.name}", cap, None
        download(address, path, size, sha256)
        if name == "tinystories":
            for text in documents([path], errors="ignore"):
                yield split, text
            continue
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=["text"]):
            for text in batch.column(0).to_pylist():
                # 3 of 256 documents are for validation: 1.2 %
                yield int(key(text)[0] < 3), text


def download(address, path, size, sha256):
    """Get the first size bytes of a file on the hub. They grow as path.part, resumed where
    an earlier run stopped, and get their name once they are whole and checked."""
    if path.exists():
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{hub.rstrip('/')}/{address}"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    part.touch()
    try:
        while part.stat().st_size < size:
            fetch(url, part, size)
    # ValueError: an HF_ENDPOINT that is no address
    except (OSError, HTTPException, ValueError) as error:
        fail(f"{url} could not be fetched ({error}): run again to resume it, or use the "
             "data set python, which needs no network")
    with open(part, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if sha256 not in (None, found):
        # resumed, it would never become right
        part.unlink()
        fail(f"{url}: its sha256 is not {sha256}; deleted, so run again")
    part.replace(path)


def fetch(url, part, size):
    """Write to part what one connection brings of the rest of the first size bytes. Each
    byte is written at its own place, so two runs at once write the same file."""
    from tqdm import tqdm
    start = part.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{size - 1}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply, open(part, "r+b") as f:
        # 200 instead of 206: the server ignores ranges and begins anew
        f.seek(start if reply.status == 206 else 0)
        # disable=None: no bar where stderr is no terminal
        with tqdm(total=size, initial=f.tell(), unit="B", unit_scale=True, disable=None) as bar:
            while block := reply.read1(min(1 << 16, size - f.tell())):
                bar.update(f.write(block))
        if f.tell() <= start:
            raise OSError("connection dropped")


# ---- writing and loading ---------------------------------------------------------------

def corpus(args, downloads):
    """Yield (split, document) of the data set that the arguments name."""
    if args["files"]:
        yield from text_corpus(args["files"])
    elif args["name"] == "python":
        for split, path in choose(python_files(), args["max_mb"]):
            yield split, path.read_bytes().decode(errors="replace")
    else:
        yield from hub_corpus(args["name"], downloads, args["max_mb"])


def sample(args, downloads):
    """Yield every n-th document of train, about SAMPLE_CHARS in all."""
    size = sum(len(text) for split, text in corpus(args, downloads) if split == 0)
    train = (text for split, text in corpus(args, downloads) if split == 0)
    yield from islice(train, 0, None, 1 + size // SAMPLE_CHARS)


def write_bins(pairs, enc, folder):
    """Write train.bin and val.bin. Return what meta.json says of each."""
    found, hashes = [Counter(), Counter()], [hashlib.sha256(), hashlib.sha256()]
    pairs = (pair for pair in pairs if pair[1])
    # a marker in the text is text; arrays, because lists of ids take half of the time
    encode = partial(enc.encode_to_numpy, disallowed_special=())
    with (open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val,
          ThreadPoolExecutor(os.cpu_count()) as pool):
        while batch := list(islice(pairs, 64)):
            coded = pool.map(encode, [text for _, text in batch])
            for (split, text), ids in zip(batch, coded):
                raw = np.append(ids, enc.eot_token).astype("<u2").tobytes()
                (train, val)[split].write(raw)
                hashes[split].update(raw)
                found[split].update(tokens=len(raw) // 2, documents=1, bytes=len(text.encode()))
    if not (found[0] and found[1]):
        fail("too little text for training and validation: give more")
    return [{**counts, "sha256": sha.hexdigest()} for counts, sha in zip(found, hashes)]


def check(folder):
    """Return meta.json of a prepared folder, or {} if the folder is not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for split in ("train", "val"):
            with open(folder / f"{split}.bin", "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != meta[split]["sha256"]:
                    return {}
        return meta
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def load(name, data_dir="data"):
    """Return meta and the ids of train and val, memory-mapped as uint16."""
    folder = Path(data_dir) / name
    meta = check(folder)
    if not meta:
        fail(f"{folder} is not prepared, or is damaged: make it with python prepare_data.py")
    paths = folder / "train.bin", folder / "val.bin"
    return meta, *(np.memmap(path, dtype="<u2", mode="r") for path in paths)


def build(folder, args):
    """Write the three files, then move them to folder, meta.json last."""
    downloads = folder.parent / "downloads"
    tok = make_tokenizer(args["tokenizer"], sample(args, downloads), args["vocab_size"])
    enc = encoding(tok)
    folder.mkdir(parents=True, exist_ok=True)
    # each run writes to a folder of its own, which goes however the run ends
    with TemporaryDirectory(dir=folder) as part:
        new = Path(part)
        train, val = write_bins(corpus(args, downloads), enc, new)
        meta = {"name": args["name"], "args": args, "vocab_size": enc.n_vocab,
                "eot": enc.eot_token, "tokenizer": tok, "train": train, "val": val}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        # if what follows is interrupted, no meta.json describes files old and new
        (folder / "meta.json").unlink(missing_ok=True)
        for file in ("train.bin", "val.bin", "meta.json"):
            (new / file).replace(folder / file)
    print(f"{folder}: {train['tokens']:,} tokens, and {val['tokens']:,} for validation")


# ---- what train.py sees ----------------------------------------------------------------

def find(name, data_dir="data"):
    """Prepare a data set if need be."""
    if name in DEFAULT_MB and not (Path(data_dir) / name / "meta.json").exists():
        main([name, "--data_dir", str(data_dir)])


def grams(tokens, order, vocab_size):
    """Return a number for each n-gram that lies within a row of tokens [n, L]. Where the
    number of a long one passes 2**63 it wraps: with an odd base, a hash of 64 bits."""
    base, found = vocab_size | 1, np.zeros((len(tokens), tokens.shape[1] + 1), np.int64)
    for k in range(order):
        found = found[:, :-1] * base + tokens[:, k:]
    return found


class Data:
    """Token sequences of a prepared data set. Each pass takes every sequence once, in an
    order of its own that the seed sets. The validation set never changes."""

    def __init__(self, name, data_dir, block_size, sequences_per_step, steps, seed, eval_tokens):
        find(name, data_dir)
        self.name = name
        self.meta, self.train, val = load(name, data_dir)
        self.T, self.sequences_per_step = block_size, sequences_per_step
        # a sequence needs one token more, the target of its last one
        shortest = min(len(self.train), len(val))
        if shortest < block_size + 1:
            fail(f"{self.name} has {shortest:,} tokens in a split, a sequence needs "
                 f"{block_size + 1:,}: give more text, or a smaller --block_size")
        # one permutation for each pass that the steps need
        n, wanted = (len(self.train) - 1) // block_size, steps * sequences_per_step
        self.sequences_per_pass, self.passes = n, wanted / n
        if wanted > 10 ** 9:
            fail(f"--steps {steps:,}: the order of {wanted:,} sequences does not fit into "
                 "memory; ask for fewer")
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(n) for _ in range(math.ceil(self.passes))]
        self.order = np.concatenate(orders)
        # the validation set, evenly spaced
        n_val = min(max(1, eval_tokens // block_size), (len(val) - 1) // block_size)
        starts = np.linspace(0, len(val) - 1 - block_size, n_val).astype(int)
        self.val_x, self.val_y = self.sequences(val, starts)
        # of made-up text we know which kind of token each one is (experiments/tasks.py)
        self.kinds, path = {}, Path(data_dir) / self.name / "val_kinds.bin"
        if "kinds" in self.meta:
            _, kinds = self.sequences(np.fromfile(path, np.uint8), starts)
            self.kinds = {name: kinds == i + 1 for i, name in enumerate(self.meta["kinds"])}
        # how many bytes each token stands for; the end of text is not text
        self.token_bytes = token_bytes(self.meta["tokenizer"])
        self.bytes = np.array([len(b) for b in self.token_bytes])
        self.bytes[self.meta["eot"]] = 0
        _, self.copyable = self.count(wanted, 2)

    def sequences(self, tokens, starts):
        """Return inputs and targets [n, T] that begin at starts."""
        rows = np.stack([tokens[s:s + self.T + 1] for s in starts]).astype(np.int64)
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def batch(self, step, rank=0, ranks=1):
        """Return x, y [sequences_per_step, T], which depend on seed and step alone; of
        several ranks, the share of one."""
        n = self.sequences_per_step // ranks
        first = (step * ranks + rank) * n
        return self.sequences(self.train, self.order[first:first + n] * self.T)

    def grams(self, x, y, order):
        """Return, as numbers, the n-grams that lie within each sequence and its target."""
        return grams(np.concatenate([x, y[:, -1:]], axis=1), order, len(self.bytes))

    def count(self, n, order):
        """Return two arrays [n_val, T] about the n-gram that ends with each validation
        token. seen: how often it stands in the first n sequences of one pass over train
        (-1: the context begins within it). copyable: never there, but earlier in the same
        context, so that in-context copying can predict it."""
        ours = self.grams(self.val_x, self.val_y, order)
        unique, where = np.unique(ours, return_inverse=True)
        times = np.zeros(len(unique), np.int64)
        trained = self.order[:min(n, self.sequences_per_pass)]
        # in parts, to bound the memory
        for i in range(0, len(trained), 4096):
            x, y = self.sequences(self.train, trained[i:i + 4096] * self.T)
            theirs, k = np.unique(self.grams(x, y, order), return_counts=True)
            _, mine, at = np.intersect1d(unique, theirs, True, return_indices=True)
            times[mine] += k[at]
        seen = np.full(self.val_y.shape, -1)
        seen[:, order - 2:] = times[where.reshape(ours.shape)]
        copyable = seen == 0
        for row, grams in zip(copyable, ours):
            # where it stands for the first time it cannot be copied
            row[order - 2 + np.unique(grams, return_index=True)[1]] = False
        return seen, copyable

    def score(self, losses):
        """Return what is reported of the losses [n_val, T] of the validation tokens."""
        copied = losses[self.copyable]
        bits = losses.sum() / np.log(2)
        scores = {"val_loss": float(losses.mean()),
                  "copy_loss": float(copied.mean()) if len(copied) else None,
                  "val_bpb": float(bits / self.bytes[self.val_y].sum())}
        for name, where in self.kinds.items():
            # known: its probability is over a half, so it is the likeliest
            known = (losses[where] < np.log(2)).mean()
            scores[name] = {"loss": float(losses[where].mean()), "known": float(known)}
        return scores


def main(argv=None):
    parser = make_parser(__doc__, "prepare_data.py [what ...] [options]")
    add = parser.add_argument
    add("files", metavar="what", nargs="*", default=["python"],
        help="python (default), tinystories, openwebtext, or text files")
    add("--name", help="name of a data set of text files (default: the first file's)")
    add("--data_dir", default="data", help="gets a folder per data set (default: data)")
    add("--max_mb", type=float,
        help="use at most so many megabytes, 0: all (default: python 48, tinystories 200)")
    add("--vocab_size", type=int, default=1024, help="tokens of the BPE (default: 1024)")
    add("--tokenizer", default="bpe", choices=("bpe", "gpt2"),
        help="bpe, trained on this text, or gpt2 (default: bpe)")
    flags = parser.parse_args(argv)
    name, files, max_mb = flags.name, flags.files, flags.max_mb
    if len(files) == 1 and files[0] in DEFAULT_MB:
        name, files = name or files[0], []
    paths = [os.path.abspath(file) for file in files]
    for path in paths:
        if not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "no file"
            fail(f"{path} is {kind}: name text files, or one of {', '.join(DEFAULT_MB)}")
        for magic, kind in MAGIC.items():
            if open(path, "rb").read(8).startswith(magic):
                fail(f"{path} is {kind}: unpack or convert it to UTF-8 text")
    if files and not name:
        name = re.sub(r"\W+", "_", Path(files[0]).stem)
    # python, tinystories and openwebtext take no files, and every other name needs some
    if bool(files) == (name in DEFAULT_MB):
        fail(f"--name {name}: text files need another name, and it needs text files")
    if not 257 <= flags.vocab_size <= 65535:
        fail(f"--vocab_size {flags.vocab_size}: must be 257 (bytes, end of text) to 65535")
    if max_mb is None:
        max_mb = DEFAULT_MB.get(name, 0)
    if not 0 <= max_mb < math.inf or max_mb and name not in ("python", "tinystories"):
        fail(f"--max_mb {max_mb:g}: must be 0 (all) or more, for python and tinystories")
    args = {"name": name, "files": paths, "max_mb": max_mb,
            "vocab_size": flags.vocab_size, "tokenizer": flags.tokenizer}
    folder = Path(flags.data_dir) / name
    old = check(folder).get("args", {}).get("files", paths)
    if old != paths:
        fail(f"{folder} was made from {', '.join(old)}: delete it, or give a --name")
    build(folder, args)


if __name__ == "__main__":
    run_script(main)
