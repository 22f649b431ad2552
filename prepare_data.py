"""
Prepare text: encode documents with a byte-level BPE into train.bin and val.bin (uint16
ids), and describe them in meta.json.

    python prepare_data.py                          # Python's own source: no network
    python prepare_data.py tinystories --max_mb 200
    python prepare_data.py openwebtext --shards 1 --tokenizer gpt2
    python prepare_data.py a.txt b.txt --name mine

The idea: a corpus is a generator of pieces (split, text, ends_document), where split 0 is
train and 1 is validation. It runs twice, once to train the tokenizer on a sample and once
to encode, so the whole text is never in memory.

Text files are UTF-8. As in Python's text mode, a byte order mark is dropped and every line
ends with one newline character. A line <|endoftext|> separates documents. In a .jsonl file
each line is an object whose field "text" is one document.
"""
import base64
import hashlib
import heapq
import importlib.util
import json
import os
import re
import sys
import sysconfig
import urllib.request
from collections import Counter, defaultdict
from functools import cache
from http.client import HTTPException
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common import fail, make_parser, run_script

# ends every document; its id is the last of the vocabulary
EOT = "<|endoftext|>"
MARKER = re.compile(re.escape(EOT) + "\n?")
# --max_mb of each data set; 0 means all
DEFAULT_MB = {"python": 48, "tinystories": 200, "openwebtext": 0}
# names that text files cannot take
RESERVED = [*DEFAULT_MB, "downloads"]
# longer documents pass through in pieces of about this many characters
CHUNK = 1 << 16
# the tokenizer sees at most so many characters, and so many bytes of different words
SAMPLE_CHARS = 12_000_000
WORD_BYTES = 2_000_000
# seconds after which a silent server is given up
TIMEOUT = 10
# files: name, bytes, sha256
TINYSTORIES = {
    "repo": "roneneldan/TinyStories", "rev": "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    "files": [("TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
               "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
              ("TinyStoriesV2-GPT4-valid.txt", 22_502_601,
               "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")]}
# size and sha256 of the first file only
OPENWEBTEXT = {
    "repo": "Skylion007/openwebtext", "rev": "79d93d786212f7344586290adb811d4ae6a1762c",
    "file": "plain_text/train-{:05d}-of-00080.parquet", "size": 302_848_326,
    "sha256": "caed9f4b7053d7cd4d1a13ce9ec9224d84a3bba1f11579193562a7e31ebe656e"}
# the requirements and what they need: a fixed list keeps other packages out of the corpus
PACKAGES = """torch torchgen functorch sympy numpy matplotlib mpl_toolkits networkx
    fontTools pygments PIL mpmath pytest _pytest fsspec filelock jinja2 markupsafe packaging
    pyparsing urllib3 idna requests charset_normalizer certifi regex tiktoken tqdm
    typing_extensions contourpy kiwisolver cycler pluggy iniconfig dateutil""".split()
# folders that hold tests, copies of other packages, tables
SKIP = set("""test tests testing idlelib _vendor vendor vendored extern external
    third_party _antlr encodings pydoc_data site-packages dist-packages""".split())
# how common files begin that are not text
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive", b"BZh": "bzip2",
         b"\x28\xb5\x2f\xfd": "zstandard", b"\xfd7zXZ": "xz", b"PAR1": "parquet",
         b"%PDF-": "a PDF", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class Offline(Exception):
    """A server does not answer. train.py may take the offline corpus instead."""


# ---- tokenizer: our own trainer, tiktoken's encoder ------------------------------------

# A merge never crosses these: contractions, words with the space before, up to 3 digits,
# punctuation, white space. As in GPT-2's, a run of white space leaves its last space to
# the next word, so "\n    return" is "\n   " + " return": indentation costs one token.
PATTERN = (r"'(?:[sdmt]|ll|re|ve)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
           r"|\s+(?!\S)|\s+")


def count_words(texts):
    """Return {word: how often}, within bounds that ordinary text stays far below."""
    import regex
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, text))
    # words without end (DNA, scripts without spaces) would make each merge slow
    for word in [word for word in counts if len(word) > 100]:
        n = counts.pop(word)
        for i in range(0, len(word), 20):
            counts[word[i:i + 20]] += n
    # of too many different words leave out the rarest
    size, kept = 0, Counter()
    for word, n in counts.most_common():
        size += len(word.encode())
        if size > WORD_BYTES:
            break
        kept[word] = n
    return kept


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
        # an earlier merge may have taken the pair from this word
        if pair not in words[i]:
            continue
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
    tok["sha256"] = hash_of(encoding(tok))
    return tok


def hash_of(enc):
    """Return a sha256 of the pattern and of all tokens but the end of text."""
    tokens = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - 1)]
    ranks = [base64.b64encode(token).decode() for token in tokens]
    return hashlib.sha256(json.dumps([enc._pat_str, ranks]).encode()).hexdigest()


def encoding(tok):
    """Return the tiktoken.Encoding of meta["tokenizer"], checked by its sha256."""
    import tiktoken
    if tok["kind"] == "gpt2":
        try:
            enc = tiktoken.get_encoding("gpt2")
        except Exception as error:
            raise Offline(f"GPT-2's tokenizer was not downloaded ({type(error).__name__}); "
                          "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use "
                          "--tokenizer bpe") from None
    else:
        ranks = {base64.b64decode(token): i for i, token in enumerate(tok["tokens"])}
        enc = tiktoken.Encoding("bpe", pat_str=tok["pattern"], mergeable_ranks=ranks,
                                special_tokens={EOT: len(ranks)})
    if "sha256" in tok and tok["sha256"] != hash_of(enc):
        raise ValueError(f"the tokenizer's sha256 is {hash_of(enc)}, not {tok['sha256']}")
    return enc


def token_bytes(tok):
    """Return the bytes of each id, 0 to vocab_size-1; the last is the end of text."""
    enc = encoding(tok)
    return [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)]


def encode_text(enc, text):
    """Return the ids of a text, in which each marker is the end-of-text id."""
    ids = []
    for n, part in enumerate(MARKER.split(text)):
        if n > 0:
            ids.append(enc.eot_token)
        # in pieces: tiktoken cannot take a million blanks at once
        for start in range(0, len(part), CHUNK):
            ids += enc.encode_ordinary(part[start:start + CHUNK])
    return ids


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
    roots = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}
    for name in PACKAGES:
        # find_spec does not import the package
        spec = importlib.util.find_spec(name)
        if spec is None:
            print(f"{name} is not installed, so it is not in the corpus")
            continue
        roots[name] = Path([*(spec.submodule_search_locations or []), spec.origin][0])
    files, seen = [], set()
    for package, root in roots.items():
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            inside = "" if path == root else path.relative_to(root).as_posix()
            name = f"{package}/{inside}"
            # _sysconfigdata holds paths of the machine it was built on
            if SKIP & set(name.split("/")) or "_sysconfigdata" in name:
                continue
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).digest()
            if is_source(raw) and digest not in seen:
                seen.add(digest)
                files.append((key(name), package, name.rpartition("/")[0], path, len(raw)))
    return files


def choose(files, max_mb):
    """Return [(split, path)]. Validation is 6 % of each package, in whole directories,
    because neighbours in a directory repeat each other."""
    total, folders = Counter(), Counter()
    for _, package, folder, _, size in files:
        total[package] += size
        folders[package, folder] += size
    # directories of validation, in the order of their hash, as long as they fit
    wanted = {package: 0.06 * size for package, size in total.items()}
    val = set()
    for package, folder in sorted(folders, key=lambda pair: key(pair[1])):
        if folders[package, folder] <= 1.2 * wanted[package]:
            val.add(folder)
            wanted[package] -= folders[package, folder]
    # share the cap: small packages are taken whole, the larger ones give the same each
    left, n = max_mb * 1e6 or sum(total.values()), len(total)
    for size in sorted(total.values()):
        limit = left / n
        if size >= limit:
            break
        left, n = left - size, n - 1
    room = Counter()
    for _, package, folder, _, size in files:
        room[package, folder in val] += min(1, limit / total[package]) * size
    # take the files that fit; the order of their hash mixes the packages
    chosen = []
    for _, package, folder, path, size in sorted(files):
        if size <= room[package, folder in val]:
            room[package, folder in val] -= size
            chosen.append((int(folder in val), path))
    return chosen


def python_corpus(max_mb):
    """Yield Python's source, at most so many megabytes."""
    for split, path in choose(python_files(), max_mb):
        yield split, path.read_bytes().decode(errors="replace"), True


# ---- corpora of text files and of downloads --------------------------------------------

def check_text(path):
    """Refuse what is not a file of text, and say what it is."""
    if not os.path.exists(path):
        fail(f"{path}: no such file; data sets, one at a time: {', '.join(DEFAULT_MB)}")
    if not os.path.isfile(path):
        fail(f"{path} is a folder, or not a regular file: name text files")
    with open(path, "rb") as f:
        head = f.read(1 << 16)
    if not head:
        fail(f"{path} is empty: give more text")
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            fail(f"{path} is {kind}: unpack or convert it to plain UTF-8 text")
    if b"\0" in head:
        fail(f"{path} holds NUL bytes (binary, or UTF-16): convert it to UTF-8 text first")


def read_blocks(path, chunk, errors):
    """Yield the text of a file in blocks; of a .jsonl file its documents with markers."""
    with open(path, encoding="utf-8-sig", errors=errors) as f:
        try:
            if Path(path).suffix.lower() != ".jsonl":
                while block := f.read(chunk):
                    yield block
                return
            for number, line in enumerate(f, 1):
                text = json_text(line, f"{path}, line {number}") if line.strip() else ""
                for start in range(0, len(text), chunk):
                    yield text[start:start + chunk]
        except UnicodeDecodeError as error:
            # its object ends where the file has been read to
            offset = f.buffer.tell() - len(error.object) + error.start
            fail(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                 f"{offset:,}; convert it first")


def json_text(line, place):
    """Return the document in a line of JSON, with a marker behind it."""
    try:
        text = json.loads(line)["text"] + f"{EOT}\n"
        # JSON can spell halves of characters, which UTF-8 cannot
        text.encode()
        return text
    except (ValueError, KeyError, TypeError, RecursionError):
        fail(f'{place}: not a JSON object with a "text" field')


def read_text(path, chunk=CHUNK, whole=True):
    """Yield (text, ends_document): a file cut at each marker, and a long document behind a
    line, else before a space, else anywhere. If the file is not whole, what follows the
    last marker is left out."""
    # the start of a document, which waits for more or for the end of the file
    held = ""
    for block in read_blocks(path, chunk, "strict" if whole else "ignore"):
        held += block
        # the new line after the marker may be in the next block
        if held.endswith(EOT):
            continue
        *ended, held = MARKER.split(held)
        for document in ended:
            yield document, True
        # keep enough for a marker that has begun
        while len(held) >= chunk + len(EOT):
            end = held.rfind("\n", 0, chunk) + 1
            if end == 0:
                end = held.rfind(" ", 1, chunk)
            if end < 0:
                end = chunk
            yield held[:end], False
            held = held[end:]
    *ended, held = MARKER.split(held)
    for document in ended:
        yield document, True
    if held and whole:
        yield held, True


def text_corpus(files):
    """Yield the pieces of a user's files. Validation is the last 5 % of all text, of a
    small text up to a quarter. It begins behind a document if one ends nearby."""
    total = 0
    for text, ends in chain.from_iterable(map(read_text, files)):
        total += len(text.encode()) + ends
    n_val = max(0.05 * total, min(0.25 * total, 4096))
    # pieces are small enough to place the border well
    chunk = min(CHUNK, int(n_val / 8) + 1)
    at, split, ended = 0, 0, True
    for file in files:
        for text, ends in read_text(file, chunk):
            size = len(text.encode()) + ends
            near = total - at < 1.25 * n_val
            if split == 0 and (ended and near or at + size > total - n_val):
                if not ended:
                    yield 0, "", True
                split = 1
            yield split, text, ends
            at, ended = at + size, ends


def tinystories_corpus(downloads, max_mb):
    """Yield the pieces of TinyStories, of its train file at most so many megabytes."""
    cap = max_mb * 1e6
    for split, (name, size, sha256) in enumerate(TINYSTORIES["files"]):
        path = downloads / name
        if split == 0 and 0 < cap < size:
            path, size, sha256 = downloads / f"{max_mb:g}MB-{name}", int(cap), None
        download(TINYSTORIES, name, path, size, sha256)
        # the cap leaves half a story at the end
        for text, ends in read_text(path, whole=False):
            yield split, text, ends


def openwebtext_corpus(downloads, shards):
    """Yield the documents of OpenWebText's first files."""
    try:
        import pyarrow.parquet
    except ImportError:
        fail("openwebtext comes as parquet, which needs pyarrow: pip install pyarrow")
    for i in range(shards):
        name = OPENWEBTEXT["file"].format(i)
        path = downloads / Path(name).name
        known = [] if i else [OPENWEBTEXT["size"], OPENWEBTEXT["sha256"]]
        download(OPENWEBTEXT, name, path, *known)
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=["text"]):
            for text in batch.column(0).to_pylist():
                # 3 of 256 documents are for validation: 1.2 %
                yield int(key(text)[0] < 3), text, True


def download(dataset, name, path, size=None, sha256=None):
    """Get the first size bytes of a file (None: all). They grow as path.part, resumed where
    an earlier run stopped, and get their name once they are whole and checked."""
    if path.exists():
        return
    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{base}/datasets/{dataset['repo']}/resolve/{dataset['rev']}/{name}"
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    while part.stat().st_size != size:
        start, why = part.stat().st_size, "connection dropped"
        try:
            size = fetch(url, part, start, size)
        except (OSError, HTTPException, ValueError) as error:
            # 416: nothing lies behind what an earlier run fetched, so it is whole
            if getattr(error, "code", None) == 416 and size is None and start:
                break
            # ValueError: an HF_ENDPOINT that is no address
            why = error
        # go on as long as each connection brings something
        if part.stat().st_size <= start:
            raise Offline(f"{url} could not be fetched ({why}); run again to resume it; the "
                          "data set python needs no network")
    if sha256 and sha256_of(part) != sha256:
        # resumed, it would never become right
        part.unlink()
        fail(f"{url}: its sha256 is not {sha256}; deleted, so run again")
    part.replace(path)


def fetch(url, part, start, size):
    """Write to part what one connection brings from byte start on. Return the whole size.
    Each byte is written at its own place, so two runs at once write the same file."""
    from tqdm import tqdm
    span = f"bytes={start}-{size - 1 if size else ''}"
    request = urllib.request.Request(url, headers={"Range": span})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
        # 200 instead of 206: the server ignores ranges and begins anew
        have = start if reply.status == 206 else 0
        # "bytes 0-99/1234", or "1234"
        total = reply.headers["Content-Range"] or reply.headers["Content-Length"] or ""
        total = int(total.rpartition("/")[2])
        if total < (size or 1):
            fail(f"{url}: its size is {total}, expected {size}: not the file we know")
        size = size or total
        # disable=None: no bar where stderr is no terminal
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, disable=None)
        with open(part, "r+b") as f, bar:
            f.seek(have)
            while block := reply.read1(min(CHUNK, size - have)):
                have += f.write(block)
                bar.update(len(block))
    return size


def sha256_of(path):
    """Return the sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- writing and loading ---------------------------------------------------------------

def sample(pieces):
    """Return at most SAMPLE_CHARS of train, spread over all of it: every stride-th piece.
    Whenever there are too many, half of them are dropped and the stride doubles."""
    kept, size, stride = [], 0, 1
    train = (text for split, text, _ in pieces if split == 0)
    for i, text in enumerate(train):
        if i % stride:
            continue
        kept.append(text)
        size += len(text)
        if size > SAMPLE_CHARS:
            kept, stride = kept[::2], 2 * stride
            size = sum(map(len, kept))
    return kept


def write_bins(pieces, enc, paths):
    """Encode into both files. Return what meta.json says of each, and the corpus's hash."""
    counts, corpus = [Counter(), Counter()], hashlib.sha256()
    with open(paths[0], "wb") as train, open(paths[1], "wb") as val:
        while batch := list(islice(pieces, 64)):
            texts = [text for _, text, _ in batch]
            coded = enc.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
            for (split, text, ends), ids in zip(batch, coded):
                raw = text.encode()
                if ends:
                    ids.append(enc.eot_token)
                (train, val)[split].write(np.array(ids, dtype="<u2").tobytes())
                corpus.update(raw + EOT.encode() * ends)
                counts[split].update(tokens=len(ids), documents=int(ends), bytes=len(raw))
    for count, path in zip(counts, paths):
        if not count["bytes"]:
            total = sum(count["bytes"] for count in counts)
            fail(f"no text is left for {path.name}, of {total:,} bytes: give more text")
        count.update(size=os.path.getsize(path))
        count["sha256"] = sha256_of(path)
    return counts, corpus.hexdigest()


def check(folder):
    """Return meta of a prepared folder. Raise ValueError if something is wrong with it."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for split in ("train", "val"):
            size, expected = os.path.getsize(folder / f"{split}.bin"), meta[split]["size"]
            if size != expected:
                raise ValueError(f"{split}.bin has {size} bytes, meta.json says {expected}")
        # the fields without which nothing can be done
        meta["train"]["sha256"], meta["val"]["sha256"], meta["tokenizer"]["sha256"]
        meta["vocab_size"], meta["eot"], len(meta["args"]["files"])
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not prepared, or is damaged ({error})") from None


def load(name, data_dir="data"):
    """Return meta and the ids of train and val, memory-mapped as uint16."""
    folder = Path(data_dir) / name
    try:
        meta = check(folder)
    except ValueError as problem:
        what = name if name in DEFAULT_MB else f"FILES --name {name}"
        fail(f"{problem}; run: python prepare_data.py {what} --data_dir {data_dir}")
    train = np.memmap(folder / "train.bin", dtype="<u2", mode="r")
    return meta, train, np.memmap(folder / "val.bin", dtype="<u2", mode="r")


def old_args(folder):
    """Return the arguments that a folder was prepared with; {} if it is not prepared."""
    try:
        return check(folder)["args"]
    except ValueError:
        return {}


def name_of(files, data_dir):
    """Return a name made from the first file's, unless it would replace other files'."""
    name = re.sub(r"\W+", "_", Path(files[0]).stem).strip("_") or "text"
    if name in RESERVED:
        name += "_text"
    old = [stamp[0] for stamp in old_args(Path(data_dir) / name).get("files", [])]
    if old and old != [os.path.abspath(file) for file in files]:
        fail(f"{data_dir}/{name} was made from {', '.join(old)}: give a --name")
    return name


def prepare(name=None, files=(), data_dir="data", max_mb=None, vocab_size=1024,
            tokenizer="bpe", shards=1):
    """Return the folder with train.bin, val.bin and meta.json. Raise Offline where a server
    does not answer; all else that a user can get wrong ends in fail()."""
    for file in files:
        check_text(file)
    if files:
        name = name or name_of(files, data_dir)
        if name in RESERVED or not re.fullmatch(r"\w[\w.-]*", name):
            fail(f"--name {name}: must be one word, and none of {', '.join(RESERVED)}")
    elif name not in DEFAULT_MB:
        fail(f"there is no data set {name}: give text files, or {', '.join(DEFAULT_MB)}")
    if not 257 <= vocab_size <= 65535:
        fail(f"--vocab_size {vocab_size}: must be 257 (bytes, end of text) to 65535")
    if not 1 <= shards <= 80:
        fail(f"--shards {shards}: must be 1 to 80")
    if max_mb is None:
        max_mb = DEFAULT_MB.get(name, 0)
    if not max_mb >= 0 or max_mb and name not in ("python", "tinystories"):
        fail(f"--max_mb {max_mb:g}: must be 0 (all) or more, for python and tinystories")
    stamps = [[os.path.abspath(f), os.path.getsize(f), os.path.getmtime(f)] for f in files]
    args = {"name": name, "files": stamps, "max_mb": max_mb, "vocab_size": vocab_size,
            "tokenizer": tokenizer, "shards": shards, "python": sys.version.split()[0]}
    folder = Path(data_dir) / name
    if old_args(folder) == args:
        print(f"{folder}: prepared with these arguments before; to do it again, delete it")
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = build(folder, args)
    except OSError as error:
        fail(f"{error.filename or data_dir}: {error.strerror or error}; what was prepared "
             "before is untouched")
    print(f"{folder}: {done}")
    return folder


def corpus(args, downloads):
    """Return a fresh generator of the corpus's pieces."""
    if args["files"]:
        return text_corpus([stamp[0] for stamp in args["files"]])
    if args["name"] == "python":
        return python_corpus(args["max_mb"])
    if args["name"] == "tinystories":
        return tinystories_corpus(downloads, args["max_mb"])
    return openwebtext_corpus(downloads, args["shards"])


def build(folder, args):
    """Write the three files, then move them to folder, meta.json last. Return a line."""
    texts, downloads = [], folder.parent / "downloads"
    if args["tokenizer"] == "bpe":
        texts = sample(corpus(args, downloads))
    tok = make_tokenizer(args["tokenizer"], texts, args["vocab_size"])
    enc = encoding(tok)
    # each run writes to a folder of its own, which goes however the run ends
    with TemporaryDirectory(dir=folder) as part:
        new = [Path(part) / name for name in ("train.bin", "val.bin", "meta.json")]
        (train, val), sha256 = write_bins(corpus(args, downloads), enc, new[:2])
        meta = {"name": args["name"], "args": args, "corpus_sha256": sha256,
                "vocab_size": enc.n_vocab, "eot": enc.eot_token, "tokenizer": tok,
                "train": train, "val": val}
        new[2].write_text(json.dumps(meta, indent=1))
        # if what follows is interrupted, no meta.json describes files old and new
        (folder / "meta.json").unlink(missing_ok=True)
        for path in new:
            path.replace(folder / path.name)
    return f"{train['tokens']:,} tokens, and {val['tokens']:,} for validation"


# ---- what train.py sees ----------------------------------------------------------------

def find(name, device="cpu", data_dir="data"):
    """Return the name of a data set, prepared if need be, and a note if python was taken
    instead (or None). "auto" is tinystories on an accelerator, otherwise python."""
    auto = name == "auto"
    if auto:
        name = "python" if device == "cpu" else "tinystories"
    if name in DEFAULT_MB and not (Path(data_dir) / name / "meta.json").exists():
        try:
            prepare(name, data_dir=data_dir)
        except Offline as error:
            if not auto:
                raise
            note = f"{name}: {error}; using python instead"
            print(note)
            return find("python", data_dir=data_dir)[0], note
    return name, None


class Data:
    """Token sequences of a prepared data set. Each pass takes every sequence once, in an
    order of its own that the seed sets. The validation set never changes."""

    def __init__(self, name, data_dir, block_size, sequences_per_step, steps, seed,
                 eval_tokens, device="cpu"):
        self.name, self.note = find(name, device, data_dir)
        self.meta, self.train, val = load(self.name, data_dir)
        self.T, self.sequences_per_step = block_size, sequences_per_step
        # a sequence needs one token more, the target of its last one
        for split, ids in (("training", self.train), ("validation", val)):
            if len(ids) < block_size + 1:
                fail(f"{self.name} has {len(ids):,} tokens of {split}, a sequence needs "
                     f"{block_size + 1:,}: give more text, or a smaller --block_size")
        # one permutation for each pass that the steps need
        n, wanted = (len(self.train) - 1) // block_size, steps * sequences_per_step
        self.sequences_per_pass, self.passes = n, wanted / n
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(n) for _ in range(max(1, -(-wanted // n)))]
        self.order = np.concatenate(orders)
        # the validation set, evenly spaced
        n_val = min(max(1, eval_tokens // block_size), (len(val) - 1) // block_size)
        starts = np.linspace(0, len(val) - 1 - block_size, n_val).astype(int)
        self.val_x, self.val_y = self.sequences(val, starts)
        # how many bytes each token stands for; the end of text is not text
        self.token_bytes = token_bytes(self.meta["tokenizer"])
        self.bytes = np.array([len(b) for b in self.token_bytes])
        self.bytes[self.meta["eot"]] = 0
        self.seen, self.copyable = self.count(wanted, 2)

    def sequences(self, tokens, starts):
        """Return inputs and targets [n, T] that begin at starts."""
        rows = np.stack([tokens[s:s + self.T + 1] for s in starts]).astype(np.int64)
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def batch(self, step):
        """Return x, y [sequences_per_step, T], which depend on seed and step alone."""
        n = self.sequences_per_step
        return self.sequences(self.train, self.order[step * n:(step + 1) * n] * self.T)

    def grams(self, x, y, order):
        """Return, as numbers, the n-grams that lie within each sequence and its target."""
        z = np.concatenate([x, y[:, -1:]], axis=1)
        base, width = len(self.bytes), self.T + 2 - order
        return sum(z[:, k:width + k] * base ** k for k in range(order))

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
        return {"val_loss": float(losses.mean()),
                "copy_loss": float(copied.mean()) if len(copied) else None,
                "val_bpb": float(bits / self.bytes[self.val_y].sum())}


def main(argv=None):
    parser = make_parser(__doc__, "prepare_data.py [what ...] [options]")
    add = parser.add_argument
    add("what", nargs="*", default=["python"],
        help="python (default), tinystories, openwebtext, or text files")
    add("--name", help="name of a data set of text files (default: the first file's)")
    add("--data_dir", default="data", help="gets a folder per data set (default: data)")
    add("--max_mb", type=float,
        help="use at most so many megabytes, 0: all (default: python 48, tinystories 200)")
    add("--vocab_size", type=int, default=1024, help="tokens of the BPE (default: 1024)")
    add("--tokenizer", default="bpe", choices=("bpe", "gpt2"),
        help="bpe, trained on this text, or gpt2 (default: bpe)")
    add("--shards", type=int, default=1,
        help="how many of openwebtext's 80 files (default: 1)")
    a = parser.parse_args(argv)
    name, files = a.name, a.what
    if len(files) == 1 and files[0] in DEFAULT_MB:
        if name:
            fail(f"--name {name}: is for text files; the data set {files[0]} has its name")
        name, files = files[0], []
    try:
        prepare(name, files, a.data_dir, a.max_mb, a.vocab_size, a.tokenizer, a.shards)
    except Offline as error:
        fail(error)


if __name__ == "__main__":
    run_script(main)
