"""A sketch holds what storing everything would give, merges and resumes exactly, and does not grow."""
import math

import pytest
import torch

from gradnb.ground.layout import Layout
from gradnb.ground.streams import Stream
from gradnb.measure.tail import TailSketch, compare_tails, tail_index
from gradnb.measure.tail.estimators import METHODS, MOHAMMADI, geometric_scale
from gradnb.measure.tail.magnitudes import Magnitudes, TailRefusal
from gradnb.measure.tail.sketch import layer_groups
from gradnb.measure.tail.stable import stable_sample
from gradnb.ground.trees import flatten, leaves, unflatten

GROUPS = {"all": slice(None), "head": slice(0, 7), "odd": torch.arange(1, 30, 2)}
MS = (1, 2, 4)


def gradients(n=200, p=30, alpha=1.6, seed=0):
    return stable_sample(alpha, (n, p), (Stream(seed) / "sketch").generator(), dtype=torch.float64)


def sketched(rows, groups=GROUPS, ms=MS, **options):
    sketch = TailSketch(groups, ms, **options)
    for g in rows: sketch.add(g)
    return sketch


def equal(a, b):
    "The same records, logarithms to rounding."
    assert a.records.keys() == b.records.keys() and a.rows == b.rows
    for key, record in a.records.items():
        other = b.records[key]
        assert record[:2] == other[:2] and all(torch.equal(x, y) for x, y in zip(record[2:4], other[2:4])), key
        torch.testing.assert_close(record.logs, other.logs)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_the_same_counts_as_storing_everything(group, paired):
    g = gradients()
    z = (g[::2] - g[1::2] if paired else g)[:, GROUPS[group]]
    for m, record in sketched(g, paired=paired).of(group).items():
        stored = Magnitudes.of(z, m)
        assert (record.m, record.width) == (m, z.shape[1])
        assert torch.equal(record.counts.sum(0), stored.counts.sum(0)) and record.blocks.sum() == len(z) // m
        torch.testing.assert_close(record.logs.sum(0), stored.logs.sum(0), rtol=1e-3, atol=.05)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_estimates_as_storing_everything(method):
    g = gradients(800)
    scale = geometric_scale(g[::2] - g[1::2])
    m = 2 if method in MOHAMMADI else 1
    options = dict(k=.1) if method == "hill" else {}        # where none is given it is chosen on halves of the folds, which are others
    ours, theirs = sketched(g, scale=scale).tail_index("all", method, m, **options), tail_index(g[::2] - g[1::2], method, m, **options)
    assert ours.value == pytest.approx(theirs.value, rel=1e-3)
    assert .5 * theirs.stderr < ours.stderr < 2 * theirs.stderr        # the folds are others


def test_one_row_to_a_fold():
    sketch = sketched(gradients(2 * 45))
    assert [int(b) for b in sketch.of("all")[1].blocks] == [3] * 5 + [2] * 15
    assert sketch.of("all")[2].blocks.sum() == 22 and sketch.of("all")[4].blocks.sum() == 11


def test_what_is_kept_does_not_grow():
    size = lambda s: sum(t.nbytes for t in leaves((s.partial, s.partial_logs, *(r for r in s.records.values()))))
    g = gradients(400)
    assert size(sketched(g)) == size(sketched(g[:40]))
    wide = TailSketch({"all": slice(None)})
    wide.add(torch.randn(50_000, generator=Stream().generator())); wide.add(torch.randn(50_000, generator=Stream(1).generator()))
    assert wide.partial.numel() == 4 * 50_000


@pytest.mark.parametrize("cut", [8, 40, 104])
def test_parts_add_up(cut):
    "Cuts where no sum is open: the histograms are those of the whole."
    g = gradients()
    both, whole = sketched(g[:cut]).merge(sketched(g[cut:])), sketched(g)
    for key, record in whole.records.items():
        assert torch.equal(both.records[key].counts.sum(0), record.counts.sum(0))
        torch.testing.assert_close(both.records[key].logs.sum(0), record.logs.sum(0))


def test_merging_in_any_order():
    a, b, c = (sketched(gradients(48, seed=s)) for s in range(3))
    left, right, turned = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a)
    for key in left.records:
        for other in (right, turned):
            assert torch.equal(left.records[key].counts, other.records[key].counts)
    assert left.tail_index("all", "ecf") == right.tail_index("all", "ecf") == turned.tail_index("all", "ecf")
    empty = TailSketch(GROUPS, MS)
    equal(a.merge(empty), a); equal(empty.merge(a), a)


def test_merging_leaves_the_parts_alone():
    a, b = sketched(gradients(48)), sketched(gradients(48, seed=1))
    before = a.state()
    a.merge(b).add(gradients(1)[0])
    equal(a, TailSketch.restore(before, GROUPS, MS))


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 96, 131])
def test_resuming_anywhere(cut):
    g = gradients(160)
    first, tensors = sketched(g[:cut]), {}
    node = flatten(first.state(), tensors)
    resumed = TailSketch.restore(unflatten(node, tensors, first.state()), GROUPS, MS)
    for row in g[cut:]:
        resumed.add(row)
        first.add(row)
    equal(resumed, sketched(g)); equal(first, resumed)


def test_a_state_is_not_shared():
    sketch = sketched(gradients(47))
    state = sketch.state()
    copies = [t.clone() for t in leaves(state)]
    for g in gradients(5, seed=2): sketch.add(g)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), copies))
    again = TailSketch.restore(state, GROUPS, MS)
    for g in gradients(5, seed=2): again.add(g)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), copies))


def test_gradients_are_not_written():
    g = gradients(9)
    kept = g.clone()
    sketched(g)
    assert torch.equal(g, kept)


def test_what_diverged_is_refused_and_leaves_no_trace():
    g = gradients(101)
    sketch = sketched(g[:50])
    before = sketch.state()
    for bad in (math.nan, math.inf):
        sketch.add(g[50])
        with pytest.raises(TailRefusal, match="infinities or NaN"): sketch.add(torch.full((30,), bad, dtype=torch.float64))
        equal(sketch, TailSketch.restore(before, GROUPS, MS))
    for row in g[50:]: sketch.add(row)
    assert math.isfinite(sketch.tail_index("all").value)


def test_dead_coordinates():
    g = gradients()
    g[:, :2] = 0
    sketch = sketched(g)
    with pytest.raises(TailRefusal, match="28.6% of the values are exactly zero"): sketch.tail_index("head")
    with pytest.raises(TailRefusal, match="exactly zero"): sketch.tail_index("head", "mle")


def test_layers():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2, bias=False))
    layout = Layout.of(net)
    groups = layer_groups(layout)
    assert groups == {"network": slice(0, 21), "0.weight": slice(0, 12), "0.bias": slice(12, 15), "2.weight": slice(15, 21)}
    vec = torch.arange(21.)
    for name, block in layout.named(vec).items(): assert torch.equal(vec[groups[name]], block.flatten())


def test_frames():
    g = gradients(800)
    sketch = sketched(g)
    frame = sketch.compare("all")
    assert set(frame["method"]) == set(METHODS) and frame["note"].eq("").all()
    assert list(sketch.m_profile("all")["m"]) == [2, 4] and len(sketch.k_plot("head", [.05, .1])) == 2
    theirs = compare_tails(g[::2] - g[1::2], ms=(2, 4), standardise=False)
    theirs.loc[theirs["method"] == "hill", "value"] = sketch.tail_index("all", "hill").value      # whose thresholds are chosen on other folds
    assert frame["value"].to_numpy() == pytest.approx(theirs["value"].to_numpy(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype):
    g = gradients(400).clamp(-1e3, 1e3).to(dtype)
    assert sketched(g).tail_index("all").value == pytest.approx(sketched(g.double()).tail_index("all").value, rel=2e-2)


def test_bad_arguments():
    sketch = sketched(gradients())
    for call, says in [(lambda: TailSketch({}), "at least one group"), (lambda: TailSketch(GROUPS, (2, 4)), "start at 1"),
                       (lambda: TailSketch(GROUPS, (1, 4, 6)), "multiple of the one before"),
                       (lambda: TailSketch(GROUPS, ()), "start at 1"),
                       (lambda: sketch.add(gradients(2)), "one flat gradient"),
                       (lambda: sketch.tail_index("neck"), "no group 'neck'"),
                       (lambda: sketch.tail_index("all", m=8), "not of 8"),
                       (lambda: TailSketch(GROUPS).tail_index("all"), "empty"),
                       (lambda: sketch.merge(TailSketch(GROUPS, (1, 2))), "do not merge"),
                       (lambda: sketched(gradients(30)).tail_index("all"), "blocks of m = 2 draws are too few")]:
        with pytest.raises(ValueError, match=says): call()


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_the_index_of_174_draws_of_unequal_scale(alpha):
    "The number of the 2019 experiment, 4,000 coordinates over decades, one gradient at a time."
    scale = torch.logspace(-3, 3, 4_000)
    sketch = sketched(gradients(174, 4_000, alpha).float() * scale, {"all": slice(None)}, MS)
    found = sketch.tail_index("all")
    assert found.value == pytest.approx(alpha, abs=.05) and alpha in sketch.tail_index("all", level=.999)
