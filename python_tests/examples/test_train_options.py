"""Options of the training itself: learning rate, label smoothing, memory format, graph, micro-batches."""

import copy
import re

import pytest
import torch
import train
from data import load
from learning_rate import lr_factor
from trainer import Trainer

from esam_kernels.graphs import _EagerStep

SMALL = ["--data", "synthetic-cifar10", "--limit", "16", "--batch-size", "8", "--seeds", "1", "--epochs", "2"]


def trainer_of(name, *arguments, data=None):
    options = train.parse_options([*SMALL, "--optimizer", name, *arguments])
    return Trainer(name, 0, load(options.data, limit=options.limit) if data is None else data, options)


def a_batch(trainer):
    return next(trainer.data.training_batches(8, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("schedule", "epochs", "warmup", "expected"),
    [
        ("cosine", 4, 0.0, [1.0, 1.0, 0.853553, 0.853553, 0.5, 0.5, 0.146447, 0.146447]),
        ("cosine", 3, 1.0, [0.5, 1.0, 1.0, 1.0, 0.5, 0.5]),
        ("constant", 2, 1.5, [1 / 3, 2 / 3, 1.0, 1.0]),
        ("constant", 1, 0.0, [1.0, 1.0]),
    ],
)
def test_learning_rate_factors(schedule, epochs, warmup, expected):
    factors = [lr_factor(step, schedule, epochs, warmup, steps_per_epoch=2) for step in range(2 * epochs)]
    assert factors == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["sgd", "esam"])
def test_steps_see_the_learning_rate_of_the_schedule(name):
    arguments = ["--lr", "0.4", "--lr-schedule", "cosine", "--lr-warmup", "1", "--epochs", "3"]
    trainer = trainer_of(name, *arguments)
    seen, step = [], trainer.step
    trainer.step = lambda *batch: (seen.append(trainer.optimizer.param_groups[0]["lr"]), step(*batch))[1]
    for _ in range(3):
        trainer.train_epoch()
    assert seen == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.2, 0.2])


def test_help_tells_each_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_options(["--help"])
    helped = re.split(r"\n  --", capsys.readouterr().out)
    for name, value in vars(train.parse_options(["--seeds", "3"])).items():
        if (
            isinstance(value, (str, int, float))
            and not isinstance(value, bool)
            and name not in ("ranking", "label_noise")
        ):
            (text,) = [" ".join(each.split()) for each in helped if re.match(name.replace("_", "-") + r"\b(?!-)", each)]
            said = re.findall(r"default ([\w.]+)", text)
            assert [type(value)(each) for each in said] == [value], text


def test_constant_learning_rate_has_no_schedule():
    assert trainer_of("sgd").lr_schedule is None


def test_label_smoothing_is_that_of_torch_and_not_in_the_evaluation():
    plain, smooth = trainer_of("sgd"), trainer_of("sgd", "--label-smoothing", "0.2")
    assert plain.evaluate() == smooth.evaluate()
    images, labels = a_batch(plain)
    expected = torch.nn.functional.cross_entropy(plain.model(images), labels, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(smooth.losses(images, labels), expected)
    assert not torch.allclose(plain.losses(images, labels), expected)


@pytest.mark.parametrize("model", ["resnet18", "cnn"])
def test_channels_last_is_the_layout_of_images_and_weights_and_changes_no_value(model):
    plain = trainer_of("esam", "--model", model)
    last = trainer_of("esam", "--model", model, "--channels-last")
    images, labels = a_batch(last)
    assert torch.equal(images, a_batch(plain)[0])
    assert images.is_contiguous(memory_format=torch.channels_last)
    kernels = [weight for weight in last.model.parameters() if weight.ndim == 4 and weight.shape[2] == 3]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    torch.testing.assert_close(last.losses(images, labels), plain.losses(images, labels), rtol=1e-4, atol=1e-4)
    last.step(images, labels)
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


@pytest.mark.parametrize("name", ["sgd", "sam", "esam"])
def test_an_epoch_waits_for_the_device_as_often_whatever_its_steps(name):
    waits = []
    for images in ("16", "32"):
        trainer = trainer_of(name, "--limit", images, "--lr-schedule", "cosine", "--lr-warmup", "0.5")
        trainer.train_epoch()
        with torch.profiler.profile() as profile:
            trainer.train_epoch()
        calls = {event.key: event.count for event in profile.key_averages()}
        waits.append(sum(calls.get(key, 0) for key in ("aten::_local_scalar_dense", "aten::nonzero")))
    assert waits == [3, 3]  # the training loss, and loss and accuracy on the test set


def history(capsys, *arguments):
    options = train.parse_options([*SMALL, "--optimizer", "sam", "esam", *arguments])
    results = train.train(options)
    kept = [
        [{key: value for key, value in entry.items() if key != "seconds"} for entry in result["history"]]
        for result in results
    ]
    return kept, capsys.readouterr()


def test_graph_falls_back_to_the_eager_step_with_one_line(capsys, caplog):
    eager, without = history(capsys, "--device", "cpu")
    graphed, output = history(capsys, "--device", "cpu", "--graph")
    assert graphed == eager
    message = "--graph: not on a CUDA device, so that every step runs eagerly"
    assert output.out.splitlines()[0] == message
    assert output.out.splitlines()[1:] == without.out.splitlines()
    assert output.err == without.err == ""
    assert not caplog.records


def test_graph_makes_a_graphed_step_for_the_usual_batch():
    trainer = trainer_of("esam", "--graph")
    images, labels = a_batch(trainer)
    trainer.device = torch.device("cuda")  # the model is not there: make_graphed_step then says so, and runs eagerly
    step = trainer._make_step(images, labels)
    assert isinstance(step, _EagerStep)
    assert step.closure == trainer.losses


def test_micro_batch_perturbs_the_parts_of_a_batch_by_themselves():
    trainer = trainer_of("esam", "--micro-batch", "4", "--gamma-warmup", "0")
    whole = trainer_of("esam", "--gamma-warmup", "0")
    by_hand = copy.deepcopy(whole)
    images, labels = a_batch(trainer)
    for one in (trainer, whole):
        one.step(images, labels)
    by_hand.optimizer.step(by_hand.losses, images, labels, micro_batch=4)
    weights = [torch.cat([p.flatten() for p in one.model.parameters()]) for one in (trainer, whole, by_hand)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("extra", [["--cudnn-benchmark"], ["--amp", "bf16", "--channels-last", "--graph"]])
def test_options_for_speed_run_on_the_cpu(extra, tmp_path):
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        assert train.main([*SMALL, "--device", "cpu", *extra, "--out", str(tmp_path)]) == 0
        assert torch.backends.cudnn.benchmark is ("--cudnn-benchmark" in extra)
        assert torch.backends.cudnn.deterministic is not torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--graph", "--micro-batch", "4"], "--graph takes the batch whole"),
        (["--lr-warmup", "2"], "--lr-warmup 2 leaves nothing of 2 epochs"),
        (["--lr-warmup", "-1"], "--lr-warmup: -1 is not a finite number of 0 or more"),
        (["--label-smoothing", "1.5"], "--label-smoothing: 1.5 does not lie in"),
        (["--lr", "nan"], "--lr: nan is not a finite number of 0 or more"),
        (["--momentum", "nan"], "--momentum: nan is not a finite number of 0 or more"),
        (["--weight-decay", "inf"], "--weight-decay: inf is not a finite number of 0 or more"),
        (["--workers", "-1"], "--workers: -1 is not 0 or more"),
        (["--data-path", "x"], "--data-path is for --data cifar10, cifar100 and imagenet"),
        (["--model", "resnet50", "--micro-batch", "3", "--batch-size", "4"], "resnet50 with a batch of one image"),
    ],
)
def test_options_that_cannot_be_are_one_line(arguments, message, tmp_path, capsys):
    try:
        code = train.main([*SMALL, *arguments, "--out", str(tmp_path)])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
