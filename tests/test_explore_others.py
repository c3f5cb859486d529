"""Live runs, and the explorers of tails, clusters and landscapes: bitwise numbers, bad input, closing at any time."""
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gradnb.data import load_dataset
from gradnb.move.estimators.clustering import GradientClustering
from gradnb.move.estimators.minibatch import FullBatch, MiniBatch
from gradnb.move.estimators.sam import SAM
from gradnb.move.estimators.svrg import SVRG
from gradnb.show.explorers.clusters import ClusterExplorer, clusters_over, snapshots
from gradnb.show.explorers.landscape import LandscapeExplorer
from gradnb.runs import Run
from gradnb.runs.live import Live
from gradnb.runs.trajectory import changed_stepper
from gradnb.show.explorers.lines import trace_lines
from gradnb.show.explorers.live import LiveExplorer
from gradnb.show.explorers.tail import TailExplorer
from gradnb.move.flows.central import CentralFlow
from gradnb.move.flows.gradient import GradientFlow
from gradnb.models import build_model
from gradnb.measure.probes.view import every, probe
from gradnb.problem import Problem
from gradnb.move.rules.adam import Adam
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.move.rules.fromtorch import FromTorch
from gradnb.move.rules.gd import GD
from gradnb.move.rules.momentum import Momentum
from gradnb.move.rules.schedule import Piecewise, Scheduled
from gradnb.move.steppers import Descent
from gradnb.ground.streams import Stream
from gradnb.ground.traces import Trace
from gradnb.runs.training import train

STEPPERS = {
    "gd": Descent(GD(.1)),
    "adam, batches": Descent(Adam(1e-3), MiniBatch(16)),
    "svrg": Descent(Momentum(.02), SVRG(8, 5)),
    "clusters": Descent(GD(.1), GradientClustering(4, every=6)),
    "sam": Descent(GD(.1), SAM(.05, MiniBatch(16))),
    "torch": Descent(FromTorch(torch.optim.AdamW, lr=1e-3), MiniBatch(16)),
    "scheduled": Descent(Scheduled(GD(.1), Piecewise(((7, .5),))), MiniBatch(16)),
    "flow": GradientFlow(.1),
    "central": CentralFlow(GD(.1)),
}


@pytest.fixture(scope="module")
def problem():
    digits = load_dataset("digits-50")
    return Problem(build_model("fc-tanh:width=6", digits), "mse", digits)


@probe(every(3))
def drawn(view):
    "A number of the probe's own stream."
    return torch.randn((), generator=view.stream.generator()) + view.full_grad.norm()


@pytest.mark.parametrize("name", STEPPERS)
def test_live_is_train(problem, name):
    "Laws 1 to 3: in a thread, in several pieces, with a fork beside it, every number is that of train."
    live = Live(problem, STEPPERS[name], [drawn], seed=3, most=4)
    live.advance(4)
    fork = live.fork(2)
    live.advance(8)
    state, traces = train(problem, STEPPERS[name], 12, [drawn], seed=3, progress=False)
    for t in live.trajectories.values():
        assert t.step == 12 and torch.equal(t.state.theta, state.theta)
    for trace in ("loss", "drawn"):
        assert (live.first.traces[trace].values == traces[trace].values).all()
    assert live.of(fork).traces["distance"].values[-1] == 0
    start, _ = train(problem, STEPPERS[name], 5, seed=3, progress=False)
    assert torch.equal(live.first.at(5)[0].theta, start.theta)          # replayed


@pytest.mark.parametrize("old", STEPPERS)
@pytest.mark.parametrize("new", STEPPERS)
def test_every_stepper_follows_every_other(problem, old, new):
    "What goes on is θ and the step; a state of the same make goes on too."
    live = Live(problem, STEPPERS[old])
    live.advance(3)
    before = live.first.state
    said = live.change(stepper=STEPPERS[new])
    assert live.first.state.step == 3 and torch.equal(live.first.state.theta, before.theta)
    assert (old == new) <= (said == "")
    live.advance(2)
    assert live.first.step == 5 and live.first.state.theta.isfinite().all()
    if old == new: assert torch.equal(live.first.state.theta, train(problem, STEPPERS[new], 5, progress=False)[0].theta)


def test_changed_rate_is_train_from_there(problem):
    old = Descent(Adam(1e-2), MiniBatch(16))
    live = Live(problem, old, seed=1)
    live.advance(6)
    live.change(lr=1e-3, size=8)
    live.advance(6)
    state, _ = train(problem, old, 6, seed=1, progress=False)
    state, _ = train(problem, changed_stepper(old, lr=1e-3, size=8), 12, state=state, seed=1, progress=False)
    assert torch.equal(live.first.state.theta, state.theta)


def test_pausing_at_any_time_loses_nothing(problem):
    "Run, pause, change and fork from the outside while the thread works; then the same numbers as in one piece."
    stepper = Descent(Momentum(.02), MiniBatch(16))
    live = Live(problem, stepper, [drawn])
    for i in range(10):
        live.run()
        time.sleep(.01 * (i % 3))
        live.change(lr=.02)                                           # the same again, in the middle of it
        if i % 3 == 0: live.fork(name=f"fork {i}")
        live.pause()
        assert not live.running
    live.advance(5)
    last = live.first.step
    state, traces = train(problem, stepper, last, [drawn], progress=False)
    for t in live.trajectories.values():
        assert t.step == last and torch.equal(t.state.theta, state.theta)
    assert (live.first.traces["loss"].values == traces["loss"].values).all()
    assert (live.first.traces["drawn"].values == traces["drawn"].values).all()


def test_a_change_at_the_last_step_takes_no_other(problem):
    "The thread has reached its goal and not yet ended."
    class Slow(Live):
        def moved(self, last):
            if not last and self.first.step == 5:
                there.set()
                self._stop.wait()
    for _ in range(5):
        there, live = threading.Event(), Slow(problem, Descent(GD(.01)))
        live.run(5)
        there.wait()
        live.change(lr=.02)
        live._thread.join()
        assert live.first.step == 5


def test_a_failed_trajectory_goes_on_once_it_is_changed(problem):
    class Refusing(GD):
        def step(self, state, blocks, grads): raise ValueError("no step")
    live = Live(problem, Descent(GD(.01)))
    live.advance(2)
    live.first.watching.stepper = Descent(Refusing(.01))
    with pytest.raises(ValueError, match="no step"): live.advance(1)
    assert live.first.outcome.message == "run stopped at step 2: no step"
    live.change(stepper=Descent(GD(.01)))
    assert live.first.outcome is None
    live.advance(1)
    assert live.first.step == 3


KILLED = """
import sys, time
from test_explore_others import LiveExplorer, Descent, STEPPERS, drawn, load_dataset, Problem, build_model
digits = load_dataset("digits-50")
live = LiveExplorer(Problem(build_model("fc-tanh:width=6", digits), "mse", digits), STEPPERS["adam, batches"], [drawn], folder=sys.argv[1])
live.advance(12)
live.fork(5, name="other rate", lr=.01)
live.run()
time.sleep(10**6)
"""


def test_a_live_explorer_that_is_killed_loses_nothing(problem, tmp_path):
    "The oracle is `train`, in one go."
    folder, before = tmp_path / "kept", STEPPERS["adam, batches"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])})
    deadline, runs = time.monotonic() + 120, [Run(folder / "run"), Run(folder / "other%20rate")]
    seen = lambda: [len(r.trace("loss")) if (r.path / "traces" / "loss.trace").exists() else 0 for r in runs]
    while min(seen()) < 40 and time.monotonic() < deadline: time.sleep(.05)
    rows = seen()
    process.kill()
    process.wait()
    assert min(rows) >= 40 and all(len(r.trace("loss")) >= n for r, n in zip(runs, rows))
    for run, stepper, first in ((runs[0], before, 0), (runs[1], changed_stepper(before, lr=.01), 5)):
        start = train(problem, before, first, progress=False)[0] if first else None
        steps = run.trace("loss").steps
        _, traces = train(problem, stepper, int(steps[-1]), [drawn], state=start, progress=False)
        assert run.status == "unfinished" and steps.tolist() == [*range(first, first + len(steps))]
        for name in ("loss", "drawn"): np.testing.assert_array_equal(run.trace(name).values, traces[name].values[:len(run.trace(name))])
        assert run.theta.shape == (problem.p,)
    assert len(runs[1].trace("distance"))
    with pytest.raises(ValueError, match="keeps a trajectory already, of [0-9]+ steps.*Name another folder"): Live(problem, before, folder=folder)


def test_kept_states_are_bounded(problem):
    live = Live(problem, Descent(GD(.01)), most=8)
    live.advance(200)
    assert 4 <= len(live.first.kept) <= 8 and 0 in live.first.kept


def test_an_interrupt_pauses(problem, monkeypatch):
    live = Live(problem, Descent(GD(.01)))
    join, calls = threading.Thread.join, []
    def interrupted(self, timeout=None):
        calls.append(timeout)
        if len(calls) == 1: raise KeyboardInterrupt
        return join(self, timeout)
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.warns(RuntimeWarning, match="interrupted at step"): live.advance(10**6)
    assert not live.running
    reached = live.first.step
    live.advance(1)
    assert live.first.step == max(reached, 0) + 1


def test_global_generator_untouched(problem):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    live = Live(problem, Descent(GD(.1), MiniBatch(16)), [drawn])
    live.advance(5)
    assert torch.equal(before, torch.get_rng_state())


# --- widgets ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def noise(): return torch.randn(200, 20, generator=Stream(0).generator(), dtype=torch.float64)


@pytest.fixture
def explorers(problem, noise):
    thetas = snapshots(problem, Descent(GD(.1)), (0, 5, 10))
    live = LiveExplorer(problem, Descent(GD(.1), MiniBatch(16)), [drawn])
    live.advance(3)
    found = [live, TailExplorer(noise, surrogates=3, columns=2), ClusterExplorer(problem, clusters_over(problem, thetas, k=3)),
             LandscapeExplorer(problem, thetas, points=5)]
    yield found
    for e in found: e.close()


def test_every_explorer_is_a_figure_a_page_and_a_picture(explorers, tmp_path):
    for e in explorers:
        assert len(e.figure().axes) >= 2
        for kind in ("png", "svg", "html"): assert e.save(tmp_path / f"{type(e).__name__}.{kind}").stat().st_size > 1000
        assert e.still().startswith(b"\x89PNG") and e.widget
        controls = [*e._controls.values(), *getattr(e, "_parts", {}).values()]
        assert controls and all(c.description for c in controls)      # a label for each
        before = e._canvas.scene
        with pytest.raises(ValueError, match="no field"): e.set(stop=3)
        assert e._canvas.scene == before


def test_closing_while_it_updates(problem, noise):
    "A widget that goes away in the middle of its thread's work, and comes back."
    live = LiveExplorer(problem, Descent(GD(.1)))
    live.widget, live.run()
    live.close()
    assert not live.running
    live.widget, live.close(), live.refresh()
    tail = TailExplorer(noise, surrogates=3, columns=2)
    tail.widget, tail.close(), tail.widget
    for _ in range(600):
        if b"computing" not in tail._canvas.scene: break
        time.sleep(.1)
    assert b"computing" not in tail._canvas.scene and b"verdict" in tail._canvas.scene
    tail.close()


def test_live_says_what_is_wrong(problem):
    e = LiveExplorer(problem, Descent(GD(.1)))
    e.widget
    assert b"nothing has been measured yet" in e._canvas.scene
    for part, value, said in (("rule", "gd:lr=-1", "0 ≤ lr"), ("rule", "gd:rate=1", "no argument"), ("estimator", "minibatch", "needs size"),
                              ("estimator", "minibatch:size=51", "MiniBatch's batch of 51 without")):
        e._parts[part].value = value
        assert said in e._canvas.message and e.first.stepper == Descent(GD(.1), FullBatch())
        assert e._parts[part].value in ("gd:lr=0.1", "fullbatch")
    with pytest.raises(ValueError, match="no learning rate"): e.flow_of(Descent(AutomaticGradientDescent()))
    e.close()


def test_tail_explorer_refuses_in_words():
    for bad in (torch.ones(10, 3), torch.full((50, 2), np.nan), torch.zeros(60, 2)):
        panels = TailExplorer(bad.double()).panels(TailExplorer.Look())
        assert all(p.note for p in panels[:2])
    with pytest.raises(ValueError, match="takes draws"): TailExplorer(torch.arange(10))


@pytest.mark.slow
def test_tail_controls_answer_at_once(noise):
    "What was computed once is not computed again."
    e = TailExplorer(noise, surrogates=3, columns=2)
    e.figure(method="hill", m=4)
    kept = dict(e._cache)
    e.figure(method="hill", m=4)
    assert e._cache == kept


def test_divergence_names_its_trajectory(problem):
    "Of two trajectories one leaves the numbers; what is said names that one, and the other goes on."
    explorer = LiveExplorer(problem, Descent(GD(.1)), seed=3)
    explorer.widget
    (calm,), wild = explorer.trajectories, explorer.fork(lr=1e30)
    explorer.advance(20)
    said = explorer._canvas.message
    explorer.close()
    assert wild in said and calm not in said.replace(wild, "") and explorer.trajectories[calm].step == 20


def test_smooth_keeps_bands():
    "Under a mean the raw values stay, with their bands: the ends that were measured, to the bit."
    steps, value = np.arange(50), np.random.default_rng(0).normal(size=50)
    trace = Trace("noise", steps, {"value": value, "low": value - 2, "high": value + 3})
    raw, mean = trace_lines(trace, "value", "a", half=5.)
    assert raw.faint and (raw.low == value - 2).all() and (raw.high == value + 3).all()
    weights = .5 ** ((steps[-1] - steps) / 5)
    assert mean.label == "mean" and np.isclose(mean.y[-1], np.average(value, weights=weights), rtol=1e-12)
