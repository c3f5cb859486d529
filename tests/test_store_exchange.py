"Runs leave for other tools as they were measured, and the original programs' files come in without anything of them being executed."
import argparse
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

from gradnb import GD, Run, Spec, Store
from gradnb.cli import main
from gradnb.cli.runs import summary
from gradnb.show.explorers.runs import RunExplorer
from gradnb.ground.files import SAID, seal
from gradnb.ground.traces import as_row
from gradnb.runs import Imported, Lock, Recorder
from gradnb.runs.exports import export_runs
from gradnb.runs.spec import SCHEMA
from gradnb.runs.originals import import_runs, load_foreign, read_edge, read_tail


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    for seed in (0, 1): store.run(Spec("digits-60", "fc-tanh:width=3", "mse", GD(0.05), 8, probes=("sharpness:every=4,k=2", "train:every=4"), seed=seed), progress=False)
    return store


def test_tensorboard_reads_what_was_measured(store, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = store.list()[0]
    folder, = export_runs([run], tmp_path, "tensorboard")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "train/loss", "train/accuracy", "sharpness/value.0", "sharpness/value.1",
                                             "sharpness/error.0", "sharpness/error.1", "sharpness/residual.0", "sharpness/residual.1", "sharpness/converged", "sharpness/matvecs"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(k, np.float32(v)) for k, v in zip(range(9), run.traces["loss"].values)]
    assert [e.step for e in events.Scalars("sharpness/value.1")] == [0, 4, 8]


def test_many_runs_in_one_frame(store):
    frame = store.frame("sharpness", rule="GD", seed=[0, 1])
    assert len(frame) == 6 and frame["run"].nunique() == 2 and frame["rule.lr"].unique().tolist() == [0.05]
    assert frame["probes"].unique().tolist() == ["sharpness:every=4,k=2, train:every=4"]
    for run in store.list():
        own = frame[frame["run"] == run.hash].reset_index(drop=True)[run.frame("sharpness").columns]
        assert own.equals(run.frame("sharpness"))
    assert len(store.frame(seed=1)) == 9 and {"loss", "train.accuracy"} <= {*store.frame().columns}
    assert [r.hash for r in store.list(probes="train:every=4", status="finished")] == [r.hash for r in store.list()]
    assert store.list(seed=lambda s: s > 5) == [] and store.table(seed=0)["step"].tolist() == [8]
    with pytest.raises(KeyError, match="has trace 'noise'"): store.frame("noise")
    with pytest.raises(ValueError, match="Did you mean 'dataset'"): store.list(datset="digits")


def test_a_damaged_spec_is_said_and_left_out(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    (copy.list()[0].path / "spec.json").write_text("{")
    with pytest.warns(RuntimeWarning, match=f"{copy.list()[0].hash} is left out: .*spec.json is damaged"): assert len(copy.list(rule="GD")) == 1
    os.rename(copy.list()[1].path, tmp_path / "elsewhere")
    (copy.root / ("0" * 16)).symlink_to(tmp_path / "elsewhere")
    assert len(copy.list()) == 1                                                # a run is a folder, not a link to one


def test_remove(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    copy.remove(gone := copy.list()[0].hash)
    assert [r.hash for r in copy.list()] == [r.hash for r in store.list() if r.hash != gone]
    with pytest.raises(KeyError): copy.remove(gone)


@pytest.mark.parametrize("name", ["spec.json", "manifest.json", "checkpoint.safetensors", "traces", "traces/loss.arrow"])
def test_links_are_not_followed(store, tmp_path, name):
    shutil.copytree(store.root, tmp_path / "copy")
    run = Store(tmp_path / "copy").list()[0]
    os.rename(run.path / name, tmp_path / "outside")
    (run.path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a link"): run.spec, run.traces, run.theta
    before = [(p, p.stat().st_mtime_ns) for p in (tmp_path / "outside").rglob("*")]
    with pytest.raises(ValueError, match="is a link"): Store(tmp_path / "copy").run(Spec("digits-60", "fc-tanh:width=3", "mse", GD(0.05), 8, probes=(
        "sharpness:every=4,k=2", "train:every=4"), seed=0 if run.hash == store.list(seed=0)[0].hash else 1), verify=True, progress=False)
    assert before == [(p, p.stat().st_mtime_ns) for p in (tmp_path / "outside").rglob("*")]


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("parts, rule", [("gd/lr_0.02", {"rule": "GD", "rule.lr": 0.02}),
                                         ("polyak/lr_0.02_beta_0.9", {"rule": "Momentum", "rule.nesterov": False, "rule.lr": 0.02, "rule.beta": 0.9}),
                                         ("nesterov/lr_1e-3_beta_0.5", {"rule": "Momentum", "rule.nesterov": True, "rule.lr": 0.001, "rule.beta": 0.5}),
                                         ("flow/tick_1.5", {"rule": "GradientFlow", "rule.tick": 1.5})])
def test_edge_of_stability(tmp_path, parts, rule, new_format):
    folder = tmp_path / "cifar10-5k" / "fc-tanh" / "seed_3" / "ce" / parts
    folder.mkdir(parents=True)
    loss, eigs = torch.rand(103), torch.rand(20, 3).sort(1, descending=True).values
    for name, v in {"train_loss": loss, "train_acc": 1 - loss, "test_loss": loss, "test_acc": loss, "eigs": eigs, "iterates": torch.empty(0, 0)}.items():
        torch.save(v, folder / f"{name}_final", _use_new_zipfile_serialization=new_format)
    torch.save({"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}, folder / "snapshot_final", _use_new_zipfile_serialization=new_format)
    if parts.startswith("flow"): torch.save(torch.arange(103) * 1.5, folder / "times", _use_new_zipfile_serialization=new_format)
    store = Store(tmp_path / "runs")
    run, = import_runs(tmp_path, store)
    assert run.status == "imported" and run.done and run.damage() == {} and run.manifest["unread"] == {}
    assert (run.manifest["schema"], run.manifest["stretches"]) == (SCHEMA, [])
    assert run.spec.settings == {"dataset": "cifar10-5k", "model": "fc-tanh", "loss": "ce", "seed": 3, "steps": 103} | rule
    assert run.traces["sharpness"].steps.tolist() == [*range(0, 100, 5)]        # 103 // 5 is 20, and no other interval fits
    np.testing.assert_array_equal(run.traces["sharpness"].values, eigs.double())
    np.testing.assert_array_equal(run.traces["train"].columns["accuracy"], (1 - loss).double())
    assert run.arrays["snapshot"][102]["fc.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert ("time" in run.traces) == parts.startswith("flow")
    assert [r.hash for r in import_runs(tmp_path, store)] == [run.hash]          # again: the same run


def test_eigenvalues_whose_interval_is_not_known_are_noted(tmp_path):
    folder = tmp_path / "cifar10-5k/fc-tanh/seed_0/mse/gd/lr_0.1"
    folder.mkdir(parents=True)
    for name, v in {"train_loss": torch.rand(11), "train_acc": torch.rand(11), "eigs": torch.rand(2, 1)}.items(): torch.save(v, folder / f"{name}_final")
    found = read_edge(folder)
    assert found.notes == ("eigs: measured every 4 to 5 steps, taken as 5",) and [k for k, _ in found.traces["sharpness"]] == [0, 5]
    assert [k for k, _ in read_edge(folder, eig_freq=4).traces["sharpness"]] == [0, 4] and read_edge(tmp_path) is None


def test_tail_index_without_arguments(tmp_path):
    folder = tmp_path / "5_0064_02_cifar10_linear_hinge_fc"
    folder.mkdir()
    torch.save([[k, torch.tensor(1.0), 50.0] for k in range(5)], folder / "training_history.hist")
    torch.save([[k, [1.0, 2.0], [0.1, 0.2]] for k in range(5)], folder / "weight_history.hist")
    torch.save([torch.eye(3), torch.ones(2, 3)], folder / "te_outputs.pyT")
    torch.save([[4, 0.7, 81.0, 1.2]], folder / "evaluation_history_TEST.hist")
    found = read_tail(folder)
    assert found.spec.settings == {"rule": "GD", "estimator": "MiniBatch", "depth": 5, "width": 64, "seed": 2, "dataset": "cifar10",
                                   "loss": "linear_hinge", "model": "fc"}
    assert "the launcher did not pass on" in found.notes[0]
    assert found.traces["loss"][4] == (4, {"value": torch.tensor(1.0), "accuracy": 0.5})
    assert found.traces["layer_norms"][0] == (0, {"weights": [1.0, 2.0], "grads": [0.1, 0.2]})
    assert found.traces["outputs_test"][0][1]["logits"].shape == (5, 3)


class Boom:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def test_nothing_is_executed_and_no_size_is_believed(tmp_path):
    boom, file = tmp_path / "boom", tmp_path / "file"
    for data in (pickle.dumps(Boom(boom)), b"cos\nsystem\n(S'touch boom'\ntR."):
        file.write_bytes(data)
        with pytest.raises(ValueError): load_foreign(file)
    for new in (True, False):
        torch.save([Boom(boom)], file, _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError): load_foreign(file)
    assert not boom.exists()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="compressed"): load_foreign(file)
    torch.save(torch.arange(10), file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    assert b"K\x0a" in data
    file.write_bytes(data.replace(b"K\x0a", b"J" + struct.pack("<i", 2**30)))
    with pytest.raises(ValueError, match="declares 1,073,741,824 elements"): load_foreign(file)


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match="has no results"): import_runs(tmp_path, Store(tmp_path / "runs"))


# stores of released versions: 0.1.0 has four runs that are done and one interrupted at step 217, 0.1.0-whole has that one uninterrupted
OLD, BROKEN = Path(__file__).parent / "stores", "a272b52508ae69fb"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD / "0.1.0", tmp_path / "runs")
    return Store(tmp_path / "runs")


def test_a_store_of_an_older_version_opens(old, tmp_path):
    assert {r.hash: r.status for r in old.list()} == {r: "interrupted" if r == BROKEN else "finished" for r in sorted(os.listdir(OLD / "0.1.0"))}
    assert all(r.damage() == {} and r.spec.hash == r.hash and old.open(r.spec).hash == r.hash for r in old.list())
    assert [r.hash for r in old.list(rule="LAMB", estimator__k=3)] == ["74bcdcb9d2a137e6"]
    table = old.table()
    assert len(table) == 5 and table.set_index("run").loc[BROKEN, ["status", "step"]].tolist() == ["interrupted", 217]
    assert set(old.frame("sharpness")["run"]) == {"5037e2b0730c5bad", "81c5f7a720e730d8", BROKEN} and len(old.frame()) == 21 + 21 + 11 + 21 + 218
    for folder in export_runs(old.list(), tmp_path / "csv"):
        assert pd.read_csv(folder / "loss.csv", float_precision="round_trip").equals(old.open(folder.name).frame("loss"))


def test_runs_of_an_older_version_that_are_done_are_not_trained_again(old, monkeypatch):
    def never(*_): raise AssertionError("trained again")
    monkeypatch.setattr("gradnb.runs.store.write_run", never)
    for run in old.list(status="finished"): assert old.run(run.spec).hash == run.hash
    with pytest.raises(AssertionError): old.run(old.open(BROKEN).spec)


def test_a_run_of_an_older_version_is_continued(old):
    run, whole = old.open(BROKEN), Store(OLD / "0.1.0-whole").open(BROKEN)
    text = (run.path / "spec.json").read_text()
    old.run(run.spec, progress=False)
    assert run.status == "finished" and run.damage() == {} and (run.path / "spec.json").read_text() == text
    mine, other = (r.frame("loss")["value"] for r in (run, whole))
    assert len(run.frame()) == 401 and mine[:217].equals(other[:217])
    looks = [c for c in whole.frame() if c.startswith("sharpness")]        # by another search; its errors are 1e-3 of the value
    ours, theirs = (r.frame().drop(columns=looks) for r in (run, whole))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3)                 # its rule rounded otherwise, as another torch or processor may
    pd.testing.assert_series_equal(run.frame("sharpness")["value"], whole.frame("sharpness")["value"], rtol=3e-3)


# what a spec of another version looks like: a run's folder is called by the hash of its text, whatever that says
def stranger(store, about, **manifest):
    "A run of this spec (JSON data or text), with the files of one that is done."
    text = about if isinstance(about, (str, bytes)) else json.dumps(about, sort_keys=True, separators=(",", ":"))
    text = text.encode() if isinstance(text, str) else text
    folder = store.root / sha256(text).hexdigest()[:16]
    shutil.copytree(OLD / "0.1.0" / "5037e2b0730c5bad", folder)
    shutil.rmtree(folder / "traces")
    (folder / "checkpoint.safetensors").unlink()
    (folder / "spec.json").write_bytes(text)
    (folder / "manifest.json").write_text(seal({"run": folder.name, "status": "interrupted"} | manifest))
    return Run(folder)


PLAIN = json.loads((OLD / "0.1.0" / "5037e2b0730c5bad" / "spec.json").read_text())


@pytest.mark.parametrize("gone", [("acc_goal",), ("seed",), ("probes", "chunk_size"), ("loss_goal", "acc_goal", "dtype"), ("estimator",)])
def test_a_spec_that_lacks_a_newer_field_keeps_its_name(old, gone):
    run = stranger(old, {k: v for k, v in PLAIN.items() if k not in gone})
    assert run.spec.hash == run.hash == old.open(run.spec).hash
    assert Spec.from_json(run.spec.to_json()).hash == pickle.loads(pickle.dumps(run.spec)).hash == run.hash      # in another process
    done = old.run(run.spec, progress=False)
    assert done.hash == run.hash and done.status == "finished" and done.damage() == {}
    assert replace(run.spec, steps=21).hash == Spec.from_json(json.dumps(PLAIN | {"steps": 21} | {k: getattr(Spec, k) for k in gone if k == "seed"} |
                                                                         ({"probes": []} if "probes" in gone else {}))).hash


@pytest.mark.parametrize("change", [{"schema": 99}, {"schema": 3}, {"goal_of_tomorrow": 3}, {"rule": PLAIN["rule"] | {"weight": 1.0}},
                                    {"schema": 7, "rule": {"kind": "OfTomorrow"}, "steps": {"kind": "Until"}}])
def test_a_spec_of_a_newer_version_is_said_to_be_that(old, change):
    run = stranger(old, PLAIN | change)
    with pytest.raises(ValueError, match="newer"): run.spec
    assert run.damage() == {}
    row = old.table().set_index("run").loc[run.hash]
    assert row["status"] == "newer" and "newer" in row["message"] and len(old.table()) == 6
    assert "  newer " in summary(run) and "damaged" not in summary(run)


def test_what_a_newer_version_began_is_not_written_over(old):
    run = old.open(BROKEN)
    about = {k: v for k, v in run.manifest.items() if k != "rows"} | {"schema": 99, "status": "paused by the scheduler"}
    (run.path / "manifest.json").write_text(text := seal(about))
    assert old.table().set_index("run").loc[BROKEN, "status"] == "newer"
    with pytest.raises(RuntimeError, match="newer gradnb"): old.run(run.spec, progress=False)
    assert (run.path / "manifest.json").read_text() == text


ODD = {
    "lr of 400 digits": PLAIN | {"rule": {"kind": "GD", "lr": 10**400}},
    "seed of 400 digits": PLAIN | {"seed": 10**400},
    "betas": PLAIN | {"rule": {"kind": "FromTorch", "cls": {"kind": "optimizer", "name": "Adam"}, "lr": 0.1, "hyper": {"betas": [0.9]}}},
    "fused with foreach": PLAIN | {"rule": {"kind": "FromTorch", "cls": {"kind": "optimizer", "name": "Adam"}, "lr": 0.1, "hyper": {"fused": True, "foreach": True}}},
    "no settings": {"kind": "Imported", "origin": "a", "source": "b", "settings": None},
    "settings that are no names": {"kind": "Imported", "origin": ["a"], "source": "b", "settings": [1]},
    "settings in settings": {"kind": "Imported", "origin": "a", "source": "b", "settings": {"rule": {"lr": [{"x": [1]}, None]}, "seed": {"kind": "GD", "lr": 1.0}}},
    "status among the settings": {"kind": "Imported", "origin": "a", "source": "b", "settings": {"status": "finished", "message": 5, "run": [1], "rule.lr": "fast"}},
    "words and numbers": PLAIN | {"model": 5, "dataset": None, "probes": [3]},
    "a rule that is none": PLAIN | {"rule": "GD"},
    "a rule that is an estimator": PLAIN | {"rule": {"kind": "FullBatch"}},
    "a kind that is a list": PLAIN | {"rule": {"kind": ["GD"]}},
    "an unknown kind": PLAIN | {"rule": {"kind": "Mine", "lr": 0.1}},
    "an unknown kind with odd fields": PLAIN | {"rule": {"kind": "Mine", "lr": [{"x": [None]}], "\ud800": {"kind": {}}, "status": 1}},
    "deep": '{"kind":"Spec","rule":' + "[" * 900 + "]" * 900 + "}",
    "deeper": "[" * 10**5, "no JSON": "{", "empty": "", "no text": b"\xff\xfe\x00", "a number beyond floats": '{"kind":"Imported","origin":"a","settings":{"lr":1e999},"source":"b"}',
    "half a surrogate": '{"kind":"Imported","origin":"\\ud800","settings":{"rule.lr":"\\udfff"},"source":"b"}',
}
MANIFESTS = [{"step": [1]}, {"step": "many"}, {"seconds": "5"}, {"seconds": 10**400}, {"message": {"a": 1}}, {"rows": 5}, {"rows": {"loss": "21"}}, {"rows": [1]},
             {"status": 5}, {"status": "sleeping"}, {"status": None}, {"run": "f" * 16}, {"damaged": 3, "status": "finished"}, {"stretches": [1]}, {"torch": 2}]


@pytest.mark.parametrize("name", ODD)
def test_one_strange_run_spoils_nothing(old, name):
    before, run = old.frame("sharpness"), stranger(old, ODD[name])
    spoils_nothing(old, run, before)


@pytest.mark.parametrize("about", [*MANIFESTS, None, "[]", "{", b"\xff", '{"crc32":1}', "[" * 10**5])
def test_one_strange_manifest_spoils_nothing(old, about):
    run, before = old.open("81c5f7a720e730d8"), old.frame("sharpness", rule="GD")
    file = run.path / "manifest.json"
    if about is None: file.unlink(), file.mkdir()
    elif isinstance(about, dict): file.write_text(seal({k: v for k, v in run.manifest.items()} | about))
    else: file.write_bytes(about if isinstance(about, bytes) else about.encode())
    spoils_nothing(old, run, before)
    assert old.table().set_index("run").loc[run.hash, "status"] == "damaged"


@pytest.mark.parametrize("name", ["spec.json", "manifest.json", "traces", "checkpoint.safetensors"])
def test_missing_files_spoil_nothing(old, name):
    run, before = old.open("81c5f7a720e730d8"), old.frame("sharpness", rule="GD")
    shutil.rmtree(run.path / name) if name == "traces" else (run.path / name).unlink()
    spoils_nothing(old, run, before)
    assert old.table().set_index("run").loc[run.hash, "status"] == {"spec.json": "damaged", "manifest.json": "unfinished"}.get(name, "finished")


def spoils_nothing(store, run, before):
    "Everything that looks at many runs looks at this one, too, and at the others as before."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        row = store.table().set_index("run").loc[run.hash]
        assert row["status"] in ("damaged", "newer", "unreadable", "interrupted", "finished", "unfinished")
        if row["status"] in ("damaged", "newer", "unreadable"): assert len(row["message"]) > 10
        others = before["run"].unique()
        frame = store.frame("sharpness")
        assert frame[frame["run"].isin(others)][["step", "value"]].to_numpy().tolist() == before[["step", "value"]].to_numpy().tolist()
        assert len(store.frame()) and len(store.table(rule="GD")) == len(store.list(rule="GD")) >= 1
        assert {r.hash for r in store.list(rule__lr=lambda lr: lr < 0.05)} - {run.hash} <= {"81c5f7a720e730d8", "c1561c506b5e3893", "74bcdcb9d2a137e6", BROKEN}
        assert run.hash in summary(run) and run.hash in repr(run)
        explorer = RunExplorer(store, follow=0)
        assert set(explorer.found("")[0]) >= {*others} and len(explorer.panels(explorer.look)) > 1
        names = [p.name for p in explorer.panels(replace(explorer.look, where="rule=GD", runs=(others[0][:8],)))]
        assert names[:2] == ["loss", "sharpness"]


def bomb(depth):
    "Lists that each hold the last one twice."
    v = [1.0]
    for _ in range(depth): v = [v, v]
    return v


def cyclic():
    v = [1.0]
    v.append(v)
    return v


STRANGE = {
    "nested": lambda: bomb(60), "cyclic": cyclic, "complex": lambda: torch.ones(4, dtype=torch.complex64), "sparse": lambda: torch.eye(4).to_sparse(),
    "meta": lambda: torch.ones(4, device="meta"), "quantised": lambda: torch.quantize_per_tensor(torch.ones(4), .1, 0, torch.quint8),
    "empty": lambda: torch.empty(0), "empty rows": lambda: torch.empty(4, 0), "number": lambda: torch.tensor(1.), "float": lambda: 3.0, "none": lambda: None,
    "words": lambda: ["a", "b"], "dict": lambda: {"a": 1}, "3-d": lambda: torch.ones(2, 2, 2), "bool": lambda: torch.ones(4, dtype=torch.bool),
    "bfloat16": lambda: torch.ones(4, dtype=torch.bfloat16), "int8": lambda: torch.ones(4, dtype=torch.int8), "ragged": lambda: [[1, 2.0], [3]],
    "rows of tensors": lambda: [[0, torch.ones(3), torch.ones(3)]], "infinite": lambda: torch.full((4,), float("inf")), "namespace": lambda: argparse.Namespace(x=bomb(60)),
    "steps": lambda: [[float("nan"), 1.0, 2.0]], "large": lambda: [[10**30, 1.0, 2.0]]}
EDGE_FILES = "train_loss_final", "train_acc_final", "test_loss", "eigs_final", "iterates_final", "times_final", "snapshot_final"
TAIL_FILES = ("training_history.hist", "weight_history.hist", "evaluation_history_TRAIN.hist", "evaluation_history_TEST.hist", "noise_norm_history_TEST.hist", "te_outputs.pyT",
              "args.info")


FIRST = {"nested", "complex", "sparse", "meta", "quantised", "empty", "namespace"}


@pytest.mark.parametrize("what", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in STRANGE])
@pytest.mark.filterwarnings("ignore")
def test_one_strange_folder_is_a_line_and_the_rest_is_imported(tmp_path, what):
    "Each file in turn is strange, and good ones stand beside it; every warning names the folder."
    edge = tmp_path / "cifar10-5k" / "fc-tanh" / "seed_0" / "mse" / "gd"
    def write(folder):
        folder.mkdir(parents=True)
        for name in ("train_loss", "train_acc", "test_loss", "test_acc"): torch.save(torch.rand(9), folder / f"{name}_final")
        torch.save(torch.rand(4, 2), folder / "eigs_final")
    write(edge / "lr_0.1")
    for i, file in enumerate(EDGE_FILES):
        write(edge / f"lr_0.2{i}")
        torch.save(STRANGE[what](), edge / f"lr_0.2{i}" / file)
    for i, file in enumerate(TAIL_FILES):
        folder = tmp_path / f"2_0010_{i:02d}_mnist_NLL_fc"
        folder.mkdir()
        torch.save([[k, 2.3, 10. * k] for k in range(3)], folder / "training_history.hist")
        torch.save([[4, 0.7, 81.0, 1.2]], folder / "evaluation_history_TEST.hist")
        torch.save(STRANGE[what](), folder / file)
    (edge / "lr_nan").mkdir()
    torch.save(torch.rand(9), edge / "lr_nan" / "train_loss_final")
    with pytest.warns(RuntimeWarning) as said: runs = import_runs(tmp_path, Store(tmp_path / "runs"))
    assert any(f"{edge / 'lr_nan'} is left out" in str(w.message) for w in said)
    assert all(str(w.message).startswith(str(tmp_path)) for w in said)
    assert any(r.spec.source.endswith("lr_0.1") for r in runs) and len(runs) >= 10
    for r in runs: r.frame(), r.spec.fields
    assert len(Store(tmp_path / "runs").list()) == len(runs)


def test_the_time_between_eigenvalues_is_a_number_of_steps(tmp_path):
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="eig_freq"): import_runs(tmp_path, Store(tmp_path / "runs"), wrong)


@pytest.mark.parametrize("entries", [1, 3, 40])
@pytest.mark.parametrize("rows", [5, 2500])
def test_a_threshold_for_every_entry_of_a_vector_is_drawn(tmp_path, rows, entries):
    spec = Spec("digits-60", "fc-tanh:width=3", "mse", GD(0.05), rows)
    recorder = Recorder(tmp_path / spec.hash)
    value, edge = np.random.default_rng(0).random((2, rows, 3))
    edge = np.resize(edge, (rows, entries))
    for k in range(rows): recorder.append("sharpness", k, as_row({"value": value[k], "threshold": edge[k], "gaussian": value[k]}))
    recorder.close()
    (tmp_path / spec.hash / "spec.json").write_text(spec.to_json())
    panel = next(p for p in RunExplorer(tmp_path, follow=0).panels(RunExplorer(tmp_path, follow=0).look) if p.name == "sharpness")
    for line in panel.items: assert np.shape(line.y) == np.shape(line.x) == (rows,)
    drawn = [line.y for line in panel.items if line.label == "threshold"]
    np.testing.assert_array_equal(drawn, edge.T[:16])
    assert RunExplorer(tmp_path, follow=0).figure() is not None


def test_the_index_says_what_the_files_say_and_may_be_lost(old, monkeypatch):
    names, looks = ("sharpness", "loss", "train", None), lambda: (old.table(), *map(old.frame, names))
    plain = looks()
    assert not list(old.root.glob(".index*"))                    # few runs need none
    monkeypatch.setattr("gradnb.runs.store.FRESH", 1)
    def same(but=()):
        for seen, right in zip(looks(), plain):
            if seen.equals(right) and [*map(repr, seen.dtypes)] == [*map(repr, right.dtypes)]: continue       # quicker than pandas' own
            pd.testing.assert_frame_equal(seen[~seen["run"].isin(but)].reset_index(drop=True), right[~right["run"].isin(but)][seen.columns].reset_index(drop=True), check_dtype=not but, check_categorical=not but)
    same()
    files = sorted(old.root.glob(".index*"))
    assert len(files) == 1 + len(names)
    with monkeypatch.context() as m:                             # nothing of a run that is done is read again
        m.setattr("gradnb.runs.store.Run", lambda path: Run(path) if path.name == BROKEN else pytest.fail(f"{path} is read again"))
        same()
    for files in files[:1], files[1:]:                           # the lines of all looks; the traces, each of which is in one look
        whole = {file: file.read_bytes() for file in files}
        for harm in (lambda w: w[:-7], lambda w: w[:len(w) // 2], lambda w: w.replace(b"0", b"1", 3), lambda w: w[:60] + b"7" + w[61:], lambda w: b"",
                     lambda w: b"\xff" * 99, lambda w: b"{}"):    # torn, tampered with, of nobody
            for file, text in whole.items(): file.write_bytes(harm(text))
            same()
        for file in files:
            file.unlink()
            file.mkdir()
        same()
        for file in files: file.rmdir()
    same()
    run = old.open("5037e2b0730c5bad")
    text = (run.path / "manifest.json").read_text()
    (run.path / "manifest.json").write_text(seal(run.manifest | {"message": "changed", "rows": {"loss": 20, "sharpness": 3}}))
    assert old.table().set_index("run").loc[run.hash, "message"] == "changed"
    with pytest.warns(RuntimeWarning, match="left out.*21 rows, not 20"): assert run.hash not in set(old.frame("loss")["run"])
    (run.path / "manifest.json").write_text(text)
    (arrow := run.path / "traces" / "loss.arrow").write_bytes(arrow.read_bytes()[:-300])
    with pytest.warns(RuntimeWarning, match="loss.arrow is damaged"): assert run.hash not in set(old.frame("loss")["run"])
    old.remove(run.hash)
    same(but=[run.hash])
    moved = shutil.copytree(old.root, old.root.parent / "moved")                     # an index that came with a store is no authority
    (moved / BROKEN / "manifest.json").unlink()
    assert Store(moved).table().set_index("run").loc[BROKEN, "status"] == "unfinished"


def test_distances_of_imported_iterates_are_those_of_the_parameters(tmp_path):
    "The original keeps `randn(nproj, p) @ θ`, whose squared lengths are nproj times those of θ."
    g = torch.Generator().manual_seed(0)
    path = tmp_path / "cifar10-5k" / "fc-tanh" / "seed_0" / "mse" / "gd" / "lr_0.02"
    path.mkdir(parents=True)
    thetas, projectors = torch.randn(3, 50, generator=g), torch.randn(2000, 50, generator=g)
    for name in ("train_loss", "train_acc"): torch.save(torch.ones(3), path / f"{name}_final")
    torch.save(torch.stack([projectors.mv(t) for t in thetas]), path / "iterates_final")
    run, = import_runs(tmp_path, Store(tmp_path / "runs"))
    kept = torch.stack([torch.as_tensor(run.arrays["iterates"][t]["value"]) for t in range(3)]).float()
    torch.testing.assert_close(torch.cdist(kept, kept), torch.cdist(thetas, thetas), rtol=.1, atol=1e-3)


CLASHES = ["loss", "seed", "run", "step", "value", "trace", "a", "a.b", "a.0", "a.b.0", "rule.lr", "status", "trace.loss", "loss (2)", "a.seed", "origin"]


def keep(store, spec, traces):
    "A run that is done, with these rows: {trace: {column: values of the rows, (T,) or (T, m)}}."
    with Lock(store.root / spec.hash) as lock:
        recorder = Recorder(store.root / spec.hash, lock=lock)
        for name, columns in traces.items():
            for k, row in enumerate(zip(*columns.values())): recorder.append(name, k, as_row(dict(zip(columns, row))))
        recorder.close()
    (store.root / spec.hash / "spec.json").write_text(spec.to_json())
    (store.root / spec.hash / "manifest.json").write_text(seal({"run": spec.hash, "status": "finished", "rows": recorder.rows}))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@example([{"trace": {"loss": 0}, "loss": {"value": 0}}])
@example([{"a.b": {"value": 0}}, {"a": {"b": 0}}])
@example([{"a": {"a": 2}}, {"a": {"a.0": 0}}])
@example([{"a": {"seed": 0, "a.seed": 0, "run": 1, "step": 2, "step.0": 0, "loss": 0}, "step": {"value": 0}}])
@given(st.lists(st.dictionaries(st.sampled_from(CLASHES), st.dictionaries(st.sampled_from(CLASHES), st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=4),
                min_size=1, max_size=3))
def test_no_column_of_a_frame_is_written_over_or_shared(tmp_path_factory, shapes):
    store, draw, true = Store(tmp_path_factory.mktemp("clash")), iter(range(10**6)), {}
    for seed, traces in enumerate(shapes):          # each number is another one; a vector has 2 entries
        spec = Spec("digits", "fc", "mse", GD(.25), 7, seed=-1 - seed)
        values = {t: {c: np.array([[next(draw) for _ in range(max(m, 1))] for _ in range(2)], float)[:, slice(None) if m else 0] for c, m in columns.items()}
                  for t, columns in traces.items()}
        keep(store, spec, values)
        for t, columns in values.items():
            for c, v in columns.items():
                for place in np.ndindex(v.shape[1:]): true[t, c, place, -1 - seed] = v[(..., *place)].tolist()
    for name in (None, *{t for t, *_ in true}):
        frame = store.frame(name)
        assert frame.columns.is_unique and {*frame["loss"].astype(str)} == {"mse"} and {*frame["rule.lr"]} == {.25} and {*frame["steps"]} == {7} and {*frame["step"]} == {0, 1}
        found = [(v, (c, r, s)) for c in frame for v, r, s in zip(frame[c], frame["seed"], frame["step"]) if isinstance(v, float) and v >= 0 and c != "rule.lr"]
        cells = dict(found)
        assert len(cells) == len(found)                                                # nothing twice
        holds = {}
        for (t, c, place, seed), values in true.items():
            if name not in (None, t): continue
            for k, v in enumerate(values):
                column, r, s = cells.pop(v)
                assert (r, s) == (seed, k)
                holds.setdefault(column, set()).add((t, c, place))
        assert not cells and all(len(v) == 1 for v in holds.values()), holds           # nothing lost, two quantities never in one column
        assert len(holds) == len(set().union(*holds.values()))                         # one quantity never in two
    for run in store.list():
        assert all(f.columns.is_unique for f in (run.frame(), *map(run.frame, run.names())))


def test_settings_of_another_program_are_all_kept(tmp_path):
    spec = Imported("elsewhere", "here/1", {"run": 1, "status": "odd", "step": 2, "origin": "x", "a": {"b": 3}, "a.b": 4, "seconds": None, "settings.run": 5})
    keep(Store(tmp_path), spec, {"loss": {"value": np.arange(3.)}})
    line = Store(tmp_path).table().iloc[0].to_dict()
    assert (line["run"], line["status"], line["origin"]) == (spec.hash, "finished", "elsewhere")
    assert [line[k] for k in ("settings.run", "settings.status", "settings.step", "settings.origin", "a.b", "a.b (2)", "settings.run (2)")] == [1, "odd", 2, "x", 3, 4, 5]
    frame = Store(tmp_path).frame("loss")
    assert frame["value"].tolist() == [0, 1, 2] == frame["step"].tolist() and {*frame["settings.step"]} == {2}


def test_a_link_among_the_runs_is_said_once_by_name(store, tmp_path, capsys):
    here, link = tmp_path / "here", tmp_path / "here" / store.list()[0].hash
    here.mkdir()
    shutil.copytree(store.list()[1].path, here / store.list()[1].hash)
    link.symlink_to(store.list()[0].path)
    (here / ("f" * 16)).symlink_to("/nowhere")
    with pytest.warns(RuntimeWarning) as said: assert [len(look()) for look in (Store(here).table, Store(here).list, Store(here).about)] == [1, 1, 1]
    words = [str(w.message) for w in said]
    assert len(words) == 2 and all("is a link" in w and "left out" in w for w in words) and {str(link), str(here / ("f" * 16))} == {w.split(" is a link")[0] for w in words}
    SAID.clear()
    assert main(["runs", "list", "--store", str(here)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err.count(f"gradnb: {link} is a link") == 1 and "Warning" not in err
