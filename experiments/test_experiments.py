"""
Tests of the experiments: what is computed against slow and obvious ways to do it, one run
of each analysis and of one sweep, and the README against what the commands print.

    python -m pytest experiments
"""
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare_data
import train
from common import write_whole
from engram import Engram, EngramConfig, canonical_ids
from experiments import analyze, sweep
from model import GPT, GPTConfig, load_checkpoint, token_losses
from runs import read_log
from twins import make_twins

TINY = ("--n_embd 16 --n_head 2 --block_size 32 --n_layer 2 --n_expert 4 --expert_hidden 8 "
        "--shared_hidden 8 --engram_heads 2 --engram_width 4 --tokens_per_step 128 --batch_size 2 "
        "--steps 12 --eval_every 4 --eval_tokens 256 --dtype float32 --rho 0.5 --device cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Prepare a data set "mine" of a few thousand tokens; return its folder."""
    folder = tmp_path_factory.mktemp("data")
    words = np.random.default_rng(0).zipf(1.4, 30000).clip(max=500)
    text = " ".join(f"w{w}" + ("." if w % 7 == 0 else "") for w in words)
    lines = [text[i:i + 80] for i in range(0, len(text), 80)]
    (folder / "mine.txt").write_text("\n".join(lines))
    prepare_data.prepare("mine", [folder / "mine.txt"], data_dir=folder, vocab_size=400)
    return folder


def train_tiny(corpus, out, *flags):
    train.main([*TINY.split(), "--dataset", "mine", "--data_dir", str(corpus), "--out_dir",
                str(out), *flags])


@pytest.fixture(scope="module")
def pair_dir(corpus, tmp_path_factory):
    """Train two tiny twins, and make the memory loud, so that it shows."""
    out = tmp_path_factory.mktemp("out")
    train_tiny(corpus, out)
    saved = load_checkpoint(out / "engram" / "ckpt.pt")[0]
    saved["model"]["blocks.1.engram.value.weight"] *= 30
    torch.save(saved, out / "engram" / "ckpt.pt")
    return out


@pytest.fixture(scope="module")
def second_dir(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("second")
    train_tiny(corpus, out, "--seed", "1")
    return out


def refused(capsys, *argv, main=sweep.main):
    """Return the one line with which a command refuses."""
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in argv])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


# ---- sweeps --------------------------------------------------------------------------

def test_interval():
    """A normal quantile in place of t, or n in place of n - 1; an interval from one
    value."""
    mean, half = analyze.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * 1.527525 / 3 ** 0.5)
    assert analyze.interval([5.0]) == (5, 0) and analyze.summary([5.0])["half"] is None
    _, half = analyze.interval(list(range(30)))
    assert half == pytest.approx(2.131 * 77.5 ** 0.5 / 30 ** 0.5)


def runs_ending(*losses):
    """Return {seed: a run that ends at this loss}, seeds from 1 on."""
    return {seed: {"records": [{"val_loss": 9, "tokens": 1}, {"val_loss": loss, "tokens": 3}]}
            for seed, loss in enumerate(losses, 1)}


def test_pairs_are_of_one_seed():
    """Means of different seeds subtracted: the spread between seeds is then in the
    interval."""
    runs = {"a": runs_ending(3.0, 5.0, 9.0), "b": runs_ending(2.0, 0.0, 8.5)}
    del runs["b"][2]
    runs["b"] = dict(reversed(runs["b"].items()))
    assert sweep.gaps(runs, "a", "b") == [1.0, 0.5] and sweep.gaps(runs, "a", "c") == []
    assert sweep.verdict([1.0, 0.5]) == "+0.750 ± 3.176 (n=2), undecided"
    assert sweep.verdict([0.75, 0.76, 0.74]) == "+0.750 ± 0.025 (n=3), higher"
    assert sweep.verdict([-1.0, -1.1]).endswith("lower")
    assert sweep.verdict([0.5]) == "+0.500, n=1"


def copy_run(*losses):
    records = [{"copy_loss": loss, "tokens": i * 1e6, "val_loss": loss / 2}
               for i, loss in enumerate(losses, 1)]
    return {1: {"records": records}}


def test_what_a_sweep_says():
    """A slope in the wrong logarithm, copying dated to the evaluation after it."""
    x, y = [4, 64, 1024], [3.0, 2.5, 1.0]
    by_hand = sum((math.log2(a) - 6) * (b - sum(y) / 3) for a, b in zip(x, y)) / 32
    assert sweep.slope(x, y) == pytest.approx(by_hand)
    runs = {"engram": copy_run(7, 6.5, 5.5), "moe": copy_run(7, 6.8, 6.4, 5.6)}
    said = sweep.say_jump(None, runs)
    assert "after 2.5 million tokens with Engram, 3.5 with its twin" in said
    assert "difference -1.000, n=1" in said and said.endswith("its twin: -0.050, n=1")
    said = sweep.say_jump(None, {"engram": copy_run(7, 6.9), "moe": copy_run(7, 6)})
    assert "after never" in said and "both in 0 of 1 pairs); difference no pair" in said
    runs = {"engram": runs_ending(3.0), "moe": runs_ending(6.0)}
    assert "in 1 of 1 pairs, after 67% of the tokens" in sweep.say_twins(None, runs)


def test_rho_reached():
    """The share of experts on the abscissa, by another count than make_twins' own."""
    for rho in (0, 0.3, 0.75):
        shapes, numbers = make_twins(GPTConfig(n_expert=20), rho)
        for name, reached in (("engram", numbers["rho"]), ("moe", 1)):
            with torch.device("meta"):
                model = GPT(shapes[name], np.arange(4096))
            header = {"shape": vars(model.cfg), "accounting": model.accounting(),
                      "parameters_by_kind": model.parameters_by_kind()}
            assert sweep.rho_reached(header) == pytest.approx(reached, abs=1e-9)


def test_train_accepts_every_arm():
    """An arm whose flags train.py refuses, or two arms that are the same experiment."""
    for name, kind in sweep.sweeps().items():
        shapes = []
        for arm in kind.arms.values():
            flags = f"{kind.base} {arm.flags} --device cpu"
            cfg, shape = train.read_flags(flags.split())
            shapes.append((str(cfg), str(shape), arm.again))
            if not shape.engram.rows:
                make_twins(shape, cfg.rho)
        assert len(set(shapes)) == len(shapes), name
        assert kind.reference in kind.arms and cfg.model == arm.flags.split()[1]


@pytest.fixture
def tiny_sweep(corpus, tmp_path, monkeypatch):
    """A sweep at toy size in an empty folder, without a new process per run."""
    monkeypatch.setattr(sweep, "SMALL", f"{TINY} --data_dir {corpus} --n_expert 12")
    monkeypatch.chdir(tmp_path)
    commands = []

    def run_here(command, **how):
        commands.append([str(part) for part in command[2:]])
        train.main(commands[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))
    return commands


def test_a_sweep_continues_where_it_was(tiny_sweep, monkeypatch, capsys):
    """A finished run trained again; one that was interrupted taken for a result, or begun
    again; the committed results overwritten."""
    path, cut = Path("runs/results/controls.json"), []
    argv = ["controls", "--dataset", "mine", "--steps", "8", "--seeds", "1"]
    argv += ["--arms", "moe", "off", "shuffled"]

    def stop_once(path, write):
        write_whole(path, write)
        if path.name == "ckpt.pt" and not cut:
            cut.append(path)
            raise KeyboardInterrupt

    # Ctrl-C after the first checkpoint of the first run
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_whole", stop_once)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            sweep.main(argv)
    assert cut and not json.loads(path.read_text())["runs"]
    sweep.main(argv)
    assert any("--resume" in command for command in tiny_sweep)
    runs = json.loads(path.read_text())["runs"]
    # one run serves all arms that evaluate it once more
    assert [run["arm"] for run in runs] == ["engram", "moe", "shuffled", "off"]
    assert len({run["records"][-1]["val_loss"] for run in runs}) == 4
    assert path.with_suffix(".png").stat().st_size > 5000
    # what is finished is not trained again, and an uninterrupted run ends at the same loss
    n = len(tiny_sweep)
    sweep.main(argv)
    assert len(tiny_sweep) == n and json.loads(path.read_text())["runs"] == runs
    shutil.rmtree("runs")
    sweep.main(argv)
    assert len(tiny_sweep) == n + 2
    again = json.loads(path.read_text())["runs"]
    assert [run["records"][-1]["val_loss"] for run in again] == [
        run["records"][-1]["val_loss"] for run in runs]
    # mistakes
    assert "came with the code" in refused(capsys, *argv, "--results", analyze.COMMITTED)
    assert "no arm nothing" in refused(capsys, *argv, "nothing")
    assert "invalid choice" in refused(capsys, "nothing")
    argv = ["controls", "--plot", "--results", "runs/results", "--reference"]
    assert "it has engram, moe" in refused(capsys, *argv, "x")
    sweep.main([*argv, "off"])
    rows = capsys.readouterr().out.splitlines()
    assert "| memory off at inference " in next(row for row in rows if "| reference |" in row)


def test_rows_shuffled_within_their_head(pair_dir):
    """Rows that leave their head, a memory off that is on, a checkpoint that is changed."""
    path = pair_dir / "engram" / "ckpt.pt"
    before = path.read_bytes()
    found = sweep.after(pair_dir)
    _, model, cfg = analyze.load_run(path)
    data = analyze.load_pair(pair_dir).data

    def loss(memory):
        nats = token_losses(model, data.val_x, data.val_y, 2, train.autocast(cfg), memory)
        return float(nats.mean())

    assert found["off"] == pytest.approx(loss(False), abs=1e-5)
    engram, generator = model.engrams()[0], torch.Generator().manual_seed(0)
    sizes = engram.primes.flatten().tolist()
    parts = [part[torch.randperm(len(part), generator=generator)]
             for part in engram.table.split(sizes)]
    trained = loss(True)
    engram.table = torch.cat(parts)
    assert found["shuffled"] == pytest.approx(loss(True), abs=1e-5)
    assert len({round(value, 4) for value in (*found.values(), trained)}) == 3
    assert path.read_bytes() == before


look_refused = partial(refused, main=analyze.main)


# ---- analyses ------------------------------------------------------------------------

def test_by_bucket():
    """A border on the wrong side, positions without an n-gram counted as never seen."""
    by, values = np.array([[-1, 0, 9, 10], [99, 100, 1000, 0]]), np.arange(8.0).reshape(2, 4)
    assert analyze.by_bucket(by, values) == {
        "never": 4.0, "1-9": 2.0, "10-99": 3.5, "100-999": 5.0, "1,000 or more": 6.0}


def test_addresses_are_ngrams():
    """An n-gram that looks ahead, or across the start of a sequence."""
    ids = np.random.default_rng(0).integers(0, 7, (3, 9))
    for order in (1, 2, 3):
        for row, numbers in zip(ids.tolist(), analyze.addresses(ids, order, 7, 6).tolist()):
            padded = [6] * (order - 1) + row
            for t, number in enumerate(numbers):
                digits = [number // 7 ** k % 7 for k in reversed(range(order))]
                assert digits == padded[t:t + order]


def test_rows_and_counts_of_what_was_trained(pair_dir):
    """Rows of another head or order, n-grams of tokens that this run never reached."""
    pair = analyze.load_pair(pair_dir, twin=False)
    engram, canonical, base = pair.engram.engrams()[0], pair.canonical, pair.base
    assert pair.sequences == 12 * 128 // 32

    def number(ids):
        return sum(x * base ** k for k, x in enumerate(reversed(ids)))

    for i, order in enumerate((2, 3)):
        grams, counts = analyze.trained(pair, order)
        slow = Counter()
        for start in pair.data.order[:pair.sequences] * 32:
            ids = canonical[pair.data.train[start:start + 32]].tolist()
            ids = [pair.pad] * (order - 1) + ids
            slow.update(tuple(ids[t:t + order]) for t in range(32))
        expected = {number(gram): n for gram, n in slow.items()}
        assert dict(zip(grams.tolist(), counts.tolist())) == expected
        rows = analyze.rows_of(engram, grams, order, base)
        for gram in list(slow)[:40]:
            theirs = engram.hash(torch.tensor([[0, *gram]]))[0, -1, 2 * i:2 * i + 2]
            ours = rows[np.searchsorted(grams, number(gram))]
            assert ours.tolist() == (theirs - engram.offsets[i]).tolist()
        found = analyze.look_up(grams, counts, np.array([grams[0], grams[-1] + 1, grams[3]]))
        assert found.tolist() == [counts[0], 0, counts[3]]


def test_who_shares_rows():
    """A share of all rows for one of those used; a read counted once for an n-gram."""
    rng = np.random.default_rng(0)
    rows, counts = rng.integers(0, 40, (30, 3)), rng.integers(1, 9, 30)
    held = [Counter(column) for column in rows.T.tolist()]
    several = [np.mean(np.array(list(head.values())) > 1) for head in held]
    company = np.zeros((30, 3), bool)
    for i, row in enumerate(rows.tolist()):
        for k in range(3):
            company[i, k] = held[k][row[k]] > 1
    reads = (company.sum(1) * counts).sum() / counts.sum() / 3
    assert analyze.shared(rows, counts) == pytest.approx({
        "rows": sum(several) / 3, "reads": reads, "all heads": company.all(1).mean(),
        "same in all": 0})
    rows[4] = rows[9] = rows[2]
    assert analyze.shared(rows, counts)["same in all"] == pytest.approx(3 / 30)


def test_what_an_ngram_explains():
    """A share that grows with the number of groups, means of the wrong group."""
    rng = np.random.default_rng(0)
    groups, noise = rng.integers(0, 50, 400), rng.normal(size=400)
    a = noise + groups
    mean = {g: a[groups == g].mean() for g in groups}
    centred = np.array([v - mean[g] for g, v in zip(groups, a)])
    assert analyze.centred(groups, a) == pytest.approx(centred)
    within, total = (centred ** 2).sum() / (400 - 50), ((a - a.mean()) ** 2).sum() / 399
    assert analyze.explained(groups, a) == pytest.approx(1 - within / total)
    assert analyze.explained(groups, a) > 0.99
    assert abs(analyze.explained(groups, noise)) < 0.15
    # 200 groups of two
    assert abs(analyze.explained(np.arange(400) // 2, noise)) < 0.3


def test_lens_is_the_divergence_by_hand(pair_dir):
    """KL the wrong way round, a block read before its memory, a final norm left out."""
    pair = analyze.load_pair(pair_dir)
    model, x, slow = pair.engram, torch.from_numpy(pair.data.val_x), []
    with torch.no_grad():
        final, h = model(x)[0].log_softmax(-1), model.embed(x)
        reads = iter(model.read(x))
        for block in model.blocks:
            read = next(reads) if block.engram else None
            h = block(h, (model.cos[:32], model.sin[:32]), read)
            layer = (model.norm(h) @ model.embed.weight.T).log_softmax(-1)
            slow.append(float((final.exp() * (final - layer)).sum(-1).mean()))
    assert analyze.lens(pair, model) == pytest.approx(slow, abs=1e-5) and slow[0] > 1e-3


def test_hit_rate_of_a_cache(corpus, tmp_path, capsys):
    """Rows judged on the text they were chosen on, or counted twice within a prompt."""
    analyze.main(["zipf", "--dataset", "mine", "--data_dir", str(corpus), "--results",
                  str(tmp_path)])
    found = json.loads((tmp_path / "zipf.json").read_text())
    assert "different ones of" in capsys.readouterr().out
    meta, tokens, _ = prepare_data.load("mine", corpus)
    canonical = canonical_ids(prepare_data.token_bytes(meta["tokenizer"]))
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


@pytest.mark.parametrize("name", ["knockout", "gates", "collisions", "logitlens"])
def test_every_analysis_runs(pair_dir, second_dir, tmp_path, capsys, name):
    """From two pairs of checkpoints to JSON and picture, and the same from JSON; one seed
    taken for two; results that are not beside the run."""
    outs = [str(pair_dir), str(second_dir)][:1 if name == "collisions" else 2]
    argv = [name, "--results", str(tmp_path)]
    analyze.main([*argv, "--out_dir", *outs])
    printed, path = capsys.readouterr().out, tmp_path / f"{name}.json"
    found = json.loads(path.read_text())
    assert found["seeds"] == list(range(len(outs)))
    assert path.with_suffix(".png").stat().st_size > 10_000
    analyze.main([*argv, "--plot"])
    assert capsys.readouterr().out == printed
    if name == "knockout":
        moe, engram = (read_log(second_dir / model / "log.jsonl")[1][-1]["val_loss"]
                       for model in ("moe", "engram"))
        assert found["moe - engram"]["values"][1] == pytest.approx(moe - engram, rel=1e-3)
        # the first token of each of the 8 sequences ends no 3-gram
        tokens = found["3-grams"]["tokens"].values()
        assert sum(number["values"][0] for number in tokens) == 256 - 8
    argv.append("--out_dir")
    assert "of one seed" in look_refused(capsys, *argv, pair_dir, pair_dir)
    assert "no checkpoint" in look_refused(capsys, *argv, tmp_path / "no")
    analyze.main([name, "--out_dir", outs[0]])
    assert (pair_dir / f"{name}.json").exists()


def test_report_of_a_run(pair_dir, capsys):
    """Buckets that overlap or miss tokens, a gain of another sign."""
    pair = analyze.load_pair(pair_dir)
    on, moe = analyze.losses(pair, pair.engram), analyze.losses(pair, pair.moe)
    off = analyze.losses(pair, pair.engram, memory=False)
    analyze.main(["report", "--out_dir", str(pair_dir)])
    lines = capsys.readouterr().out.splitlines()
    assert f"{on.mean():.4f} -> {off.mean():.4f} nats" in lines[0]
    rows = [line.split()[-4:] for line in lines[4:] if "%" in line]
    share, loss, gain, twin = np.array(rows).T
    share = np.array([float(s[:-1]) for s in share]) / 100
    assert len(rows) >= 3 and share.sum() == pytest.approx(1, abs=0.002)
    for column, exact in ((loss, on), (gain, off - on), (twin, moe - on)):
        assert (share * column.astype(float)).sum() == pytest.approx(exact.mean(), abs=0.02)
    assert any("nats saved on each token" in line for line in lines)


def test_checkpoints_that_are_not_twins(pair_dir, corpus, tmp_path, capsys):
    """Two models of different lengths laid side by side; data prepared again since; no
    gate."""
    shutil.copytree(pair_dir, tmp_path / "out")
    out = tmp_path / "out"
    path, argv = out / "moe" / "ckpt.pt", ["knockout", "--out_dir", out]
    saved = load_checkpoint(path)[0]
    torch.save({**saved, "records": saved["records"][:2]}, path)
    assert "differ in tokens (1536, 1024)" in look_refused(capsys, *argv)
    path = out / "engram" / "ckpt.pt"
    saved = load_checkpoint(path)[0]
    torch.save({**saved, "run": {**saved["run"], "val data": "0"}}, path)
    assert "is not what" in look_refused(capsys, "gates", *argv[1:])
    for flag, value, part in (("gate", "off", "no gate"), ("orders", "1", "order above 1")):
        out = tmp_path / flag
        train_tiny(corpus, out, "--model", "engram", f"--engram_{flag}", value)
        assert part in look_refused(capsys, "gates", "--out_dir", out)


# ---- what stands in the README -------------------------------------------------------

def printed_by_all():
    """Return {name: lines} that the commands print of the committed results, and the
    intervals that tables with any other reference hold."""
    printed, others = {}, []
    for path in sorted(analyze.COMMITTED.glob("*.json")):
        name, kind = path.stem, sweep.sweeps().get(path.stem)
        if kind is None:
            printed[name] = analyze.ANALYSES[name].say(json.loads(path.read_text()))
            continue
        runs = sweep.finished_runs(path, kind)
        printed[name] = sweep.table(kind, runs)
        if kind.say:
            printed[name].append(kind.say(kind, runs))
        for reference in runs:
            others += sweep.table(replace(kind, reference=reference), runs)
    return printed, others


def test_the_readme_is_the_result():
    """A row, finding or interval in the README that no command prints; results it does not
    tell."""
    readme = (analyze.COMMITTED.parent / "README.md").read_text()
    printed, others = printed_by_all()
    for name, lines in printed.items():
        command = "sweep" if name in sweep.sweeps() else "analyze"
        assert f"-m experiments.{command} {name} --plot`" in readme.replace("\n", " "), name
        for line in lines:
            assert line in readme, line
    everything = "\n".join([*sum(printed.values(), []), *others])
    rows = re.findall(r"^(\| .* \| [\d,]{6,} \| [\d,]{6,} \| \d+ \| .*)$", readme, re.M)
    quotes = re.findall(r"^> (.*)$", readme, re.M)
    intervals = re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", readme)
    assert len(rows) > 40 and len(quotes) > 6 and len(intervals) >= 60
    for text in (*rows, *quotes, *intervals):
        assert text in everything, text
    for picture in re.findall(r"\]\((results/.*?png)\)", readme):
        assert (analyze.COMMITTED.parent / picture).exists(), picture


def test_allocation_is_fair():
    """Arms of the allocation with more parameters or more compute than the others."""
    path = analyze.COMMITTED / "allocation.json"
    runs = sweep.finished_runs(path, sweep.sweeps()["allocation"])
    for key in ("P_tot", "P_act"):
        values = [sweep.header_of(seeds)["accounting"][key] for seeds in runs.values()]
        assert max(values) <= 1.005 * min(values)


def test_the_readme_is_the_bench():
    """A table in the part on offloading that no run printed."""
    readme = (analyze.COMMITTED.parent / "README.md").read_text()
    bench = json.loads((analyze.COMMITTED / "offload" / "offload.json").read_text())
    tables = [bench["prompts"][-1], bench["others"][0], bench["others"][-1]]
    lines = [line for table in [*tables, bench["crossover"]] for line in table["lines"]]
    assert len(lines) == 9 + 9 + 8 + 8
    assert not [line for line in lines if line not in readme]
