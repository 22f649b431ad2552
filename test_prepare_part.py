"""Tests of prepare_data.py: python -m pytest test_prepare_part.py"""
import functools, hashlib, http.server, json, os, random, threading, time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import prepare_data as prep

TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i}  # \u00e4\u20ac it's\n\n" for i in range(60))


def failure(capsys, *argv):
    """main() must end in exit code 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as e:
        prep.main([str(a) for a in argv])
    err = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and err[-1].startswith("error: ") and "Traceback" not in str(err)
    return err[-1]


def raising(error):
    def function(*args):
        raise error
    return function


@pytest.fixture
def mine(tmp_path):
    """A prepared data set of 40 documents."""
    docs = [f"document {i}\n{TEXT[i * 20:i * 20 + 400]}\n" for i in range(40)]
    (tmp_path / "mine.txt").write_text(f"{prep.EOT}\n".join(docs), encoding="utf-8")
    argv = [str(tmp_path / "mine.txt"), "--data_dir", str(tmp_path / "d"), "--vocab_size", "300"]
    prep.main(argv)
    return docs, tmp_path / "d", argv


def naive_bpe(texts, n_merges):
    """The definition: count all pairs anew before each merge."""
    import regex
    words = Counter(w for t in texts for w in regex.findall(prep.PATTERN, t))
    words = [([bytes([b]) for b in w.encode()], n) for w, n in words.items()]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 256 + n_merges:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda p: (-pairs[p], tokens.index(p[0]), tokens.index(p[1])))
        tokens.append(best[0] + best[1])
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
    return tokens, {b"".join(w): w for w, _ in words}


def test_bpe_is_the_naive_one_and_tiktoken_runs_it():
    """Incremental counts that drift, ties decided by hash order, other merges in tiktoken."""
    rng = random.Random(0)
    texts = [TEXT, "".join(rng.choices("aaabbcd \n\u20ac", k=9000))]
    tokens, words = naive_bpe(texts, 150)
    assert prep.train_bpe(texts, 150) == tokens and len(tokens) == 406
    tok = json.loads(json.dumps(prep.bpe_tokenizer(texts, 407)))  # as a checkpoint carries it
    enc, texts_of = prep.encoding(tok), prep.token_bytes(tok)
    assert texts_of == tokens + [prep.EOT.encode()] and enc.n_vocab == 407
    for raw, word in words.items():
        assert [texts_of[i] for i in enc.encode_ordinary(raw.decode())] == word
    for text in ["\x00\ud7ff\U0001f600 e\u0301\r\n\t", prep.EOT, "".join(map(chr, range(1, 3000)))]:
        assert enc.decode_bytes(enc.encode_ordinary(text)) == text.encode()


def test_a_small_text_ends_the_merges(tmp_path):
    """A vocabulary recorded as asked for, with rows that no token has."""
    (tmp_path / "t.txt").write_text("some few words\n" * 30)
    prep.main([str(tmp_path / "t.txt"), "--data_dir", str(tmp_path)])
    meta, train, val = prep.load("t", tmp_path)
    assert 257 < meta["vocab_size"] < 300 and meta["eot"] == meta["vocab_size"] - 1 == train.max()
    assert 0.02 < meta["val"]["bytes"] / 450 < 0.1  # one document: the last 5 % of it


def test_round_trip(mine):
    """Text lost, doubled or reordered between documents and ids; a document without its end."""
    docs, data_dir, _ = mine
    meta, *bins = prep.load("mine", data_dir)
    enc, found = prep.encoding(meta["tokenizer"]), []
    for split, ids in zip(("train", "val"), bins):
        assert ids[-1] == meta["eot"] and len(ids) == meta[split]["tokens"]
        text = enc.decode_bytes(list(ids)).decode()
        parts = text.split(prep.EOT)[:-1]
        assert len(parts) == meta[split]["documents"]
        assert sum(len(p.encode()) for p in parts) == meta[split]["bytes"]
        found.append(parts)
    assert sorted(found[0] + found[1]) == sorted(docs)
    assert found[0] and found[1] and not set(found[0]) & set(found[1])


def test_long_documents_and_reading_up_to(tmp_path):
    """A piece cut within a character or a separator; a broken last document taken for a whole."""
    docs = ["\u20ac" * 50 + "\n" + TEXT[:700], "short", TEXT * 3]
    text = f"\n{prep.EOT}\n".join(docs)
    (tmp_path / "t").write_text(text, encoding="utf-8")
    for chunk in (1, 100, 1000, 1 << 20):
        got = "".join(t + prep.EOT * ends for t, ends in prep.read_text(tmp_path / "t", chunk))
        assert got == text.replace(f"{prep.EOT}\n", prep.EOT) + prep.EOT
        cut = len(f"\n{prep.EOT}\n".join(docs[:2]).encode()) + 40
        part = list(prep.read_text(tmp_path / "t", 1 << 20, stop=cut))
        assert [t.strip("\n") for t, _ in part] == docs[:2] and all(e for _, e in part)


def test_python_corpus(tmp_path, capsys, monkeypatch):
    """Validation from directories that train has too; a cap passed or filled by one package; an
    order or a tokenizer that differs from run to run; a second run that does it all again."""
    argv = ["--data_dir", str(tmp_path), "--max_mb", "2", "--vocab_size", "512"]
    prep.main(argv)
    meta, train, val = prep.load("python", tmp_path)
    size = meta["train"]["bytes"] + meta["val"]["bytes"]
    assert 1e6 < size <= 2e6 and 0.01 < meta["val"]["bytes"] / size < 0.12
    assert meta["val_13grams_in_train"] < 0.2 and train.max() < 512
    roots, real, seen = prep.find_packages()[0], prep.key, []
    monkeypatch.setattr(prep, "key", lambda name: seen.append(name) or real(name))
    prep.python_corpus({p: roots[p] for p in ("stdlib", "numpy")}, 4)
    monkeypatch.setattr(prep, "key", real)
    assert any(n.startswith("numpy/") for n in seen) and not any("/tests/" in n for n in seen)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "python").iterdir()}
    assert sorted(before) == ["meta.json", "train.bin", "val.bin"]
    capsys.readouterr()
    prep.main(argv)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "python").iterdir()}
    prep.main(["--data_dir", str(tmp_path / "again"), *argv[2:]])
    assert prep.load("python", tmp_path / "again")[0] == meta


def test_held_out_directories():
    """A directory in both splits: 6 % instead of 3 % of validation would stand in train."""
    files = [(f"p/d{i % 30}/f{i}.py", None, 100 + i) for i in range(300)]
    train, val = prep.hold_out(files, 0.06 * sum(f[2] for f in files))
    assert sorted(train + val) == sorted(files)
    assert not {f[0].split("/")[1] for f in train} & {f[0].split("/")[1] for f in val}
    assert 0.03 < sum(f[2] for f in val) / sum(f[2] for f in files) < 0.08
    assert prep.fair_limit([1, 2, 30, 40], 23) == 10 and prep.fair_limit([1, 2], 5) == 2


def test_seen_share():
    """The 13-gram share of a hash that collides, of a chunk's edge, of no overlap at all."""
    rng = np.random.default_rng(1)
    train, val = rng.integers(0, 4096, (2, 1_100_000 + 600)).astype("<u2")
    val = val[:1000]
    assert prep.seen_share(train, val) == 0
    val[100:313] = train[(1 << 20) - 100:(1 << 20) + 113]  # across the border of two chunks
    assert prep.seen_share(train, val) == pytest.approx(201 / 988)


def test_a_killed_run_leaves_nothing_that_loads(mine, monkeypatch, capsys):
    """Half a train.bin that looks finished; the old data set gone before the new one is whole."""
    _, data_dir, argv = mine
    before = prep.load("mine", data_dir)[0]
    monkeypatch.setattr(prep, "seen_share", raising(KeyboardInterrupt))
    for name, old in (("mine", before), ("new", None)):
        with pytest.raises(KeyboardInterrupt):
            prep.main([*argv[:-1], "290", "--name", name])
        assert old is None or prep.load(name, data_dir)[0] == old
        assert [f for f in os.listdir(data_dir / name) if old is None or f.endswith("tmp")] == []
    with pytest.raises(SystemExit):
        prep.load("new", data_dir)
    assert "not prepared; run: python prepare_data.py" in capsys.readouterr().err


@pytest.mark.parametrize("file, change, message", [
    ("train.bin", lambda b: b[:-2], "meta.json says"), ("val.bin", lambda b: b[::-1], "sha256"),
    ("meta.json", lambda b: b[:99], "damaged"), ("meta.json", lambda b: b"[]", "damaged")])
def test_load_refuses(mine, capsys, file, change, message):
    """Training on a truncated file (SIGBUS), on another's ids, or a traceback from json."""
    path = mine[1] / "mine" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SystemExit):
        prep.load("mine", mine[1])
    assert message in capsys.readouterr().err
    prep.main(mine[2])  # the remedy that it names works
    prep.load("mine", mine[1])


class Server(http.server.BaseHTTPRequestHandler):
    """Serves bytes; `mood` says how badly."""
    def do_GET(self):
        body, mood = self.server.files.get(self.path.rpartition("/")[2]), self.server.mood
        self.server.log.append(self.headers.get("Range"))
        if mood == "silent":
            return time.sleep(2)
        if body is None:
            return self.send_error(404)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last or 1 << 60), len(body) - 1)
        if mood == "no ranges":
            first, last = 0, len(body) - 1
        elif first > last:
            return self.send_error(416)
        self.send_response(200 if mood == "no ranges" else 206)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[first:last + 1][:3000 if mood == "short" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files, server.mood, server.log, server.daemon_threads = {}, "good", [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setattr(prep, "TIMEOUT", 0.5)
    monkeypatch.setattr(prep.time, "sleep", lambda s: None)
    yield server
    server.shutdown()


def test_download(hub, tmp_path, capsys):
    """Resumed at the wrong byte; a 200 appended to what was there; a dropped connection taken for
    the end; a file that is not the one expected kept as if it were."""
    body = random.Random(0).randbytes(10_000)
    hub.files["f"], sha = body, hashlib.sha256(body).hexdigest()
    for i, mood in enumerate(["good", "no ranges", "short"]):
        hub.mood, path = mood, tmp_path / str(i)
        Path(f"{path}.part").write_bytes(body[:1234])
        hub.log.clear()
        assert prep.download(hub.url + "/f", path, 10_000, sha).read_bytes() == body
        assert hub.log[0] == "bytes=1234-" and (mood != "short" or hub.log[1] == "bytes=4234-")
        assert not Path(f"{path}.part").exists()
    hub.mood = "good"
    part = prep.download(hub.url + "/f", tmp_path / "w", 10_000, sha, want=500)
    assert part.read_bytes() == body[:500]
    assert prep.download(hub.url + "/f", tmp_path / "w", None).read_bytes() == body
    Path(tmp_path / "all.part").write_bytes(body)  # whole, but killed before it got its name: 416
    assert prep.download(hub.url + "/f", tmp_path / "all").read_bytes() == body
    for size, digest, why in [(10_000, "0" * 64, "deleted"), (9_999, sha, "expected 9999")]:
        with pytest.raises(SystemExit):
            prep.download(hub.url + "/f", tmp_path / "bad", size, digest)
        assert why in capsys.readouterr().err and not list(tmp_path.glob("bad*"))
    hub.mood, start = "silent", time.time()
    with pytest.raises(prep.Offline):
        prep.download(hub.url + "/f", tmp_path / "s", 10_000)
    assert time.time() - start < 2


def test_tinystories(hub, tmp_path, monkeypatch, capsys):
    """A capped download that fetches all of it, or ends in half a story; a cap raised later that
    starts over; a traceback without a network."""
    story = f"Once upon a time there was a cat.\n{prep.EOT}\n".encode()
    files = dict(train=story * 400, valid=story.replace(b"cat", b"dog") * 20)
    monkeypatch.setitem(prep.TINYSTORIES, "files", [
        (n, len(b), hashlib.sha256(b).hexdigest()) for n, b in files.items()])
    hub.files.update(files)
    argv = ["tinystories", "--data_dir", str(tmp_path), "--vocab_size", "270", "--max_mb"]
    prep.main([*argv, "0.005"])
    meta, train, val = prep.load("tinystories", tmp_path)
    assert meta["train"]["documents"] == 5000 // len(story) and meta["val"]["documents"] == 20
    assert hub.log[-1] == "bytes=0-4999"
    prep.main([*argv, "0"])
    assert hub.log[-1] == "bytes=5000-"
    assert prep.load("tinystories", tmp_path)[0]["train"]["documents"] == 400
    hub.files.clear()
    assert "404" in failure(capsys, *argv[:2], tmp_path / "other", *argv[3:], 1)
    hub.shutdown()
    hub.server_close()
    assert "does not answer" in failure(capsys, *argv[:2], tmp_path / "other", *argv[3:], 1)


def test_gpt2(tmp_path):
    """Ids that are not GPT-2's."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", "")
    if not cache or not os.path.exists(f"{cache}/{hashlib.sha1(GPT2_FILE).hexdigest()}"):
        pytest.skip("TIKTOKEN_CACHE_DIR does not name a folder that holds GPT-2's ranks")
    (tmp_path / "t.txt").write_text("Hello world\n" * 50)
    prep.main([str(tmp_path / "t.txt"), "--data_dir", str(tmp_path), "--tokenizer", "gpt2"])
    meta, train, _ = prep.load("t", tmp_path)
    assert (meta["vocab_size"], meta["eot"]) == (50257, 50256) and list(train[:2]) == [15496, 995]
    assert prep.token_bytes(meta["tokenizer"])[995] == b" world"


GPT2_FILE = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"


def test_mistakes(tmp_path, capsys, monkeypatch):
    """A traceback, or a message without the numbers, for what users get wrong."""
    for name, raw in [("empty", b""), ("bad", b"abc\n" * 5 + b"\xff"), ("ok", TEXT.encode())]:
        (tmp_path / f"{name}.txt").write_bytes(raw)
    say = functools.partial(failure, capsys)
    at = ["--data_dir", tmp_path / "d"]
    assert "no such file" in say("pyhton", *at) and "python, tinystories" in say("pyhton", *at)
    assert "is empty" in say(tmp_path / "empty.txt", *at)
    assert "byte 0xff at offset 20" in say(tmp_path / "bad.txt", *at)
    assert "257" in say("--vocab_size", 256, *at) and "65535" in say("--vocab_size", 65536, *at)
    assert "--max_mb -1" in say("--max_mb", -1, *at)
    assert "80" in say("openwebtext", "--shards", 81, *at)
    assert "bpe or gpt2" in say("--tokenizer", "gpt3", *at) and "--name" in say("--name", "x", *at)
    assert "is a file" in say("--data_dir", tmp_path / "ok.txt")
    assert "downloads" in say(tmp_path / "ok.txt", "--name", "../x", *at)
    monkeypatch.setattr(prep, "seen_share", raising(OSError(28, "No space left")))
    assert "No space left" in say(tmp_path / "ok.txt", *at) and not os.listdir(tmp_path / "d/ok")
    monkeypatch.setenv("HF_ENDPOINT", "somewhere")
    assert "https://" in say("tinystories", *at)


def test_import_is_light():
    """`import prepare_data` in train.py that loads heavy modules, or prepares anything."""
    import subprocess, sys
    heavy = {"torch", "tiktoken", "tqdm", "regex", "pyarrow"}
    code = f"import sys, prepare_data; print({heavy} & set(sys.modules))"
    here = Path(prep.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert run.stdout.strip() == "set()"
