"""The examples of examples/integrations run, and train as the bare loop does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from small_training import assert_same_bits, small_net, snapshot
from torch.utils.data import DataLoader, TensorDataset

from esam_kernels import ESAM, SAM, cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*pin_memory")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "integrations"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_shorter_than_60_lines(path):
    assert len(path.read_text().splitlines()) < 60


# -- Lightning ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    module = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    return module


def quiet_trainer(lightning, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(accelerator="cpu", logger=False, **{**quiet, **arguments})


def digit_loader(example) -> DataLoader:
    images, labels = example.digits()
    return DataLoader(TensorDataset(images[:300], labels[:300]), batch_size=64)


def without_dropout(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", ["lightning_automatic", "lightning_manual"])
def test_lightning_example_learns(lightning, name):
    assert load_example(name).main(epochs=3) > 0.7


def test_lightning_automatic_trains_as_the_closure_does_by_hand(lightning):
    example = load_example("lightning_automatic")
    loader = digit_loader(example)
    model = without_dropout(example.Classifier())
    trainer = quiet_trainer(lightning, max_epochs=2)
    trainer.fit(model, loader)
    assert trainer.global_step == 2 * len(loader)

    by_hand = without_dropout(example.Classifier())
    configured = by_hand.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for _ in range(2):
        for images, labels in loader:

            def closure():
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(by_hand(images), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
        scheduler.step()
    assert_same_bits(snapshot(model), snapshot(by_hand))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_manual_trains_as_step_does(lightning, precision):
    example = load_example("lightning_manual")
    loader = digit_loader(example)
    model = without_dropout(example.Classifier())
    trainer = quiet_trainer(lightning, max_epochs=2, precision=precision)
    trainer.fit(model, loader)
    assert trainer.global_step == 2 * len(loader)

    by_hand = without_dropout(example.Classifier())
    optimizer = by_hand.configure_optimizers()
    for _ in range(2):
        for batch in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                optimizer.step(by_hand.losses, *batch)
    assert_same_bits(snapshot(model), snapshot(by_hand))


def test_lightning_with_pass_1_on_a_quarter_trains_as_step_does(lightning):
    """The training step of docs/frameworks.md."""
    example = load_example("lightning_manual")

    class Quarter(example.Classifier):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            sam = optimizer.optimizer
            quarter = [tensor[: max(2, len(tensor) // 4)] for tensor in batch]
            sam.backward(self.losses(*quarter).mean())
            sam.first_step(zero_grad=True)
            self.manual_backward(self.losses(*batch).mean())
            optimizer.step()
            sam.zero_grad()

        def configure_optimizers(self):
            return SAM(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, ascent_share=0.25, model=self)

    loader = digit_loader(example)
    model, by_hand = without_dropout(Quarter()), without_dropout(Quarter())
    trainer = quiet_trainer(lightning, max_epochs=1)
    trainer.fit(model, loader)
    assert trainer.global_step == len(loader)
    optimizer = by_hand.configure_optimizers()
    for batch in loader:
        optimizer.step(by_hand.losses, *batch)
    assert_same_bits(snapshot(model), snapshot(by_hand))


@pytest.mark.parametrize("name", ["lightning_automatic", "lightning_manual"])
def test_lightning_resumes_from_its_checkpoint_with_the_same_bits(lightning, name, tmp_path):
    example = load_example(name)
    loader = digit_loader(example)

    undisturbed = without_dropout(example.Classifier())
    quiet_trainer(lightning, max_epochs=3).fit(undisturbed, loader)

    first = quiet_trainer(lightning, max_epochs=1)
    first.fit(without_dropout(example.Classifier()), loader)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = without_dropout(example.Classifier())
    quiet_trainer(lightning, max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert_same_bits(snapshot(undisturbed), snapshot(resumed))


def test_lightning_wrapper_and_optimizer_agree_on_whether_the_weights_are_perturbed(lightning):
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = small_net(batch_norm=False)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    before = snapshot(model)
    wrapped = LightningOptimizer(optimizer)
    cross_entropy(model(torch.randn(8, 8)), torch.randint(4, (8,))).mean().backward()
    wrapped.first_step()
    with pytest.raises(RuntimeError, match="perturbed"):
        optimizer.first_step()
    optimizer.restore()
    assert_same_bits(before, snapshot(model))


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    module = pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


@pytest.fixture
def trainer_example(accelerate):
    pytest.importorskip("transformers")
    return load_example("huggingface_trainer")


def small_trainer(example, batches: list, folder: Path, dropout: float = 0.0, **arguments):
    """The example's Trainer over a small model, which keeps the batches that it has drawn."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )

    set_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    noise = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = BertForSequenceClassification(BertConfig(vocab_size=17, num_labels=4, **size, **noise))
    optimizer = ESAM(model.parameters(), torch.optim.AdamW, lr=1e-3, rho=0.05, model=model)

    def collate(samples):
        batches.append(default_data_collator(samples))
        return dict(batches[-1])

    defaults = {"max_steps": 6, "per_device_train_batch_size": 16, "lr_scheduler_type": "constant", "use_cpu": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return example.ESAMTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**defaults, **quiet, **arguments}),
        train_dataset=[{"input_ids": torch.randint(17, (8,)), "labels": i % 4} for i in range(200)],
        data_collator=collate,
        optimizers=(optimizer, None),
    )


def test_trainer_example_learns(trainer_example):
    assert trainer_example.main(epochs=4, disable_tqdm=True, use_cpu=True) > 0.25


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_trains_as_step_does(trainer_example, tmp_path, bf16):
    batches: list = []
    trainer = small_trainer(trainer_example, batches, tmp_path, max_grad_norm=0.5, bf16=bf16)
    start = snapshot(trainer.model)
    trainer.train()
    trained = snapshot(trainer.model)

    model = small_trainer(trainer_example, [], tmp_path).model
    model.load_state_dict(start)
    model.train()
    optimizer = ESAM(model.parameters(), torch.optim.AdamW, lr=1e-3, rho=0.05, model=model)

    def losses(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=batch["input_ids"]).logits
        return cross_entropy(logits.float(), batch["labels"])

    for each in batches[:6]:
        optimizer.step(losses, dict(each), max_grad_norm=0.5)
    assert_same_bits(trained, snapshot(model))


def test_trainer_resumes_from_its_checkpoint_with_the_same_bits(trainer_example, tmp_path):
    undisturbed = small_trainer(trainer_example, [], tmp_path / "a", dropout=0.2)
    undisturbed.train()
    arguments = {"dropout": 0.2, "save_strategy": "steps", "save_steps": 3}
    small_trainer(trainer_example, [], tmp_path / "b", **arguments).train()
    resumed = small_trainer(trainer_example, [], tmp_path / "b", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same_bits(snapshot(undisturbed.model), snapshot(resumed.model))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_example_learns(accelerate, precision):
    assert load_example("accelerate_loop").main(epochs=3, cpu=True, mixed_precision=precision) > 0.7


def test_accelerate_resumes_from_its_state_with_the_same_bits(accelerate, tmp_path):
    def prepared():
        model = small_net()
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, model=model)
        return (optimizer, *accelerator.prepare(model, optimizer))

    def train(steps):
        for _ in range(steps):
            inputs, targets = torch.randn(16, 8), torch.randint(4, (16,))
            esam.step(lambda x, y: cross_entropy(model(x), y), inputs, targets)

    accelerator = accelerate.Accelerator(cpu=True)
    esam, model, _ = prepared()
    train(3)
    accelerator.save_state(tmp_path / "state")
    train(3)
    undisturbed = snapshot(model)

    accelerator.free_memory()
    esam, model, _ = prepared()
    accelerator.load_state(tmp_path / "state")
    train(3)
    assert_same_bits(undisturbed, snapshot(model))
