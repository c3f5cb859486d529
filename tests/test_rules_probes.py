"Probes of rules against the run itself, stepped by hand."
import math
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

import gradnb
from gradnb.data import load_dataset
from gradnb.move.estimators.minibatch import MiniBatch
from gradnb.runs.laws import check_probe
from gradnb.models import build_model
from gradnb.measure.probes.view import PROBES
from gradnb.problem import Problem
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.move.rules.gd import GD
from gradnb.move.rules.groups import Groups
from gradnb.move.rules.lamb import LAMB
from gradnb.move.rules.schedule import Piecewise, Scheduled
from gradnb.move.rules.schedulefree import ScheduleFreeAdamW, ScheduleFreeSGD
from gradnb.move.steppers import Descent, trajectory
from gradnb.runs.training import train


@pytest.fixture(scope="module")
def problem():
    digits = load_dataset("digits-200").to(dtype=torch.float64)
    return Problem(build_model("fc-tanh:width=8,depth=1", digits), "ce", digits)


@pytest.mark.parametrize("name", ["weight_norms", "grad_norms", "update_norms", "relative_updates", "effective_rates",
                                  "update_rms", "update_angles", "spikes", "noise_scales:examples=20", "trust_ratio", "rule:field=exp_avg", "rule:field=step"])
def test_laws(name, problem): check_probe(PROBES.build(name, every=5), problem, Descent(LAMB(.01), MiniBatch(8)))


def test_laws_of_agd(problem): check_probe(PROBES.build("agd"), problem, Descent(AutomaticGradientDescent(vectors=True)))


def test_they_measure_the_step_that_the_run_takes(problem):
    stepper, names = Descent(Scheduled(LAMB(.01), Piecewise(((5, .1),))), MiniBatch(16)), problem.layout.names
    watch = ["weight_norms", "grad_norms", "update_norms", "relative_updates", "effective_rates", "update_rms", "update_angles", "trust_ratio", "rule:field=adam_norm"]
    _, traces = train(problem, stepper, 9, [PROBES.build(p, every=1) for p in watch], progress=False)
    states = list(islice(trajectory(problem, stepper), 11))
    for k, (now, then) in enumerate(zip(states[:10], states[1:])):
        w, g, to = (problem.layout.split(v) for v in (now.theta, now.grad, then.theta))
        for i, n in enumerate(names):
            got = {t: float(traces[t].columns[n][k]) for t in traces if t != "loss"}
            moved = float((to[i] - w[i]).norm())
            expected = dict(weight_norms=float(w[i].norm()), grad_norms=float(g[i].norm()), update_norms=moved,
                            relative_updates=moved / float(w[i].norm()), effective_rates=moved / float(g[i].norm()),
                            update_rms=float((to[i] - w[i]).square().mean().sqrt()),
                            update_angles=math.degrees(math.acos(-float(((to[i] - w[i]) * g[i]).sum()) / moved / float(g[i].norm()))),
                            trust_ratio=float(then.rule.inner.trust_ratio[n]), adam_norm=float(then.rule.inner.adam_norm[n]))
            for t, value in expected.items(): assert abs(got[t] / value - 1) < 1e-9, (t, k, n)
            assert abs(got["relative_updates"] / (.01 if k < 5 else .001) - 1) < 1e-9


def test_gradient_descent_goes_along_its_gradient(problem):
    _, traces = train(problem, Descent(GD(.1), MiniBatch(8)), 3, ["update_angles:every=1"], progress=False)
    assert all((traces["update_angles"].columns[n] < 1e-4).all() for n in problem.layout.names)


def test_a_dead_block_has_no_ratio(problem):
    theta = problem.theta0.clone()
    problem.layout.named(theta)["fc1.bias"].zero_()
    _, traces = train(problem, Descent(GD(.1)), 0, [PROBES.build("relative_updates", every=1)], theta=theta, progress=False)
    columns = traces["relative_updates"].columns
    assert columns["fc1.bias"][0] != columns["fc1.bias"][0] and columns["fc1.weight"][0] > 0


@pytest.mark.parametrize("rule", [ScheduleFreeSGD(.3), Scheduled(ScheduleFreeAdamW(.01), Piecewise(((5, .1),))), Groups((("matrix", ScheduleFreeSGD(.3, .7)), ("*", GD(.1))))], ids=repr)
def test_probes_at_the_average(rule, problem):
    "What they find is what they find of a run that sits there."
    stepper, names = Descent(rule, MiniBatch(16)), ["averaged:probe=[sharpness:every=4,tol=1e-9]", "averaged:probe=[train:every=4]", "averaged:probe=[grad_norm:every=4]"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(problem, stepper, 1, names, progress=False)
    with pytest.warns(UserWarning, match=r"averaged:probe=\[train\] looks there"): _, traces = train(problem, stepper, 8, [*names, "train:every=4"], progress=False)
    for k, state in zip((0, 4, 8), list(islice(trajectory(problem, stepper), 9))[::4]):
        z, blocks = {}, problem.layout.named(state.theta)
        states = getattr(state.rule, "states", (getattr(state.rule, "inner", state.rule),))
        for s in states: z |= getattr(s, "z", {})
        beta = .7 if hasattr(state.rule, "states") else .9
        x = problem.layout.join((blocks[n] - (1 - beta) * z[n]) / beta if n in z else blocks[n] for n in problem.layout.names)
        seen = [traces[t].values[list(traces[t].steps).index(k)] for t in ("averaged_sharpness", "averaged_train", "averaged_grad_norm", "train")]
        assert seen[2] == pytest.approx(problem.grad_and_loss(x)[0].norm().item(), rel=1e-9)
        assert traces["averaged_train"].columns["loss"][k // 4] == pytest.approx(problem.loss(x).item(), rel=1e-12)
        assert traces["averaged_sharpness"].columns["value"][k // 4] == pytest.approx(gradnb.sharpness(problem, x, tol=1e-9).values[0].item(), rel=1e-6)
    assert traces["averaged_train"].columns["loss"][-1] != traces["train"].columns["loss"][-1]
    ends = traces["averaged_train"].columns["loss"]
    outcome = train(problem, stepper, 8, loss_goal=ends[1] * (1 + 1e-9), goal_every=4, progress=False)[1].outcome
    assert ends[0] > ends[1] and outcome.step == 4 and f"training loss {ends[1]:.4g} <" in outcome.message
    with pytest.raises(TypeError, match="GD keeps no average"): train(problem, Descent(GD(.1)), 1, names[-1:], progress=False)


@pytest.mark.slow
def test_laws_at_the_average(problem): check_probe(PROBES.build("averaged:probe=[sharpness:every=5]"), problem, Descent(ScheduleFreeSGD(.3), MiniBatch(16)))


def test_what_is_not_there(problem):
    for rule, name, says in ((GD(.1), "trust_ratio", "nothing"), (LAMB(.1), "rule:field=velocity", "exp_avg_sq")):
        with pytest.raises(ValueError, match=says): train(problem, Descent(rule), 1, [PROBES.build(name)], progress=False)


def parts(grads):
    "Tr Σ and ‖G‖² of single gradients (n, …) from the norms of each and of their mean (McCandlish et al. 2018, A.2)."
    n, each, mean = len(grads), sum((g ** 2).sum() for g in grads) / len(grads), ((sum(grads) / len(grads)) ** 2).sum()
    return (each - mean) / (1 - 1 / n), (n * mean - each) / (n - 1)


@pytest.mark.parametrize("kind", ["tied", "apart", "batches"])
def test_noise_scale_of_every_layer_by_plain_backward_passes(kind):
    "A language model of Hugging Face's whose embedding is its last layer, one whose is not, and one with a loss that only a batch has."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6, bos_token_id=0, eos_token_id=0, tie_word_embeddings=kind == "tied")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).double().eval()
    ids = torch.randint(11, (24, 6))
    ids[:, 3:] = ids[:, :3]                                  # something to learn, so that there is a signal
    size = 3 if kind == "batches" else 1
    def mean(model, batch): return model(**batch).loss
    def each(model, batch):
        logits = model(batch["input_ids"]).logits[:, :-1].transpose(1, 2)
        return nn.functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").mean(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    data = [dict(input_ids=i, labels=i) for i in ids.split(size)] if kind == "batches" else [dict(input_ids=i, labels=i) for i in ids]
    loader = data if kind == "batches" else torch.utils.data.DataLoader(data, batch_size=8)
    words = ["noise_scales:examples=0,every=1", "noise_scales:params=norm,examples=0,every=1"]
    with gradnb.watch(model, mean if kind == "batches" else each, loader, words, optimizer, strict=True) as seen: pass
    grads = {name: [] for name, _ in model.named_parameters()}
    for batch in ids.split(size):
        model.zero_grad()
        mean(model, dict(input_ids=batch, labels=batch)).backward()
        for name, p in model.named_parameters(): grads[name].append(p.grad.numpy().copy())
    rows = [seen.traces[t].frame().iloc[-1] for t in ("noise_scales", "noise_scales of norm")]
    layers = {name.rpartition(".")[0] for name in grads}
    norms = {l for l in layers if ".ln_" in l}
    assert len(norms) == 3 and ("lm_head" in layers) == (kind != "tied")
    for row, found in zip(rows, (layers, norms)):
        noise, signal = (sum(x) for x in zip(*(parts(g) for name, g in grads.items() if name.rpartition(".")[0] in found)))
        assert (row["variance"], row["norm_sq"]) == pytest.approx((size * noise, signal), rel=1e-6, abs=1e-9 * noise)
        assert {k for k in row.index if f"{k}_low" in row.index} == found
        for layer in found:
            noise, signal = (sum(x) for x in zip(*(parts(g) for name, g in grads.items() if name.rpartition(".")[0] == layer)))
            assert row[layer] == pytest.approx(size * noise / signal if signal > 0 else np.inf, rel=1e-6)
            assert row[f"{layer}_low"] < row[layer] <= row[f"{layer}_high"]


# --- loss by class ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data, net, options", [
    ("zipf:n=60,k=6,features=9", "deeplinear:depth=1", ""), ("digits-100:test=50", "fc-tanh:width=6", "split=test"), ("zipf:n=60,k=6,features=9", "deeplinear:depth=1", "groups=3"),
    ("sorting:n=12", "gpt:width=8,layers=1,heads=2,dropout=0.0", ""), ("digits-50", "fc-bn-relu:width=6", "")])
@pytest.mark.parametrize("chunk", [None, 7])
def test_loss_by_class_is_that_of_a_mask(data, net, options, chunk):
    "torch's cross-entropy of the examples of one class, or of one group, after the other."
    if chunk and "bn" in net: return
    d, module = load_dataset(data), build_model(net, load_dataset(data))
    problem = Problem(module, "ce", d, chunk)
    state, traces = train(problem, Descent(GD(.2)), 2, [f"class_loss:every=2,{options}".rstrip(",")], progress=False)
    found, = (t.values[-1] for name, t in traces.items() if name.startswith("class_loss"))
    x, y = (d.x_test, d.y_test) if "test" in options else (d.x, d.y)
    with torch.no_grad(): out = problem.outputs(state.theta, x)
    out, y, seen = out[y >= 0], y[y >= 0], d.y[d.y >= 0]
    each = nn.functional.cross_entropy(out, y, reduction="none")
    counts = torch.bincount(seen, minlength=d.classes).tolist()
    members = [[c] for c in range(d.classes)]
    if "groups" in options:                           # classes have 25, 12, 8, 6, 5, 4 examples: middles at 12.5, 31, 41, 48, 53.5, 58 of 60
        assert counts == sorted(counts, reverse=True)
        middles = [sum(counts[:c]) + counts[c] / 2 for c in range(6)]
        members = [[c for c in range(6) if 20 * g <= middles[c] < 20 * g + 20] for g in range(3)]
    wanted = [each[torch.isin(y, torch.tensor(m))].mean() if m and torch.isin(y, torch.tensor(m)).any() else torch.nan for m in members]
    np.testing.assert_allclose(found, torch.tensor(wanted), rtol=2e-5)


def test_loss_by_class_needs_classes():
    d = load_dataset("chebyshev-3-8")
    with pytest.raises(TypeError, match="has none"): train(Problem(build_model("regression:width=3", d), "mse", d), Descent(GD(.1)), 1, ["class_loss"], progress=False)
    for word, says in (("class_loss:groups=-1", "groups"), ("class_loss:split=valid", "split"), ("class_loss:groups=2.5", "whole")):
        with pytest.raises(ValueError, match=says): PROBES.build(word)
    assert PROBES.build("class_loss:groups=3").name == "class_loss of 3" and PROBES.build("class_loss").name == "class_loss"


@pytest.mark.parametrize("word, least", [
    ("update_variance:draws=1", 2), ("published_variance:draws=2", 3), ("noise_scale:examples=1", 2), ("noise_scale:examples=-1", 2), ("batch_tests:examples=1", 2),
    ("gradient_moments:examples=2", 3), ("tic:examples=1", 2), ("tic:samples=1", 2), ("flatness:measure=sam,examples=0", 1), ("noise_scales:examples=1", 2),
    ("frobenius:products=5", 6), ("frobenius:examples=1", 2), ("tail_index:m=0", 1), ("tail_index:coordinates=0", 1), ("original_index:most=2", 3)])
def test_what_is_too_little_for_any_network_is_refused_before_a_run(word, least):
    name = word.rpartition(":")[2].rpartition(",")[2].partition("=")[0]
    with pytest.raises(ValueError, match=f"{least} ≤ {name} < inf, got {name}="): PROBES.build(word)
