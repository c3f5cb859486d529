"One thread for each process of the tests: their networks are small, and threads that wait for each other cost more than they give."
import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

def pytest_make_parametrize_id(config, val, argname):
    "Names without addresses: processes that share the tests must find the same."
    text = repr(val)
    return re.sub(r" at 0x[0-9a-f]+", "", text) if " at 0x" in text else None
