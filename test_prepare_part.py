"""Tests of prepare_data.py: python -m pytest test_prepare_part.py"""
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import prepare_data

CODE_TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i}  # ä€ it's\n\n" for i in range(60))


def prepare_fails(capsys, *argv):
    """main() must end in exit code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        prepare_data.main([str(a) for a in argv])
    line, = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and line.startswith("error: ")
    return line


@pytest.fixture
def prepared(tmp_path):
    """A prepared data set of 40 documents."""
    docs = [f"document {i}\n{CODE_TEXT[i * 20:i * 20 + 400]}\n" for i in range(40)]
    (tmp_path / "mine.txt").write_text(f"{prepare_data.EOT}\n".join(docs), encoding="utf-8")
    argv = [str(tmp_path / "mine.txt"), "--data_dir", str(tmp_path / "d"), "--vocab_size", "300"]
    prepare_data.main(argv)
    return docs, tmp_path / "d", argv


def naive_bpe(texts, n_merges):
    """The definition: count all pairs anew before each merge."""
    import regex
    words = Counter(w for t in texts for w in regex.findall(prepare_data.PATTERN, t))
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
    texts = [CODE_TEXT, "".join(random.Random(0).choices("aaabbcd \n\u20ac", k=9000))]
    tokens, words = naive_bpe(texts, 150)
    assert prepare_data.train_bpe(texts, 150) == tokens and len(tokens) == 406
    tok = json.loads(json.dumps(prepare_data.make_tokenizer("bpe", texts, 407)))
    enc, of_id = prepare_data.encoding(tok), prepare_data.token_bytes(tok)
    assert of_id == tokens + [prepare_data.EOT.encode()] and enc.n_vocab == 407
    for raw, word in words.items():
        assert [of_id[i] for i in enc.encode_ordinary(raw.decode())] == word
    for text in ["\x00\ud7ff\U0001f600 e\u0301\r\n\t", prepare_data.EOT, *map(chr, range(1, 3000))]:
        assert enc.decode_bytes(enc.encode_ordinary(text)) == text.encode()
    with pytest.raises(SystemExit):  # two tokens swapped: every text would decode to another
        prepare_data.encoding(dict(tok, tokens=tok["tokens"][1::-1] + tok["tokens"][2:]))


def test_text_round_trip(prepared):
    """Text lost, doubled or reordered between documents and ids; a document without its end."""
    docs, data_dir, _ = prepared
    meta, *bins = prepare_data.load("mine", data_dir)
    enc, found = prepare_data.encoding(meta["tokenizer"]), []
    for split, ids in zip(("train", "val"), bins):
        assert ids[-1] == meta["eot"] and len(ids) == meta[split]["tokens"]
        parts = enc.decode_bytes(list(ids)).decode().split(prepare_data.EOT)[:-1]
        assert len(parts) == meta[split]["documents"]
        assert sum(len(p.encode()) for p in parts) == meta[split]["bytes"]
        found += parts
    assert found == docs and meta["val"]["documents"] == 2  # the last 5 % of 40


def test_a_small_text_without_documents(tmp_path):
    """A vocabulary recorded as asked for, with rows that no token has; no validation."""
    (tmp_path / "t.txt").write_text("some few words\n" * 30)
    prepare_data.main([str(tmp_path / "t.txt"), "--data_dir", str(tmp_path)])
    meta, train, _ = prepare_data.load("t", tmp_path)
    assert 257 < meta["vocab_size"] < 300 and meta["eot"] == meta["vocab_size"] - 1 == train.max()
    assert 0.02 < meta["val"]["bytes"] / 450 < 0.1


def test_read_text(tmp_path):
    """A piece cut within a character or a separator; a broken last document taken for a whole."""
    docs, eot = ["\u20ac" * 50 + "\n" + CODE_TEXT[:700], "short", CODE_TEXT * 3], prepare_data.EOT
    (tmp_path / "t").write_text(f"\n{eot}\n".join(docs), encoding="utf-8")
    for chunk in (1, 100, 1000, 1 << 20):
        got = "".join(t + eot * ends for t, ends in prepare_data.read_text(tmp_path / "t", chunk))
        assert got == f"\n{eot}".join(docs) + eot
    assert [t for t, _ in prepare_data.read_text(tmp_path / "t", whole=False)] == \
        [doc + "\n" for doc in docs[:2]]


def test_python_corpus(tmp_path, capsys):
    """A cap passed or filled by one package; an order or a tokenizer that differs from run to run;
    a second run that does it all again."""
    argv = ["--data_dir", str(tmp_path), "--max_mb", "2", "--vocab_size", "512"]
    prepare_data.main(argv)
    meta, train, _ = prepare_data.load("python", tmp_path)
    size = meta["train"]["bytes"] + meta["val"]["bytes"]
    assert 1e6 < size <= 2e6 and 0.01 < meta["val"]["bytes"] / size < 0.12
    assert meta["val_13grams_in_train"] < 0.2 and train.max() < 512
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "python").iterdir()}
    assert sorted(before) == ["meta.json", "train.bin", "val.bin"]
    prepare_data.main(argv)
    assert before == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "python").iterdir()}
    prepare_data.main(["--data_dir", str(tmp_path / "again"), *argv[2:]])
    assert prepare_data.load("python", tmp_path / "again")[0] == meta


def test_choice_of_files():
    """A directory in both splits: 6 % instead of 3 % of validation would stand in train."""
    files = [(prepare_data.key(f"{p}{i}"), p, f"{p}/d{i % 30}", f"{p}/d{i % 30}/{i}", 100 + i)
             for p, n in (("big", 400), ("small", 200)) for i in range(n)]
    for cap, share_big in ((0, 120 / 160), (0.04, 0.5)):  # in MB: all of 160 kB; 20 kB of each
        chosen, size = prepare_data.choose(files, cap), {f[3]: f[4] for f in files}
        total = sum(size[path] for _, path in chosen)
        assert total == sum(size.values()) if cap == 0 else 0.9 * cap < total / 1e6 <= cap
        big = sum(size[path] for _, path in chosen if path.startswith("big"))
        assert big / total == pytest.approx(share_big, abs=0.05)
        train, val = ({p.rpartition("/")[0] for s, p in chosen if s == split} for split in (0, 1))
        assert not train & val and {folder[:3] for folder in val} == {"big", "sma"}


def test_seen_share():
    """The 13-gram share of a hash that collides, of a chunk's edge, of no overlap at all."""
    train, val = np.random.default_rng(1).integers(0, 4096, (2, 1_100_000)).astype("<u2")
    val = val[:1000]
    assert prepare_data.seen_share(train, val) == 0
    val[100:313] = train[(1 << 20) - 100:(1 << 20) + 113]  # across the border of two chunks
    assert prepare_data.seen_share(train, val) == pytest.approx(201 / 988)


def test_a_killed_run_leaves_nothing_that_loads(prepared, monkeypatch, capsys):
    """Half a train.bin that looks finished; the old data set gone before the new one is whole."""
    _, data_dir, argv = prepared
    before = prepare_data.load("mine", data_dir)[0]

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare_data, "seen_share", killed)
    for name in ("mine", "new"):
        with pytest.raises(KeyboardInterrupt):
            prepare_data.main([*argv[:-1], "290", "--name", name])
    assert prepare_data.load("mine", data_dir)[0] == before
    with pytest.raises(SystemExit):
        prepare_data.load("new", data_dir)
    assert "run: python prepare_data.py" in capsys.readouterr().err


@pytest.mark.parametrize("file, change, message", [
    ("train.bin", lambda b: b[:-2], "meta.json says"), ("val.bin", lambda b: b[::-1], "sha256"),
    ("meta.json", lambda b: b[:99], "damaged"), ("meta.json", lambda b: b"[]", "damaged")])
def test_load_refuses(prepared, capsys, file, change, message):
    """Training on a truncated file (SIGBUS), on another's ids, or a traceback from json."""
    path = prepared[1] / "mine" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SystemExit):
        prepare_data.load("mine", prepared[1])
    assert message in capsys.readouterr().err
    prepare_data.main(prepared[2])  # the remedy that it names works
    prepare_data.load("mine", prepared[1])


class HubServer(http.server.BaseHTTPRequestHandler):
    """Serves bytes; `mood` says how badly."""
    def do_GET(self):
        body, mood = self.server.files.get(self.path.rpartition("/")[2]), self.server.mood
        self.server.log.append(self.headers["Range"])
        if mood == "silent":
            return time.sleep(1)
        if body is None:
            return self.send_error(404)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last or 1 << 60), len(body) - 1)
        if mood == "no ranges":
            first, last = 0, len(body) - 1
        self.send_response(200 if mood == "no ranges" else 206)
        self.send_header("Content-Length", str(last + 1 - first))
        if mood != "no ranges":
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[first:last + 1][:3000 if mood == "short" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubServer)
    server.files, server.mood, server.log, server.daemon_threads = {}, "good", [], True
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.5)
    yield server
    server.shutdown()
    server.server_close()


def test_download(hub, tmp_path, capsys):
    """Resumed at the wrong byte; a 200 appended to what was there; a dropped connection taken for
    the end; a file that is not the one expected kept as if it were; waiting without an end."""
    hub.files["f"] = body = random.Random(0).randbytes(10_000)
    sha = hashlib.sha256(body).hexdigest()

    def get(name, *expected):
        prepare_data.download(dict(repo="a/b", rev="1"), "f", tmp_path / name, *expected)
        assert not (tmp_path / f"{name}.part").exists()
        return (tmp_path / name).read_bytes()
    for mood in ["good", "no ranges", "short"]:
        for expected in [(10_000, sha), ()]:
            hub.mood, name = mood, f"{mood}{len(expected)}"
            (tmp_path / f"{name}.part").write_bytes(body[:1234])
            hub.log.clear()
            assert get(name, *expected) == body and hub.log[0].startswith("bytes=1234-")
            assert mood != "short" or hub.log[1].startswith("bytes=4234-")
    hub.mood = "good"
    assert get("first", 500) == body[:500]
    for size, digest, why in [(10_000, "0" * 64, "deleted"), (10_001, sha, "expected 10001")]:
        with pytest.raises(SystemExit):
            get("bad", size, digest)
        assert why in capsys.readouterr().err and not (tmp_path / "bad").exists()
    hub.mood, start = "silent", time.time()
    with pytest.raises(prepare_data.Offline):
        get("silent", 10_000)
    assert time.time() - start < 2


def test_tinystories(hub, tmp_path, monkeypatch, capsys):
    """A capped download that fetches all of it, or ends in half a story; a traceback without a
    network."""
    story = f"Once upon a time there was a cat.\n{prepare_data.EOT}\n".encode()
    hub.files = dict(train=story * 400, valid=story.replace(b"cat", b"dog") * 20)
    monkeypatch.setitem(prepare_data.TINYSTORIES, "files", [
        (n, len(b), hashlib.sha256(b).hexdigest()) for n, b in hub.files.items()])
    argv = ["tinystories", "--data_dir", str(tmp_path), "--vocab_size", "270", "--max_mb"]
    for cap, n in (("0.005", 5000 // len(story)), ("0", 400)):
        prepare_data.main([*argv, cap])
        meta = prepare_data.load("tinystories", tmp_path)[0]
        assert meta["train"]["documents"] == n and meta["val"]["documents"] == 20
        assert "bytes=0-4999" in hub.log
    hub.files = {}
    assert "404" in prepare_fails(capsys, *argv[:2], tmp_path / "other", *argv[3:], 1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "check the network" in prepare_fails(capsys, *argv[:2], tmp_path / "other", *argv[3:], 1)


def test_gpt2(tmp_path):
    """Ids that are not GPT-2's, or no hash by which a checkpoint could tell."""
    url = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", "")
    if not cache or not os.path.exists(f"{cache}/{hashlib.sha1(url).hexdigest()}"):
        pytest.skip("TIKTOKEN_CACHE_DIR does not name a folder that holds GPT-2's ranks")
    (tmp_path / "t.txt").write_text("Hello world\n" * 50)
    prepare_data.main([str(tmp_path / "t.txt"), "--data_dir", str(tmp_path), "--tokenizer", "gpt2"])
    meta, train, _ = prepare_data.load("t", tmp_path)
    assert (meta["vocab_size"], meta["eot"]) == (50257, 50256) and list(train[:2]) == [15496, 995]
    assert prepare_data.token_bytes(meta["tokenizer"])[995] == b" world"
    assert len(meta["tokenizer"]["sha256"]) == 64


def test_mistakes(tmp_path, capsys, monkeypatch):
    """A traceback, or a message without the numbers, for what users get wrong."""
    for name, raw in [("empty", b""), ("bad", b"abc\n" * 5 + b"\xff"), ("ok", CODE_TEXT.encode())]:
        (tmp_path / f"{name}.txt").write_bytes(raw)
    monkeypatch.setenv("HF_ENDPOINT", "somewhere")
    for message, argv in [
            ("python, tinystories", ["pyhton"]), ("empty", [tmp_path / "empty.txt"]),
            ("byte 0xff at offset 20", [tmp_path / "bad.txt"]),
            ("to 80", ["openwebtext", "--shards", 81]),
            ("257", ["--vocab_size", 256]), ("65535", ["--vocab_size", 65536]),
            ("--max_mb -1", ["--max_mb", -1]), ("bpe or gpt2", ["--tokenizer", "gpt3"]),
            ("text files", ["--name", "x"]), ("downloads", [tmp_path / "ok.txt", "--name", "../x"]),
            ("somewhere", ["tinystories"])]:
        assert message in prepare_fails(capsys, *argv, "--data_dir", tmp_path / "d")
    assert "ok.txt" in prepare_fails(capsys, "--max_mb", 1, "--data_dir", tmp_path / "ok.txt")


def test_import_is_light():
    """`import prepare_data` in train.py that loads heavy modules, or prepares anything."""
    heavy = {"torch", "tiktoken", "tqdm", "regex", "pyarrow"}
    code = f"import sys, prepare_data; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         cwd=Path(prepare_data.__file__).parent)
    assert run.stdout.strip() == "set()"
