"K-FAC: factors and second moments by brute force, directions by dense solves, and the factors of another library."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradnb import Descent, MiniBatch, Momentum, PROBES, Problem, Stream, View, load_dataset, trajectory
from gradnb.runs.laws import check_rule, check_stepper
from gradnb.problem.modes import drawing
from gradnb.move.rules.kfac import KFAC, estimate_factors, estimate_moments, positions
from gradnb.move.rules.schedule import Cosine, Scheduled

DIGITS = load_dataset("digits-40")


class Tokens(nn.Module):
    "A linear layer at eight positions of one example."
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(8, 6), nn.Linear(6, 10, bias=False)

    def forward(self, x): return self.out(self.embed(x.squeeze(1)).tanh().mean(1))


NETWORKS = {
    "fc": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 10)),
    "conv": lambda: nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, (2, 3), dilation=(2, 1), bias=False),
                                  nn.Tanh(), nn.Flatten(), nn.Linear(8, 10)),
    "same": lambda: nn.Sequential(nn.Conv2d(1, 2, 4, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(128, 10)),
    "conv1d": lambda: nn.Sequential(nn.Flatten(1, 2), nn.Conv1d(8, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 10)),
    "positions": Tokens,
}


def make(name="fc", loss="ce"):
    with drawing(Stream(0), torch.device("cpu")): module = NETWORKS[name]().double()
    return Problem(module, loss, DIGITS)


@pytest.mark.parametrize("name", NETWORKS)
def test_positions_give_the_gradient(name):
    "Σ_t δ_t ā_tᵀ is the gradient of one example, whatever the layer."
    problem = make(name)
    io, = problem.layer_io(problem.theta0)
    expected = problem.example_grads(problem.theta0)
    for layer in io.layers:
        a, d = positions(layer)
        g = torch.bmm(d.mT, a)
        if "bias" in layer.params: g = torch.cat([g[..., :-1].flatten(1), g[..., -1]], 1)
        torch.testing.assert_close(g.flatten(1), expected[:, layer.span])


def test_factors_are_means_of_outer_products():
    problem = make("conv")
    io, = problem.layer_io(problem.theta0)
    factors = estimate_factors(problem.layer_io(problem.theta0, rows=7))
    for layer in io.layers:
        a, d = positions(layer)
        A = sum(torch.outer(v, v) for i in range(len(a)) for v in a[i]) / len(a)
        G = sum(torch.outer(v, v) for i in range(len(d)) for v in d[i]) / (len(d) * d.shape[1])
        torch.testing.assert_close(factors[layer.name], (A, G))


def test_patches_are_those_of_a_convolution():
    problem = make("conv")
    io, = problem.layer_io(problem.theta0)
    a, _ = positions(io.layers[0])
    w = problem.layout.named(problem.theta0)
    out = a @ torch.cat([w["0.weight"].flatten(1), w["0.bias"][:, None]], 1).T
    expected = F.conv2d(problem.dataset.x, w["0.weight"], w["0.bias"], stride=2, padding=1)
    torch.testing.assert_close(out.mT.reshape(expected.shape), expected)


@pytest.mark.parametrize("pi", [False, True])
@pytest.mark.parametrize("name", ["fc", "conv"])
def test_direction_is_the_damped_dense_solve(name, pi):
    problem, rule = make(name), KFAC(.1, damping=.02, pi=pi, fisher="empirical", clip=None)
    state = next(trajectory(problem, Descent(rule)))
    grads = problem.layout.named(state.grad)
    out = rule.precondition(state.rule, grads)
    for layer, (A, G) in state.rule.factors.items():
        v = grads[f"{layer}.weight"].flatten(1)
        if f"{layer}.bias" in grads: v = torch.cat([v, grads[f"{layer}.bias"][:, None]], 1)
        eye = lambda M: torch.eye(len(M), dtype=M.dtype)
        if pi:
            split = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
            dense = torch.kron(G + .02 ** .5 / split * eye(G), A + .02 ** .5 * split * eye(A))
        else: dense = torch.kron(G, A) + .02 * torch.eye(len(A) * len(G), dtype=A.dtype)
        expected = torch.linalg.solve(dense, v.flatten()).view_as(v)
        torch.testing.assert_close(out[f"{layer}.weight"].flatten(1), expected[:, :grads[f"{layer}.weight"][0].numel()])


@pytest.mark.parametrize("name", ["fc", "conv", "positions"])
def test_ekfac_measures_every_example_along_the_eigenvectors(name):
    problem, rule = make(name), KFAC(.1, ekfac=True)
    factors = estimate_factors(problem.layer_io(problem.theta0))
    bases = {k: rule.inverted(*f) for k, f in factors.items()}
    moments = estimate_moments(problem.layer_io(problem.theta0, rows=9), bases)
    io, = problem.layer_io(problem.theta0)
    for layer in io.layers:
        (a, d), (left, right, _) = positions(layer), bases[layer.name]
        expected = torch.stack([(left.T @ d[i].T @ a[i] @ right).square() for i in range(len(a))]).mean(0)
        torch.testing.assert_close(moments[layer.name], expected)


def test_sampled_factors_approach_the_fisher_matrix():
    "One linear layer under softmax: G is E[diag(p) − ppᵀ]."
    with drawing(Stream(0), torch.device("cpu")): module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    problem = Problem(module, "ce", DIGITS)
    p = problem.outputs(problem.theta0, problem.dataset.x).softmax(1)
    truth = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    draws = torch.stack([estimate_factors(problem.layer_io(problem.theta0, labels=Stream(k)))["1"][1] for k in range(200)])
    z = (draws.mean(0) - truth) / (draws.std(0) / 200 ** .5)
    assert z.abs().max() < 4.5 and z.square().mean() < 1.7


def test_clip_bounds_the_step_in_the_fisher_metric():
    problem = make()
    for clip in (1e-6, 1e-2):
        rule = KFAC(.5, beta=0., clip=clip, fisher="empirical")
        state = next(trajectory(problem, Descent(rule)))
        grads, after = problem.layout.named(state.grad), Descent(rule).step(problem, state).theta
        free = problem.layout.join(rule.precondition(state.rule, grads).values())
        moved = (problem.theta0 - after) / .5
        assert .25 * (free @ state.grad) > clip                    # the clip is at work
        torch.testing.assert_close(.25 * (moved @ state.grad) ** 2 / (free @ state.grad), torch.tensor(clip, dtype=torch.float64))
        torch.testing.assert_close(moved / moved.norm(), free / free.norm())


@pytest.mark.parametrize("wrap", [lambda rule: rule, lambda rule: Scheduled(rule, Cosine(10, floor=1.))], ids=["itself", "scheduled"])
def test_the_clip_is_off_while_the_variance_is_measured(wrap):
    "What is measured is η² Tr Cov of the preconditioned gradient, at factors that stay."
    problem, rule = make(), KFAC(.5, beta=0., clip=1e-8, fisher="empirical")
    stepper = Descent(wrap(rule), MiniBatch(8))
    state = next(trajectory(problem, stepper))
    view = View(problem, stepper, state, Stream(3))
    inner = getattr(state.rule, "inner", state.rule)
    free = [problem.layout.join(rule.precondition(inner, problem.layout.named(stepper.prepare(problem, state, view.stream / "updates" / i).grad)).values())
            for i in range(20)]
    free, clipped = torch.stack(free), view.updates(20)
    measured = PROBES.build("update_variance:draws=20").measure(view)
    assert measured["value"] == pytest.approx(.25 * free.var(0).sum().item(), rel=1e-9)
    assert clipped.var(0).sum() < 1e-3 * measured["value"]


@pytest.mark.parametrize("fisher, loss", [("true", "ce"), ("empirical", "ce"), ("true", "unit_mse")])
def test_targets_of_the_model_or_of_the_data(fisher, loss):
    "G of the last layer: near the Hessian of the loss in the outputs where targets are sampled, the residuals' own otherwise."
    problem = make(loss=loss)
    state = next(trajectory(problem, Descent(KFAC(.1, fisher=fisher))))
    out, y = problem.outputs(problem.theta0, problem.dataset.x), problem.dataset.y
    data = (out.softmax(1) - F.one_hot(y, 10)) if loss == "ce" else .2 * (out - 10 ** .5 * F.one_hot(y, 10))
    data, model = data.T @ data / len(y), (torch.diag_embed(out.softmax(1)) - out.softmax(1)[:, :, None] * out.softmax(1)[:, None]).mean(0)
    if loss == "unit_mse": model = .2 * torch.eye(10, dtype=out.dtype)
    G, other = state.rule.factors["3"][1], data if fisher == "empirical" else model
    if fisher == "empirical": torch.testing.assert_close(G, other)
    else: assert (G - other).norm() < .6 * other.norm() and not torch.allclose(G, data, rtol=.01)


def test_factors_are_moving_averages():
    "By the recursion, with estimates of its own at every other step."
    problem, stepper, mean = make(), Descent(KFAC(.05, every=2, decay=.7, fisher="empirical")), {}
    for k, state in zip(range(7), trajectory(problem, stepper)):
        if k % 2 == 0:
            new = estimate_factors(problem.layer_io(state.theta))
            mean = new if k == 0 else {n: tuple(.7 * a + .3 * b for a, b in zip(mean[n], new[n])) for n in new}
        torch.testing.assert_close(state.rule.factors, mean)


def test_refresh_is_idempotent_keeps_time_and_resumes():
    problem, stepper = make(), Descent(KFAC(.05, every=2, invert=4, size=16))
    check_rule(KFAC(.05))
    check_stepper(stepper, problem)
    check_stepper(Descent(KFAC(.05, every=2, invert=3, ekfac=True)), problem)
    states = [s for s, _ in zip(trajectory(problem, stepper), range(6))]
    assert [s.rule.refreshed for s in states] == [0, 0, 2, 2, 4, 4]
    assert states[2].rule.inverse["1"][0] is states[0].rule.inverse["1"][0]


def test_without_a_refresh_it_is_momentum():
    problem = make()
    blocks = problem.layout.named(problem.theta0)
    grads = problem.layout.named(problem.grad_and_loss(problem.theta0)[0])
    ours, theirs = KFAC(.1, .9), Momentum(.1, .9)
    a, b = ours.step(ours.init(blocks, {}), blocks, grads)[0], theirs.step(theirs.init(blocks, {}), blocks, grads)[0]
    assert all(torch.equal(a[k], b[k]) for k in blocks)


@pytest.mark.parametrize("module, why", [
    (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 10)), r"'1' \(groups=2\)"),
    (lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(256, 10)), "circular"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 10)), "LayerNorm")])
def test_layers_without_factors_are_named(module, why):
    problem = Problem(module().double(), "ce", DIGITS)
    with pytest.raises(TypeError, match=why): next(trajectory(problem, Descent(KFAC(.1))))


def test_a_diverged_run_ends_as_one():
    from gradnb import train
    with pytest.warns(RuntimeWarning, match="loss is"):
        _, traces = train(make(), Descent(KFAC(1e308, clip=None, every=1, invert=1)), 20, progress=False)
    assert traces.outcome.kind == "diverged"


def test_against_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    with drawing(Stream(0), torch.device("cpu")): module = NETWORKS["fc"]().double()
    problem = Problem(module, "ce", DIGITS)
    theirs = curvlinops.KFACLinearOperator(module, nn.CrossEntropyLoss(), list(module.parameters()),
                                           [(problem.dataset.x, problem.dataset.y)], fisher_type="empirical",
                                           separate_weight_and_bias=False, check_deterministic=False)
    v = torch.randn(problem.p, generator=Stream(1).generator(), dtype=torch.float64)
    named, expected = problem.layout.named(v), theirs @ v
    factors, out = estimate_factors(problem.layer_io(problem.theta0)), {}
    for name, (A, G) in factors.items():
        V = torch.cat([named[f"{name}.weight"], named[f"{name}.bias"][:, None]], 1)
        U = G @ V @ A
        out[f"{name}.weight"], out[f"{name}.bias"] = U[:, :-1], U[:, -1]
    torch.testing.assert_close(problem.layout.join(out[n] for n in problem.layout.names), expected)
