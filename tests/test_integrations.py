"Trainers of other libraries carry a watch and come to the same bits without it."
import contextlib
import io
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradnb
from gradnb import Problem, sharpness
from gradnb.integrations import lightning_callback, trainer_callback


def seed():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


def bits(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, random.getstate(), tuple(np.random.get_state()[1]), torch.get_rng_state()


def same(a, b):
    return a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items()) and a[1:3] == b[1:3] and torch.equal(a[3], b[3])


class Texts(torch.utils.data.Dataset):
    "Padded, and with a word left out at random."
    def __len__(self): return 24
    def __getitem__(self, i):
        gen = torch.Generator().manual_seed(i)
        ids = torch.randint(1, 50, (10,), generator=gen)
        mask = (torch.arange(10) < 5 + i % 6).long()
        return dict(input_ids=ids.where(torch.rand(10) > .1, 1), attention_mask=mask, labels=ids.where(mask == 1, -100))


def hugging(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)), Texts()
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50, max_position_embeddings=16)
    class Labelled(Texts):
        def __getitem__(self, i): return super().__getitem__(i) | dict(labels=torch.tensor(i % 2))
    return transformers.BertForSequenceClassification(config), Labelled()


@pytest.mark.parametrize("kind, mixed", [("gpt2", False), ("bert", False), ("gpt2", True)])
def test_hugging_faces_trainer(kind, mixed, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments
    def run(*callbacks, mixed=mixed):
        seed()
        model, data = hugging(kind)
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, report_to=[], disable_tqdm=True,
                                 use_cpu=True, save_strategy="no", max_grad_norm=.5, bf16=mixed)
        if mixed: model.gradient_checkpointing_enable({"use_reentrant": False})
        with contextlib.redirect_stdout(io.StringIO()): Trainer(model, args, train_dataset=data, callbacks=list(callbacks)).train()
        return bits(model)
    watched = lambda: trainer_callback(probes=["sharpness:every=2", "grad_norm:every=1"], strict=True)
    callback = watched()
    assert same(run(), run(callback))
    assert list(callback.watch.traces["sharpness"].steps) == [0, 2, 4] and list(callback.watch.traces["grad_norm"].steps) == [0, 1, 2, 3, 4]
    assert callback.watch.closed
    if mixed:                   # as without, where the weights are the same
        plain = watched()
        run(plain, mixed=False)
        for name, rtol in (("sharpness", 2e-3), ("grad_norm", 1e-4)):
            np.testing.assert_allclose(callback.watch.traces[name].values[0], plain.watch.traces[name].values[0], rtol=rtol)


@pytest.mark.parametrize("how", ["smoothed", "function", "method"])
def test_what_the_trainer_minimises_is_measured(how, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments
    class Tripled(Trainer):
        def compute_loss(self, *args, **kwargs): return 3 * super().compute_loss(*args, **kwargs)
    def words(model, batch, smoothing=0.):
        logits, labels = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    means = {"smoothed": lambda model, batch: words(model, batch, .5), "function": lambda model, batch: 3 * words(model, batch), "method": lambda model, batch: 3 * words(model, batch)}
    found = []
    for objective in (None, means[how]):
        seed()
        model, data = hugging("gpt2")
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=8, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
                                 label_smoothing_factor=.5 if how == "smoothed" else 0)
        callback = trainer_callback(objective, probes=["sharpness:every=2", "grad_norm:every=2"], strict=True)
        extra = dict(compute_loss_func=lambda out, labels, **_: 3 * F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())) if how == "function" else {}
        with contextlib.redirect_stdout(io.StringIO()): (Tripled if how == "method" else Trainer)(model, args, train_dataset=data, callbacks=[callback], **extra).train()
        found.append([callback.watch.traces[name].values[0] for name in ("sharpness", "grad_norm")])
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    x, y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    class Classifier(lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(.2), nn.Linear(8, 3))
        def training_step(self, batch, i):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return {"loss": loss}
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)]
    class Manual(Classifier):
        automatic_optimization = False
        def training_step(self, batch, i):
            optimizer, loss = self.optimizers(), super().training_step(batch, i)["loss"]
            optimizer.zero_grad(), self.manual_backward(loss), optimizer.step()
    def run(*callbacks, cls=Classifier):
        seed()
        module = cls()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                              callbacks=list(callbacks), default_root_dir=tmp_path).fit(module, DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True))
        return bits(module)
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path, "own")
    callback = lightning_callback(probes=["sharpness:every=2"], log=logger)
    told = lightning_callback(lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]), probes=["sharpness:every=2"])
    assert same(run(), run(callback)) and same(run(cls=Manual), run(told, cls=Manual))
    for one in (callback, told): assert list(one.watch.traces["sharpness"].steps) == [0, 2, 4, 6, 8] and one.watch.closed
    with pytest.raises(TypeError, match="takes the steps itself"): run(lightning_callback(probes=["sharpness"]), cls=Manual)
    logger.save()
    table = pd.read_csv(logger.log_dir + "/metrics.csv").dropna(subset=["sharpness"])
    np.testing.assert_allclose(table.set_index("step")["sharpness"], callback.watch.traces["sharpness"].values, rtol=1e-6)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    x, y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    def run(watched):
        seed()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=.1, momentum=.9),
                                                       DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True))
        watch = gradnb.watch(model, nn.CrossEntropyLoss(), loader, probes=["sharpness:every=1"], optimizer=optimizer, strict=True).attach() if watched else None
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(batch[0]), batch[1]))
                optimizer.step()
                optimizer.zero_grad()
        if watched:
            watch.close()
            assert list(watch.traces["sharpness"].steps) == [0, 1, 2, 3]
            problem = Problem(model, "ce", TensorDataset(x, y))
            found = sharpness(problem, problem.theta0)
            assert abs(found.values[0] - watch.traces["sharpness"].columns["value"][-1]) <= 2 * found.errors[0]
        return bits(model)
    assert same(run(False), run(True))
