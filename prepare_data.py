"""Prepare text: documents -> byte-level BPE -> train.bin, val.bin (uint16 ids) and meta.json.

    python prepare_data.py                          # Python's own source: offline, in seconds
    python prepare_data.py tinystories --max_mb 200
    python prepare_data.py openwebtext --shards 1 --tokenizer gpt2
    python prepare_data.py a.txt b.txt --name mine

The one idea: a corpus is a function whose call yields pieces (split, text, ends_document; split 0
is train, 1 validation). It is called twice, once to train the tokenizer on a sample, once to
encode, and never more than a batch of it is in memory.
"""
import argparse, base64, hashlib, heapq, importlib.metadata, importlib.util, json
import os, platform, re, sys, sysconfig, threading, time, urllib.error, urllib.request
from collections import Counter, defaultdict
from http.client import HTTPException
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"           # ends every document; its id is the last one of the vocabulary
CHUNK = 1 << 18                 # bytes; longer documents pass through in pieces of about this
SAMPLE_BYTES = 12_000_000       # text the tokenizer is trained on
TIMEOUT = 10                    # seconds of silence after which a server is given up
DEFAULT_MB = {"python": 48, "tinystories": 200, "openwebtext": 0}  # --max_mb; 0 = all
HUB = "https://huggingface.co"  # or the environment's HF_ENDPOINT
TINYSTORIES = dict(repo="roneneldan/TinyStories", rev="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    files=[("TinyStoriesV2-GPT4-train.txt", 2_227_753_162,  # name, bytes, sha256
            "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
           ("TinyStoriesV2-GPT4-valid.txt", 22_502_601,
            "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")])
OPENWEBTEXT = dict(repo="Skylion007/openwebtext", rev="79d93d786212f7344586290adb811d4ae6a1762c",
    path="plain_text/train-{:05d}-of-00080.parquet", shards=80,  # known of the first shard only:
    size=302_848_326, sha256="caed9f4b7053d7cd4d1a13ce9ec9224d84a3bba1f11579193562a7e31ebe656e")
# import name[:distribution]: the requirements and what they need. A fixed list, so that nobody's
# own packages end up in a corpus.
PACKAGES = """torch torchgen:torch functorch:torch sympy numpy matplotlib mpl_toolkits:matplotlib
    networkx fontTools pygments PIL:pillow mpmath pytest _pytest:pytest fsspec filelock jinja2
    markupsafe packaging pyparsing urllib3 idna requests charset_normalizer certifi regex tiktoken
    tqdm typing_extensions contourpy kiwisolver cycler pluggy iniconfig dateutil:python-dateutil
    """.split()
SKIP = set("""test tests testing idlelib _vendor vendor vendored extern external third_party _antlr
    encodings pydoc_data site-packages dist-packages""".split())  # tests, copies, tables


class Offline(Exception):
    """A server does not answer; train.py may fall back to the offline corpus."""


def fail(message):
    """One line on stderr, exit code 2: the way every user's mistake ends."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------
# tokenizer: our own trainer, tiktoken's encoder

# A merge never crosses these: contractions, words with the space before, up to 3 digits,
# punctuation, white space. As in GPT-2's, a run of white space leaves its last space to the next
# word, so "\n    return" is "\n   " + " return": indentation costs one token.
PATTERN = (r"'(?:[sdmt]|ll|re|ve)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
           r"|\s+(?!\S)|\s+")


def train_bpe(texts, n_merges):
    """-> tokens (bytes) in order of id: the 256 bytes, then one for each merge.

    Each step merges the most frequent pair of neighbours (of equals, the one with the smallest
    ids). The obvious way counts anew each time; here only the words that hold the pair are
    touched, and a heap finds the next. Its entries are not updated when a count falls: an outdated
    one goes back in with its true count when it comes up. A word is a string with one character
    per token, so that str.replace is the merge.
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
        for i in where.pop(pair):
            old, words[i] = words[i], words[i].replace(pair, chr(new))
            if old != words[i]:
                for a, b in zip(old, old[1:]):
                    pairs[a + b] -= freqs[i]
                for a, b in zip(words[i], words[i][1:]):
                    pairs[a + b] += freqs[i]
                    if chr(new) in (a, b):
                        where[a + b].add(i)
                        grown.add(a + b)
        for p in grown:
            heapq.heappush(heap, (-pairs[p], p))
    return tokens


def sha256_of(tok):
    return hashlib.sha256(json.dumps([tok["pattern"], tok["tokens"]]).encode()).hexdigest()


def bpe_tokenizer(texts, vocab_size):
    """A JSON-serialisable dict, all that a checkpoint needs to carry."""
    tokens = [base64.b64encode(t).decode() for t in train_bpe(texts, vocab_size - 257)]
    tok = dict(kind="bpe", pattern=PATTERN, tokens=tokens)
    return dict(tok, sha256=sha256_of(tok))


def gpt2_encoding():
    """tiktoken downloads GPT-2's ranks at first use, without a time-out: behind a silent proxy for
    ever. So it runs in a thread that we can walk away from."""
    import tiktoken
    result = ["no answer"]

    def get():
        try:
            result[0] = tiktoken.get_encoding("gpt2")
        except Exception as e:  # whatever its HTTP client raises
            result[0] = type(e).__name__
    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(2 * TIMEOUT)
    if isinstance(result[0], str):
        raise Offline(f"GPT-2's tokenizer could not be downloaded ({result[0]}); set "
                      "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bpe")
    return result[0]


def encoding(tok):
    """meta["tokenizer"] -> tiktoken.Encoding."""
    import tiktoken
    if tok["kind"] == "gpt2":
        return gpt2_encoding()
    if sha256_of(tok) != tok["sha256"]:
        fail(f"the tokenizer's sha256 is {sha256_of(tok)}, not {tok['sha256']}: it is damaged; "
             "prepare the data anew")
    ranks = {base64.b64decode(t): i for i, t in enumerate(tok["tokens"])}
    return tiktoken.Encoding("bpe", pat_str=tok["pattern"], mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def token_bytes(tok):
    """The bytes of each id, 0..vocab_size-1; the last is the end of text."""
    enc = encoding(tok)
    return [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)]


# ---------------------------------------------------------------------------------------------
# corpora

def key(text):
    """32 bytes that order or split things at random, everywhere and always in the same way."""
    return hashlib.sha256(text.encode()).digest()


def find_packages():
    """-> ({package: its folder or file}, {distribution: version}); nothing is imported."""
    roots, versions = {"stdlib": sysconfig.get_paths()["stdlib"]}, {}
    for entry in PACKAGES:
        name, _, dist = entry.partition(":")
        try:
            versions[dist or name] = importlib.metadata.version(dist or name)
            spec = importlib.util.find_spec(name)
            roots[name] = [*(spec.submodule_search_locations or []), spec.origin][0]
        except (importlib.metadata.PackageNotFoundError, AttributeError):  # AttributeError: no spec
            versions[dist or name] = "missing"
    return roots, dict(versions, python=platform.python_version())


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


def python_corpus(roots, max_mb):
    """Whole directories are held out of each package, since neighbours in one repeat each other:
    of validation's 13-grams 2.9 % stand in train, split file by file 6.2 %. Taking a directory
    with all below it, down from a package's first level, hardly changes that (2.8 %)."""
    files, seen = {}, set()  # package -> [(name, file, size)]
    for package, root in roots.items():
        root = Path(root)
        for file in [root] if root.is_file() else sorted(root.rglob("*.py")):
            name = f"{package}/{'' if file == root else file.relative_to(root).as_posix()}"
            if SKIP & set(name.split("/")) or "_sysconfigdata" in name:  # this holds local paths
                continue
            raw = file.read_bytes()
            if is_source(raw) and (digest := hashlib.sha256(raw).digest()) not in seen:
                seen.add(digest)
                files.setdefault(package, []).append((name, file, len(raw)))
    total = {package: sum(size for *_, size in fs) for package, fs in files.items()}
    limit = fair_limit(total.values(), max_mb * 1e6 or sum(total.values()))
    chosen = []
    for package, fs in files.items():
        share = min(1, limit / total[package])
        for split, part in enumerate(hold_out(fs, 0.06 * total[package])):
            room = share * sum(size for *_, size in part)
            for name, file, size in sorted(part, key=lambda f: key(f[0])):
                if size <= room:
                    room -= size
                    chosen.append((key(name), split, file))

    def pieces():
        for _, split, file in sorted(chosen):  # by hash: any stretch is a mixture of all packages
            yield split, file.read_bytes().decode(), True
    return pieces


def fair_limit(sizes, cap):
    """What one package may give so that all together give cap: small ones whole, big ones alike."""
    sizes = sorted(sizes)
    for i, size in enumerate(sizes):
        if size >= cap / (len(sizes) - i):
            return cap / (len(sizes) - i)
        cap -= size
    return sizes[-1]


def hold_out(files, wanted):
    """-> (train, val) files: directories in hash order go to val as long as they fit."""
    sizes, val = Counter(), set()
    for name, _, size in files:
        sizes[name.rpartition("/")[0]] += size
    for folder in sorted(sizes, key=key):
        if sizes[folder] <= wanted * 1.2:
            val.add(folder)
            wanted -= sizes[folder]
    return [[f for f in files if (f[0].rpartition("/")[0] in val) == s] for s in (False, True)]


def read_text(path, chunk=CHUNK, stop=None):
    """(text, ends_document) of a UTF-8 file, cut at each EOT (and the new line after it), a long
    document at line ends too. Of a file read up to byte `stop` only, what follows the last EOT is
    left out: it is a broken document."""
    at, begun, end = 0, False, EOT.encode()
    with open(path, "rb") as f:
        while lines := f.readlines(chunk):
            block = b"".join(lines)
            if stop and at + len(block) >= stop:
                block = b"".join(block[:stop - at].rpartition(end)[:2])
            parts = block.split(end)
            for i, raw in enumerate(parts):
                try:
                    text = raw.decode().removeprefix("\n" if i else "")
                except UnicodeDecodeError as e:
                    fail(f"{path} is not UTF-8: byte 0x{raw[e.start]:02x} at offset "
                         f"{at + e.start:,}; convert it first")
                ends, begun = i < len(parts) - 1, begun or bool(text)
                if text or ends and begun:
                    yield text, ends
                at, begun = at + len(raw) + ends * len(end), begun and not ends
            if stop and f.tell() >= stop:
                break
    if begun:
        yield "", True


def text_corpus(files):
    """The user's files. Validation is each document whose hash says so, about one in 20, if there
    are 20 or more and that makes 2 to 10 % of the text; else the last 5 % of the text."""
    sizes = [0, 0]
    chunk = max(1, min(CHUNK, sum(os.path.getsize(f) for f in files) // 50))

    def pieces(by_hash=True):
        done, fresh, split = 0, True, 0
        for file in files:
            for text, ends in read_text(file, chunk):
                if not by_hash and not split and done >= 0.94 * sum(sizes):
                    split = 1
                    if not fresh:
                        yield 0, "", True
                elif by_hash and fresh:  # a long document goes where its first piece goes
                    split = int(key(text)[0] < 13)  # 13 of 256
                fresh, done = ends, done + len(text.encode())
                yield split, text, ends
    n = 0
    for split, text, ends in pieces():
        sizes[split] += len(text.encode())
        n += ends
    return pieces if n >= 20 and 2 < 100 * sizes[1] / sum(sizes) < 10 else lambda: pieces(False)


def tinystories_corpus(downloads, max_mb):
    train, val = TINYSTORIES["files"]
    stop = int(max_mb * 1e6) if 0 < max_mb * 1e6 < train[1] else None
    val, train = fetch(TINYSTORIES, downloads, *val), fetch(TINYSTORIES, downloads, *train, stop)

    def pieces():
        for split, (file, end) in enumerate([(train, stop), (val, None)]):
            for text, ends in read_text(file, stop=end):
                yield split, text, ends
    return pieces


def openwebtext_corpus(downloads, shards):
    try:
        import pyarrow.parquet
    except ImportError:
        fail("openwebtext comes as parquet, which needs pyarrow: pip install pyarrow")
    files, first = [], (OPENWEBTEXT["size"], OPENWEBTEXT["sha256"])
    for i in range(shards):
        name = OPENWEBTEXT["path"].format(i)
        files.append(fetch(OPENWEBTEXT, downloads, name, *((None, None) if i else first)))

    def pieces():
        for file in files:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield int(key(text)[0] < 3), text, True  # 3 of 256 documents: 1.2 %
    return pieces


# ---------------------------------------------------------------------------------------------
# download

def fetch(dataset, downloads, name, size, sha256, want=None):
    base = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    if not re.match("https?://.", base):
        fail(f"HF_ENDPOINT={base}: must begin with http:// or https://")
    url = f"{base}/datasets/{dataset['repo']}/resolve/{dataset['rev']}/{name}"
    return download(url, downloads / name.rpartition("/")[2], size, sha256, want)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def download(url, path, size=None, sha256=None, want=None):
    """-> the file. It grows as path.part, resumed where an earlier call stopped, and gets its name
    once whole and checked. With `want`, that many bytes will do: then the .part is returned."""
    if path.exists() and size in (None, size_of(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, failures = Path(f"{path}.part"), 0
    start = have = size_of(part)
    while size is None or have < (want or size):
        try:
            size, why = receive(url, part, have, size, want)
        except urllib.error.HTTPError as e:
            if 400 <= e.code < 500:
                fail(f"{url}: {e.code} {e.reason}")
            why = f"{e.code} {e.reason}"
        except (urllib.error.URLError, ConnectionError, TimeoutError, HTTPException) as e:
            why = getattr(e, "reason", e)
        failures, have = failures + (size_of(part) <= have), size_of(part)
        if have == size:  # it may have been whole before: a killed run, a size not known
            break
        # not a single byte: most likely there is no network, and nobody waits for more time-outs
        if failures > 3 or failures and have <= start:
            raise Offline(f"{url.split('/')[2]} does not answer ({why}); check the network, "
                          "then run again: it resumes. The data set python needs no network")
        time.sleep(failures)
    if have < size:
        return part
    with open(part, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest() if sha256 else None
    if (have, found) != (size, sha256):
        part.unlink()  # resumed, it would never become right
        fail(f"{url}: got {have:,} bytes, sha256 {found}; expected {size:,}, {sha256}; deleted, "
             "so run again")
    part.replace(path)
    return path


def receive(url, part, have, size, want):
    """Append the rest of the file to part -> (size of the whole, why it ended). A dropped
    connection looks like the end of the file, so the caller compares sizes."""
    from tqdm import tqdm
    span = {"Range": f"bytes={have}-{want - 1 if want else ''}"}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=span), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code != 416:  # 416: nothing behind what we have. Of a file of unknown size it is all
            raise
        return size or have, "complete"
    with reply as r:
        have = have if r.status == 206 else 0  # 200: the server ignores ranges, start over
        total = (r.headers.get("Content-Range", "").rpartition("/")[2] if r.status == 206
                 else r.headers.get("Content-Length", ""))
        total = int(total) if total.isdigit() else size
        if total is None or total != (size or total):
            fail(f"{url} has {total} bytes, expected {size}: not the file we know, so not read")
        stop = min(want or total, total)
        with open(part, "ab" if have else "wb") as f, tqdm(
                total=stop, initial=have, unit="B", unit_scale=True, desc=part.stem[-30:],
                disable=None) as bar:  # None: silent where stderr is no terminal
            while have < stop:
                try:
                    chunk = r.read1(min(CHUNK, stop - have))
                except (OSError, HTTPException) as e:
                    return total, e
                if not chunk:
                    return total, "connection dropped"
                have += f.write(chunk)
                bar.update(len(chunk))
    return total, "complete"


# ---------------------------------------------------------------------------------------------
# writing and loading

def sample(pieces):
    """At most SAMPLE_BYTES of train, spread over all of it: every stride-th piece. Whenever it
    gets too much, every second one goes and the stride doubles."""
    kept, size, stride = [], 0, 1
    for i, text in enumerate(text for split, text, _ in pieces() if split == 0):
        if i % stride == 0:
            kept.append(text)
            size += len(text)
            if size > SAMPLE_BYTES:
                kept, stride = kept[::2], 2 * stride
                size = sum(map(len, kept))
    return kept


def write_bins(pieces, enc, paths):
    """Encode into both files -> their two accounts for meta.json, and the corpus' sha256."""
    counts = [dict(tokens=0, documents=0, bytes=0) for _ in paths]
    hashes, corpus = [hashlib.sha256() for _ in paths], hashlib.sha256()
    with open(paths[0], "wb") as train, open(paths[1], "wb") as val:
        for batch in batches(pieces()):
            coded = enc.encode_ordinary_batch([text for _, text, _ in batch],
                                              num_threads=os.cpu_count() or 1)
            for (split, text, ends), ids in zip(batch, coded):
                raw = np.array(ids + [enc.n_vocab - 1] * ends, dtype="<u2").tobytes()
                (train, val)[split].write(raw)
                hashes[split].update(raw)
                corpus.update(text.encode() + EOT.encode() * ends)
                for k, n in [("tokens", len(raw) // 2), ("documents", int(ends)),
                             ("bytes", len(text.encode()))]:
                    counts[split][k] += n
    for path, count, h in zip(paths, counts, hashes):
        if not count["bytes"]:
            fail(f"no text is left for {path.name.split('.')[0]}: give more text, or more lines")
        count.update(size=size_of(path), sha256=h.hexdigest())
    return counts, corpus.hexdigest()


def batches(pieces, size=1 << 22):
    batch, n = [], 0
    for piece in pieces:
        batch.append(piece)
        n += len(piece[1])
        if n > size:
            yield batch
            batch, n = [], 0
    yield batch


def seen_share(train, val, n=13, most=200_000, chunk=1 << 20):
    """The share of validation's n-grams of ids (of `most`, evenly spaced) that stand in train."""
    mult = np.random.default_rng(0).integers(1 << 63, size=n, dtype=np.uint64) | np.uint64(1)

    def hashes(ids, at, stop, step=1):  # of the n-grams that begin at at, at + step..., mod 2^64
        stop = min(stop, len(ids) - n + 1)
        return sum((ids[at + k:stop + k:step].astype(np.uint64) + np.uint64(1)) * mult[k]
                   for k in range(n))
    if min(len(val), len(train)) < n:
        return 0.0
    values, counts = np.unique(hashes(val, 0, len(val), len(val) // most + 1), return_counts=True)
    coarse, found = np.zeros(1 << 24, bool), np.zeros(len(values), bool)
    coarse[values >> np.uint64(40)] = True  # sorts out nearly all of train with one look-up each
    for at in range(0, len(train) - n + 1, chunk):
        h = hashes(train, at, at + chunk)
        h = h[coarse[h >> np.uint64(40)]]
        i = np.minimum(np.searchsorted(values, h), len(values) - 1)
        found[i[values[i] == h]] = True
    return float(counts[found].sum() / counts.sum())


def check(folder):
    """-> (meta, None), or (None, what is wrong with the prepared folder)."""
    path = folder / "meta.json"
    if not path.exists():
        return None, f"{folder} is not prepared"
    try:
        meta = json.loads(path.read_text())
        meta["tokenizer"]["kind"], meta["vocab_size"], meta["eot"], meta["args"]  # all there?
        for split in ("train", "val"):
            file, size = folder / f"{split}.bin", meta[split]["size"]
            if size_of(file) != size:
                return None, f"{file} has {size_of(file):,} bytes, meta.json says {size:,}"
            if size < 1e9:  # a gigabyte takes a second or two
                with open(file, "rb") as f:
                    if hashlib.file_digest(f, "sha256").hexdigest() != meta[split]["sha256"]:
                        return None, f"{file} is not what meta.json describes (another sha256)"
        return meta, None
    except (ValueError, KeyError, TypeError) as e:
        return None, f"{path} is damaged ({type(e).__name__}: {e})"


def load(name, data_dir="data"):
    """-> (meta, train, val): the ids memory-mapped as uint16, checked to be what meta.json says."""
    folder = Path(data_dir) / name
    meta, problem = check(folder)
    if problem:
        what = name if name in DEFAULT_MB else f"FILES --name {name}"
        fail(f"{problem}; run: python prepare_data.py {what} --data_dir {data_dir}")
    return meta, *(np.memmap(folder / f"{s}.bin", dtype="<u2", mode="r") for s in ("train", "val"))


def checked_args(name, files, data_dir, max_mb, vocab_size, tokenizer, shards):
    """-> all that the result depends on: where an earlier run had the same, nothing is to do."""
    known, paths = ", ".join(DEFAULT_MB), [Path(f) for f in files]
    top = OPENWEBTEXT["shards"]
    for bad, message in [
            (tokenizer not in ("bpe", "gpt2"), f"--tokenizer {tokenizer}: must be bpe or gpt2"),
            (not 257 <= vocab_size <= 65535, f"--vocab_size {vocab_size}: must be 257 (256 bytes "
             "and the end of text) to 65535 (ids are uint16)"),
            (not 1 <= shards <= top, f"--shards {shards}: must be 1 to {top}"),
            (not 0 <= (max_mb or 0) < 1e7, f"--max_mb {max_mb}: must be 0 (all) or more"),
            (max_mb and (files or name == "openwebtext"),
             "--max_mb is for python and tinystories; of openwebtext take fewer --shards"),
            (not files and name not in DEFAULT_MB,
             f"there is no data set {name}: give one of {known}, or text files"),
            (files and (name in [*DEFAULT_MB, "downloads"] or not re.fullmatch(r"\w[\w-]*", name)),
             f"--name {name}: must be one word, and none of {known}, downloads"),
            *((p.exists() and not p.is_dir(), f"{p} is a file, where a folder is to be")
              for p in (Path(data_dir), Path(data_dir) / name)),
            *((not p.is_file(), f"{p}: no such file, nor a data set ({known})") for p in paths),
            *((not size_of(p), f"{p} is empty") for p in paths)]:
        if bad:
            fail(message)
    return dict(name=name, format=1,  # count up when this script makes other data of the same
                files=[[str(p), size_of(p), p.stat().st_mtime_ns] for p in paths],
                max_mb=DEFAULT_MB.get(name, 0) if max_mb is None else max_mb, tokenizer=tokenizer,
                vocab_size=vocab_size if tokenizer == "bpe" else None,
                shards=shards if name == "openwebtext" else None,
                versions=find_packages()[1] if name == "python" else {})


def prepare(name, files=(), data_dir="data", max_mb=None, vocab_size=4096, tokenizer="bpe",
            shards=1):
    """-> the folder with train.bin, val.bin, meta.json. Raises Offline where a server is needed
    and does not answer; all else that a user can get wrong ends in fail()."""
    try:
        args = checked_args(name, files, data_dir, max_mb, vocab_size, tokenizer, shards)
        folder = Path(data_dir) / name
        meta, _ = check(folder)
        if meta and meta["args"] == args:
            print(f"{folder}: prepared with the same arguments before; nothing to do")
            return folder
        missing = [k for k, version in args["versions"].items() if version == "missing"]
        if missing:
            print(f"not installed, so not in the corpus: {', '.join(missing)}")
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer == "gpt2":
            gpt2_encoding()  # may fail: better before the work than after
        write(folder, args, files)
        return folder
    except OSError as e:
        fail(f"{e.filename or data_dir}: {e.strerror or e}; what was prepared before is untouched")


def write(folder, args, files):
    """Tokenizer, both bins and meta.json, under temporary names until all are whole."""
    start, downloads = time.time(), folder.parent / "downloads"
    pieces = {"python": lambda: python_corpus(find_packages()[0], args["max_mb"]),
              "tinystories": lambda: tinystories_corpus(downloads, args["max_mb"]),
              "openwebtext": lambda: openwebtext_corpus(downloads, args["shards"]),
              }.get(args["name"], lambda: text_corpus(files))()
    tok = (dict(kind="gpt2", sha256=None) if args["tokenizer"] == "gpt2"
           else bpe_tokenizer(sample(pieces), args["vocab_size"]))
    enc, trained = encoding(tok), time.time()
    # the process id: two trainers started side by side may both prepare the default
    new = {n: folder / f"{n}.{os.getpid()}.tmp" for n in ("train.bin", "val.bin", "meta.json")}
    bins = [new["train.bin"], new["val.bin"]]
    for left in folder.glob("*.tmp"):  # by a run that was killed; one that lives wrote just now
        if left.stat().st_mtime < start - 3600:
            left.unlink()
    try:
        (train, val), corpus = write_bins(pieces, enc, bins)
        seen = seen_share(*(np.memmap(f, dtype="<u2", mode="r") for f in bins))
        data = {"tinystories": TINYSTORIES, "openwebtext": OPENWEBTEXT}.get(args["name"], {})
        meta = dict(name=args["name"], source=data.get("repo", "local files"), args=args,
                    revision=data.get("rev"), corpus_sha256=corpus, train=train, val=val,
                    vocab_size=enc.n_vocab, eot=enc.n_vocab - 1, val_13grams_in_train=seen,
                    tokenizer=tok)
        new["meta.json"].write_text(json.dumps(meta, indent=1))
        for name, file in new.items():  # meta.json last: it vouches for the other two
            file.replace(folder / name)
    finally:
        for file in new.values():
            file.unlink(missing_ok=True)
    size, n = (train["bytes"] + val["bytes"]) / 1e6, train["tokens"] + val["tokens"]
    print(f"{folder}: {size:.1f} MB -> {train['tokens']:,} tokens to train, {val['tokens']:,} to "
          f"validate, {size * 1e6 / n:.2f} bytes each; vocabulary {enc.n_vocab:,}; {seen:.1%} of "
          f"validation's 13-grams stand in train; tokenizer {trained - start:.1f} s, all "
          f"{time.time() - start:.1f} s")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", nargs="*", default=["python"],
        help="python (default), tinystories, openwebtext, or UTF-8 text files")
    add("--name", help="of the data set made from text files (default: the first file's)")
    add("--data_dir", default="data", help="gets a folder per data set (default: %(default)s)")
    add("--max_mb", type=float, help=f"cap on the text, 0 = none (default: {DEFAULT_MB})")
    add("--vocab_size", type=int, default=4096, help="of the BPE (default: %(default)s)")
    add("--tokenizer", default="bpe", help="bpe, trained on this text (default), or gpt2")
    add("--shards", type=int, default=1, help="of openwebtext's 80 (default: %(default)s)")
    a = parser.parse_args(argv)
    files = [] if len(a.what) == 1 and a.what[0] in DEFAULT_MB else a.what
    if a.name and not files:
        fail(f"--name is for text files; the data set {a.what[0]} keeps its own name")
    try:
        prepare(a.name or Path(a.what[0]).stem, files, a.data_dir, a.max_mb, a.vocab_size,
                a.tokenizer, a.shards)
    except Offline as e:
        fail(e)


if __name__ == "__main__":
    main()
