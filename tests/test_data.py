"Data: every refusal, scaling against plain NumPy, names, files as they come, and downloads that break off."
import itertools
import os
import struct
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import transforms
from gradnb.data import SOURCES, Dataset, data_root, load_dataset
from gradnb.data.pictures import torchvision_splits
from gradnb.data.pixels import CONSTANTS, CropFlip, pixel_scale, scale_of, standardise
from gradnb.data.sources import read_name

REAL = os.environ.get("GRADNB_DATA")


def real(path):
    return pytest.mark.skipif(not (REAL and Path(REAL, path).exists()), reason=f"needs {path} in GRADNB_DATA")


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pixels(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- Dataset

def fields(**change):
    y = torch.tensor([0, 1, 2, 1])
    return dict(x=numbers(4, 3), y=y, x_test=numbers(2, 3, seed=1), y_test=y[:2], classes=3, name="four") | change


def holed(value, *index):
    x = numbers(4, 3)
    x[index] = value
    return x


@pytest.mark.parametrize("change, error, says", [
    (dict(x=np.zeros((4, 3))), TypeError, "x must be a tensor, got ndarray"),
    (dict(y=[0, 1, 2, 1]), TypeError, "y must be a tensor, got list"),
    (dict(x=torch.zeros(4, 3, dtype=torch.uint8)), TypeError, "x must be floating point, got torch.uint8"),
    (dict(x=torch.zeros(4, 3, dtype=torch.complex64)), TypeError, "complex64"),
    (dict(x=numbers(4)), ValueError, r"\(n, features …\), got shape \(4,\)"),
    (dict(x=numbers(0, 3), y=torch.zeros(0, dtype=torch.int64)), ValueError, r"x is empty: its shape is \(0, 3\)"),
    (dict(x=numbers(4, 0)), ValueError, "x is empty"),
    (dict(x_test=numbers(0, 3), y_test=torch.zeros(0, dtype=torch.int64)), ValueError, "x_test is empty"),
    (dict(x=holed(torch.nan, 2, 1)), ValueError, "infinite.: 1 in 1 examples, the first is example 2"),
    (dict(x=holed(torch.inf, slice(1, 3))), ValueError, "infinite.: 6 in 2 examples, the first is example 1"),
    (dict(x_test=holed(-torch.inf, 0, 0), y_test=torch.tensor([0, 1, 2, 1])), ValueError, "x_test holds"),
    (dict(y=torch.tensor([0, 1, 2])), ValueError, r"n = 4, one class index per example, got shape \(3,\)"),
    (dict(y=torch.tensor([[0], [1], [2], [1]])), ValueError, r"got shape \(4, 1\)"),
    (dict(y=torch.tensor(0)), ValueError, r"got shape \(\)"),
    (dict(y=torch.tensor([0, 1, 3, 1])), ValueError, "y has 1 labels outside 0 … 2, the first is 3 in example 2"),
    (dict(y_test=torch.tensor([-1, 1])), ValueError, "y_test has 1 labels .* the first is -1 in example 0"),
    (dict(y=torch.tensor([0, 1, 2, 1], dtype=torch.int32)), TypeError, "y is torch.int32: class indices are int64"),
    (dict(y=numbers(4, 1)), TypeError, "classes=None"),
    (dict(classes=None), TypeError, "say classes="),
    (dict(classes=0), ValueError, "classes must be"), (dict(classes=3.0), ValueError, "classes must be"),
    (dict(classes=True), ValueError, "classes must be"),
    (dict(classes=None, y=numbers(4)), ValueError, r"\(n, outputs\) with n = 4, .*, got shape \(4,\)"),
    (dict(classes=None, y=numbers(3, 1)), ValueError, r"got shape \(3, 1\)"),
    (dict(classes=None, y=numbers(4, 0)), ValueError, r"got shape \(4, 0\)"),
    (dict(classes=None, y=holed(torch.nan, 3, 0), y_test=numbers(2, 3)), ValueError, "y holds"),
    (dict(classes=None, y=numbers(4, 2), y_test=numbers(2, 1)), ValueError, r"shape \(2,\), but .* y_test \(1,\)"),
    (dict(classes=None, y=numbers(4, 2, dtype=torch.float64), y_test=numbers(2, 2)), TypeError, "y is torch.float64"),
    (dict(x_test=numbers(2, 4)), ValueError, r"x has shape \(3,\), but one of x_test \(4,\)"),
    (dict(x_test=numbers(2, 3, dtype=torch.float64)), TypeError, "x_test is torch.float64"),
])
def test_dataset_refuses(change, error, says):
    with pytest.raises(error, match=says): Dataset(**fields(**change))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dataset_moves_and_cuts(dtype):
    data = Dataset(**fields())
    moved = data.to(dtype=dtype)
    assert (moved.x.dtype, moved.x_test.dtype, moved.y.dtype) == (dtype, dtype, torch.int64)
    assert (data.n, data.n_test, data.in_shape, data.outputs, data.classes) == (4, 2, (3,), 3, 3)
    assert torch.equal(data.head(3).x, data.x[:3]) and data.head(3).n_test == 2
    for n in (0, 5, -1):
        with pytest.raises(ValueError, match="four has 4 training examples"): data.head(n)
    assert data == data and data != Dataset(**fields()) and "3 classes" in repr(data) and "(3,)" in repr(data)


def test_regression_moves_its_targets_too():
    data = Dataset(**fields(classes=None, y=numbers(4, 2), y_test=numbers(2, 2)))
    assert data.outputs == 2 and data.to(dtype=torch.float64).y.dtype == torch.float64 and "2 outputs" in repr(data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dataset_on_cuda():
    data = load_dataset("digits-100").to("cuda", torch.float64)
    assert all(a.is_cuda for a in (data.x, data.y, data.x_test, data.y_test)) and data.y.dtype == torch.int64
    with pytest.raises(ValueError, match="x is on cuda:0, but y on cpu"):
        Dataset(data.x, data.y.cpu(), data.x_test, data.y_test, 10)


# --- scaling

@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 1, 5), (301, 3, 6, 7)])
def test_pixel_scale_is_numpys(shape, each):
    a = pixels(*shape)
    a[:, 0, 0, 0] = 255
    scale, axes = pixel_scale(torch.from_numpy(a), each=each), 0 if each else (0, 2, 3)
    std = a.astype(float).std(axes, keepdims=True)
    np.testing.assert_allclose(scale.mean, a.astype(float).mean(axes, keepdims=True), rtol=1e-14)
    np.testing.assert_allclose(scale.std, np.where(std == 0, 255, std), rtol=1e-10)


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_constant_pixels_have_no_rounding(value):
    scale = pixel_scale(torch.full((49_999, 1, 1, 1), value, dtype=torch.uint8), each=True)
    assert (scale.mean.item(), scale.std.item()) == (value, 255)


# --- names

@pytest.mark.parametrize("name, source, found, take", [
    ("digits", "digits", {}, None), ("digits-500", "digits", {}, 500), ("cifar10-1k", "cifar10", {}, 1000),
    ("cifar100-20k", "cifar100", {}, 20_000), ("mnist-5k", "mnist", {}, 5000), ("digits-0", "digits", {}, 0),
    ("chebyshev-3-20", "chebyshev-{degree}-{n}", dict(degree="3", n="20"), None),
    ("chebyshev-3-20-10", "chebyshev-{degree}-{n}", dict(degree="3", n="20"), 10),
    ("npz:/a b/c-5k.npz", "npz:{path}", dict(path="/a b/c-5k.npz"), None),
    ("npz:c.npz-1k", "npz:{path}", dict(path="c.npz"), 1000),
    ("npz:C:\\x.npz-7", "npz:{path}", dict(path="C:\\x.npz"), 7),
])
def test_names(name, source, found, take): assert read_name(name) == (SOURCES[source], found, {}, take)


@pytest.mark.parametrize("name, error, says", [
    ("mnits", ValueError, "Did you mean 'mnist'"), ("digits-2.5k", ValueError, "no dataset"),
    ("digits-", ValueError, "no dataset"), ("digits-1m", ValueError, "no dataset"),
    ("", ValueError, "chebyshev-{degree}-{n}"), ("mine.npz", ValueError, "npz:PATH"),
    ("chebyshev-3", ValueError, "no dataset"), ("chebyshev-x-20", ValueError, "whole numbers"),
    ("chebyshev-3-0", ValueError, "whole numbers"), ("npz:mine-5", ValueError, "must end in .npz"),
    ("digits-0", ValueError, "asked for the first 0 training examples, there are 1,437"),
    ("digits-1438", ValueError, "there are 1,437"), ("digits-2k", ValueError, "first 2,000"),
    (None, TypeError, "named by a str"), (Path("mine.npz"), TypeError, "named by a str"),
])
def test_names_refused(name, error, says):
    with pytest.raises(error, match=says): load_dataset(name)


def test_data_root(monkeypatch, tmp_path):
    for name in ("GRADNB_DATA", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    assert data_root() == Path.home() / ".cache/gradnb"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path)); assert data_root() == tmp_path / "gradnb"
    monkeypatch.setenv("GRADNB_DATA", "~/data"); assert data_root() == Path.home() / "data"
    assert data_root(tmp_path) == tmp_path
    monkeypatch.setenv("GRADNB_DATA", ""); assert data_root() == tmp_path / "gradnb"


# --- embedded and synthetic

@pytest.mark.parametrize("moved", [False, True])
def test_digits_are_sklearns_in_order(moved, monkeypatch):
    "Read from its folder, or asked of a version that keeps them elsewhere."
    if moved: monkeypatch.setattr("gradnb.data.small.find_spec", lambda name: SimpleNamespace(origin="/nowhere/__init__.py"))
    data, bunch = load_dataset("digits"), load_digits()
    mean, std = bunch.images[:1437].mean(), bunch.images[:1437].std()
    np.testing.assert_allclose(data.x[:, 0], (bunch.images[:1437] - mean) / std, atol=1e-6)
    np.testing.assert_allclose(data.x_test[:, 0], (bunch.images[1437:] - mean) / std, atol=1e-6)
    assert data.y.tolist() == bunch.target[:1437].tolist() and data.y_test.tolist() == bunch.target[1437:].tolist()
    assert (data.in_shape, data.classes, data.n_test) == ((1, 8, 8), 10, 360)
    assert (data.x.dtype, data.name) == (torch.float32, "digits")


@pytest.mark.parametrize("n", [1, 100, 1437])
def test_a_cut_is_the_head_of_the_whole(n):
    whole, cut = load_dataset("digits"), load_dataset(f"digits-{n}")
    assert torch.equal(cut.x, whole.x[:n]) and torch.equal(cut.y, whole.y[:n]) and torch.equal(cut.x_test, whole.x_test)
    assert cut.name == f"digits-{n}" and cut.x.is_contiguous()


@pytest.mark.parametrize("degree, n", list(itertools.product((0, 1, 2, 3, 4, 5, 10), (1, 2, 20, 50))))
def test_chebyshev(degree, n):
    data = load_dataset(f"chebyshev-{degree}-{n}")
    x = np.linspace(-1, 1, n)
    np.testing.assert_allclose(data.x[:, 0], x, atol=1e-7)
    np.testing.assert_allclose(data.y[:, 0], np.cos(degree * np.arccos(x)), atol=1e-6)
    assert torch.equal(data.x, data.x_test) and torch.equal(data.y, data.y_test)
    assert (data.classes, data.outputs, data.in_shape) == (None, 1, (1,))


# --- MNIST's own files

def write_mnist(root, n=60, n_test=10):
    raw = Path(root, "MNIST/raw"); raw.mkdir(parents=True)
    arrays = {}
    for split, k in (("train", n), ("t10k", n_test)):
        arrays[split] = pixels(k, 28, 28, seed=k), pixels(k, seed=k) % 10
        for kind, a in zip(("images-idx3", "labels-idx1"), arrays[split]):
            head = struct.pack(">BBBB", 0, 0, 8, a.ndim) + struct.pack(f">{a.ndim}I", *a.shape)
            (raw / f"{split}-{kind}-ubyte").write_bytes(head + a.tobytes())
    return arrays


def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise OSError("no network in this test")
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_mnist_files(tmp_path, monkeypatch):
    no_network(monkeypatch)
    (a, y), (b, z) = write_mnist(tmp_path).values()
    data = load_dataset("mnist", tmp_path)
    np.testing.assert_allclose(data.x[:, 0], (a / 255 - 0.1307) / 0.3081, atol=2e-6)
    np.testing.assert_allclose(data.x_test[:, 0], (b / 255 - 0.1307) / 0.3081, atol=2e-6)
    assert data.y.tolist() == y.tolist() and data.y_test.tolist() == z.tolist() and data.in_shape == (1, 28, 28)
    monkeypatch.setenv("GRADNB_DATA", str(tmp_path))
    assert torch.equal(load_dataset("mnist-50").x, data.x[:50])
    with pytest.raises(ValueError, match="first 1,000 training examples, there are 60"): load_dataset("mnist-1k")


@pytest.mark.parametrize("name, wanted", [("mnist", "MNIST/raw/"), ("cifar10-1k", "cifar-10-batches-py/"),
                                          ("cifar100", "cifar-100-python/")])
def test_offline_says_what_is_there_and_what_should_be(name, wanted, tmp_path, monkeypatch):
    no_network(monkeypatch)
    (tmp_path / "something.txt").touch()
    with pytest.raises(RuntimeError) as e: load_dataset(name, tmp_path)
    assert all(s in str(e.value) for s in (wanted, "holds something.txt", "no network", "'digits' needs no download"))
    assert [f.name for f in tmp_path.iterdir()] == ["something.txt"]
    (tmp_path / "mine.npz").touch()
    with pytest.raises(RuntimeError, match="mine.npz is called 'npz:mine.npz'"): load_dataset(name, tmp_path)


def test_short_files_are_not_taken_for_mnist(tmp_path, monkeypatch):
    no_network(monkeypatch)
    write_mnist(tmp_path)
    images = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match="MNIST can neither be read"): load_dataset("mnist", tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="There is no folder .*needs no download"):
        load_dataset("mnist", tmp_path / "file")


@real("MNIST/raw")
def test_real_mnist():
    data = load_dataset("mnist-1k")
    raw = Path(REAL, "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:16 + 784_000]
    a = np.frombuffer(raw, np.uint8).reshape(1000, 28, 28)
    np.testing.assert_allclose(data.x[:, 0], (a / 255 - 0.1307) / 0.3081, atol=2e-6)
    assert data.n_test == 10_000 and data.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


# --- CIFAR, downloads

def stand_in(classes=10, n=40):
    class CIFAR:
        base_folder, filename = "cifar", "cifar.tar.gz"
        def __init__(self, root, train=True, download=False):
            self.data, self.targets = pixels(n, 32, 32, 3, seed=train), (pixels(n, seed=train) % classes).tolist()
            self.data[:, 5, 6, 1] = 77 if train else 78
    return CIFAR


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_scaled_by_the_whole_training_set(name, classes, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, name.upper(), make := stand_in(classes))
    train, test = (make(None, t).data.transpose(0, 3, 1, 2).astype(float) for t in (True, False))
    mean, std = train.mean(0), train.std(0)      # of whole numbers: std is exactly zero where it should be
    std[std == 0] = 255
    cut = load_dataset(f"{name}-15")
    np.testing.assert_allclose(cut.x, (train[:15] - mean) / std, atol=1e-5)
    np.testing.assert_allclose(cut.x_test, (test - mean) / std, atol=1e-5)
    assert cut.x.is_contiguous() and cut.in_shape == (3, 32, 32) and cut.classes == classes
    assert not cut.x[:, 1, 5, 6].any() and torch.allclose(cut.x_test[:, 1, 5, 6], torch.tensor(1 / 255))
    assert cut.y.tolist() == make(None).targets[:15]


class Files:
    "A data set of two files whose download can break off after the first."
    breaks: BaseException | None = None
    def __init__(self, root, train=True, download=False):
        files = [Path(root, "files", f) for f in ("one", "two")]
        if download:
            files[0].parent.mkdir(parents=True); (files[0].parent / "all.gz").touch(); files[0].write_text("whole")
            if self.breaks: raise self.breaks
            files[1].write_text("whole")
        if [f.read_text() for f in files] != ["whole"] * 2: raise RuntimeError("corrupted")


def test_a_download_arrives_whole_and_without_its_archive(tmp_path):
    torchvision_splits(Files, tmp_path / "new/cache", "files/")
    assert sorted(f.name for f in (tmp_path / "new/cache").rglob("*")) == ["files", "one", "two"]


def test_a_broken_file_is_replaced(tmp_path):
    (tmp_path / "files").mkdir()
    for f in ("one", "two"): (tmp_path / "files" / f).write_text("who")
    torchvision_splits(Files, tmp_path, "files/")
    assert (tmp_path / "files/two").read_text() == "whole"


@pytest.mark.parametrize("breaks, raised", [(OSError("gone"), RuntimeError), (RuntimeError("checksum"), RuntimeError),
                                            (EOFError("tar"), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_download_that_breaks_off_leaves_nothing(breaks, raised, tmp_path, monkeypatch):
    monkeypatch.setattr(Files, "breaks", breaks)
    with pytest.raises(raised): torchvision_splits(Files, tmp_path, "files/")
    assert list(tmp_path.iterdir()) == []


# --- npz

def arrays(**change):
    return dict(x_train=pixels(6, 4, 5, 3), y_train=np.arange(6) % 3, x_test=pixels(3, 4, 5, 3, seed=1),
                y_test=np.arange(3)) | change


def load(tmp_path, suffix="", **a):
    np.savez(tmp_path / "mine.npz", **a)
    return load_dataset(f"npz:{tmp_path}/mine.npz{suffix}")


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_npz_images(channels, tmp_path):
    shape = (4, 5) if channels is None else (4, 5, channels)
    a, b = pixels(6, *shape), pixels(3, *shape, seed=1)
    data = load(tmp_path, "-4", **arrays(x_train=a, x_test=b))
    a, b = (np.moveaxis(i.reshape(*i.shape[:3], -1), 3, 1) / 255 for i in (a, b))
    axes = (0, 2, 3) if channels in (None, 1) else 0
    mean, std = a.mean(axes, keepdims=True), a.std(axes, keepdims=True)
    np.testing.assert_allclose(data.x, ((a - mean) / std)[:4], atol=1e-5)
    np.testing.assert_allclose(data.x_test, (b - mean) / std, atol=1e-5)
    assert data.in_shape == (channels or 1, 4, 5) and data.classes == 3 and data.x.is_contiguous()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_npz_floats_are_used_as_they_are(dtype, tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(dtype)
    data = load(tmp_path, "-5", **arrays(x_train=x, x_test=x[:3]))
    assert data.x.numpy().dtype == np.dtype(dtype).newbyteorder("=") and np.array_equal(data.x.numpy(), x[:5])


@pytest.mark.parametrize("dtype, column", list(itertools.product(["u1", "i1", "<i4", ">i8", "u8"], (False, True))))
def test_npz_integer_targets_are_classes(dtype, column, tmp_path):
    y, z = np.array([0, 1, 2, 1, 0, 6], dtype), np.array([0, 8, 2], dtype)
    data = load(tmp_path, **arrays(y_train=y[:, None] if column else y, y_test=z))
    assert data.y.dtype == torch.int64 and data.y.tolist() == y.tolist() and data.classes == 9


@pytest.mark.parametrize("dtype, shape", list(itertools.product(["f4", ">f8", "f2"], [(), (1,), (2,)])))
def test_npz_float_targets_are_regression(dtype, shape, tmp_path):
    y, z = np.ones((6, *shape), dtype) / 4, np.ones((3, *shape), dtype)
    data = load(tmp_path, **arrays(y_train=y, y_test=z))
    assert data.classes is None and data.y.dtype == torch.float32 and data.y.shape == (6, *(shape or (1,)))
    assert (data.y == 0.25).all()


def test_npz_is_found_in_the_working_directory_then_in_the_root(tmp_path, monkeypatch):
    here, root = tmp_path / "here", tmp_path / "root"
    for folder, n in ((here, 5), (root, 6)):
        folder.mkdir()
        np.savez(folder / "both.npz", **arrays(x_train=pixels(n, 4, 5, 3), y_train=np.zeros(n, int)))
    (here / "both.npz").rename(here / "one.npz"); np.savez(here / "both.npz", **np.load(here / "one.npz"))
    monkeypatch.chdir(here); monkeypatch.setenv("GRADNB_DATA", str(root))
    assert load_dataset("npz:both.npz").n == 5
    (here / "both.npz").unlink()
    assert load_dataset("npz:both.npz").n == 6 and load_dataset("npz:one.npz", root=root).n == 5
    (root / "both.npz").unlink()
    with pytest.raises(FileNotFoundError) as e: load_dataset("npz:both.npz")
    assert str(here / "both.npz") in str(e.value) and str(root / "both.npz") in str(e.value)


class Trap:
    def __reduce__(self): return os.mkdir, ("sprung",)


@pytest.mark.parametrize("change, error, says", [
    (dict(x_train=np.array([Trap()] * 6, dtype=object)), ValueError, "x_train in .* objects are pickles"),
    (dict(y_test=np.array([{}, 1, 2], dtype=object)), ValueError, "y_test in .* objects are pickles"),
    (dict(x_train=pixels(6, 20)), ValueError, r"x_train in .* \(6, 20\); store other features as floating"),
    (dict(x_train=pixels(6, 3, 4, 5)), ValueError, r"channels ≤ 4\), but has shape \(6, 3, 4, 5\)"),
    (dict(x_train=pixels(0, 4, 5, 3)), ValueError, r"x_train in .* \(0, 4, 5, 3\)"),
    (dict(x_train=np.zeros((6, 4, 2), int)), TypeError, "x_train in .* is int64; images are uint8"),
    (dict(x_test=np.zeros((3, 4, 5, 3), bool)), TypeError, "x_test in .* is bool"),
    (dict(x_train=np.zeros((6, 4), complex)), TypeError, "x_train in .* is complex128"),
    (dict(x_train=np.zeros((6, 4), "f2")), TypeError, "x_train in .* is float16"),
    (dict(x_train=np.zeros(6)), ValueError, r"x_train in .* must be \(n, features …\)"),
    (dict(x_train=np.full((6, 2), np.nan), x_test=np.zeros((3, 2))), ValueError, "x_train in .*: 12 in 6 examples"),
    (dict(x_test=np.zeros((3, 4, 5, 3))), ValueError, "x_train and x_test in .* differ"),
    (dict(x_test=pixels(3, 4, 5)), ValueError, r"\(3, 4, 5\) in the first, torch.uint8 \(1, 4, 5\) in the second"),
    (dict(y_train=np.eye(6, 3, dtype=int)), ValueError, "y_train in .* one-hot"),
    (dict(y_train=np.arange(5)), ValueError, r"y_train in .* n = 6, .* got shape \(5,\)"),
    (dict(y_test=np.arange(4)), ValueError, r"y_test in .* n = 3, .* got shape \(4,\)"),
    (dict(y_train=np.array([0, 1, -1, 0, -1, 0])), ValueError, "y_train in .* 2 labels .* first is -1 in example 2"),
    (dict(y_train=np.array(list("abcdef"))), TypeError, "y_train in .* is <U1"),
    (dict(y_train=np.zeros(6)), ValueError, "y_train and y_test in .* differ"),
    (dict(y_train=np.full(6, np.inf), y_test=np.zeros(3)), ValueError, "y_train in .* infinite"),
    (dict(y_train=np.zeros(()), y_test=np.zeros(())), ValueError, "y_train in .* got shape"),
])
def test_npz_refuses_and_names_the_array(change, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says) as e: load(tmp_path, **arrays(**change))
    assert "mine.npz" in str(e.value) and not (tmp_path / "sprung").exists()


def test_npz_files_that_are_none(tmp_path):
    file = tmp_path / "bad.npz"
    for content in (b"", b"hello", b"\x93NUMPY"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="bad.npz is not an .npz archive"): load_dataset(f"npz:{file}")
    np.savez(file, x_train=np.zeros(3), other=np.zeros(1))
    with pytest.raises(ValueError, match="lacks y_train, x_test, y_test; it holds x_train, other"):
        load_dataset(f"npz:{file}")
    np.savez(file, **arrays())
    whole = file.read_bytes()
    at = whole.index(b"x_train.npy") + 300
    file.write_bytes(whole[:at] + bytes(b ^ 255 for b in whole[at:at + 40]) + whole[at + 40:])
    with pytest.raises(ValueError, match="x_train in .* cannot be read"): load_dataset(f"npz:{file}")


@real("cifar10-5k.npz")
def test_real_cifar_subset():
    data = load_dataset("npz:cifar10-5k.npz-1k")
    a = np.load(Path(REAL, "cifar10-5k.npz"))["x_train"].astype(np.float64).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(data.x, ((a - a.mean(0)) / a.std(0))[:1000], atol=2e-5)
    assert data.classes == 10 and data.in_shape == (3, 32, 32) and data.y[:5].tolist() == [6, 9, 9, 4, 1]


# --- tokens

def texts(**change):
    x = torch.tensor([[0, 3, 1], [2, 2, 0]])
    return dict(x=x, y=x, x_test=x[:1], y_test=x[:1], classes=4, words=4) | change


@pytest.mark.parametrize("change, error, says", [
    (dict(words=None), TypeError, "or say words=… for tokens"), (dict(words=3), ValueError, "x has 1 tokens outside 0 … 2, the first in example 0"),
    (dict(x=texts()["x"].int()), TypeError, "x is torch.int32: tokens are int64"), (dict(x=texts()["x"].float()), TypeError, "tokens are int64"),
    (dict(y=torch.zeros(2, 2, dtype=torch.int64)), ValueError, r"one class index per example, or \(n, 3\), one per position, got shape \(2, 2\)"),
    (dict(y=torch.full((2, 3), -1)), ValueError, "example 0 of y has no target"), (dict(y=texts()["x"] - 2), ValueError, "first is -2 in example 0"),
    (dict(y=texts()["x"] + 1), ValueError, "outside 0 … 3, the first is 4 in example 0"),
])
def test_token_datasets_refuse(change, error, says):
    with pytest.raises(error, match=says): Dataset(**texts(**change))


def test_token_datasets_move():
    data = Dataset(**texts(y=torch.tensor([1, 0]), y_test=torch.tensor([3])))
    moved = data.to(dtype=torch.float64)
    assert moved.x.dtype == torch.int64 and moved.words == 4 and moved.dtype == torch.float32 and data.in_shape == (3,)
    assert "4 words, 4 classes" in repr(data)


def test_subsets():
    data = load_dataset("digits-50")
    part = data.subset(torch.tensor([7, 3, 3]))
    assert torch.equal(part.x, data.x[[7, 3, 3]]) and torch.equal(part.y, data.y[[7, 3, 3]]) and part.n_test == data.n_test


@pytest.mark.parametrize("name, second", [("sorting", lambda a: np.sort(a, 1)), ("copying", lambda a: a)])
def test_sequences_to_continue(name, second):
    data = load_dataset(f"{name}:n=50,words=6,length=5")
    prompt = np.random.default_rng(0).integers(0, 6, size=(100, 5))
    both = np.concatenate([prompt, second(prompt)], 1)
    for x, y, rows in ((data.x, data.y, both[:50]), (data.x_test, data.y_test, both[50:])):
        assert np.array_equal(x, rows[:, :-1]) and np.array_equal(y[:, 4:], rows[:, 5:]) and (y[:, :4] == -1).all()
    assert (data.words, data.classes) == (6, 6)


@pytest.mark.parametrize("n, d", [(50, 50), (9, 4)])
def test_linear_is_the_draw_of_the_source(n, d):
    data = load_dataset(f"linear-{n}-{d}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, a = torch.linalg.qr(torch.randn(n, d))[0] * n**.5, torch.randn(d, d)
    assert torch.equal(data.x, x)
    torch.testing.assert_close(data.y, x @ a.T)


def test_toys_have_two_sides():
    for name in ("moons", "circles"):
        data = load_dataset(name)
        assert (data.n, data.n_test, data.outputs, data.classes) == (200, 100, 1, None) and set(data.y[:, 0].tolist()) == {-1, 1}
    data = load_dataset("classification:k=3")
    assert (data.in_shape, data.classes, data.n_test) == ((20,), 3, 100)


def test_windows_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("the cat\nthe dog\n" * 30, encoding="utf-8")
    chars, words = load_dataset("text:a.txt:length=16", tmp_path), load_dataset("text:a.txt:length=6,unit=word,stride=1", tmp_path)
    letters = sorted(set("the cat\ndog"))
    assert "".join(letters[i] for i in chars.x[0]) == "the cat\nthe dog\n" and (chars.n, chars.words) == (26, len(letters))
    assert torch.equal(chars.y[:, :-1], chars.x[:, 1:]) and torch.equal(words.x[1:, :-1], words.x[:-1, 1:])
    assert words.words == 4 and words.x[0].tolist() == [0, 1, 2, 0, 3, 2]        # the cat <eos> the dog <eos>


@real("tinyshakespeare/input.txt")
def test_real_shakespeare_is_nanogpts():
    data = load_dataset("shakespeare-char-10:length=64,stride=63,test=3")
    text = Path(REAL, "tinyshakespeare/input.txt").read_text()
    letters = sorted(set(text))
    assert data.words == 65 and "".join(letters[i] for i in data.x[0]) == text[:64]
    assert "".join(letters[i] for i in data.x_test[0]) == text[1_003_854:1_003_854 + 64]
    assert (data.n, data.n_test) == (10, 3)


# --- options

def test_options_choose_classes_and_test_examples(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", make := stand_in(10, 400))
    y = torch.tensor(make(None).targets)
    data, whole = load_dataset("cifar10-20:classes=4,test=7"), load_dataset("cifar10")
    where = torch.cat([(y == c).nonzero()[:5, 0] for c in range(4)]).sort().values
    assert torch.equal(data.x, whole.x[where]) and data.y.bincount().tolist() == [5] * 4 and data.classes == 4
    assert data.n_test == 7 and (data.y_test < 4).all() and torch.equal(data.x_test, whole.x_test[whole.y_test < 4][:7])


@pytest.mark.parametrize("name", [name for name, (mean, _) in CONSTANTS.items() if len(mean) == 3])
def test_customary_scales(name, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", make := stand_in(10))
    data = load_dataset(f"cifar10:scale={name}")
    want = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*CONSTANTS[name])])(make(None).data[3])
    torch.testing.assert_close(data.x[3], want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name, says", [
    ("digits:clases=3", "Did you mean 'classes'"), ("digits:classes=11", "classes=11, but it has 10 classes"), ("digits:classes=0", "classes=0"),
    ("digits:classes=two", "classes=two"), ("digits:scale=mnits", "Did you mean 'mnist'"), ("digits:scale=cifar100", "is for 3 channels"),
    ("moons:flip=true", "is for pictures"), ("digits-3:classes=4", "asked for 3 training examples of 4 classes"), ("digits:crop=-1", "crop must be"),
    ("digits:crop=two", "crop must be"), ("digits:test=0", "asked for the first 0 test examples"), ("digits:test=9k", "test must be"), ("sorting:words=none", "at least 1")])
def test_options_refused(name, says):
    with pytest.raises((ValueError, TypeError), match=says): load_dataset(name)


# --- crop and flip

@pytest.mark.parametrize("scale, pad, flip, dtype", list(itertools.product(("pixel", "channel", "cifar10-tail", None), (0, 1, 4), (False, True), (torch.float32, torch.float64))))
def test_crop_and_flip_are_torchvisions_on_the_stored_bytes(scale, pad, flip, dtype):
    a = torch.from_numpy(pixels(9, 3, 6, 5))
    scale = scale and scale_of(a, scale)
    stored = a if scale else a.float() / 7
    vary, x = CropFlip(scale, pad, flip), standardise(stored, scale).to(dtype)
    got = vary(x, torch.Generator().manual_seed(3))
    assert torch.equal(got, vary(x, torch.Generator().manual_seed(3))) and got.dtype == dtype
    g = torch.Generator().manual_seed(3)
    (dy, dx), mirror = torch.randint(2 * pad + 1, (2, 9), generator=g), torch.rand(9, generator=g) < .5
    for i, one in enumerate(stored):
        one = transforms.functional.crop(transforms.functional.pad(one, [pad]), int(dy[i]), int(dx[i]), 6, 5)
        if flip and mirror[i]: one = transforms.functional.hflip(one)
        torch.testing.assert_close(got[i:i + 1], standardise(one[None], scale).to(dtype), rtol=0, atol=0)


def test_varied_pictures_leave_the_global_generator_alone():
    data = load_dataset("digits-9:crop=2,flip=true")
    before = torch.get_rng_state()
    assert not torch.equal(data.augment(data.x, torch.Generator().manual_seed(0)), data.x)
    assert torch.equal(before, torch.get_rng_state()) and load_dataset("digits-9").augment is None
    assert torch.equal(data.x, load_dataset("digits-9").x)


# --- folders of pictures

def write_pictures(top, classes=3, n=4, n_test=2, names=("train", "val")):
    for split, count in zip(names, (n, n_test)):
        for c in range(classes):
            place = Path(top, split, f"class{c}"); place.mkdir(parents=True)
            for i in range(count + c): Image.fromarray(pixels(37 + i, 50, 3, seed=10 * c + i)).save(place / f"{i}.png")


@pytest.mark.parametrize("name", ["imagenet:size=28", "folder:imagenet:size=28"])
def test_folders_of_pictures(name, tmp_path):
    write_pictures(tmp_path / "imagenet")
    data = load_dataset(name, tmp_path)
    assert data.y.tolist() == [0, 1, 2] * 4 + [1, 2, 2] and data.n_test == 9 and data.classes == 3
    pipeline = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(), transforms.Normalize(*CONSTANTS["imagenet"])])
    for i, file in ((4, "train/class1/1.png"), (14, "train/class2/5.png")):
        torch.testing.assert_close(data.x[i], pipeline(Image.open(tmp_path / "imagenet" / file)), atol=2e-6, rtol=1e-5)


def test_only_the_pictures_that_are_kept_are_read(tmp_path):
    write_pictures(tmp_path, names=("train", "test"))
    for file in list(Path(tmp_path, "train").rglob("*.png")) + list(Path(tmp_path, "test").rglob("*.png")):
        if file.name != "0.png": file.write_bytes(b"torn")
    data = load_dataset(f"folder:{tmp_path}-3:size=8,test=3,crop=1")
    assert data.in_shape == (3, 8, 8) and data.n == data.n_test == 3 and data.augment.pad == 1
    with pytest.raises(OSError, match="1.png|cannot identify"): load_dataset(f"folder:{tmp_path}-4:size=8,test=3")


def test_folders_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder with train/CLASS"): load_dataset("imagenet", tmp_path)
    write_pictures(tmp_path / "a"); (tmp_path / "a/val/class1").rename(tmp_path / "a/val/other")
    with pytest.raises(ValueError, match="classes"): load_dataset("folder:a:size=8", tmp_path)
    with pytest.raises(ValueError, match="size must be"): load_dataset("folder:a:size=big", tmp_path)


# --- tokens in files

def test_npz_of_tokens(tmp_path):
    x = np.arange(12).reshape(4, 3) % 5
    data = load(tmp_path, x_train=x, y_train=(x + 1) % 5, x_test=x[:2], y_test=x[:2])
    assert (data.words, data.classes, data.y.shape) == (5, 5, (4, 3)) and np.array_equal(data.x, x)
    data = load(tmp_path, "-2", x_train=x, y_train=np.array([0, 1, 1, 0]), x_test=x, y_test=np.array([0, 0, 1, 1]))
    assert (data.words, data.classes, data.y.tolist()) == (5, 2, [0, 1])


def test_inside_held_a_data_set_is_read_once(tmp_path, monkeypatch):
    from gradnb.data.sources import held
    np.savez(tmp_path / "a.npz", x_train=np.ones((4, 2), np.float32), y_train=np.zeros(4, np.int64), x_test=np.ones((2, 2), np.float32), y_test=np.zeros(2, np.int64))
    monkeypatch.setenv("GRADNB_DATA", str(tmp_path))
    with held():
        first = load_dataset("npz:a.npz")
        with held(): assert load_dataset("npz:a.npz") is first
        assert load_dataset("npz:a.npz-2") is not first and load_dataset("npz:a.npz") is first
        monkeypatch.setattr("gradnb.data.sources.MOST_HELD", 200)        # bytes: of 96, and of 64 and 80 for two and three examples
        load_dataset("npz:a.npz-3")                                      # in place of the two, which nobody asked for since
        assert load_dataset("npz:a.npz") is first
        load_dataset("npz:a.npz-2")
        load_dataset("npz:a.npz-3")
        assert load_dataset("npz:a.npz") is not first
    assert load_dataset("npz:a.npz") is not first


def test_zipfs_shares():
    "Largest remainders are off by less than one example; classes= keeps the first of them."
    d, shares = load_dataset("zipf:n=1000,k=20,features=3"), 1 / np.arange(1, 21)
    counts = torch.bincount(d.y, minlength=20).numpy()
    assert counts.sum() == 1000 and np.abs(counts - 1000 * shares / shares.sum()).max() <= 1 and (np.diff(counts) <= 0).all()
    assert d.x.shape == (1000, 3) and 0 <= d.x.min() and d.x.max() <= 1 and not torch.equal(d.x, load_dataset("zipf:n=1000,k=20,features=3,seed=1").x)
    assert load_dataset("zipf:k=20,classes=5").y.max() == 4
    with pytest.raises(ValueError, match="zipf: k"): load_dataset("zipf:k=0")
