"""Any line that anybody may type: never a traceback; a word that is wrong ends with status 2 and a sentence that names it.

The lines come from the parser itself, so that a new command, option or word is enrolled at once. Nothing is trained: a line that is right
ends where its run would begin.
"""
import argparse
import inspect
import re
import resource
import signal
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace

import pytest

from gradnb import MODELS, PROBES, SOURCES, GD, Spec, Store
from gradnb.cli import main
from gradnb.ground.roles import ESTIMATORS, RULES
from gradnb.models.losses import LOSSES
from gradnb.move.flows.integrators import METHODS
from gradnb.runs.sweeps.engines import ENGINES

VALUES = ["0", "1", "2", "3", "-1", "0.5", "1e-3", "1e400", "-0.0", "nan", "inf", "-inf", "none", "true", "false", "x", "", " ", "10" * 200, "9" * 30, "1,2", "(1,)", "(0.9,)",
          "(1,2,3)", "[]", "[1,[2]]", "{}", "{'a':1}", "()", "(", ")", "'", "''", '"a"', "b'x'", "1j", "1_000", "0x10", "a=b", "a:b", ":", ";", "=", ",", "..", "0..3", "3..0",
          "1..", "é", "\x1b[31m", "a\nb", "\u202e", "\x00", "$x$", "%s", "{x}", "../..", "/", "/dev/null", "~", "*", "-", "--", "[" * 200, "(" * 200, "not", "-x", "1 2", "Ellipsis", "..."]
SMALL = {"dataset": "digits-30", "model": "fc:width=2,depth=2", "loss": "ce", "rule": "gd", "lr": "0.1", "steps": "1", "probe": "train", "estimator": "minibatch:size=2", "tick": "0.1"}
DATASETS = [n for n in SOURCES if not re.match("mnist|fashion|kmnist|qmnist|emnist|cifar|svhn|imagenet|stl|usps|wikitext|shakespeare|ptb", n)]
WORDS = {"dataset": (DATASETS, SOURCES, 1), "model": (list(MODELS), MODELS, 2), "loss": (list(LOSSES), LOSSES, 2), "rule": (list(RULES), RULES, 0),
         "estimator": (list(ESTIMATORS), ESTIMATORS, 0), "probe": (list(PROBES), PROBES, 0), "method": (list(METHODS), METHODS, 0), "central": (list(RULES), RULES, 0),
         "engine": (list(ENGINES), ENGINES, 0)}


def call(random, dest):
    "A word of the language: a name, near a name, or none, with arguments of the builder's own or of nobody's, and any values."
    names, registry, given = WORDS[dest]
    name = re.sub(r"\{\w+\}", lambda _: random.choice(["2", "3", "x", "-1", "/nowhere.npz"]), random.choice(names)) if random.random() < .85 else random.choice(VALUES + ["digits-0", "digits-1k", "fc-tnh"])
    if dest == "dataset" and random.random() < .2: name += random.choice(["-0", "-5", "-1k", "-99999", "-x"])
    try: takes = [p for p in list(inspect.signature(registry[name]).parameters)[given:]]
    except (ValueError, KeyError): takes = []
    keys = [random.choice(takes if takes and random.random() < .85 else ["every", "lr", "x", "", "name"]) for _ in range(random.choice([0, 0, 1, 1, 2, 3]))]
    return name + (":" if keys else "") + ",".join(random.choice(["{}={}"] * 15 + ["{}{}"]).format(k, random.choice(VALUES)) for k in keys)


def value(random, action):
    "Something behind an option."
    name = action.dest
    if name in WORDS and random.random() < .9: return call(random, name)
    if name == "axis":
        path = random.choice(["seed", "rule", "rule.lr", "model.width", "estimator.size", "estimator", "probes", "probes.0.every", "steps", "dtype", "x", "", "rule.x.y", "loss_goal"])
        return f"{path}={random.choice(VALUES + [call(random, 'rule'), call(random, 'estimator'), '0..99999999999'])}"
    if name == "drop": return f"{random.choice(VALUES)}:{random.choice(VALUES)}"
    if action.choices and random.random() < .7: return str(random.choice(list(action.choices)))
    if name in ("where", "param") and random.random() < .8: return f"{random.choice(['seed', 'rule', 'rule.lr', 'status', 'size', 'steps', 'x', ''])}={random.choice(VALUES)}"
    if name in ("hash", "names") and random.random() < .5: return random.choice(["0", "a", "f" * 16, "spectrum", "landscape"])
    return random.choice(VALUES)


def parsers(parser, words=()):
    "Every command with its parser: (words, parser)."
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below: yield list(words), parser
    for a in below:
        for name, sub in a.choices.items(): yield from parsers(sub, (*words, name))


def the_parser():
    "The parser that `main` makes."
    found = []
    def caught(self, *args):
        found.append(self)
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        with pytest.raises(KeyboardInterrupt): main([])
    return found[0]


def line(random, words, parser):
    "One line: some options, some of them right, in any order."
    options = [a for a in parser._actions if a.option_strings and not isinstance(a, (argparse._HelpAction, argparse._VersionAction)) and a.dest != "store"]
    chosen = {a.dest: None for a in options if a.required or a.dest in SMALL and a.dest not in ("estimator", "probe")}
    parts = []
    wild = random.sample(options, min(len(options), random.choice([0, 1, 1, 2, 3])))
    for a in options:
        if a in wild: v = [] if a.nargs == 0 else [value(random, a)]
        elif a.dest in chosen and a.dest in SMALL: v = [SMALL[a.dest]]
        else: continue
        flag = random.choice(a.option_strings)
        parts.append([f"{flag}={v[0]}"] if v and flag.startswith("--") else [flag, *v])
    for a in parser._actions:
        if not a.option_strings: parts += [[value(random, a)] for _ in range(random.choice([0, 1, 1, 2]) if a.nargs in ("*", "?") else 1)]
    random.shuffle(parts)
    return [*words, *(w for p in parts for w in p)]


@pytest.fixture
def idle(tmp_path, monkeypatch):
    "No line trains, starts processes, draws or deletes."
    from gradnb.cli import train
    from gradnb.runs.sweeps import engines, slurm
    from gradnb.show import build
    store = Store(tmp_path / "runs")
    for seed in range(2): store.run(Spec("digits-30", "fc:width=2", "ce", GD(.1), 2, seed=seed), progress=False)
    for name in ("a.npz", "a.txt"): (tmp_path / name).write_bytes(b"PK\xff")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADNB_DATA", str(tmp_path))
    monkeypatch.setenv("GRADNB_STORE", str(tmp_path / "runs"))

    def run(self, spec, device="cpu", *args, **kwargs):
        spec.build(device)
        return SimpleNamespace(hash=spec.hash, manifest={"message": "would begin", "seconds": 0.}, path="", status="finished")
    monkeypatch.setattr(Store, "run", run)
    monkeypatch.setattr(Store, "remove", lambda *args: None)
    monkeypatch.setattr(train, "start_processes", lambda args: 0)
    monkeypatch.setattr(build, "draw", lambda plan, *args: build.FigureResult(plan.path.stem, plan.home, 0.))
    for engine in (engines.Pool, slurm.Slurm): monkeypatch.setattr(engine, "__call__", lambda self, jobs, worker: engines.Here()(jobs, worker))
    monkeypatch.setattr("gradnb.bench.harness.run_benches", lambda names: [] if not names else (_ for _ in ()).throw(ValueError(f"no bench {names[0]!r}.")))


@contextmanager
def bounded(seconds, gigabytes):
    "An end to what takes too long or too much."
    def late(*_): raise TimeoutError("too long")
    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    used = int(re.search(r"VmSize:\s*(\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), limits[1]))
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(lines, seed, capsys):
    "Faults of so many lines: (line, what is wrong)."
    random, faults = Random(seed), []
    commands = [*parsers(the_parser())]
    for _ in range(lines):
        words = line(random, *random.choice(commands + [c for c in commands if c[0][0] in ("train", "sweep", "flow")] * 3))
        fault = None
        try:
            with bounded(30, 4): code = main(words)
        except SystemExit as e: code = e.code
        except TimeoutError: code = 0
        except BaseException as e:
            code, frame = 2, next(reversed(inspect.getinnerframes(e.__traceback__)))
            fault = f"{type(e).__name__}: {e} at {frame.filename}:{frame.lineno}"
        said = capsys.readouterr()
        if code not in (0, 1, 2, 130): fault = f"status {code}"
        if code == 2 and not fault:
            last = said.err.strip().rpartition("gradnb")[2].partition(":")[2].strip() if "gradnb" in said.err else ""
            if len(last) < 12 or len(last.split()) < 3: fault = f"says {last!r}"
        if "Traceback" in said.err + said.out: fault = "Traceback among the words"
        if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\u202e]", (said.err + said.out).replace("\x1b[A", "")): fault = "raw control characters"
        if fault: faults.append((words, fault))
    return faults


def tell(faults): return "\n".join(f"{fault}\n    {words}" for words, fault in faults[:40])


def test_a_few_lines(idle, capsys):
    assert not (faults := fuzz(80, 0, capsys)), tell(faults)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_some_thousand_lines(idle, capsys, seed):
    assert not (faults := fuzz(1000, seed, capsys)), tell(faults)
