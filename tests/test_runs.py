"A run survives kills and interrupts, is read while it goes on, and a stranger's run is only data."
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from gradnb import GD, Adam, Cosine, Descent, FromTorch, MiniBatch, Momentum, Piecewise, Quadratic, Rule, Run, Scheduled, Spec, Store, every, kind, probe, train
from gradnb.cli.command import main
from gradnb.ground.files import seal
from gradnb.ground.roles import KINDS, RULES
from gradnb.move.rules.inplace import InPlace
from gradnb.problem.designs import NotFinite
from gradnb.runs import Recorder
from gradnb.runs.tracefiles import compact, read_arrow, read_trace
from gradnb.ground.traces import as_row

SPEC = Spec("digits-200", "fc-tanh:width=10", "mse", Momentum(0.02), 400, MiniBatch(20), ("sharpness:every=80", "train:every=50"))
CHILD = """
import sys, signal
from gradnb import Spec, Store
signal.signal(signal.SIGINT, signal.default_int_handler)      # a background job may have inherited "ignore"
Store(sys.argv[1]).run(Spec.from_json(sys.argv[2]), progress=False, interval=float(sys.argv[3]))
"""


def child(root, spec=SPEC, interval=0.05):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(root), spec.to_json(), str(interval)], stderr=subprocess.PIPE, text=True)


class Fork:
    "The same in a fork, which need not import what is there."
    def __init__(self, root, interval):
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid: return
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            Store(root).run(SPEC, progress=False, interval=interval)
        finally: os._exit(0)

    stderr = None
    def poll(self): return None if os.waitpid(self.pid, os.WNOHANG) == (0, 0) else "the fork has ended"
    def send_signal(self, how): os.kill(self.pid, how)
    def wait(self, seconds=None): return os.waitpid(self.pid, 0)


def wait_for_rows(run, rows, process):
    "Until the run has so many losses on disk; the child must live to write them."
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if run.path.exists() and len(run.traces.get("loss", "")) >= rows: return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("the child wrote nothing in two minutes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return Store(tmp_path_factory.mktemp("whole")).run(SPEC, progress=False)


@pytest.mark.parametrize("start, how, interval, kills", [(child, signal.SIGKILL, 0.05, (40, 150)), (Fork, signal.SIGINT, 1e9, (40, 150)),
    *(pytest.param(child, *case, (40, 150), marks=pytest.mark.slow) for case in [(signal.SIGKILL, 1e9), (signal.SIGTERM, 0.2), (signal.SIGINT, 1e9)])])
def test_a_killed_run_resumes_bitwise(tmp_path, whole, start, how, interval, kills):
    run = Run(tmp_path / SPEC.hash)
    for rows in kills:
        process = start(tmp_path, interval=interval)
        wait_for_rows(run, rows, process)
        process.send_signal(signal.SIGSTOP)                        # so that it does not end while we look
        assert run.status == "running"
        with pytest.raises(RuntimeError, match="is being written by process"): Store(tmp_path).run(SPEC)
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        process.wait(60)
        assert run.status == ("unfinished" if how == signal.SIGKILL else "interrupted")
        assert len(run.traces["loss"]) >= rows
    Store(tmp_path).run(SPEC, progress=False)
    assert run.status == "finished"
    assert torch.equal(run.theta, whole.theta)
    assert run.frame().equals(whole.frame())
    assert run.frame()["step"].tolist() == list(range(401))


def test_a_torn_row_is_left_out_and_written_again(tmp_path, whole):
    spec_dir = tmp_path / SPEC.hash
    process = Fork(tmp_path, .05)
    wait_for_rows(Run(spec_dir), 60, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(spec_dir / "traces" / "loss.trace", "ab") as f: f.write(b"\x00" * 7)
    read_trace(spec_dir / "traces" / "loss.trace")
    assert Store(tmp_path).run(SPEC, progress=False).frame().equals(whole.frame())


def test_divergence_is_an_outcome(tmp_path):
    spec = Spec("digits-200", "fc-tanh:width=10", "mse", GD(1e4), 400)
    with pytest.warns(RuntimeWarning, match=r"the loss is .* at step \d+ of .*GD\(lr=10000.0\)"):
        run = Store(tmp_path).run(spec, progress=False)
    assert run.status == "diverged" and run.done
    loss = run.traces["loss"]
    assert not np.isfinite(loss.values[-1]) and np.isfinite(loss.values[:-1]).all()


class Broken(InPlace):
    "Gradient descent that meets a gradient it cannot take at step 3, half way through its blocks."
    apart = True
    def init(self, blocks, roles): return ()
    def update(self, state, blocks, grads, total, ops):
        for n, b in blocks.items(): b.add_(grads[n], alpha=-.1)
        if (at := Broken.steps) == 3: raise NotFinite("the gradient is not finite")
        Broken.steps = at + 1
        return state


def test_a_run_that_ends_half_written_before_its_first_checkpoint_is_whole(tmp_path, monkeypatch):
    "Nothing is missing of it, so that nobody trains it again to mend it."
    calls = []
    def update(self, state, blocks, grads, total, ops):
        for n, b in blocks.items(): b.add_(grads[n])
        calls.append(1)
        if len(calls) == 3: raise NotFinite("the gradient is not finite")
        return state
    monkeypatch.setattr(Adam, "update", update)
    with pytest.warns(RuntimeWarning, match="at step 2"): run = Store(tmp_path).run(Spec("digits-60", "fc-tanh:width=4", "ce", Adam(.01), 4), progress=False)
    assert (run.status, run.manifest["stored"], run.damage()) == ("diverged", None, {}) and "no weights are stored" in run.manifest["message"]
    assert Store(tmp_path).run(run.spec, verify=True, progress=False).manifest["began"] == run.manifest["began"]


@pytest.mark.parametrize("last", [None, 1, 3])
def test_an_end_in_the_middle_of_a_step_says_whose_weights_are_stored(tmp_path, last):
    record, start, Broken.steps = Recorder(tmp_path / "run", 1e9 if last is None else 0.), torch.tensor([1., 2.]), 0
    @probe(every(1))
    def slower(view):
        if view.step == last: record.interval = 1e9          # this step is the last that is stored
        return 0.
    with pytest.warns(RuntimeWarning, match="at step 3"): state, traces = train(Quadratic(torch.eye(2)), Descent(Broken()), 10, [slower], start, record=record)
    record.close()
    said = traces.outcome
    assert (state, said.kind, said.step) == (None, "diverged", 3)
    if last is None: assert said.message.endswith("no weights are stored)")
    else: assert said.message.endswith(f"are those of step {last})") and torch.allclose(Run(record.path).theta, start * .9**last)


def test_goals_end_a_run(tmp_path):
    spec = Spec("digits-200", "fc-tanh:width=10", "ce", Adam(0.05), 400, probes=["train:every=300", "grad_norm:every=7"], acc_goal=0.9)
    run = Store(tmp_path).run(spec, progress=False)
    assert run.status == "goal" and "accuracy" in run.manifest["message"]
    stop = run.traces["loss"].steps[-1]
    assert run.traces["train"].steps.tolist() == [0, stop] and run.traces["train"].columns["accuracy"][-1] >= 0.9
    assert run.traces["grad_norm"].steps.tolist() == [*range(0, stop, 7), stop]


@pytest.mark.parametrize("name", ["ce", "mse", "unit_mse", "linear_hinge"])
def test_a_goal_is_given_up_when_some_examples_rule_it_out_and_not_before(name):
    from gradnb import LOSSES, Problem, build_model, load_dataset
    data, seen = load_dataset("digits-200"), []
    loss = LOSSES[name]

    def cost(outputs, targets):
        seen.append(len(targets))
        return loss(outputs, targets)

    cost.least = loss.least
    problem = Problem(build_model("fc-tanh:width=10", data), cost, data, chunk_size=20)
    theta = train(problem, Descent(Adam(.02)), 20, progress=False)[0].theta
    with torch.no_grad():
        out = problem.outputs(theta, data.x)
        each, right = loss(out, data.y), (out.argmax(1) == data.y).double()
    for goals in [(share * float(each.mean()), None) for share in (.1, .99, 1.01)] + [(None, float(right.mean()) + d) for d in (-.01, .01, .3)] + [(.1 * float(each.mean()), float(right.mean()) + d) for d in (-.01, .3)]:
        below, reached = goals[0] or 0., goals[1] or 2.
        open_yet = [i for i in range(20, 200, 20) if each[:i].sum() / 200 < below or (right[:i].sum() + 200 - i) / 200 >= reached]
        seen.clear()
        found, met = problem.evaluate(theta, goals=goals), float(each.mean()) < below or float(right.mean()) >= reached
        assert sum(seen) == (max(open_yet, default=0) + 20)
        assert (found is None) == (sum(seen) < 200) and not (met and found is None)
    del cost.least                               # others might cost less than nothing
    seen.clear()
    assert problem.evaluate(theta, goals=(.1 * float(each.mean()), None)) and sum(seen) == 200


specs = st.builds(
    Spec, dataset=st.sampled_from(["digits", "chebyshev-3-20"]), model=st.just("fc-tanh"), loss=st.sampled_from(["ce", "mse"]),
    rule=st.one_of(st.builds(GD, st.floats(0, 10)), st.builds(Adam, lr=st.floats(0, 1), beta1=st.floats(0, 0.99)),
                   st.builds(lambda lr, m: FromTorch(torch.optim.SGD, lr=lr, momentum=m), st.floats(0, 1), st.floats(0, 0.9)),
                   st.builds(lambda lr, k: Scheduled(GD(lr), Piecewise(((k, 0.5),))), st.floats(0, 1), st.integers(0, 99)),
                   st.builds(lambda lr, k: Scheduled(GD(lr), Cosine(k, k // 2)), st.floats(0, 1), st.integers(1, 99))),
    steps=st.integers(0, 10**6), estimator=st.builds(MiniBatch, st.integers(1, 500), st.booleans()),
    probes=st.lists(st.text(max_size=20), max_size=3), seed=st.integers(-2**70, 2**70),
    loss_goal=st.none() | st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=200, deadline=None)
@given(specs)
def test_specs_come_back(spec):
    again = Spec.from_json(spec.to_json())
    assert again == spec and again.hash == spec.hash


def test_a_run_of_a_rule_that_is_not_known_here_is_read_and_goes_on_where_it_is(tmp_path, capsys):
    @kind
    @dataclass(frozen=True)
    class Signs(Rule):
        lr: float
        def step(self, state, blocks, grads): return {k: b - self.lr * grads[k].sign() for k, b in blocks.items()}, state
    spec, store = Spec("digits-100", "fc-tanh:width=4", "mse", Signs(.01), 6, probes="sharpness:every=3"), Store(tmp_path)
    try:
        known = store.run(spec, progress=False)
        frame, theta = known.frame(), known.theta
        del KINDS["Signs"]
        run, = Store(tmp_path).list(rule="Signs")
        assert run.hash == known.hash and run.frame().equals(frame) and torch.equal(run.theta, theta) and not run.damage()
        assert Store(tmp_path).frame()["rule.lr"].eq(.01).all() and run.about["status"] == "finished"
        main(["runs", "list", "--store", str(tmp_path)]), main(["runs", "show", known.hash, "--store", str(tmp_path)])
        assert "rule=Signs rule.lr=0.01" in capsys.readouterr().out
        (run.path / "manifest.json").write_text(seal(run.manifest | {"status": "interrupted"}))
        with pytest.raises(ValueError, match="'Signs', which is not known here; import its definition"): store.run(run.spec, progress=False)
        KINDS["Signs"] = Signs
        assert store.run(Run(run.path).spec, progress=False).frame().equals(frame)
    finally: KINDS.data.pop("Signs", None), RULES.data.pop("signs", None)


def test_every_field_has_a_say_in_the_hash():
    changed = dict(dataset="digits", model="fc-relu", loss="ce", rule=GD(0.02), steps=1, estimator=MiniBatch(21), probes=(), seed=1,
                   dtype="float64", chunk_size=7, loss_goal=0.1, acc_goal=0.5, goal_every=7)
    from dataclasses import fields, replace
    assert changed.keys() == {f.name for f in fields(Spec)}
    assert len({SPEC.hash, *(replace(SPEC, **{k: v}).hash for k, v in changed.items())}) == len(changed) + 1


@settings(max_examples=60, deadline=None)
@given(name=st.text(min_size=1, max_size=30).filter(lambda s: len(s.encode("utf-8", "ignore")) < 60 and s.isprintable()),
       rows=st.lists(st.floats(), min_size=1, max_size=20))
def test_traces_come_back_under_any_name(tmp_path_factory, name, rows):
    path = tmp_path_factory.mktemp("run")
    recorder = Recorder(path)
    for k, v in enumerate(rows): recorder.append(name, k, as_row({"a": v, "b": [v, k]}))
    (path / "spec.json").write_text("{}")
    trace, = Run(path).traces.items()
    recorder.close()
    assert trace[0] == name and {p.parent for p in (path / "traces").iterdir()} == {path / "traces"}
    np.testing.assert_array_equal(trace[1].columns["b"], np.array([[v, k] for k, v in enumerate(rows)]))


@pytest.mark.parametrize("text", ["", "[]", "3", '{"kind":"Spec"}', '{"kind":"Spec","rule":{"kind":"GD","lr":-1}}',
                                  '{"kind":"eval","x":1}', '{"kind":"GD","lr":1,"boom":2}', '{"kind":"optimizer","name":"lr_scheduler"}'])
def test_a_strangers_spec_is_refused_or_read(text):
    with pytest.raises((ValueError, TypeError)): Spec.from_json(text)


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 400), junk=st.binary(max_size=40))
def test_a_damaged_trace_is_named_or_a_prefix(tmp_path_factory, cut, junk):
    run = tmp_path_factory.mktemp("run")
    recorder = Recorder(run)
    for k in range(10): recorder.append("x", k, as_row(k / 2))
    recorder.close()
    path = run / "traces" / "x.trace"
    path.write_bytes(path.read_bytes()[:cut] + junk)
    try: trace = read_trace(path)
    except ValueError as e: assert "x.trace is damaged" in str(e)
    else: assert trace.values.tolist() == [k / 2 for k in range(len(trace))] and len(trace) <= 10


def test_a_manifest_says_where_and_with_what(whole):
    m = whole.manifest
    assert m["torch"] == torch.__version__ and m["device"] == "cpu" and m["seconds"] > 0 and m["p"] == 870 and m["n"] == 200
    json.dumps(m, allow_nan=False)


def test_two_specs_two_folders(tmp_path):
    from dataclasses import replace
    store, short = Store(tmp_path), replace(SPEC, steps=3)
    runs = [store.run(replace(short, seed=s), progress=False) for s in (0, 1)]
    assert [r.hash for r in store.list()] == sorted(r.hash for r in runs)
    assert not torch.equal(runs[0].theta, runs[1].theta)
    assert store.open(runs[0].hash[:9]).spec == runs[0].spec
    with pytest.raises(KeyError, match="begins 2 runs|no run"): store.open(os.path.commonprefix([r.hash for r in runs]) or "0")


def test_a_torn_header_is_set_aside_and_other_columns_are_refused(tmp_path):
    recorder = Recorder(tmp_path)
    (tmp_path / "traces" / "x.trace").write_bytes(b'{"format": "gra')
    with pytest.warns(RuntimeWarning, match="x.trace is damaged.*now called x.trace.corrupt-1"): assert recorder.resume(None) == (None, None)
    recorder.append("x", 0, as_row(1.0))
    recorder.close()
    assert read_trace(tmp_path / "traces" / "x.trace").values.tolist() == [1.0]
    with pytest.raises(ValueError, match="other columns than probe 'x'"): Recorder(tmp_path).append("x", 1, as_row([1.0, 2.0]))


def test_an_interrupt_between_two_probes_of_a_step_resumes_bitwise(tmp_path):
    from dataclasses import replace

    from gradnb import PROBES, Probe
    calm = []

    def impatient_probe():
        def measure(view):
            if view.step == 40 and not calm: raise KeyboardInterrupt
            return 0.0
        return Probe("impatient", lambda step: step % 20 == 0, measure)

    PROBES["impatient"] = impatient_probe
    try:
        spec = replace(SPEC, steps=60, probes=("sharpness:every=20", "impatient"))
        with pytest.warns(RuntimeWarning, match="interrupted at step 40"), pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "a").run(spec, progress=False, interval=1e9)
        calm.append(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)             # no row of step 40 is missed
            again, whole = (Store(tmp_path / where).run(spec, progress=False) for where in "ab")
    finally: del PROBES["impatient"]
    assert again.frame().equals(whole.frame()) and torch.equal(again.theta, whole.theta)


def test_a_field_that_came_later_changes_no_hash_at_its_default(tmp_path):
    old = ('{"acc_goal":null,"chunk_size":null,"dataset":"digits","dtype":"float32","estimator":{"kind":"FullBatch"},"kind":"Spec","loss":"ce",'
           '"loss_goal":null,"model":"fc-relu","probes":[],"rule":{"kind":"GD","lr":1.0},"seed":0,"steps":5}')
    spec = Spec("digits", "fc-relu", "ce", GD(1.), 5)
    assert spec.to_json() == old and spec.hash == "3162722baf1b1dab"             # as stored before there was goal_every
    assert Spec.from_json(old).goal_every == 10
    other = Spec("digits-90", "fc-relu:width=5", "ce", GD(.5), 30, loss_goal=2.2, goal_every=1)
    assert Spec.from_json(other.to_json()) == other and '"goal_every":1' in other.to_json()
    losses = Store(tmp_path).run(other, progress=False).traces["loss"].values
    assert losses[-1] < 2.2 and (losses[:-1] >= 2.2).all() and (len(losses) - 1) % 10
    with pytest.raises(ValueError, match="goal_every"): Spec("digits", "fc-relu", "ce", GD(1.), 5, goal_every=0)


def entries():
    "What a probe may return, and more."
    finite = st.floats() | st.integers(-2**80, 2**80) | st.booleans()
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    dtypes = st.sampled_from(["<f4", ">f8", "f2", "<i8", "u1", "?", "<u2", "g"])
    arrays = st.builds(lambda shape, dtype: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype), shapes, dtypes)
    tensors = st.builds(lambda shape, dtype: torch.full(shape, 1.5).to(dtype), shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.bool]))
    odd = st.sampled_from([None, "x", 1j, [], [[1, 2], [3]], 10**400, [10**400], {"a": 1}, np.float32("inf"), torch.tensor(float("nan")), [2**70, 1], float("-inf")])
    return finite | arrays | tensors | odd | st.lists(finite, max_size=4)


column_names = st.sampled_from(["value", "step", "run", "seed", "a", "a.0", "a.1", "", ".", "loss", "__metadata__", "\ud800", "\0", "λ", "crc", "c0"]) | st.text(max_size=5)


@settings(max_examples=250, deadline=None)
@given(answers=st.lists(st.dictionaries(column_names, entries(), min_size=1, max_size=4), min_size=1, max_size=3),
       steps=st.lists(st.integers(-1, 4), min_size=3, max_size=3), repeat=st.booleans())
def test_what_is_recorded_is_read(tmp_path_factory, answers, steps, repeat):
    "In each form, or it is refused before anything of it is written. What is read is compared with what was given, not with another table."
    path = tmp_path_factory.mktemp("run")
    recorder, kept = Recorder(path), []
    for step, answer in zip(steps, answers * 3 if repeat else answers):
        try: recorder.append("x", step, as_row(answer))
        except (TypeError, ValueError) as e: assert str(e)
        else: kept.append((step, answer))
    recorder.close()
    file = path / "traces" / "x.trace"
    if not kept: return
    for trace in (read_trace(file), read_arrow(compact(file)).trace):
        assert trace.steps.tolist() == [k for k, _ in kept] == sorted({k for k, _ in kept})
        for i, (step, answer) in enumerate(kept):
            for name, given in answer.items():
                found = trace.columns[name][i] if name in trace.columns else trace.arrays[step][name]
                given = given.double().numpy() if isinstance(given, torch.Tensor) else np.asarray(given, np.float64)
                np.testing.assert_array_equal(np.asarray(found, np.float64), given)
        table = trace.frame()
        assert table.columns.is_unique and table["step"].tolist() == trace.steps.tolist()
        assert table.shape[1] == 1 + sum(int(np.prod(v.shape[1:])) for v in trace.columns.values())
    (path / "spec.json").write_text("{}")
    assert Run(path).frame().columns.is_unique


def test_a_probe_that_returns_an_empty_vector_keeps_its_trace(tmp_path):
    from gradnb import PROBES, Probe
    PROBES["empty test"] = lambda: Probe("empty", lambda step: True, lambda view: {"none": torch.zeros(0), "some": view.step})
    try: run = Store(tmp_path).run(Spec("digits-60", "fc-tanh:width=3", "mse", GD(0.01), 3, probes=("empty test",)), progress=False)
    finally: del PROBES["empty test"]
    assert run.traces["empty"].columns["none"].shape == (4, 0) and run.damage() == {} and run.frame("empty")["some"].tolist() == [0, 1, 2, 3]


STRANGERS = ["loss (conflicted copy).arrow", "loss (1).trace", "._loss.trace", ".DS_Store", "loss.tmp", "Thumbs.db", "loss.trace~", ".nfs0001",
             "loss.sync-conflict-20240101-120000-ABC.trace", "~$loss.arrow", "loss-DESKTOP-1.trace"]


@pytest.mark.parametrize("done", [True, False])
def test_strangers_among_the_traces_are_named_and_left_alone(tmp_path, done):
    from gradnb.ground import files
    spec = Spec("digits-60", "fc-tanh:width=3", "mse", GD(0.01), 6, probes=("sharpness:every=3",))
    whole, run = Store(tmp_path / "whole").run(spec, progress=False), Store(tmp_path).run(spec, progress=False)
    if not done:
        (run.path / "manifest.json").unlink()
        recorder = Recorder(run.path)
        recorder.resume(run_state(spec))                     # the traces are rows again
        recorder.close()
    form = ".arrow" if done else ".trace"
    if not (source := run.path / "traces" / f"loss{form}").exists(): source = None
    for name in STRANGERS: (run.path / "traces" / name).write_bytes(source.read_bytes() if source and name.endswith(form) else b"junk")
    (run.path / "arrays" / "loss (conflicted copy)").mkdir(parents=True)
    (run.path / "arrays" / "loss (conflicted copy)" / "3.safetensors").write_bytes(b"junk")
    files.SAID.clear()
    with pytest.warns(RuntimeWarning, match="is no trace of this run and is left alone; move it elsewhere") as said: traces, frame = run.traces, run.frame()
    assert {*traces} <= {"loss", "sharpness"} and len(said) >= len(STRANGERS) - 1
    assert not done or frame.equals(whole.frame()) and run.damage() == {}
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error" if done else "ignore")                   # said once
        again = Store(tmp_path).run(spec, progress=False)
    assert again.frame().equals(whole.frame()) and again.status == "finished" and again.damage() == {}
    assert {*STRANGERS[:-1]} <= {p.name for p in (run.path / "traces").iterdir()}
    assert (run.path / "arrays" / "loss (conflicted copy)" / "3.safetensors").exists()


def run_state(spec):
    problem, stepper, _ = spec.build("cpu")
    return stepper.init(problem, problem.theta0)


def test_infinite_floats_are_checkpointed(tmp_path):
    "Freshness starts its best distance at infinity."
    spec = Spec("digits-60", "fc-tanh:width=3", "mse", GD(0.01), 6, MiniBatch(10), probes=("freshness",))
    run = Store(tmp_path).run(spec, progress=False, interval=0.0)
    assert run.status == "finished" and len(run.traces["freshness"]) > 0


def test_resuming_takes_memory_that_does_not_grow_with_the_rows(tmp_path):
    "Measured in a process of its own; a set of two million steps alone has over 100 MB."
    script = """
import sys, tracemalloc
from pathlib import Path
import numpy as np, torch
from gradnb.ground.roles import State
from gradnb.ground.traces import Trace
from gradnb.move.rules.inplace import InPlace
from gradnb.problem.designs import NotFinite
from gradnb.runs import Recorder
from gradnb.runs.tracefiles import TraceLayout, write_rows
for n in map(int, sys.argv[2:]):
    path = Path(sys.argv[1]) / str(n)
    (path / "traces").mkdir(parents=True)
    steps = np.arange(n)
    write_rows(path / "traces" / "loss.trace", TraceLayout(path.name, "loss", [("value", ())]), Trace("loss", steps, {"value": steps / 2}), n)
    state = State(n - 5, torch.zeros(3))
    recorder = Recorder(path)
    recorder._written = {"loss": (n - 5, n - 6)}
    recorder.checkpoint(state, {}, last=True)
    del steps
    tracemalloc.start()
    found, _ = Recorder(path).resume(state)
    print(found.step, (path / "traces" / "loss.trace").stat().st_size // 20, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""
    peaks, sizes = [], (1_000, 200_000, 2_000_000)                # the first, for what is made once
    said = subprocess.run([sys.executable, "-c", script, str(tmp_path), *map(str, sizes)], capture_output=True, text=True, check=True).stdout
    for n, line in zip(sizes, said.splitlines(), strict=True):
        out = line.split()
        assert int(out[0]) == n - 5 and n - 5 <= int(out[1]) < n + 9
        peaks.append(int(out[2]))
    assert peaks[2] < 1.5 * peaks[1], peaks
HOSTILE = """[core]
	repositoryFormatVersion = 0
	fsmonitor = {trap}
	hooksPath = {folder}/hooks
	pager = {trap}
	editor = {trap}
	sshCommand = {trap}
	untrackedCache = true
[filter "boom"]
	clean = {trap}; cat
	smudge = {trap}; cat
	process = {trap}
	required = true
[diff "boom"]
	textconv = {trap}
	command = {trap}
[alias]
	status = "!{trap}"
	rev-parse = "!{trap}"
[include]
	path = {folder}/more
[status]
	submoduleSummary = true
[remote "origin"]
	url = ext::{trap}
	promisor = true
	partialCloneFilter = blob:none
[extensions]
	partialClone = origin
"""


def test_the_commit_of_a_strangers_folder_is_read_and_nothing_of_it_runs(tmp_path, monkeypatch):
    from gradnb.ground.commit import changed, commit, git_folders, head
    for k in [k for k in os.environ if k.startswith("GIT_")]: monkeypatch.delenv(k)
    folder, trap = tmp_path / "tarball", tmp_path / "trap"
    git = lambda *words: subprocess.run(["git", "-C", str(folder), "-c", "user.name=A", "-c", "user.email=a@b", "-c", "protocol.file.allow=always", *words],
                                        check=True, capture_output=True, text=True).stdout.strip()
    inner, work = tmp_path / "inner", tmp_path / "work"
    for where in (inner, folder):
        where.mkdir()
        subprocess.run(["git", "init", "-q", "-b", "main", str(where)], check=True)
        (where / "a.py").write_text("1")
        subprocess.run(["git", "-C", str(where), "add", "."], check=True)
        subprocess.run(["git", "-C", str(where), "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-qm", "first"], check=True)
    (folder / ".gitattributes").write_text("* filter=boom diff=boom\n")
    git("add", "."), git("submodule", "-q", "add", str(inner), "sub"), git("commit", "-qm", "second"), git("worktree", "add", "-q", "-b", "other", str(work))
    name, other = git("rev-parse", "HEAD"), work
    script = tmp_path / "trap.sh"
    script.write_text(f"#!/bin/sh\ntouch {trap}\n")
    script.chmod(0o755)
    for config in (folder / ".git" / "config", folder / ".git" / "modules" / "sub" / "config"):
        config.write_text(HOSTILE.format(trap=script, folder=tmp_path))
    (tmp_path / "hooks").mkdir()
    for hook in ("post-index-change", "reference-transaction", "fsmonitor-watchman"): (tmp_path / "hooks" / hook).symlink_to(script)
    (tmp_path / "more").write_text(f"[core]\n\tfsmonitor = {script}\n")
    subprocess.run(["git", "-C", str(folder), "status"], capture_output=True)
    assert trap.exists()                                         # git itself falls into it
    trap.unlink()

    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.fsmonitor")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(script))
    monkeypatch.setenv("PATH", f".:{os.environ['PATH']}")
    (folder / "git").symlink_to(script)
    at = lambda where: (lambda found: head(*found[1:]) + "+" * changed(*found, head(*found[1:])))(git_folders(where))
    for file in ("a.py", ".gitattributes"): os.utime(folder / file)
    assert at(folder) == at(folder / "sub" / "..") == at(other) == name
    monkeypatch.chdir(folder)
    commit.cache_clear()
    assert commit() == name
    (folder / "a.py").write_text("2")
    assert at(folder) == name + "+" and at(other) == name
    (folder / "a.py").unlink()
    assert at(folder) == name + "+"
    (folder / ".git" / "packed-refs").write_text(f"# pack-refs with: peeled\n{name} refs/heads/main\n^{'0' * 40}\n")
    (folder / ".git" / "refs" / "heads" / "main").unlink()
    assert at(folder) == name + "+"
    for text in ("ref: ../../../etc/passwd", "ref: refs/heads/../../config", "ref: refs/heads/none", "", "nonsense", "\0"):
        (folder / ".git" / "HEAD").write_text(text)
        assert (found := git_folders(folder)) is None or head(*found[1:]) is None
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/.invalid\n")       # as git leaves it where references are in tables
    (folder / ".git" / "reftable").mkdir()
    commit.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"the commit of {folder} is not noted"): assert commit() is None
    (folder / ".git" / "HEAD").unlink()
    os.mkfifo(folder / ".git" / "HEAD")
    assert git_folders(folder) is None and not trap.exists()
    commit.cache_clear()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def stopped(store, spec, step):
    "The run of a spec, interrupted before this step."
    from gradnb import Descent
    real = Descent.prepare

    def prepare(self, problem, state, stream):
        if state.step == step: raise KeyboardInterrupt
        return real(self, problem, state, stream)

    Descent.prepare = prepare
    try:
        with pytest.warns(RuntimeWarning, match="interrupted"), pytest.raises(KeyboardInterrupt): store.run(spec, progress=False)
    finally: Descent.prepare = real
    return store.open(spec)


def test_a_run_goes_on_with_the_threads_that_it_began_with(tmp_path, threads):
    from dataclasses import replace
    spec, seen = replace(SPEC, steps=60, probes=("threads_seen",)), []
    from gradnb import PROBES, Probe
    PROBES["threads_seen"] = lambda: Probe("threads_seen", lambda step: True, lambda view: float(torch.get_num_threads()))
    try:
        threads(2)
        run = stopped(Store(tmp_path), spec, 23)
        threads(1)
        with pytest.warns(UserWarning, match=r"begun on 2 threads and goes on with 2, not with the 1 .*OMP_NUM_THREADS=2 or torch.set_num_threads\(2\)"):
            stopped(Store(tmp_path), spec, 41)
        assert torch.get_num_threads() == 1
        threads(2)
        Store(tmp_path).run(spec, progress=False)
    finally: del PROBES["threads_seen"]
    assert run.status == "finished" and set(run.traces["threads_seen"].values) == {2.0}
    parts = run.manifest["stretches"]
    assert [(s["step"], s["threads"], s["device"], s["torch"]) for s in parts] == [(k, 2, "cpu", torch.__version__) for k in (0, 23, 41)]
    assert all(s["began"] > 0 and {"processor", "host", "commit", "gradnb", "numpy", "python"} <= s.keys() for s in parts)


def test_another_machine_is_said_before_a_run_goes_on(tmp_path):
    from dataclasses import replace

    from gradnb.ground.files import seal
    run = stopped(Store(tmp_path), replace(SPEC, steps=60, probes=()), 23)
    about = {k: v for k, v in run.manifest.items() if k not in ("stretches", "schema", "threads")}                 # as 0.1.0 wrote it
    (run.path / "manifest.json").write_text(seal(about | {"torch": "1.0", "processor": "vax"}))
    with pytest.warns(UserWarning, match="begun with processor vax, now .*; torch 1.0, now .*not bitwise"): Store(tmp_path).run(run.spec, progress=False)
    assert [(s["torch"], s.get("threads")) for s in run.manifest["stretches"]] == [("1.0", None), (torch.__version__, torch.get_num_threads())]
