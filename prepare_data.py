"""Prepare text: documents -> byte-level BPE -> train.bin, val.bin (uint16 ids) and meta.json.

    python prepare_data.py                          # Python's own source: offline, in seconds
    python prepare_data.py tinystories --max_mb 200
    python prepare_data.py openwebtext --shards 1 --tokenizer gpt2
    python prepare_data.py a.txt b.txt --name mine

The one idea: a corpus is a generator of pieces (split, text, ends_document), where split 0 is train
and 1 validation. It runs twice, once to train the tokenizer on a sample of it and once to encode,
so that all of it is never in memory.
"""
import argparse
import base64
import ctypes
import fcntl
import hashlib
import heapq
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"           # ends every document; its id is the last one of the vocabulary
CHUNK = 1 << 18                 # bytes; longer documents pass through in pieces of about this
SAMPLE_CHARS = 12_000_000       # text the tokenizer is trained on
TIMEOUT = 10                    # seconds of silence after which a server is given up
DEFAULT_MB = {"python": 48, "tinystories": 200, "openwebtext": 0}  # --max_mb; 0 = all
TINYSTORIES = dict(repo="roneneldan/TinyStories", rev="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    files=[("TinyStoriesV2-GPT4-train.txt", 2_227_753_162,  # name, bytes, sha256
            "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
           ("TinyStoriesV2-GPT4-valid.txt", 22_502_601,
            "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")])
OPENWEBTEXT = dict(repo="Skylion007/openwebtext", rev="79d93d786212f7344586290adb811d4ae6a1762c",
    file="plain_text/train-{:05d}-of-00080.parquet",  # known of the first of the 80 only:
    size=302_848_326, sha256="caed9f4b7053d7cd4d1a13ce9ec9224d84a3bba1f11579193562a7e31ebe656e")
# the requirements and what they need: a fixed list, so that nobody's own packages end up in it
PACKAGES = """torch torchgen functorch sympy numpy matplotlib mpl_toolkits networkx fontTools
    pygments PIL mpmath pytest _pytest fsspec filelock jinja2 markupsafe packaging pyparsing urllib3
    idna requests charset_normalizer certifi regex tiktoken tqdm typing_extensions contourpy
    kiwisolver cycler pluggy iniconfig dateutil""".split()
SKIP = set("""test tests testing idlelib _vendor vendor vendored extern external third_party _antlr
    encodings pydoc_data site-packages dist-packages""".split())  # tests, copies, tables


class Offline(Exception):
    """A server does not answer; train.py may fall back to the offline corpus."""


def fail(message):
    """One line on stderr, exit code 2: the way every user's mistake ends."""
    try:
        line = "\n" if sys.stderr.isatty() else ""  # there a progress bar may be in the way
        print(f"{line}error: {message}", file=sys.stderr)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody listens
    raise SystemExit(2)


def script(main):
    """main() as a command: Ctrl-C, an output that takes no more and too little memory end in one
    line too."""
    sys.stdout, sys.stderr = (f or open(os.devnull, "w") for f in (sys.stdout, sys.stderr))
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130)
    except OSError as e:
        if e.filename:
            fail(f"{e.filename}: {e.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at the very end
        fail(f"the output could not be written: {e.strerror}")
    except (MemoryError, RuntimeError) as e:  # torch has kinds of its own
        if isinstance(e.__cause__ or e.__context__, KeyboardInterrupt):
            raise SystemExit(130)
        if not re.search("MemoryError|out of memory|allocate memory|not enough memory", repr(e)):
            raise
        fail(f"not enough memory ({' '.join(str(e).split()):.150}); take a smaller shape or batch")


def write_whole(path, write):
    """write(file) into a neighbour, flushed to disk and renamed: never half a file at path."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch's for a full disk, or for Ctrl-C
        if isinstance(e.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt
        fail(f"{path} could not be written ({e}); what was there before is kept")


def commit():
    """What is checked out here, "-dirty" with changes; nothing outside of git."""
    here = shlex.quote(str(Path(__file__).resolve().parent))
    return subprocess.getoutput(f"git -C {here} describe --always --dirty 2>&-")


def keep_freed_memory():
    """glibc hands large freed blocks back to the system, and each step maps and clears its
    activations anew: a quarter of its time on a CPU. Have it keep them."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-4, 0)               # M_MMAP_MAX: no mappings of their own
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)     # M_TRIM_THRESHOLD: 2 GB


def free_memory():
    """Bytes that this process can still have: the system's, or its container's (cgroup v2) if that
    is less. None where the system does not say (Linux does)."""
    def number(path, pattern, unit=1):
        try:
            found = re.search(pattern, Path(path).read_text())
        except OSError:
            return None
        return found and int(found[1]) * unit
    free = number("/proc/meminfo", r"MemAvailable:\s+(\d+)", 1024)
    most = number("/sys/fs/cgroup/memory.max", r"^(\d+)")
    used = number("/sys/fs/cgroup/memory.current", r"^(\d+)")
    cached = number("/sys/fs/cgroup/memory.stat", r"(?m)^inactive_file (\d+)") or 0
    return min(free, most - used + cached) if free and most and used else free


def need_memory(size, what):
    """fail() if so many bytes are not free: the system would swap, or end some process."""
    free = free_memory()
    if free is not None and size > free:
        fail(f"not enough memory: {what} takes {size / 1e9:,.1f} GB, {free / 1e9:.1f} GB are free; "
             "ask for fewer rows (train.py: fewer experts, or --table disk)")


@contextmanager
def lock(*folders):
    """Make the folders; one process at a time writes into each. The system lets go of them when
    the process ends, however it ends."""
    handles = []
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            handles.append(os.open(folder, os.O_RDONLY))
            fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing to {folder}: let it end, or name another folder")
    except OSError as e:
        fail(f"{folder} cannot be made or written to ({e.strerror}): name another folder")
    try:
        yield
    finally:
        for handle in handles:
            os.close(handle)


# ---- tokenizer: our own trainer, tiktoken's encoder ---------------------------------------------

# A merge never crosses these: contractions, words with the space before, up to 3 digits,
# punctuation, white space. As in GPT-2's, a run of white space leaves its last space to the next
# word, so "\n    return" is "\n   " + " return": indentation costs one token.
PATTERN = (r"'(?:[sdmt]|ll|re|ve)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
           r"|\s+(?!\S)|\s+")


def train_bpe(texts, n_merges):
    """-> tokens (bytes) in order of id: the 256 bytes, then one for each merge.

    Each step merges the most frequent pair of neighbours (of equals, that with the smallest ids).
    A word is a string with one character per token, so that str.replace is the merge; only words
    that hold the pair are touched, and a heap finds the next pair. When a count falls, its entry
    in the heap is left as it is and corrected when it comes up.
    """
    import regex
    find, counts = regex.compile(PATTERN).findall, Counter()
    for text in texts:
        counts.update(find(text))
    words, freqs = ["".join(map(chr, w.encode())) for w in counts], list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> its count; -> indices of words with it
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
        if -n < 2:
            break  # the text is too small for more: a pair seen once is not worth a token
        joined = tokens[ord(pair[0])] + tokens[ord(pair[1])]
        new = ids.setdefault(joined, len(tokens))  # ab+c and a+bc are one token, as in tiktoken
        if new == len(tokens):
            tokens.append(joined)
        grown = set()
        for i in [i for i in where.pop(pair) if pair in words[i]]:  # else merged away since
            for a, b in zip(words[i], words[i][1:]):
                pairs[a + b] -= freqs[i]
            words[i] = words[i].replace(pair, chr(new))
            for a, b in zip(words[i], words[i][1:]):
                pairs[a + b] += freqs[i]
                if chr(new) in (a, b):
                    where[a + b].add(i)
                    grown.add(a + b)
        for p in grown:
            heapq.heappush(heap, (-pairs[p], p))
    return tokens


@cache
def gpt2_encoding():
    """tiktoken downloads GPT-2's ranks at first use, without a time-out: behind a silent proxy for
    ever. So another process goes first, one that can be ended; tiktoken caches what it gets."""
    import tiktoken
    command = [sys.executable, "-c", "import tiktoken; tiktoken.get_encoding('gpt2')"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=2 * TIMEOUT)
    except subprocess.SubprocessError as e:
        why = (e.stderr or b"no answer").decode().strip().splitlines()[-1]
        raise Offline(f"GPT-2's tokenizer could not be downloaded ({why:.99}); set "
                      "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bpe")
    return tiktoken.get_encoding("gpt2")


def make_tokenizer(kind, texts=(), vocab_size=4096):
    """-> a JSON-serialisable dict, all that a checkpoint needs to carry."""
    tok = dict(kind=kind)
    if kind == "bpe":
        tokens = [base64.b64encode(t).decode() for t in train_bpe(texts, vocab_size - 257)]
        tok.update(pattern=PATTERN, tokens=tokens)
    return dict(tok, sha256=hash_of(encoding(tok)))


def hash_of(enc):
    ranks = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - 1)]  # all but EOT
    ranks = [base64.b64encode(token).decode() for token in ranks]
    return hashlib.sha256(json.dumps([enc._pat_str, ranks]).encode()).hexdigest()


def encoding(tok):
    """meta["tokenizer"] -> tiktoken.Encoding: the very one that made the ids, by its hash."""
    import tiktoken
    if tok["kind"] == "gpt2":
        enc = gpt2_encoding()
    else:
        ranks = {base64.b64decode(t): i for i, t in enumerate(tok["tokens"])}
        enc = tiktoken.Encoding("bpe", pat_str=tok["pattern"], mergeable_ranks=ranks,
                                special_tokens={EOT: len(ranks)})
    if "sha256" in tok and tok["sha256"] != hash_of(enc):
        raise ValueError(f"the tokenizer's sha256 is {hash_of(enc)}, not {tok['sha256']}")
    return enc


def token_bytes(tok):
    """The bytes of each id, 0..vocab_size-1; the last is the end of text."""
    enc = encoding(tok)
    return [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)]


# ---- corpus python: the source of Python itself and of what is installed with this project ------

def key(text):
    """32 bytes that order or split things at random, everywhere and always in the same way."""
    return hashlib.sha256(text.encode()).digest()


def is_source(raw):
    """UTF-8, and not a generated table (Unicode, colour maps, lexers' lists of names): those have
    more than a quarter digits, or hardly a keyword in a long file."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    n = len(raw.translate(None, b" \n"))
    keywords = sum(raw.count(k) for k in (b"def ", b"class ", b"return ", b"import ", b"self."))
    digits = n - len(raw.translate(None, b" \n0123456789"))
    return n > 0 and (n < 4000 or digits * 4 < n and keywords * 1500 > n)


def python_files():
    """-> [(hash, package, folder, path, size)] of all that is source, exact copies once."""
    roots, files, seen = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}, [], set()
    for name in PACKAGES:
        if spec := importlib.util.find_spec(name):  # which does not import it
            roots[name] = Path([*(spec.submodule_search_locations or []), spec.origin][0])
        else:
            print(f"{name} is not installed, so not in the corpus")
    for package, root in roots.items():
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            name = f"{package}/{'' if path == root else path.relative_to(root).as_posix()}"
            if SKIP & set(name.split("/")) or "_sysconfigdata" in name:  # this holds local paths
                continue
            raw = path.read_bytes()
            if is_source(raw) and (digest := hashlib.sha256(raw).digest()) not in seen:
                seen.add(digest)
                files.append((key(name), package, name.rpartition("/")[0], path, len(raw)))
    return files


def choose(files, max_mb):
    """-> [(split, path)]. Validation is 6 % of each package: whole directories, by their hash, as
    long as they fit. Neighbours in one repeat each other: of validation's 13-grams 2.9 % stand in
    train so, split file by file 6.2 %."""
    total, folders, room, val, chosen = Counter(), Counter(), Counter(), set(), []
    for _, package, folder, _, size in files:
        total[package] += size
        folders[package, folder] += size
    wanted = {package: 0.06 * size for package, size in total.items()}
    for package, folder in sorted(folders, key=lambda pair: key(pair[1])):
        if folders[package, folder] <= 1.2 * wanted[package]:
            val.add(folder)
            wanted[package] -= folders[package, folder]
    # what one package may give so that all together give the cap: small ones whole, big ones alike
    sizes, n = sorted(total.values()), len(total)
    cap = max_mb * 1e6 or sum(sizes)
    limit = max((cap - sum(sizes[:i])) / (n - i) for i in range(n))
    for _, package, folder, _, size in files:
        room[package, folder in val] += min(1, limit / total[package]) * size
    for _, package, folder, path, size in sorted(files):  # by hash: mixes the packages everywhere
        if size <= room[package, folder in val]:
            room[package, folder in val] -= size
            chosen.append((int(folder in val), path))
    return chosen


# ---- corpora of text files and of downloads -----------------------------------------------------

def read_text(path, chunk=CHUNK, whole=True):
    """(text, ends_document) of a UTF-8 file, cut at each EOT (and the new line after it), a long
    document at line ends too. What follows the last EOT is a document if the file is whole."""
    held = ""  # the start of a document; it waits for more, or for the end of the file
    with open(path, "rb") as f:
        while lines := f.readlines(chunk):
            raw = b"".join(lines)
            try:
                text = raw.decode()
            except UnicodeDecodeError as e:
                if whole or e.reason != "unexpected end of data":
                    fail(f"{path} is not UTF-8: byte 0x{raw[e.start]:02x} at offset "
                         f"{f.tell() - len(raw) + e.start:,}; convert it first")
                text = raw[:e.start].decode()  # the cap cut a character
            if len(held) >= chunk:
                yield held, False
                held = ""
            *ended, held = re.split(re.escape(EOT) + "\n?", held + text)
            for document in ended:
                yield document, True
    if held and whole:
        yield held, True


def text_corpus(files):
    """The user's files. Validation is the last 5 % of all text, from the next document or line on:
    there is some whatever the text, and only one border where train is its neighbour."""
    total = sum(os.path.getsize(f) for f in files)
    at, split, ended = 0, 0, True
    for file in files:
        for text, ends in read_text(file, min(CHUNK, total // 50)):
            if split == 0 and at >= 0.95 * total:
                if not ended:
                    yield 0, "", True
                split = 1
            yield split, text, ends
            at, ended = at + len(text.encode()) + ends * len(EOT + "\n"), ends


def tinystories_corpus(downloads, max_mb):
    cap = max_mb * 1e6
    for split, (name, size, sha256) in enumerate(TINYSTORIES["files"]):
        path = downloads / name
        if split == 0 and 0 < cap < size:
            path, size, sha256 = downloads / f"{max_mb:g}MB-{name}", int(cap), None
        download(TINYSTORIES, name, path, size, sha256)
        for text, ends in read_text(path, whole=False):  # the cap leaves half a story
            yield split, text, ends


def openwebtext_corpus(downloads, shards):
    try:
        import pyarrow.parquet
    except ImportError:
        fail("openwebtext comes as parquet, which needs pyarrow: pip install pyarrow")
    for i in range(shards):
        name = OPENWEBTEXT["file"].format(i)
        path = downloads / Path(name).name
        known = [None, None] if i else [OPENWEBTEXT["size"], OPENWEBTEXT["sha256"]]
        download(OPENWEBTEXT, name, path, *known)
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield int(key(text)[0] < 3), text, True  # 3 of 256 documents: 1.2 %


# ---- download -----------------------------------------------------------------------------------

def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def download(dataset, name, path, size=None, sha256=None):
    """Get the first `size` bytes of a file (None: all, as many as the server says). They grow as
    path.part, resumed where an earlier run stopped, and get their name once whole and checked."""
    from tqdm import tqdm
    if path.exists():
        return
    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{base}/datasets/{dataset['repo']}/resolve/{dataset['rev']}/{name}"
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    while (start := part.stat().st_size) != size:
        span, why = f"bytes={start}-{size - 1 if size else ''}", "connection dropped"
        try:
            request = urllib.request.Request(url, headers={"Range": span})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                have = start if reply.status == 206 else 0  # 200: it ignores ranges, start over
                total = reply.headers["Content-Range"] or reply.headers["Content-Length"] or "?"
                total = total.rpartition("/")[2]  # of "bytes 0-99/1234", or of "1234"
                if not total.isdigit() or int(total) < (size or 1):
                    fail(f"{url}: its size is {total}, expected {size}: not the file we know")
                size = size or int(total)
                with open(part, "ab" if have else "wb") as f, tqdm(
                        total=size, initial=have, unit="B", unit_scale=True, desc=path.name[-30:],
                        disable=None) as bar:  # None: silent where stderr is no terminal
                    while chunk := reply.read1(min(CHUNK, size - have)):
                        have += f.write(chunk)
                        bar.update(len(chunk))
        except (OSError, HTTPException, ValueError) as e:  # ValueError: no https:// in HF_ENDPOINT
            if getattr(e, "code", None) == 416 and size is None and start:
                break  # nothing lies behind what an earlier run fetched: it is whole
            why = e
        if part.stat().st_size <= start:  # as long as each connection brings something we go on
            raise Offline(f"{url} could not be fetched ({why}); check the network and {part}, then "
                          "run again: it resumes. The data set python needs no network")
    if sha256 and (found := sha256_of(part)) != sha256:
        part.unlink()  # resumed, it would never become right
        fail(f"{url}: sha256 {found}, expected {sha256}; deleted, so run again")
    part.replace(path)


# ---- writing and loading ------------------------------------------------------------------------

def sample(pieces):
    """At most SAMPLE_CHARS of train, spread over all of it: every stride-th piece. Whenever it
    gets too much, every second one goes and the stride doubles."""
    kept, size, stride = [], 0, 1
    for i, text in enumerate(text for split, text, _ in pieces if split == 0):
        if i % stride == 0:
            kept.append(text)
            size += len(text)
            if size > SAMPLE_CHARS:
                kept, stride = kept[::2], 2 * stride
                size = sum(map(len, kept))
    return kept


def write_bins(pieces, enc, paths):
    """Encode into both files -> what meta.json says of each, and the sha256 of the corpus."""
    counts, corpus = [Counter(), Counter()], hashlib.sha256()
    with open(paths[0], "wb") as train, open(paths[1], "wb") as val:
        while batch := list(islice(pieces, 64)):
            coded = enc.encode_ordinary_batch([text for _, text, _ in batch],
                                              num_threads=os.cpu_count() or 1)
            for (split, text, ends), ids in zip(batch, coded):
                ids, raw = ids + [enc.n_vocab - 1] * ends, text.encode()
                (train, val)[split].write(np.array(ids, dtype="<u2").tobytes())
                corpus.update(raw + EOT.encode() * ends)
                counts[split].update(tokens=len(ids), documents=int(ends), bytes=len(raw))
        account = [dict(c, size=f.tell()) for c, f in zip(counts, (train, val))]
    for count, path in zip(account, paths):
        if not count.get("bytes"):
            fail(f"no text is left for {path.name.split('.')[0]}: give more text, or more lines")
        count["sha256"] = sha256_of(path)
    return account, corpus.hexdigest()


def seen_share(train, val, n=13, most=200_000, chunk=1 << 20):
    """The share of validation's n-grams of ids (of `most`, evenly spaced) that stand in train."""
    def hashes(ids, step=1):  # of the n-grams that begin at 0, step, 2 step..., mod 2^64
        h = np.uint64(1)
        for k in range(n):
            h = (h + ids[k:len(ids) - n + 1 + k:step]) * np.uint64(0x9E3779B97F4A7C15)
        return h
    if min(len(val), len(train)) < n:
        return 0.0
    values, counts = np.unique(hashes(val, len(val) // most + 1), return_counts=True)
    coarse, found = np.zeros(1 << 24, bool), np.zeros(len(values), bool)
    coarse[values >> np.uint64(40)] = True  # sorts out nearly all of train with one look-up each
    for at in range(0, len(train) - n + 1, chunk):
        h = hashes(train[at:at + chunk + n - 1])
        found |= np.isin(values, h[coarse[h >> np.uint64(40)]])
    return float(counts[found].sum() / counts.sum())


def check(folder):
    """-> meta of a prepared folder, or a ValueError that says what is wrong with it."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for name, of in (("train.bin", meta["train"]), ("val.bin", meta["val"])):
            size = os.path.getsize(folder / name)
            # a hash of more than 1 GB would take seconds at every start
            if size != of["size"] or size < 1e9 and sha256_of(folder / name) != of["sha256"]:
                raise ValueError(f"{name}: {size:,} bytes, or another sha256, where meta.json says "
                                 f"{of['size']:,} bytes, sha256 {of['sha256']}")
        tok = meta["tokenizer"]
        if tok["sha256"] and tok["kind"] != "gpt2":  # gpt2's may need the network: not for a check
            last = encoding(tok).n_vocab - 1
            if (meta["vocab_size"], meta["eot"]) != (last + 1, last):
                raise ValueError(f"its tokenizer has {last + 1} ids, the last one for {EOT}")
        return meta
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise ValueError(f"{folder} is not prepared, or is damaged ({e})")


def load(name, data_dir="data"):
    """-> (meta, train, val): the ids memory-mapped as uint16, checked to be what meta.json says."""
    folder = Path(data_dir) / name
    try:
        meta = check(folder)
    except ValueError as problem:
        what = name if name in DEFAULT_MB else f"FILES --name {name}"
        fail(f"{problem}; run: python prepare_data.py {what} --data_dir {data_dir}")
    return meta, *(np.memmap(folder / f"{s}.bin", dtype="<u2", mode="r") for s in ("train", "val"))


def prepare(name, files=(), data_dir="data", max_mb=None, vocab_size=4096, tokenizer="bpe",
            shards=1):
    """-> the folder with train.bin, val.bin, meta.json. Raises Offline where a server is needed
    and does not answer; all else that a user can get wrong ends in fail()."""
    known = ", ".join(DEFAULT_MB)
    for file in files:
        if not os.path.isfile(file) or not os.path.getsize(file):
            fail(f"{file}: no such file or it is empty, nor is it a data set ({known})")
    if not files and name not in DEFAULT_MB:
        fail(f"there is no data set {name}: give one of {known}, or text files")
    if files and (name in [*DEFAULT_MB, "downloads"] or not re.fullmatch(r"\w[\w-]*", name)):
        fail(f"--name {name}: must be one word, and none of {known}, downloads")
    if tokenizer not in ("bpe", "gpt2"):
        fail(f"--tokenizer {tokenizer}: must be bpe or gpt2")
    if not 257 <= vocab_size <= 65535:
        fail(f"--vocab_size {vocab_size}: must be 257 (bytes, end of text) to 65535 (uint16)")
    if not 1 <= shards <= 80:
        fail(f"--shards {shards}: must be 1 to 80")
    max_mb = DEFAULT_MB.get(name, 0) if max_mb is None else max_mb
    if max_mb and name not in ("python", "tinystories") or not max_mb >= 0:
        fail(f"--max_mb {max_mb:g}: must be 0 (all) or more, and is for python and tinystories")
    try:
        stamps = [[str(f), os.path.getsize(f), os.path.getmtime(f)] for f in files]
        args = dict(name=name, files=stamps, max_mb=max_mb, vocab_size=vocab_size,
                    tokenizer=tokenizer, shards=shards, python=sys.version.split()[0])
        with lock(folder := Path(data_dir) / name):
            done = build(folder, args, files)
    except OSError as e:
        fail(f"{e.filename or data_dir}: {e.strerror or e}; what was prepared before is untouched")
    print(f"{folder}: {done}")
    return folder


def build(folder, args, files):
    """-> what was done, in words. Write all three files as .tmp and rename them when whole, last
    meta.json: it vouches for the other two. With the same `args` nothing is to do."""
    try:
        if check(folder)["args"] == args:
            return "prepared with these arguments before; to do it anew delete it"
    except (ValueError, KeyError):
        pass  # not there, or damaged
    start, downloads, hosted = time.time(), folder.parent / "downloads", {}
    if files:
        pieces = lambda: text_corpus(files)
    elif folder.name == "python":
        chosen = choose(python_files(), args["max_mb"])
        pieces = lambda: ((split, path.read_bytes().decode(), True) for split, path in chosen)
    elif folder.name == "tinystories":
        pieces, hosted = lambda: tinystories_corpus(downloads, args["max_mb"]), TINYSTORIES
    else:
        pieces, hosted = lambda: openwebtext_corpus(downloads, args["shards"]), OPENWEBTEXT
    texts = sample(pieces()) if args["tokenizer"] == "bpe" else ()
    tok = make_tokenizer(args["tokenizer"], texts, args["vocab_size"])
    enc, trained = encoding(tok), time.time()
    final = [folder / name for name in ("train.bin", "val.bin", "meta.json")]
    *bins, account = tmp = [Path(f"{path}.tmp") for path in final]
    (train, val), corpus = write_bins(pieces(), enc, bins)
    seen = seen_share(*(np.memmap(path, dtype="<u2", mode="r") for path in bins))
    meta = dict(name=folder.name, source=hosted.get("repo", "local files"), args=args,
                revision=hosted.get("rev"), corpus_sha256=corpus, vocab_size=enc.n_vocab,
                eot=enc.n_vocab - 1, val_13grams_in_train=seen, train=train, val=val, tokenizer=tok)
    account.write_text(json.dumps(meta, indent=1))
    for path, name in zip(tmp, final):
        path.replace(name)
    n = train["tokens"] + val["tokens"]
    return (f"{n:,} tokens, {val['tokens']:,} for validation, {seen:.1%} of its 13-grams "
            f"are in train; {(train['bytes'] + val['bytes']) / n:.2f} bytes per token; tokenizer "
            f"{trained - start:.1f} s, all {time.time() - start:.1f} s")


# ---- what train.py sees -------------------------------------------------------------------------

def find(name, default, data_dir="data"):
    """-> name of the data set, prepared if need be, and None, or a note if python was taken instead
    ("auto": the default, and python where that needs a server that does not answer)."""
    auto, name = name == "auto", default if name == "auto" else name
    if name in DEFAULT_MB and not (Path(data_dir) / name / "meta.json").exists():
        try:
            prepare(name, data_dir=data_dir)
        except Offline as error:
            if not auto:
                raise
            note = f"{name}: {error}; using python instead"
            print(note)
            return find("python", None, data_dir)[0], note
    return name, None


class Data:
    """Token sequences of a prepared data set: one pass in an order set by the seed (of train_tokens
    as many as the steps ask, each in its own order), a validation set that never changes, and what
    is known about its tokens. Arrays [n, T], of int64 ids."""

    def __init__(self, cfg, T):
        """cfg: train.Config, whose steps are capped here; T: tokens a sequence."""
        default = "tinystories" if cfg.device.startswith("cuda") else "python"
        self.name, self.note = find(cfg.dataset, default, cfg.data_dir)
        self.meta, self.train, val = load(self.name, cfg.data_dir)
        self.train = self.train[:cfg.train_tokens or None]
        self.T, blocks, per_step = T, (len(self.train) - 1) // T, cfg.tokens_per_step // T
        n = min(max(1, cfg.eval_tokens // T), (len(val) - 1) // T)
        if n < 1 or blocks < per_step:
            fail(f"{self.name}: {len(self.train):,} tokens to train on, {len(val):,} to validate: "
                 f"too few for a step of {cfg.tokens_per_step:,} or a sequence of {T}")
        rng, passes = np.random.default_rng(cfg.seed), 1
        if cfg.train_tokens:  # to show what repetition does
            passes = -(-cfg.steps * per_step // blocks)
        self.order = np.concatenate([rng.permutation(blocks) for _ in range(passes)])
        starts = np.linspace(0, len(val) - 1 - T, n).astype(int)
        self.val_x, self.val_y = self.sequences(val, starts)
        if cfg.steps * per_step > len(self.order):
            print(f"steps {cfg.steps} capped at {blocks // per_step}, one pass over the "
                  f"{len(self.train):,} tokens of {self.name}: on repeated data tables overfit")
            cfg.steps = blocks // per_step
        self.token_bytes = token_bytes(self.meta["tokenizer"])
        self.bytes = np.array([len(b) for b in self.token_bytes])
        self.bytes[self.meta["eot"]] = 0  # the separator is not text
        self.seen, self.copyable = self.count(cfg.steps * per_step, 2)

    def sequences(self, tokens, starts):
        rows = np.stack([tokens[s:s + self.T + 1] for s in starts]).astype(np.int64)
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def batch(self, step, n):
        """-> x, y [n, T]. A function of seed and step alone: nothing to save or restore."""
        return self.sequences(self.train, self.order[step * n:(step + 1) * n] * self.T)

    def count(self, n, order):
        """seen [n_val, T]: how often the n-gram of that order that ends with each validation token
        stands in the first n sequences of the order, those that training sees (-1: the context
        begins within it). copyable [n_val, T]: never there, but earlier in the same context. Mostly
        in-context copying (induction) predicts these: their loss shows whether it has formed."""
        def grams(x, y):  # each n-gram as one number
            z = np.concatenate([x, y[:, -1:]], axis=1)
            return sum(z[:, k:self.T + 2 - order + k] * len(self.bytes) ** k for k in range(order))

        ours = grams(self.val_x, self.val_y)
        unique, where = np.unique(ours, return_inverse=True)
        times = np.zeros(len(unique), np.int64)
        for i in range(0, n, 4096):  # memory stays flat
            trained, k = np.unique(grams(*self.sequences(
                self.train, self.order[i:min(i + 4096, n)] * self.T)), return_counts=True)
            _, mine, theirs = np.intersect1d(unique, trained, True, return_indices=True)
            times[mine] += k[theirs]
        seen = np.full(self.val_y.shape, -1)
        seen[:, order - 2:] = times[where.reshape(ours.shape)]
        copyable = seen == 0
        for row, g in zip(copyable, ours):
            row[order - 2 + np.unique(g, return_index=True)[1]] = False  # its first time here
        return seen, copyable

    def score(self, losses):
        """Nats of the validation tokens [n_val, T] -> what is reported of them."""
        mean = lambda mask: float(losses[mask].mean()) if mask.any() else None
        return {"val_loss": float(losses.mean()), "copy_loss": mean(self.copyable),
                "val_bpb": float(losses.sum() / np.log(2) / self.bytes[self.val_y].sum())}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", nargs="*", default=["python"],
        help="python (default), tinystories, openwebtext, or UTF-8 text files")
    add("--name", help="of the data set made from text files (default: the first file's)")
    add("--data_dir", default="data", help="gets a folder per data set (default: %(default)s)")
    defaults = ", ".join(f"{name} {mb}" for name, mb in DEFAULT_MB.items())
    add("--max_mb", type=float, help=f"cap on the text, 0 = none (default: {defaults})")
    add("--vocab_size", type=int, default=4096, help="of the BPE (default: %(default)s)")
    add("--tokenizer", default="bpe", help="bpe, trained on this text (default), or gpt2")
    add("--shards", type=int, default=1, help="of openwebtext's 80 (default: %(default)s)")
    a = parser.parse_args(argv)
    files = [] if len(a.what) == 1 and a.what[0] in DEFAULT_MB else a.what
    try:
        prepare(a.name or Path(a.what[0]).stem, files, a.data_dir, a.max_mb, a.vocab_size,
                a.tokenizer, a.shards)
    except Offline as e:
        fail(e)


if __name__ == "__main__":
    script(main)
