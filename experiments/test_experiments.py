"""
Tests of the experiments: what is computed against slow and obvious ways to do it, one run
of each analysis and of one sweep, and the README against what the commands print.

    python -m pytest experiments
"""
import json
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare_data
import train
from common import write_whole
from engram import Engram, EngramConfig
from experiments import analyze, sweep, tasks
from model import load_checkpoint, watch
from test_engram import TINY, run
from twins import make_twins


@pytest.fixture(scope="module")
def pair_dirs(corpus, tmp_path_factory):
    """Train two pairs of tiny twins."""
    out = tmp_path_factory.mktemp("out")
    for seed in "01":
        run(train, *corpus, *TINY, "--out_dir", out / seed, "--seed", seed)
    return str(out / "0"), str(out / "1")


# ---- sweeps --------------------------------------------------------------------------

def test_intervals_of_pairs():
    """A normal quantile in place of t, or n in place of n - 1; losses of different seeds
    subtracted. (What else a sweep says is held by the README, below.)"""
    mean, half = analyze.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.303 * 1.527525 / 3 ** 0.5)
    _, half = analyze.interval(list(range(30)))
    assert half == pytest.approx(2.131 * 77.5 ** 0.5 / 30 ** 0.5)
    runs = {}
    for arm, seed, loss in (("a", 1, 3.0), ("a", 2, 5.0), ("a", 3, 9.0), ("b", 3, 8.5),
                            ("b", 1, 2.0)):
        runs.setdefault(arm, {})[seed] = {"records": [{"val_loss": 7}, {"val_loss": loss}]}
    assert sweep.gaps(runs, "a", "b") == [1.0, 0.5]


def test_train_accepts_every_arm():
    """An arm whose flags train.py refuses, or two arms that are the same experiment."""
    for name, kind in sweep.sweeps().items():
        shapes = []
        for arm in kind.arms.values():
            flags = f"{kind.base} {arm.flags} --device cpu"
            cfg, shape = train.read_flags(flags.split())
            shapes.append((str(cfg), str(shape)))
            # without a memory, two experts are no twin's
            if "--model moe" not in arm.flags and not shape.engram.rows:
                make_twins(shape, cfg.rho)
        assert len(set(shapes)) == len(shapes), name
        assert kind.draw != sweep.draw_curves or kind.arms.keys() <= sweep.CURVE_STYLES.keys()
        assert kind.reference in kind.arms and cfg.model == arm.flags.split()[1]


def test_a_sweep_continues_where_it_was(corpus, tmp_path, monkeypatch, capsys, refused):
    """A finished run trained again; one that was interrupted taken for a result, or begun
    again; the committed results overwritten."""
    path, commands = Path("runs/results/controls.json"), []
    argv = "controls --dataset mine --steps 8 --seeds 1 --arms ungated".split()

    def run_here(command, **how):
        commands.append([str(part) for part in command[2:]])
        train.main(commands[-1])
        return SimpleNamespace(returncode=0)

    def stop(path, write):
        write_whole(path, write)
        if path.name == "ckpt.pt":
            raise KeyboardInterrupt

    # tiny runs, in an empty folder and in this process
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "LAPTOP", f"{' '.join(TINY)} --data_dir {corpus[3]} --n_expert 12")
    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))
    # Ctrl-C after the first checkpoint of the first run
    with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)):
        patch.setattr(train, "write_whole", stop)
        sweep.main(argv)
    assert not path.exists()
    sweep.main(argv)
    assert any("--resume" in command for command in commands)
    runs = json.loads(path.read_text())["runs"]
    assert [run["arm"] for run in runs] == ["engram", "ungated"]
    assert path.with_suffix(".png").stat().st_size > 5000
    # what is finished is not trained again
    n = len(commands)
    sweep.main(argv)
    assert len(commands) == n and json.loads(path.read_text())["runs"] == runs
    refused("came with the code", sweep.main, [*argv, "--results", str(analyze.COMMITTED)])
    argv = "controls --plot --results runs/results --reference ungated".split()
    sweep.main(argv)
    assert re.search(r"no gate .* \| reference \|", capsys.readouterr().out)
    path.write_text(path.read_text()[:99])
    refused("damaged", sweep.main, argv)


# ---- analyses ------------------------------------------------------------------------

def ngrams(ids, n):
    return [tuple(ids[t:t + n]) for t in range(len(ids) + 1 - n)]


def table_by_hand(pair, ids, rows, values, n):
    """Return {bucket: mean value} of the tokens, by how often the run has seen the n-grams
    that end in them. ids: what an n-gram is made of, for each token."""
    seen, found = Counter(), {}
    for start in pair.data.order[:12 * 128 // 32] * 32:
        seen.update(ngrams(ids[pair.data.train[start:start + 33]], n))
    for row, numbers in zip(ids[rows], values):
        for gram, value in zip(ngrams(row, n), numbers[n - 1:], strict=True):
            names = [name for name, least in analyze.BUCKETS.items() if seen[gram] >= least]
            found.setdefault(names[-1], []).append(value)
    return {name: np.mean(some) for name, some in found.items()}


def test_knockout_by_hand(pair_dirs):
    """A loss beside the n-gram of another token, a part of the text that this run never
    reached, a gain of the other sign."""
    pair = analyze.load_pair(pair_dirs[0])
    x, y = torch.from_numpy(pair.data.val_x), torch.from_numpy(pair.data.val_y)
    losses = []
    with torch.no_grad():
        for model, reads in ((pair.engram, None), (pair.engram, []), (pair.moe, None)):
            probs = model(x, reads=reads)[0].log_softmax(-1)
            losses.append(-probs.gather(-1, y[..., None])[..., 0].double().numpy())
    on, off, moe = losses
    # the first token of a row has no loss
    rows = np.concatenate([x, y[:, -1:]], axis=1)
    found = analyze.knockout(pair)
    for name, gain in (("off - on", off - on), ("moe - engram", moe - on)):
        slow = table_by_hand(pair, np.arange(400), rows, np.pad(gain, ((0, 0), (1, 0))), 3)
        assert len(slow) > 2 and found["3-grams"][name] == pytest.approx(slow, abs=1e-5)
        assert found[name] == pytest.approx(gain.mean(), abs=1e-5)


def test_gates_by_hand(pair_dirs):
    """A gate beside the n-gram of another token, tokens in place of canonical ids; a share
    that grows with the number of groups."""
    pair = analyze.load_pair(pair_dirs[0], twin=False)
    x, canonical, found = pair.data.val_x, pair.canonical, analyze.gates(pair)
    with torch.no_grad(), watch(pair.engram) as seen:
        pair.engram(torch.from_numpy(x))
    gate = seen[0]["gate"][0].double().numpy()
    for n in (2, 3):
        slow = table_by_hand(pair, canonical, x, gate, n)
        assert found[f"{n}-grams"]["by count"] == pytest.approx(slow)
    # the share that each grouping explains, of the 3-grams as written that recur
    written = sum((ngrams(row, 3) for row in x.tolist()), [])
    recurs = [written.count(gram) > 1 for gram in written]
    written = [gram for gram in written if written.count(gram) > 1]
    values = gate[:, 2:].flatten()[recurs]
    merged = [tuple(canonical[list(gram)].tolist()) for gram in written]
    for name, groups in (("by the token", [gram[2] for gram in merged]),
                         ("by the n-gram", merged), ("by its writing too", written)):
        inner = 0
        for group in set(groups):
            members = values[[other == group for other in groups]]
            inner += members.var() * len(members)
        inner /= len(values) - len(set(groups))
        assert found[name] == pytest.approx(1 - inner / values.var(ddof=1), rel=1e-4)


def test_hit_rate_of_a_cache(pair_dirs):
    """Rows judged on the text they were chosen on, or counted twice within a prompt."""
    pair = analyze.load_pair(pair_dirs[0], twin=False)
    found, tokens, canonical = analyze.zipf(pair), pair.data.train, pair.canonical
    engram = Engram(EngramConfig(heads=8, rows=250_000), 1, 8, int(canonical.max()) + 1,
                    int(canonical[-1]), table_device="meta")
    prompts = canonical[tokens[:len(tokens) // 2048 * 2048]].reshape(-1, 1024)
    first, second = Counter(), Counter()
    for i, prompt in enumerate(torch.from_numpy(prompts)):
        half = first if 2 * i < len(prompts) else second
        half.update(set(engram.hash(prompt[None]).flatten().tolist()))
    assert found["reads"] == first.total() + second.total()
    assert found["rows_read"] == len(first | second)
    # rows that were read equally often may come in any order, so there are two bounds
    counts = sorted(first.values(), reverse=True)
    for n, rate in zip(found["cache_rows"], found["hit_rate"]):
        if n < len(counts):
            surely = sum(second[row] for row, k in first.items() if k > counts[n])
            at_most = sum(second[row] for row, k in first.items() if k >= counts[n])
            assert surely - 1 <= rate * second.total() <= at_most + 1


def test_how_similar_layers_are(pair_dirs):
    """A biased estimate, layers called different because they are rotated, the stream of
    another place, a control that is no control."""
    a, b = (torch.randn(L, 7, 5, dtype=torch.float64) for L in (2, 3))
    K, L, total = a[1] @ a[1].T, b[2] @ b[2].T, 0
    # the definition: the mean over all choices of four different tokens
    for t, u, v, w in permutations(range(7), 4):
        total += K[t, u] * (L[t, u] + L[v, w] - 2 * L[t, v])
    assert analyze.hsic(a, b)[1, 2] == pytest.approx(total / 840)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    halves = [(x, x @ rotation * 3) for x in (a, torch.randn_like(a))]
    assert analyze.cka(halves).diag().tolist() == pytest.approx([1, 1])
    similar = torch.tensor([[0.2, 0.6, 0.0, 0.0, 0.0, 0.2, 0.1]])
    assert analyze.alignment(similar).tolist() == pytest.approx([2.2 / 1.1])
    pair = analyze.load_pairs(pair_dirs, twin=True)[0]
    x = pair.data.val_x[0]
    stream, logits = analyze.states(pair.moe, x), pair.moe(torch.from_numpy(x)[None])[0]
    assert len(stream) == 3 and torch.equal(stream[0], pair.moe.embed.weight[x])
    last = pair.moe.norm(stream[-1]) @ pair.moe.embed.weight.T
    torch.testing.assert_close(last, logits[0])
    pair.other = pair.engram
    found = analyze.depth(pair)
    assert abs(found["KL"]["2"]) < 1e-6 < abs(found["KL"]["0"])
    assert set(found["all tokens"]["alignment"].values()) == {0.0}


@pytest.mark.parametrize("name", ["knockout", "gates", "depth", "facts", "zipf"])
def test_every_analysis_runs(pair_dirs, tmp_path, capsys, name):
    """Another text from JSON than from the checkpoints."""
    argv = [name, "--results", str(tmp_path)]
    analyze.main([*argv, "--out_dir", *pair_dirs])
    printed, path = capsys.readouterr().out, tmp_path / f"{name}.json"
    found = json.loads(path.read_text())
    assert [header["config"]["seed"] for header in found["headers"]] == [0, 1]
    if analyze.ANALYSES[name][2]:
        assert path.with_suffix(".png").stat().st_size > 10_000
    analyze.main([*argv, "--plot"])
    assert capsys.readouterr().out == printed


def test_checkpoints_that_are_not_twins(pair_dirs, corpus, tmp_path, refused):
    """One seed taken for two; two models of different lengths laid side by side; data
    prepared again since; no gate."""
    out = shutil.copytree(pair_dirs[0], tmp_path / "out")
    refused("of one seed", run, analyze, "depth", "--out_dir", out, out)
    path = out / "moe" / "ckpt.pt"
    saved = load_checkpoint(path)[0]
    torch.save({**saved, "records": saved["records"][:2]}, path)
    refused("differ in tokens (1536, 1024)", run, analyze, "knockout", "--out_dir", out)
    path = out / "engram" / "ckpt.pt"
    saved = load_checkpoint(path)[0]
    torch.save({**saved, "run": {**saved["run"], "val data": "0"}}, path)
    refused("is not what", run, analyze, "gates", "--out_dir", out)
    run(train, *corpus, *TINY, "--out_dir", tmp_path, "--model", "engram", "--engram_gate", "off")
    refused("where there is a gate", run, analyze, "gates", "--out_dir", tmp_path)


# ---- made-up text --------------------------------------------------------------------

def learnt_by_heart(train, n):
    """Return guess(text): the token that most often followed its last n in train."""
    grams = Counter(ngrams(train.tolist(), n + 1)).most_common()
    # the most frequent one comes last, and stays
    likeliest = {gram[:-1]: gram[-1] for gram, _ in reversed(grams)}
    return lambda text: likeliest.get(tuple(text[-n:]))


def copied(n):
    """Return guess(text): the token that followed when its last n stood in it before."""
    def guess(text):
        for at in range(len(text) - 1, n - 1, -1):
            if text[at - n:at] == text[-n:]:
                return text[at]
    return guess


def test_what_made_up_text_tells(tmp_path):
    """An entry of the context book that a table could hold, an answer that is in the table or
    that one token of a name tells, a book that can be copied; kinds beside other tokens."""
    chance = 1 / 64 + 0.015
    for name, T in (("phonebooks50", 128), ("recall", 64)):
        tasks.make(name, tmp_path, n_tokens=320_000)
        data = prepare_data.Data(name, tmp_path, T, 8, 10, 0, eval_tokens=65536)
        assert data.val_x.shape == (65536 // T, T) and data.val_x.max() < data.meta["eot"] + 1
        guesses = {f"table of {n}": learnt_by_heart(data.train, n) for n in (1, 2, 3)}
        guesses |= {f"copy after {n}": copied(n) for n in (1, 2)}
        for (kind, where), (method, guess) in product(data.kinds.items(), guesses.items()):
            right = []
            for row, at in np.argwhere(where)[:1500]:
                text = data.val_x[row, :at + 1].tolist()
                right.append(guess(text) == data.val_y[row, at])
            score = np.mean(right)
            if (kind, method) == ("local", "table of 2"):
                assert score > 0.99
            elif kind in ("local", "context"):
                # a 3-gram that ends a local entry is often new
                assert score < chance or (kind, method) == ("local", "table of 3")
                assert score == 0 or "copy" not in method
            elif method == "copy after 2":
                assert score == 1
            else:
                assert score < (0.6 if method == "copy after 1" else chance), (kind, method)


# ---- what stands in the README -------------------------------------------------------

README = (analyze.COMMITTED.parent / "README.md").read_text()
FIRST_PAGE = (analyze.COMMITTED.parents[1] / "README.md").read_text()


def test_the_readme_is_the_result():
    """A row, finding or interval in the README that no command prints; results it does not
    tell."""
    # {name: lines} of the committed results, and lines of tables with any other reference
    printed, others = {}, []
    for path in sorted(analyze.COMMITTED.glob("*.json")):
        name, kind = path.stem, sweep.sweeps().get(path.stem)
        if kind is None:
            _, say, *_ = analyze.ANALYSES[name]
            printed[name] = say(json.loads(path.read_text()))
            continue
        runs = sweep.finished_runs(path, kind)
        printed[name] = sweep.lines_of(kind, runs)
        for reference in runs:
            others += sweep.table(kind._replace(reference=reference), runs)
    for name, lines in printed.items():
        command = "sweep" if name in sweep.sweeps() else "analyze"
        assert f"-m experiments.{command} {name} --plot`" in README.replace("\n", " "), name
        assert not [line for line in lines if line not in README], name
    everything = "\n".join([*sum(printed.values(), []), *others])
    rows = re.findall(r"^(\| .* \| [\d,]{6,} \| [\d,]{6,} \| \d+ \| .*)$", README, re.M)
    quotes = re.findall(r"^> (.*)$", README, re.M)
    intervals = re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", README + FIRST_PAGE)
    assert len(rows) > 25 and len(quotes) > 10 and len(intervals) > 50
    assert not [text for text in (*rows, *quotes, *intervals) if text not in everything]
    for picture in re.findall(r"\]\((results/.*?png)\)", README):
        assert (analyze.COMMITTED.parent / picture).exists(), picture


def test_allocation_is_fair():
    """Arms of the allocation with more parameters or more compute than the others."""
    path = analyze.COMMITTED / "allocation.json"
    runs = sweep.finished_runs(path, sweep.sweeps()["allocation"])
    for key in ("P_tot", "P_act"):
        values = [seeds[21]["header"]["accounting"][key] for seeds in runs.values()]
        assert max(values) <= 1.005 * min(values)


def test_the_readme_is_the_bench():
    """A table in the part on offloading that no run printed."""
    bench = json.loads((analyze.COMMITTED / "offload" / "offload.json").read_text())
    parts = [bench[name] for name in ("parts", "text", "latency", "training", "crossover")]
    lines = [line for part in [bench["prompts"][-1], *parts] for line in part["lines"]]
    assert len(lines) == 8 + (1 + 2 + 1 + 10) + 8 + (1 + 12) + 8 + 8
    assert not [line for line in lines if line not in README]
