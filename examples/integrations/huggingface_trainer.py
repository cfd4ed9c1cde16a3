"""Hugging Face Trainer: both passes in ``training_step``; clipping, the update and the rest stay the Trainer's."""

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from esam_kernels import ESAM, RandomState, cross_entropy


class ESAMTrainer(Trainer):
    """Its ``optimizers=(esam, scheduler)`` has to hold an ESAM or SAM; one batch a step (no accumulation)."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        esam = self.optimizer.optimizer  # what Accelerate has wrapped
        model.train()
        inputs = dict(self._prepare_inputs(inputs))

        def losses(batch):
            with self.compute_loss_context_manager():
                logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
                return cross_entropy(logits, batch["labels"])

        noise = RandomState([self.args.device])
        with self.accelerator.no_sync(model):  # each process perturbs for its own batch
            loss_before = losses(inputs)
            esam.backward(loss_before.mean())
        esam.first_step(zero_grad=True)
        with torch.no_grad(), noise.replay():
            loss_after = losses(inputs)
        self.accelerator.backward(losses(esam.select(loss_before, loss_after, inputs)).mean())
        return loss_before.mean().detach()  # the Trainer's optimizer.step() is second_step()


def digits() -> list[dict]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, data.target)]


def main(epochs: int = 6, **arguments) -> float:
    set_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    image = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    model = ViTForImageClassification(ViTConfig(hidden_dropout_prob=0.1, initializer_range=0.1, **image, **size))
    optimizer = ESAM(model.parameters(), torch.optim.AdamW, lr=5e-3, rho=0.05, model=model)
    arguments = {"output_dir": "runs/huggingface", "save_strategy": "no", "report_to": "none", **arguments}
    trainer = ESAMTrainer(
        model,
        TrainingArguments(num_train_epochs=epochs, per_device_train_batch_size=32, **arguments),
        train_dataset=digits()[:1400],
        optimizers=(optimizer, None),
    )
    trainer.train()
    predicted = trainer.predict(digits()[1400:])
    return float((predicted.predictions.argmax(1) == predicted.label_ids).mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.3f}")
