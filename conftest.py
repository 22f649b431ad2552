"""pytest reads this first, before torch: the tests and the scripts that they start run on
one thread. For models this small two are no faster, and beside another busy process they
wait for each other."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
