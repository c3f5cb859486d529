"Runs in threads of one process: on one problem, beside each other and beside somebody who draws, they are what they are alone."
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
import torch
from torch import nn

from gradnb import Dataset, Descent, MiniBatch, Momentum, Problem, build_model, load_dataset, probe, train

DIGITS = load_dataset("digits-64")
LOOKS = ["sharpness:every=10", "grad_norm:every=2", "grad_variance:every=5"]


def network(kind):
    if kind == "attention":
        x = torch.randint(0, 9, (24, 7), generator=torch.Generator().manual_seed(0))
        text = Dataset(x, x, x, x, 9, words=9)
        return Problem(build_model("gpt:width=4,heads=1,layers=1,dropout=0", text), "ce", text)
    if kind == "plain": return Problem(build_model("fc-tanh:width=8", DIGITS), "ce", DIGITS)
    torch.manual_seed(0)
    return Problem(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(.5), nn.Linear(8, 10)), "ce", DIGITS)


def trained(problem, lr, looks=(), steps=15): return train(problem, Descent(Momentum(lr, .9), MiniBatch(8)), steps, looks, progress=False)


@pytest.mark.parametrize("kind, looks", [("plain", LOOKS), ("draws and counts", ["grad_norm:every=2", "sharpness:every=10"]), ("attention", ["sharpness:every=10,tol=.1"])])
def test_threads_on_one_problem_are_what_they_are_alone(kind, looks):
    problem = network(kind)
    alone = [trained(problem, lr, looks) for lr in (.01, .05)]
    with ThreadPoolExecutor(2) as pool: beside = [*pool.map(lambda lr: trained(problem, lr, looks), (.01, .05))]
    for (state, traces), (other, seen) in zip(alone, beside):
        assert torch.equal(state.theta, other.theta)
        for name in traces: assert traces[name].frame().drop(columns="seconds", errors="ignore").equals(seen[name].frame().drop(columns="seconds", errors="ignore")), name


def test_models_are_built_while_another_thread_draws():
    problem, wanted, over = network("draws and counts"), build_model("fc-tanh:width=8", DIGITS).state_dict(), Event()
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    def go_on():
        while not over.is_set(): trained(problem, .01, steps=5)
    other = Thread(target=go_on)
    other.start()
    built = [build_model("fc-tanh:width=8", DIGITS).state_dict() for _ in range(80)]
    over.set(), other.join()
    assert all(torch.equal(one[k], wanted[k]) for one in built for k in wanted)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == dtype


def test_a_probe_is_not_blamed_for_what_another_thread_draws():
    problem, asked, drawn = network("plain"), Event(), Event()
    @probe(1)
    def slow(view):
        if view.step == 3 and not asked.is_set(): asked.set(), drawn.wait(9)
        return view.theta.norm()
    @probe(7)
    def draws(view): return torch.rand(())
    torch.manual_seed(0)
    wanted = torch.rand(5)
    torch.manual_seed(0)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(trained, problem, .01, [slow])
        assert asked.wait(9)
        mine = torch.rand(5)
        drawn.set()
        assert len(run.result()[1]["slow"]) == 16 and torch.equal(mine, wanted)
        assert not torch.equal(torch.rand(5), mine)
        assert "probe 'draws' drew from torch's global generator at step 0" in str(pool.submit(trained, problem, .01, [draws]).exception())
