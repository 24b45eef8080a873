"""Training frameworks drive SINGD as any optimizer; tiny models built from configurations, no downloads."""

import os
import sys

import pytest

if sys.version_info < (3, 11):
    pytest.skip("transformers needs Python 3.11", allow_module_level=True)
os.environ["HF_HUB_OFFLINE"] = "1"

import lightning
import torch
import transformers
from accelerate import Accelerator
from published import SINGD
from torch import nn
from torch.utils.data import DataLoader, Dataset

from singd.layers import KINDS, LinearKind, register_layer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]  # of the frameworks and of torch in their hands; SINGD's own stay errors

FAST = dict(lr=0.02, T=2, lr_cov=0.05, damping=0.1)


def assert_identical(model, other):
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


class Points(Dataset):
    """Points whose class is the largest of their first three coordinates."""

    def __init__(self, n=32):
        self.x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.x[i, :3].argmax()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


# -- Lightning -----------------------------------------------------------------


class Lit(lightning.LightningModule):
    """Automatic optimization, with a schedule per step."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.losses = []

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = SINGD(self, **FAST)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def lightning_fit(directory, epochs, ckpt=None, **options):
    module = Lit()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        default_root_dir=directory,
        logger=False,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(directory, save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, DataLoader(Points(), batch_size=8), ckpt_path=ckpt)
    return module, trainer


@pytest.mark.parametrize("told", [True, False])
def test_lightning_with_a_gradient_scaler(tmp_path, told, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    if not told:
        with pytest.raises(RuntimeError, match=r"build it with SINGD\(..., grad_scaler=scaler\)"):
            lightning_fit(tmp_path, 10, plugins=[plugin])
        return
    monkeypatch.setitem(FAST, "grad_scaler", scaler)
    module, _ = lightning_fit(tmp_path, 10, plugins=[plugin])
    assert sum(module.losses[-4:]) < 0.7 * sum(module.losses[:4])


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str
)
def test_lightning_trains(tmp_path, options):
    module, trainer = lightning_fit(tmp_path, 10, **options)
    assert sum(module.losses[-4:]) < 0.7 * sum(module.losses[:4])
    K = trainer.optimizers[0].factors("net.0").K.dense()
    assert not torch.equal(K, torch.eye(7))


def test_lightning_resumes_to_the_same_bits(tmp_path):
    whole, _ = lightning_fit(tmp_path / "whole", 6)
    lightning_fit(tmp_path / "half", 3)
    resumed, _ = lightning_fit(tmp_path / "half", 6, ckpt=tmp_path / "half" / "last.ckpt")
    assert len(resumed.losses) == 12
    assert_identical(whole, resumed)


# -- Hugging Face ----------------------------------------------------------------


class Images(Dataset):
    """Images of noise, brighter with their class."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        noise = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": noise + i % 3, "labels": i % 3}


class Sentences(Dataset):
    """Sequences that repeat a word; the word is the class, and the next word."""

    def __init__(self, key):
        self.key = key

    def __len__(self):
        return 16

    def __getitem__(self, i):
        words = torch.full((6,), i % 3 + 1)
        return {
            "input_ids": words,
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": words if self.key == "words" else torch.tensor(i % 3),
        }


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_channels=1, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=8, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


class Conv1DKind(LinearKind):
    """GPT-2's linear layer stores its weight transposed."""

    input_name = "x"

    def weight_to_matrix(self, layer, weight):
        return weight.T

    def matrix_to_weight(self, layer, matrix):
        return matrix.T


@pytest.fixture(autouse=True)
def gpt2_layers():
    register_layer(transformers.pytorch_utils.Conv1D, Conv1DKind())
    yield
    del KINDS[transformers.pytorch_utils.Conv1D]


# name: (model, data, a layer that must have factors)
TRANSFORMERS = {
    "ViT": (vit, Images(), "vit.embeddings.patch_embeddings.projection"),
    "BERT": (bert, Sentences("class"), "bert.embeddings.word_embeddings"),
    "GPT-2": (gpt2, Sentences("words"), "transformer.h.0.attn.c_attn"),
}


def singd(model):
    return SINGD(
        model, lr=0.03, T=2, lr_cov=0.1, normalize_lr_cov=True, damping=0.1, fallback={"lr": 0.01}
    )


def built(name):
    make, data, layer = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = make()
    return model, singd(model), data, layer


def trainer_of(model, optimizer, data, directory, steps, **options):
    arguments = transformers.TrainingArguments(
        output_dir=directory,
        max_steps=steps,
        per_device_train_batch_size=8,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=6,
        seed=0,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_hugging_face_trainer_trains_and_resumes_to_the_same_bits(name, tmp_path):
    model, optimizer, data, layer = built(name)
    trainer = trainer_of(model, optimizer, data, tmp_path, steps=16)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    K = optimizer.factors(layer).K.dense()
    assert not torch.equal(K, torch.eye(len(K)))

    # From its files: transformers 5.23 stores a ViT under other names than its Trainer looks for.
    checkpoint = str(tmp_path / "checkpoint-12")
    other = type(model).from_pretrained(checkpoint)
    resumed = trainer_of(other, singd(other), data, tmp_path, steps=16)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 16
    assert_identical(model, other)


@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_options_of_the_hugging_face_trainer(options, tmp_path):
    model, optimizer, data, layer = built("GPT-2")
    trainer = trainer_of(model, optimizer, data, tmp_path, steps=8, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    K = optimizer.factors(layer).K.dense()
    assert not torch.equal(K, torch.eye(len(K)))


def accelerate_steps(model, optimizer, data, steps, directory=None, save=False, load=False):
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8))
    if load:
        accelerator.load_state(directory)
    losses = []
    while len(losses) < steps:
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    if save:
        accelerator.save_state(directory)
    return losses


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_accelerate_trains_and_resumes_to_the_same_bits(name, tmp_path):
    def without_dropout():
        model, optimizer, data, _ = built(name)
        return model.eval(), optimizer, data  # torch's random numbers are not what this is about

    model, optimizer, data = without_dropout()
    losses = accelerate_steps(model, optimizer, data, 24, tmp_path, save=True)
    assert losses[-1] < 0.9 * losses[0]
    accelerate_steps(model, optimizer, data, 4)
    other, fresh, data = without_dropout()
    accelerate_steps(other, fresh, data, 4, tmp_path, load=True)
    assert_identical(model, other)
