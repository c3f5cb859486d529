"What a training left behind gives the numbers that it would have given itself, whoever wrote the files; nothing in them is executed."
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gradnb
from gradnb import Descent, GD, MiniBatch, Momentum, Problem, Store, every, load_dataset, measure_weights, probe, train
from gradnb.cli import main
from gradnb.runs.foreign.checkpoints import find_weights, read_weights, step_of

ROOT = Path(__file__).resolve().parents[1]
DATA = load_dataset("digits-60")


def network(seed=0, norm=True):
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), first=nn.Linear(64, 4), norm=nn.BatchNorm1d(4) if norm else nn.Identity(), act=nn.Tanh(), last=nn.Linear(4, 10)))


def states(net, problem, views):
    "A state dict for what each view saw."
    for theta, buffers in views: yield {**problem.layout.named(theta), **{k: v.clone() for k, v in net.state_dict().items() if "running" in k or "tracked" in k}, **dict(buffers)}



@pytest.mark.parametrize("estimator", [None, 16])
def test_the_numbers_are_those_of_the_run_itself(tmp_path, estimator):
    net, seen = network(), {}
    problem = Problem(net, "ce", DATA)
    words = ["sharpness:every=10,k=2", "sharpness:every=10,frozen=true", "grad_norm:every=10"] + ["grad_variance:every=10"] * (estimator is not None)
    keep = probe(10, "keep")(lambda view: seen.update({view.step: (view.theta.clone(), dict(view.state.buffers))}) or 0.)
    _, own = train(problem, Descent(Momentum(.05), *([MiniBatch(estimator)] if estimator else [])), 30, [*words, keep], progress=False)
    for step, state in zip(seen, states(net, problem, seen.values())): save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / f"step_{step}.safetensors")
    found = measure_weights(problem, str(tmp_path / "*.safetensors"), words, batch_size=estimator)
    assert found.outcome.kind == "finished" and [*found] == [n for n in own if n not in ("loss", "keep")]
    for name, trace in found.items():
        assert trace.steps.tolist() == [0, 10, 20, 30]
        for column, v in trace.columns.items(): np.testing.assert_allclose(v, own[name].columns[column], rtol=1e-6, atol=1e-9)


def wrapped(form, state, folder):
    "A file of a state dict as one program or another writes it."
    pre = lambda p: {p + k: v for k, v in state.items()}
    other = {k: v + 9 for k, v in state.items()}
    trees = {"plain": state, "model": {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": .1}]}, "epoch": 2},
             "lightning": {"state_dict": pre("model."), "global_step": 70, "pytorch-lightning_version": "2.4", "callbacks": {"a": {"best": torch.tensor(1.)}}, "seed": 2**40},
             "ddp": {"model_state_dict": pre("module."), "step": 70}, "compiled": pre("_orig_mod."), "compiled in ddp": {"state_dict": pre("module._orig_mod.")},
             "compiled layer": {k.replace("first.", "first._orig_mod."): v for k, v in state.items()}, "net": pre("net."), "module key": {"module": state},
             "ema beside": {"model": state, "ema": other, "model_ema": {"module": other}}, "teacher beside": {"state_dict": pre("model.") | {f"teacher.{k}": v for k, v in other.items()}},
             "own prefix": pre("student.encoder."), "deep": {"a": {"b": {"state_dict": pre("module.model.")}}}, "with a head": {"state_dict": pre("model.") | {"criterion.weight": torch.ones(10)}}}
    if form == "safetensors": save_file({k: v.contiguous() for k, v in state.items()}, file := folder / "w_70.safetensors", {"format": "pt"})
    elif form == "half": save_file({k: v.to(torch.float16 if v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()}, file := folder / "w_70.safetensors")
    elif form == "hugging face":
        (file := folder / "checkpoint-70").mkdir()
        names = [*state]
        for i, part in enumerate((names[:2], names[2:])): save_file({k: state[k].contiguous() for k in part}, file / f"model-{i + 1:05}-of-00002.safetensors")
    elif form == "before 1.6": torch.save(state, file := folder / "w_70.pt", _use_new_zipfile_serialization=False)
    else: torch.save(trees[form], file := folder / "w_70.ckpt")
    return file


@pytest.mark.parametrize("form", ["safetensors", "hugging face", "before 1.6", "plain", "model", "lightning", "ddp", "compiled", "compiled in ddp", "compiled layer", "net", "module key",
                                  "ema beside", "teacher beside", "own prefix", "deep", "with a head", "half"])
def test_whoever_wrote_it(tmp_path, form):
    problem, other = Problem(network(), "ce", DATA), network(1)
    other(torch.randn(9, 64))                                              # its running statistics have moved
    tree = read_weights(file := wrapped(form, other.state_dict(), tmp_path))
    theta, held = find_weights(problem, tree, "file")
    exact = dict(rtol=2e-3, atol=1e-4) if form == "half" else dict(rtol=0, atol=0)
    torch.testing.assert_close(theta, nn.utils.parameters_to_vector(other.parameters()).detach(), **exact)
    torch.testing.assert_close(held["norm.running_mean"].float(), other.norm.running_mean, **exact)
    assert step_of(file, tree) == 70


def test_the_loss_is_that_of_the_network_with_its_running_statistics():
    net, other = network().eval(), network(1)
    for _ in range(3): other(DATA.x)
    other.eval()
    for given in (net, network()):                                         # in evaluation and in training mode
        found = measure_weights(Problem(given, "ce", DATA), {5: other.state_dict()}, ["train:frozen=true"])
        with torch.no_grad(): right = nn.functional.cross_entropy(other(DATA.x), DATA.y)
        assert next(iter(found.values())).columns["loss"][0] == pytest.approx(right.item(), rel=1e-6)


def test_sharpness_of_one_checkpoint_is_that_of_the_whole_hessian(tmp_path):
    net, other = network(norm=False).double(), network(3, norm=False).double()
    torch.save(other.state_dict(), tmp_path / "best.pt")
    run = gradnb.measure(Problem(net, "mse", DATA), tmp_path / "best.pt", ["sharpness:k=3,tol=1e-8"], tmp_path / "runs", steps=12)
    params = {k: v.detach() for k, v in other.named_parameters()}
    targets = nn.functional.one_hot(DATA.y, 10).double()
    def loss(flat): return (torch.func.functional_call(other, dict(zip(params, (b.view_as(p) for b, p in zip(flat.split([p.numel() for p in params.values()]), params.values())))), DATA.x.double()) - targets).square().sum(1).mean() / 2
    H = torch.autograd.functional.hessian(loss, nn.utils.parameters_to_vector(other.parameters()).detach())
    top = torch.linalg.eigvalsh(H).flip(0)[:3]
    assert run.trace("sharpness").values[0] == pytest.approx(top.numpy(), rel=1e-6)
    assert run.trace("sharpness").steps.tolist() == [12] and run.spec.fields["origin"] == "measured" and run.status == "finished"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.a, self.b, self.out = nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.b.weight = self.a.weight

    def forward(self, x): return self.out(self.b(self.a(self.flat(x)).tanh()))


@pytest.mark.parametrize("left", ["a.weight", "b.weight"])
def test_a_tied_parameter_goes_by_either_name(left):
    problem, state = Problem(Tied(), "ce", DATA), Tied().state_dict()
    del state["b.weight" if left == "a.weight" else "a.weight"]
    assert torch.equal(problem.layout.named(find_weights(problem, state, "file").theta)["a.weight"], state[left])


def test_frozen_parameters_come_along():
    net, other = network(norm=False), network(5, norm=False)
    net.first.requires_grad_(False)
    found = measure_weights(Problem(net, "ce", DATA), {0: other.state_dict()}, ["train", "grad_norm"])
    loss = nn.functional.cross_entropy(other(DATA.x), DATA.y)
    assert found["train"].columns["loss"][0] == pytest.approx(loss.item(), rel=1e-6)
    g = torch.cat([v.reshape(-1) for v in torch.autograd.grad(loss, [*other.last.parameters()])])
    assert found["grad_norm"].values[0] == pytest.approx(g.norm().item(), rel=1e-5)


def test_what_does_not_fit_is_named_before_anything_is_measured(tmp_path):
    problem, state = Problem(network(), "ce", DATA), network(1).state_dict()
    good = tmp_path / "step_1.pt"
    torch.save(state, good)
    for change, words in (({"last.bias": None}, "has no last.bias"), ({"more.weight": torch.ones(2)}, "has, and the problem has not, more.weight"),
                          ({"last.weight": torch.ones(10, 5)}, r"last.weight \(10, 5\) for \(10, 4\)"), ({"norm.running_var": None}, "has no norm.running_var")):
        torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / "step_2.pt")
        with pytest.raises(ValueError, match=words): measure_weights(problem, str(tmp_path / "step_*.pt"), store=tmp_path / "runs")
    torch.save({"x": torch.ones(2)}, tmp_path / "step_2.pt")
    with pytest.raises(ValueError, match="none of this problem's parameters.*it has x"): measure_weights(problem, [good, tmp_path / "step_2.pt"], store=tmp_path / "runs")
    torch.save({"a": state, "b": state}, tmp_path / "step_2.pt")
    with pytest.raises(ValueError, match="2 times, under 'a', 'b'; say which: key='b'"): measure_weights(problem, tmp_path / "step_2.pt")
    assert not (tmp_path / "runs").exists()


def test_the_average_beside_the_weights_is_measured_by_its_key(tmp_path):
    problem, state, mean = Problem(network(), "ce", DATA), network(1).state_dict(), network(2).state_dict()
    torch.save({"state_dict": state, "averages": {"ema": {f"module.{k}": v for k, v in mean.items()}}}, tmp_path / "epoch_3.pth")
    for key, seed in ((None, 1), ("state_dict", 1), ("averages.ema", 2)):
        found = measure_weights(problem, tmp_path / "epoch_3.pth", ["grad_norm"], key=key)["grad_norm"]
        theta = problem.layout.join(dict(network(seed).named_parameters()).values())
        assert found.steps.tolist() == [3] and abs(found.values[0] - problem.grad_and_loss(theta)[0].norm()) < 1e-6
    with pytest.raises(ValueError, match="nothing under 'averages.swa'; at 'swa' there are ema"): measure_weights(problem, tmp_path / "epoch_3.pth", key="averages.swa")


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'run'}",)
    problem, state = Problem(network(), "ce", DATA), network(1).state_dict()
    for i, kind in enumerate((True, False)): torch.save({"model": state, "hyper": Evil()}, tmp_path / f"evil_{i}.pt", _use_new_zipfile_serialization=kind)
    torch.save(network(), tmp_path / "whole_2.pt")
    for file in tmp_path.glob("*.pt"):
        with pytest.raises(ValueError, match=f"{file.name} cannot be read.*it holds .*no data but code.*keep weights as data"): measure_weights(problem, file)
    assert not (tmp_path / "run").exists()


def test_a_distributed_checkpoint_is_refused_with_what_makes_a_file_of_it(tmp_path):
    dcp, utils = (pytest.importorskip(f"torch.distributed.checkpoint{part}") for part in ("", ".format_utils"))
    net, folder = network(), tmp_path / "step70"
    dcp.save({"model": net.state_dict()}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(ValueError, match=r"step70 is of torch.distributed.checkpoint, whose index is a pickle, .*dcp_to_torch_save\('.*step70', '.*step70.pt'\)"): read_weights(folder)
    utils.dcp_to_torch_save(folder, tmp_path / "step70.pt")
    problem = Problem(net, "ce", DATA)
    assert torch.equal(find_weights(problem, read_weights(tmp_path / "step70.pt"), "step70").theta, problem.theta0)


def test_a_broken_file_costs_itself_only(tmp_path):
    problem = Problem(network(), "ce", DATA)
    for step in (1, 2, 3): save_file(network(step).state_dict(), tmp_path / f"step_{step}.safetensors")
    data = (tmp_path / "step_2.safetensors").read_bytes()
    (tmp_path / "step_2.safetensors").write_bytes(data[:-5])
    with pytest.warns(RuntimeWarning, match="lost: .*step_2.safetensors cannot be read"):
        run = measure_weights(problem, str(tmp_path / "*.safetensors"), ["grad_norm"], tmp_path / "runs")
    assert run.trace("grad_norm").steps.tolist() == [1, 3] and run.status == "failed" and "step_2" in run.manifest["message"]
    with pytest.raises(ValueError, match="already"): measure_weights(problem, tmp_path / "step_1.safetensors", ["grad_norm"], tmp_path / "runs")
    save_file(network(9).state_dict(), tmp_path / "step_9.safetensors")
    (tmp_path / "step_2.safetensors").write_bytes(data)
    (tmp_path / "step_3.safetensors").unlink()
    run = measure_weights(problem, str(tmp_path / "*.safetensors"), ["grad_norm"], tmp_path / "runs", again="go on")
    theta = lambda k: problem.layout.join(dict(network(k).named_parameters()).values())
    assert run.trace("grad_norm").steps.tolist() == [1, 2, 3, 9] and run.status == "finished"
    np.testing.assert_allclose(run.trace("grad_norm").values, [float(problem.grad_and_loss(theta(k))[0].norm()) for k in (1, 2, 3, 9)], rtol=1e-6)
    looked = []
    @probe(every(1))
    def counted(view): looked.append(view.step); return 0.
    for again in ("refuse", "go on"): measure_weights(problem, str(tmp_path / "*.safetensors"), [counted], tmp_path / "runs", name="counted", again=again)
    assert looked == [1, 2, 9]                                                    # nothing twice
    for file in tmp_path.glob("*.safetensors"): file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"): measure_weights(problem, str(tmp_path / "*.safetensors"))


def test_a_probe_that_fails_costs_itself_only():
    problem, bad = Problem(network(norm=False), "ce", DATA), network(norm=False).state_dict()
    bad["last.bias"] = torch.full((10,), float("nan"))
    with pytest.warns(RuntimeWarning, match="sharpness at step 1: NotFinite"): found = measure_weights(problem, {0: network(norm=False).state_dict(), 1: bad, 2: problem.theta0}, ["sharpness", "grad_norm"])
    assert found["sharpness"].steps.tolist() == [0, 2] and found["grad_norm"].steps.tolist() == [0, 1, 2] and found.outcome.kind == "failed"
    with pytest.warns(RuntimeWarning, match="measure_weights.…, batch_size=128"): measure_weights(problem, problem.theta0, ["grad_variance"])
    with pytest.warns(RuntimeWarning, match="weights do not say what optimizer"): measure_weights(problem, problem.theta0, ["update_norms"])


def test_steps(tmp_path):
    assert [step_of(Path(n), {}) for n in ("step100.pt", "step_2.pt", "epoch=1-step=5-v3.ckpt", "a10b20.pt", "checkpoint-500/model.safetensors", "x.pt")] == [100, 2, 5, 20, 500, None]
    assert step_of(Path("last.ckpt"), {"global_step": torch.tensor(8)}) == 8 and step_of(Path("last.ckpt"), {"step": 3}) == 3
    problem, states = Problem(network(), "ce", DATA), [network(k).state_dict() for k in range(3)]
    for name, state in zip(("c_30.pt", "a_10.pt", "b_200.pt"), states): torch.save(state, tmp_path / name)
    assert measure_weights(problem, str(tmp_path / "*.pt"), ["grad_norm"])["grad_norm"].steps.tolist() == [10, 30, 200]
    assert measure_weights(problem, [tmp_path / "c_30.pt", tmp_path / "a_10.pt"], ["grad_norm"], steps=[4, 2])["grad_norm"].steps.tolist() == [2, 4]
    for weights, steps, words in (([], None, "no weights"), (states, None, "nobody says of which step"), (states, [1, 2], "3 checkpoints need as many steps"), (states, [1, 1, 2], "both of step 1"),
                                  (states, [1, 2, -3], "whole number")):
        with pytest.raises(ValueError, match=words): measure_weights(problem, weights, ["grad_norm"], steps=steps)
    with pytest.raises(FileNotFoundError, match="no file is called"): measure_weights(problem, str(tmp_path / "d*.pt"))
    with pytest.raises(ValueError, match="there is no .*d.pt"): measure_weights(problem, tmp_path / "d.pt")
    with pytest.raises(ValueError, match="must have shape"): measure_weights(problem, torch.zeros(3))


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom gradnb import Problem, load_dataset\ntorch.manual_seed(0)\n"
        "net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\ndef problem(): return Problem(net, 'ce', load_dataset('digits-60'))\n")
    nets = {k: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for k in (100, 20)}
    for k, net in nets.items(): torch.save({"state_dict": {f"model.{n}": v for n, v in net.state_dict().items()}}, tmp_path / f"step{k}.ckpt")
    run = lambda *words: subprocess.run([Path(sys.executable).with_name("gradnb"), "measure", *words], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    right = {k: torch.cat([g.reshape(-1) for g in torch.autograd.grad(nn.functional.cross_entropy(net(DATA.x), DATA.y), [*net.parameters()])]).norm().item() for k, net in nets.items()}
    many = run("mine:problem", "--weights", "step*.ckpt", "--probe", "grad_norm", "--store", "runs", "--csv")
    assert many.returncode == 0, many.stderr
    lines = [line.split(",") for line in many.stdout.splitlines()]
    assert lines[0] == ["step", "grad_norm"] and [int(float(line[0])) for line in lines[1:]] == [20, 100]
    assert [float(line[1]) for line in lines[1:]] == pytest.approx([right[20], right[100]], rel=1e-5)
    stored, = Store(tmp_path / "runs").list(origin="measured")
    assert stored.trace("grad_norm").values.tolist() == pytest.approx([right[20], right[100]], rel=1e-5)
    monkeypatch.chdir(tmp_path)                                             # the rest in this process
    def measure(*words): return main(["measure", *words]), *capsys.readouterr()
    code, out, _ = measure("mine.py:problem", "--weights", "step20.ckpt", "--probe", "grad_norm")
    assert code == 0 and "measured" in out and f"{right[20]:.4f}"[:5] in out and [*tmp_path.glob("runs*")] == [tmp_path / "runs"]
    _, out, _ = measure("mine:problem", "--weights", "step20.ckpt", "step100.ckpt", "--probe", "grad_norm", "--store", "others", "--csv")
    assert out == many.stdout                                      # as a shell spells step*.ckpt out
    code, out, err = measure("mine:problem", "--weights", "step20.ckpt", "--probe", "grad_variance")
    assert code and not out and "--batch 128" in err
    bad = run("mine:nothing", "--weights", "step20.ckpt")
    assert bad.returncode == 2 and "has no 'nothing'" in bad.stderr and "Traceback" not in bad.stderr
