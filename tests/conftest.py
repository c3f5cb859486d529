"""One thread for each process of the tests: their networks are small, and threads that wait for each other cost more
than they give. And the same global random numbers each time."""
import os
import random
import re
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:      # as a script's background jobs have it; tests that stop others need it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch

torch.manual_seed(0)                         # what a test file draws when it is read: torch starts each process elsewhere


@pytest.fixture(autouse=True)
def same_numbers():
    "What a test draws from the global generators, so that what fails fails again."
    for seed in random.seed, np.random.seed, torch.manual_seed:
        seed(0)


def pytest_make_parametrize_id(config, val, argname):
    "Names without addresses: processes that share the tests must find the same."
    text = repr(val)
    return re.sub(r" at 0x[0-9a-f]+", "", text) if " at 0x" in text else None
