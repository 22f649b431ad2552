"""
pytest reads this first, before torch: the tests and the scripts that they start run on one
thread. For models this small two are no faster, and beside another busy process they wait
for each other. And what tests in both folders need.
"""
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def same_start():
    """One seed, whatever ran before."""
    import torch
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Prepare a data set "mine" of a few thousand tokens; return the flags that name it."""
    import numpy as np

    import prepare_data
    folder = tmp_path_factory.mktemp("data")
    numbers = np.random.default_rng(0).zipf(1.4, 30000).clip(max=500)
    words = [f"w{n}.\n" if n % 7 == 0 else f"w{n} " for n in numbers]
    (folder / "mine.txt").write_text("".join(words))
    prepare_data.main([str(folder / "mine.txt"), f"--data_dir={folder}", "--vocab_size=400"])
    return ["--dataset", "mine", "--data_dir", str(folder)]


@pytest.fixture
def refused(capsys):
    """refused(word, call, *args): it ends with code 2 and one line that holds word."""
    def check(word, call, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(*args)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and word in lines[0], lines
    return check
