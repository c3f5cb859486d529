"Sophia: against pytorch_optimizer's on the same draws and the authors' formula, its estimates against dense diagonals, its face and its edge."
from dataclasses import make_dataclass, replace
from itertools import islice

import pytest
import pytorch_optimizer as po
import torch
from torch import nn

from gradnb import Descent, GD, Groups, MiniBatch, Problem, Quadratic, Stream, build_model, load_dataset, optim, trajectory, update_radius
from gradnb.data import Dataset
from gradnb.ground.roles import ESTIMATORS, RULES, State, check_range
from gradnb.measure.thresholds.metrics import metric_of, preconditioned_sharpness
from gradnb.move.faces.estimated import Estimated
from gradnb.move.rules.kfac import KFAC
from gradnb.move.rules.sophia import Sophia, SophiaState, probing
from gradnb.runs.laws import check_stepper

DOUBLE = torch.float64
DIGITS = load_dataset("digits-60").to(dtype=DOUBLE)


def network(): return build_model("fc-tanh:width=5,depth=2", DIGITS)
def flat(params): return torch.cat([p.detach().flatten() for p in params])
def loss_of(net): return nn.functional.cross_entropy(net(DIGITS.x), DIGITS.y)


@pytest.mark.parametrize("draws", ["normal", "signs"])
@pytest.mark.parametrize("ours, theirs", [(Sophia.pytorch_optimizer(every=4), dict(update_period=4)),
                                          (Sophia.pytorch_optimizer(.1, .04, 1e-3, .1, beta1=.9, beta2=.8, every=3), dict(lr=.1, p=.04, eps=1e-3, weight_decay=.1, betas=(.9, .8), update_period=3))])
def test_thirty_steps_of_sophia_h(ours, theirs, draws):
    "Products by torch's autograd through their network, along the vectors that the rule draws."
    net = network()
    optimizer, every = po.SophiaH(net.parameters(), **theirs), theirs["update_period"]
    start, ours = flat(net.parameters()), replace(ours, draws=draws)
    for k, state in enumerate(islice(trajectory(Problem(network(), "ce", DIGITS), Descent(ours)), 31)):
        there = flat(net.parameters())
        assert (state.theta - there).abs().max() <= 1e-12
        params, hessian = list(net.parameters()), None
        grads = torch.autograd.grad(loss_of(net), params, create_graph=True)
        if k % every == 0:
            v = probing(draws, there, Stream(0) / "train" / k / "rule" / "vector").split([p.numel() for p in params])
            v = [a.view_as(p) for a, p in zip(v, params)]
            hessian = [a * b for a, b in zip(v, torch.autograd.grad(grads, params, v))]
        for p, g in zip(params, grads): p.grad = g.detach()
        optimizer.step(hessian=hessian)
    assert (there - start).abs().max() > 1e-3


@pytest.mark.parametrize("bs", [60, 240])
def test_thirty_steps_of_the_authors_sophia_g(bs):
    """Their update written out: squares of the gradient at drawn targets, ratio |m| / (ρ bs h + 1e-15).

    What their 1e-15, added where ours is a bound, makes of a step is counted; to 1e-12 the rest is equal."""
    problem, rho = Problem(network(), "ce", DIGITS), 1.
    rule = Sophia.authors(3e-3, rho, bs / 60, every=5)
    w = problem.theta0.clone()
    m, h, unclipped, slack = torch.zeros_like(w), torch.zeros_like(w), 0, 0
    for k, state in enumerate(islice(trajectory(problem, Descent(rule)), 31)):
        assert (state.theta - w).abs().max() <= 1e-12 + 2 * slack
        if k % 5 == 0:
            drawn = torch.multinomial(problem.outputs(w, DIGITS.x).softmax(-1), 1, generator=(Stream(0) / "train" / k / "rule" / "labels" / 0).generator())[:, 0]
            g = Problem(network(), "ce", Dataset(DIGITS.x, drawn, DIGITS.x, drawn, 10, "drawn")).grad_and_loss(w)[0]
            h = .99 * h + .01 * g * g
        m = .965 * m + .035 * problem.grad_and_loss(w)[0]
        ratio = (m.abs() / (rho * bs * h + 1e-15)).clamp(None, 1)
        slack += 3e-3 * (1e-15 / (rho * bs * h)).where(ratio < 1, 0).max().item()
        w, unclipped = w * (1 - 3e-3 * .1) - 3e-3 * m.sign() * ratio, unclipped + (ratio < 1).double().mean() / 31
    assert .02 < unclipped < .95 and slack < 1e-10


def test_an_estimate_of_a_text_counts_its_positions():
    "Means of 300 estimates against the diagonal of the dense Gauss–Newton matrix."
    class Next(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3)
            self.out = nn.Linear(3, 4)
        def forward(self, x): return self.out(self.table(x))
    torch.manual_seed(0)
    x = torch.randint(4, (9, 5))
    problem = Problem(Next().double(), "ce", Dataset(x, x.roll(-1, 1), x, x, 4, "texts", words=4))
    truth = problem.at().ggn(torch.eye(problem.p, dtype=DOUBLE)).diag()
    draws = torch.stack([Sophia(curvature="gnb").estimate(problem, problem.theta0, Stream(i)) for i in range(300)])
    z = (draws.mean(0) - truth) / draws.std(0) * 300 ** .5
    assert z.square().mean() < 1.6 and truth.min() > 0


def test_an_estimate_of_some_examples_is_that_of_a_batch():
    problem = Problem(network(), "ce", DIGITS)
    one, again, other = (Sophia(size=7).estimate(problem, problem.theta0, Stream(s)) for s in (0, 0, 1))
    idx = torch.randperm(60, generator=(Stream(0) / "batch").generator())[:7]
    few = Problem(network(), "ce", Dataset(DIGITS.x[idx], DIGITS.y[idx], DIGITS.x, DIGITS.y, 10, "few"))
    v = probing("normal", problem.theta0, Stream(0) / "vector")
    torch.testing.assert_close(one, v * few.hvp(few.theta0, v), rtol=1e-9, atol=1e-12)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_refresh_is_idempotent_and_keeps_its_intervals():
    problem, seen = Problem(network(), "ce", DIGITS), []
    for state in islice(trajectory(problem, Descent(Sophia(every=4))), 9):
        rule = Sophia(every=4).refresh(state.rule, problem, state.theta, state.step, Stream(9))
        assert rule is state.rule
        seen.append(rule.refreshed)
    assert seen == [0, 0, 0, 0, 4, 4, 4, 4, 8]


@pytest.mark.parametrize("decay", [0., .1])
@pytest.mark.parametrize("clipped", [0, 3])
def test_the_edge_on_axes(decay, clipped):
    """With h the diagonal of a diagonal Hessian the preconditioned sharpness is 1/γ and a step flips at η = γ(2 + 2β₁)/(1 − β₁) (2 − ηλ)/2; what is
    clipped takes no part, however sharp it is."""
    d = torch.tensor([1e4, 300., 20., 1., .5, .01], dtype=DOUBLE)
    bowl, beta1, gamma = Quadratic(torch.diag(d)), .9, .7
    def at(lr):
        rule = Sophia(lr, beta1, gamma=gamma, weight_decay=decay)
        far = torch.zeros(6, dtype=DOUBLE)
        far[:clipped] = 1e6                     # of the mean of gradients, in units of h: stays clipped
        moments = SophiaState(3, 3, {"theta": far * d}, {"theta": d})
        zero = torch.zeros(6, dtype=DOUBLE)
        return bowl, Descent(rule), State(3, zero, moments, grad=zero, loss=zero[0])
    bowl, stepper, state = at(1.)
    metric = metric_of(bowl, stepper, state)
    assert preconditioned_sharpness(bowl.at(state.theta), metric, tol=1e-10).values[0].item() == pytest.approx(1 / gamma, rel=1e-8)
    whole = (2 + 2 * beta1) / (1 - beta1) * gamma
    lr = whole / (1 + decay * whole / 2)        # η = γ (2 − ηλ)(1 + β₁)/(1 − β₁)
    assert metric_of(*at(lr)).threshold == pytest.approx(1 / gamma, rel=1e-12)
    assert update_radius(*at(lr), tol=1e-9).flip == pytest.approx(-1, abs=1e-6)
    assert update_radius(*at(.98 * lr), tol=1e-9).flip > -1 > update_radius(*at(1.02 * lr), tol=1e-9).flip


@pytest.mark.parametrize("curvature", ["hutchinson", "gnb"])
def test_the_face_goes_where_the_rule_goes(curvature):
    net = network()
    words = dict(lr=.01, gamma=1., every=3, weight_decay=.1, curvature=curvature)
    optimizer, problem = optim.Sophia([{"params": [p]} for p in net.parameters()], **words), Problem(network(), "ce", DIGITS)
    for k, state in enumerate(islice(trajectory(problem, Descent(Sophia(**words))), 8)):
        torch.testing.assert_close(state.theta, flat(net.parameters()), rtol=1e-11, atol=1e-13)
        stream = Stream(0) / "train" / k / "rule"
        assert optimizer.due == (k % 3 == 0)
        loss = loss_of(net)
        if curvature == "hutchinson": optimizer.estimate(loss, stream=stream / "vector")
        elif optimizer.due:
            out = net(DIGITS.x)
            drawn = torch.multinomial(out.detach().softmax(-1), 1, generator=(stream / "labels" / 0).generator())[:, 0]
            optimizer.estimate(nn.functional.cross_entropy(out, drawn), targets=60)
        assert not optimizer.due
        optimizer.zero_grad()
        loss.backward()                          # its graph is still there
        optimizer.step()


def test_the_face_touches_nothing_else():
    net = network()
    optimizer = optim.Sophia(net.parameters(), lr=.01)
    before, seed = flat(net.parameters()), torch.get_rng_state()
    optimizer.estimate(loss_of(net))
    assert torch.equal(before, flat(net.parameters())) and all(p.grad is None for p in net.parameters()) and torch.equal(seed, torch.get_rng_state())


def test_what_the_face_refuses():
    net = network()
    optimizer, frozen = optim.Sophia(net.parameters(), lr=.01), optim.Sophia(net.parameters(), lr=.01, curvature="gnb")
    loss_of(net).backward()
    with pytest.raises(RuntimeError, match=r"opt.estimate\(loss\) before step"): optimizer.step()
    with pytest.raises(TypeError, match="scalar loss with its graph"): optimizer.estimate(net(DIGITS.x))
    with pytest.raises(ValueError, match="targets=n"): frozen.estimate(loss_of(net))
    with pytest.raises(TypeError, match="no meaning for complex"): optim.Sophia([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    late = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    optimizer.estimate(loss_of(net))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones_like(late)
    with pytest.raises(RuntimeError, match="estimate"): optimizer.step()      # the loss was shown before it was there


def test_with_gradients_of_an_estimator():
    "Whose gradients it gets; the losses it is shown are one's own."
    net = network()
    run = Estimated(optim.Sophia(net.parameters(), lr=.01, gamma=1., every=2), Problem(net, "ce", DIGITS), MiniBatch(30))
    with pytest.raises(RuntimeError, match="before step"): run.step()
    first = loss_of(net).item()
    for _ in range(60):
        if run.optimizer.due: run.optimizer.estimate(loss_of(net))
        run.step()
    assert loss_of(net).item() < .7 * first


def test_words():
    assert RULES.build("sophia:lr=.01,curvature=gnb,size=30") == Sophia(.01, curvature="gnb", size=30)
    assert RULES.build("sophia-authors:lr=.01,rho=.05").gamma == .05


@pytest.mark.parametrize("curvature", ["hutchinson", "gnb"])
def test_a_group_has_the_curvature_of_its_own_blocks(curvature):
    "On a diagonal Hessian Hutchinson's estimate with signs is exact; on a network no block of others adds noise, and the estimates' mean is the diagonal."
    digits = load_dataset("digits-30").to(dtype=DOUBLE)
    problem = Problem(build_model("fc-tanh:width=3,depth=1", digits), "mse" if curvature == "hutchinson" else "ce", digits)
    whole = Sophia(.01, beta2=0., every=1, curvature=curvature, draws="signs")
    rule, matrices = Groups((("matrix", whole), ("*", GD(.1)))), problem.layout.named(problem.theta0)
    own = [n for n, r in zip(problem.layout.names, problem.layout.roles) if r == "matrix"]
    state = rule.init(matrices, dict(zip(problem.layout.names, problem.layout.roles)))
    found = [rule.refresh(state, problem, problem.theta0, k, Stream(k)).states[0].hessian for k in range(200 if curvature == "hutchinson" else 1)]
    assert all(list(h) == own for h in found)
    mean = torch.cat([torch.stack([h[n] for h in found]).mean(0).reshape(-1) for n in own])
    if curvature == "gnb":
        alone = problem.layout.named(whole.estimate(problem, problem.theta0, Stream(0) / 0))
        torch.testing.assert_close(mean, torch.cat([alone[n].reshape(-1) for n in own]), rtol=1e-12, atol=0)
        return
    H, at = problem.hvp(problem.theta0, torch.eye(problem.p, dtype=DOUBLE)), torch.cat([torch.full((b.numel(),), n in own) for n, b in matrices.items()])
    inside = H[at][:, at]
    noise = (inside.square().sum(1) - inside.diag().square()).sqrt() / 200 ** .5      # of the mean; blocks of others would add theirs
    assert ((mean - inside.diag()).abs() <= 5 * noise + 1e-12).all() and 0.8 < ((mean - inside.diag()) / noise)[noise > 1e-9].square().mean().sqrt() < 1.2


def test_groups_with_sophia_are_rules_that_resume():
    rule = Groups((("matrix", Sophia(.01, every=3)), ("*", Groups((("*", GD(.1)),)))))
    digits = load_dataset("digits-30").to(dtype=DOUBLE)
    problem = Problem(build_model("fc-tanh:width=3,depth=1", digits), "mse", digits)
    check_stepper(Descent(rule), problem)
    seen = [s.rule.states[0].refreshed for s in islice(trajectory(problem, Descent(rule)), 7)]
    assert seen == [0, 0, 0, 3, 3, 3, 6] or seen[1:] == [0, 0, 3, 3, 3, 6], seen
    with pytest.raises(ValueError, match="KFAC looks at the whole network.*give this group another rule"): Groups((("matrix", KFAC(.01)), ("*", GD(.1))))


def test_rules_that_draw_examples_are_no_estimators_and_take_whole_numbers_of_them():
    assert {"sophia", "kfac"} <= RULES.keys() and not {"sophia", "kfac"} & ESTIMATORS.keys()
    with pytest.raises(ValueError, match="KFAC needs a whole number 1 ≤ size < inf, got size=2.5"): KFAC(.01, size=2.5)
    with pytest.raises(ValueError, match="whole"): check_range(make_dataclass("Mine", [("size", "int | None")])(2.5), "size", 1)      # as after from __future__ import annotations
