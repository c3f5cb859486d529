"K-FAC as a torch optimizer: the rule's own steps, hooks that can be silenced and removed, states that travel."
import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gradnb import Descent, MiniBatch, Problem, load_dataset, optim, trajectory
from gradnb.move.faces.estimated import Estimated
from gradnb.problem.modes import drawing
from gradnb.move.rules.kfac import KFAC
from gradnb.ground.streams import Stream

DIGITS = load_dataset("digits-60")


def network(dtype=torch.float64):
    with drawing(Stream(0), torch.device("cpu")):
        return nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 10)).to(dtype)


def backward(net, opt, observe=True):
    opt.zero_grad()
    x = DIGITS.x.to(next(net.parameters()).dtype)
    loss = nn.functional.cross_entropy(net(x), DIGITS.y)
    loss.backward()
    if observe: opt.observe(x, DIGITS.y)
    return loss


@pytest.mark.parametrize("hyper", [{}, dict(ekfac=True, pi=False), dict(clip=None, decay=0., beta=0.)], ids=str)
def test_the_same_steps_as_inside(hyper):
    hyper = dict(every=2, invert=4, fisher="empirical") | hyper
    net = network()
    opt = optim.KFAC(net, .05, **hyper)
    for state, _ in zip(trajectory(Problem(network(), "ce", DIGITS), Descent(KFAC(.05, **hyper))), range(7)):
        torch.testing.assert_close(state.theta, torch.cat([p.detach().flatten() for p in net.parameters()]), rtol=1e-9, atol=1e-12)
        backward(net, opt)
        opt.step()


def test_targets_from_the_model_lower_the_loss():
    net = network()
    opt = optim.KFAC(net, .05, damping=.03, every=3, invert=3)
    losses = []
    for _ in range(15):
        losses.append(float(backward(net, opt, observe=False).detach()))
        opt.step()
    assert losses[-1] < .7 * losses[0]


def test_hooks_are_silent_where_they_should_be():
    net = network()
    opt = optim.KFAC(net, .05)
    with torch.no_grad(): net(DIGITS.x.double())
    net.eval()(DIGITS.x.double()).sum().backward()
    net.train()
    with opt.silent(): net(DIGITS.x.double()).sum().backward()
    assert not opt._seen
    copy.deepcopy(net)(DIGITS.x.double()).sum().backward()
    assert not opt._seen
    net(100 * DIGITS.x.double())
    assert not opt._seen                                    # no gradient comes from it
    net(DIGITS.x.double()).sum().backward()
    assert len(opt._seen) == 1
    backward(net, opt)
    opt.step()
    net(DIGITS.x.double()).sum().backward()
    assert not opt._seen                                    # nothing is due at the second step
    opt.remove_hooks()
    assert not net._forward_hooks


@pytest.mark.parametrize("clear", [lambda net, opt: opt.zero_grad(), lambda net, opt: opt.zero_grad(set_to_none=False), lambda net, opt: net.zero_grad()])
def test_micro_batches_count_as_their_batch(clear):
    "Halves, with other calls among them, give the factors of the whole; what was cleared does not count."
    whole, parts = network(), network()
    x, y = DIGITS.x.double(), DIGITS.y
    (one, two) = (optim.KFAC(net, .05, every=1, invert=1, fisher="empirical") for net in (whole, parts))
    for _ in range(3):
        one.zero_grad()
        nn.functional.cross_entropy(whole(x), y).backward()
        one.observe(x, y)
        one.step()
        parts(100 * x).sum().backward()
        clear(parts, two)
        for half in (slice(0, 30), slice(30, 60)):
            (nn.functional.cross_entropy(parts(x[half]), y[half]) / 2).backward()
            parts(3 * x)                                    # looked at, and no more
        two._seen = [call._replace(targets=y[half]) for call, half in zip(two._seen, (slice(0, 30), slice(30, 60)), strict=True)]
        two.step()
    for p, q in zip(whole.parameters(), parts.parameters()): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


class Masked(nn.Module):
    "A network of two inputs, one of them a keyword."
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)
    def forward(self, x, mask=None):
        h = self.first(x.flatten(1)).tanh()
        return self.last(h if mask is None else h * mask)


@pytest.mark.parametrize("call", [lambda net, x: net(x=x), lambda net, x: net(x, torch.ones(8).to(x)), lambda net, x: net(x, mask=torch.ones(8).to(x))])
def test_the_network_may_be_called_as_it_likes(call):
    with drawing(Stream(0), torch.device("cpu")): net = Masked().double()
    twin, x, y = copy.deepcopy(net), DIGITS.x.double(), DIGITS.y
    one, two = optim.KFAC(net, .05), optim.KFAC(twin, .05)
    with torch.no_grad(): call(net.eval(), x)
    net.train()
    for _ in range(2):
        for n, o, out in ((net, one, call(net, x)), (twin, two, twin(x))):
            o.zero_grad()
            nn.functional.cross_entropy(out, y).backward()
            o.step()
    for p, q in zip(net.parameters(), twin.parameters()): torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_weight_normalised_layer(norm):
    with drawing(Stream(0), torch.device("cpu")): net = nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 5)), nn.Tanh(), nn.Linear(5, 10)).double()
    opt = optim.KFAC(net, .05)
    nn.functional.cross_entropy(net(DIGITS.x.double()), DIGITS.y).backward()
    with pytest.raises(TypeError, match="no factors for layer '1.*its weight is made of"): opt.step()


def test_measurements_through_the_networks_module_are_not_seen():
    "Factors are due, the network is in training mode, and gradnb measures with the module that the hook sits on."
    net = network()
    opt = optim.KFAC(net, .05)
    problem = Problem(net, "ce", DIGITS.to(dtype=torch.float64))
    for measure in (problem.loss, problem.grad_and_loss, lambda t: problem.hvp(t, t), lambda t: list(problem.layer_io(t)), problem.example_grads):
        measure(problem.theta0)
        assert not opt._seen
    net(DIGITS.x[:7].double()).sum().backward()
    problem.grad_and_loss(problem.theta0)
    assert [len(call.args[0]) for call in opt._seen] == [7]


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_an_estimator_shows_its_batches(fisher):
    net, twin = network(), network()
    hyper = dict(every=2, invert=2, fisher=fisher)
    run = Estimated(optim.KFAC(net, .05, **hyper), Problem(net, "ce", DIGITS.to(dtype=torch.float64)), MiniBatch(20))
    opt = optim.KFAC(twin, .05, **hyper)
    for k in range(4):
        idx = MiniBatch(20).sample((), run.problem, Stream(0) / "train" / k / "batch").idx
        x, y = DIGITS.x[idx].double(), DIGITS.y[idx]
        opt.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        opt.observe(x, y if fisher == "empirical" else None)
        opt.step()
        run.step()
        for p, q in zip(net.parameters(), twin.parameters()): torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_what_has_no_gradient_stays():
    net = network()
    opt, start = optim.KFAC(net, .05), copy.deepcopy(net)
    opt.step()
    assert not opt.state and opt.param_groups[0]["step"] == 0
    for k in range(3):
        backward(net, opt, observe=False)
        if k > 0: net[0].bias.grad = None
        if k == 1: held, velocity = net[0].bias.detach().clone(), opt.state[net[0].bias]["velocity"].clone()
        opt.step()
    assert torch.equal(net[0].bias, held) and torch.equal(opt.state[net[0].bias]["velocity"], velocity)
    assert not torch.equal(net[0].bias, start[0].bias) and not torch.equal(net[0].weight, start[0].weight)


def test_the_network_is_not_disturbed_by_looking():
    "BatchNorm's running statistics move once a step, by the training pass, and torch's generator stays."
    with drawing(Stream(0), torch.device("cpu")):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 10)).double()
    twin, rng = copy.deepcopy(net), torch.get_rng_state()
    opt = optim.KFAC(net, .05, every=1, invert=1)
    for n in (net, twin): nn.functional.cross_entropy(n(DIGITS.x.double()), DIGITS.y).backward()
    opt.step()
    assert torch.equal(net[2].running_mean, twin[2].running_mean) and torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("travel", ["pickle", "deepcopy", "state dict"])
def test_it_travels(travel):
    net = network()
    opt = optim.KFAC(net, .05, every=2, fisher="empirical", ekfac=True)
    for _ in range(3):
        backward(net, opt)
        opt.step()
    if travel == "pickle": twin_net, twin = pickle.loads(pickle.dumps((net, opt)))
    elif travel == "deepcopy": twin_net, twin = copy.deepcopy((net, opt))
    else:
        twin_net, file = copy.deepcopy(net), io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        twin = optim.KFAC(twin_net, 1.)
        twin.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        for n, o in ((net, opt), (twin_net, twin)):
            backward(n, o)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin_net.parameters()))
    twin_net(DIGITS.x.double())
    assert twin.module is twin_net


def test_schedulers_closures_maximize_and_tensor_rates():
    net, climber = network(), network()
    opt = optim.KFAC(net, torch.tensor(.05), fisher="empirical")
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=.1)
    before = float(opt.step(lambda: backward(net, opt)).detach())
    scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(.005) and before > 0
    up = optim.KFAC(climber, .01, maximize=True, fisher="empirical")
    losses = []
    for _ in range(4):
        losses.append(float(backward(climber, up).detach()))
        up.step()
    assert losses[-1] > losses[0]


def test_what_is_refused_says_why():
    net = network()
    opt = optim.KFAC(net, .05, fisher="empirical")
    backward(net, opt, observe=False)
    with pytest.raises(RuntimeError, match="opt.observe"): opt.step()
    with pytest.raises(ValueError, match="linear_hinge"):
        hinge = optim.KFAC(net, .05, loss="linear_hinge")
        backward(net, hinge, observe=False)
        hinge.step()
    with pytest.raises(ValueError, match="one group"): opt.add_param_group({"params": []})
    with pytest.raises(ValueError, match="Did you mean 'damping'"): optim.KFAC(net, .1, dampin=.1)
    with pytest.raises(ValueError, match="1-element, got shape .2,."): optim.KFAC(net, torch.ones(2))
    for lr in (-1., float("nan")):
        with pytest.raises(ValueError, match=f"lr={lr}"): optim.KFAC(net, lr)
    with pytest.raises(TypeError, match="no meaning for complex parameters, and '0.weight' is one"): optim.KFAC(nn.Sequential(nn.Linear(3, 2, dtype=torch.complex128)), .1)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 10)).double()
    with pytest.raises(TypeError, match=r"no factors for layer '2' \(LayerNorm\)"):
        lost = optim.KFAC(normed, .1)
        backward(normed, lost)
        lost.step()
    net[3].weight.grad = net[3].weight.grad.to_sparse()
    with pytest.raises(TypeError, match="dense gradients, but that of '3.weight' is sparse"): opt.step()


@pytest.mark.parametrize("build", [lambda p: torch.optim.SGD(p, .1, momentum=.9), torch.optim.AdamW, optim.LAMB, lambda p: optim.LARS(p, 1.)])
def test_a_state_dict_of_another_rule_is_refused(build):
    net, stranger = network(), network()
    opt, other = optim.KFAC(net, .05), build(stranger.parameters())
    backward(net, opt)
    opt.step()
    backward(stranger, opt, observe=False)
    other.step()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="not that of a KFAC"): opt.load_state_dict(other.state_dict())
    assert str(before) == str(opt.state_dict())
    for face in (optim.Momentum(network().parameters(), .1), optim.LAMB(network().parameters())):
        with pytest.raises(ValueError, match=type(face).__name__): face.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.functional.cross_entropy, nn.MSELoss(reduction="sum")])
def test_a_loss_of_all_examples_at_once_is_refused_when_it_is_given(loss):
    with pytest.raises(TypeError, match="gives the (mean|sum) of all.*reduction='none'"): optim.KFAC(network(), lr=.1, loss=loss)


def test_a_function_that_averages_is_named_at_the_step():
    "And the same function of single examples gives the steps of the loss by name."
    net, other, third = network(), network(), network()
    opt = optim.KFAC(net, lr=.1, loss=lambda out, y: nn.functional.cross_entropy(out, y), fisher="empirical")
    backward(net, opt)
    with pytest.raises(TypeError, match=r"each example costs, \(b,\).*gave shape \(\) for 60 examples"): opt.step()
    for it, loss in ((other, nn.CrossEntropyLoss(reduction="none")), (third, "ce")):
        opt = optim.KFAC(it, lr=.1, loss=loss, fisher="empirical")
        backward(it, opt)
        opt.step()
    assert all(map(torch.equal, other.parameters(), third.parameters()))
