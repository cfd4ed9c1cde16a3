"""Stopping and resuming: the same bits as an undisturbed run, however it was stopped."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train
from trainer import Trainer

pytest.importorskip("sklearn")

# Two seeds, so that runs are stopped in the second, with finished results before them.
OPTIONS = ["--limit", "150", "--epochs", "3", "--seeds", "2", "--lr-schedule", "cosine"]


def without_seconds(state):
    if isinstance(state, dict):
        return {key: without_seconds(value) for key, value in state.items() if key != "seconds"}
    return [without_seconds(value) for value in state] if isinstance(state, list) else state


def assert_same(one, other):
    """Equal to the last bit, tensors included."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def checkpoint(directory):
    return without_seconds(torch.load(directory / "checkpoint.pt", weights_only=True))


def program(directory, *arguments, options=OPTIONS):
    files = ["--checkpoint", str(directory), "--out", str(directory / "out")]
    return [*options, *files, *arguments]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    assert train.main(program(directory)) == 0
    return checkpoint(directory)


def test_interrupted_run_says_how_to_resume_and_continues_bit_for_bit(undisturbed, tmp_path, capsys, monkeypatch):
    train_epoch, calls = Trainer.train_epoch, []

    def interrupted_in_the_middle(self, on_step):
        calls.append(self.name)
        if len(calls) == 14:  # the second seed, the second epoch, after SGD has had its turn
            raise KeyboardInterrupt
        train_epoch(self, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted_in_the_middle)
        assert train.main(program(tmp_path)) == 130
    err = capsys.readouterr().err
    assert err.startswith(f"interrupted: go on with: {sys.executable} ")
    assert err.endswith(f"--checkpoint {tmp_path} --out {tmp_path}/out --resume\n")
    assert err.count("\n") == 1

    assert train.main(program(tmp_path, "--resume")) == 0
    assert_same(checkpoint(tmp_path), undisturbed)


def start(directory):
    """The program in a process of its own, once its first epoch is over."""
    process = subprocess.Popen(
        [sys.executable, train.__file__, *program(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        # Where the tests run under nohup or in the background, a child would ignore ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline().startswith("seed 0  epoch 1/3")
    deadline = time.monotonic() + 60
    while not (directory / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def test_a_second_training_with_the_same_checkpoint_stops_at_once(tmp_path, capsys):
    process = start(tmp_path)
    for arguments in [], ["--resume"]:
        assert train.main(program(tmp_path, *arguments)) == 2
        err = capsys.readouterr().err
        assert f"{tmp_path} is in use: another training that is running saves its state there" in err
        assert err.count("\n") == 1
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_file_system_without_locks_is_no_error(tiny, tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert train.main(program(tmp_path, options=tiny)) == 0


def test_killed_run_continues_bit_for_bit(undisturbed, tmp_path):
    process = start(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert train.main(program(tmp_path, "--resume")) == 0
    assert_same(checkpoint(tmp_path), undisturbed)


def test_ctrl_c_exits_with_130_and_no_traceback(tmp_path):
    process = start(tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.startswith("interrupted: go on with: ")
    assert err.count("\n") == 1


def test_interrupted_run_without_checkpoint_says_so(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train.main([*tiny, "--out", str(tmp_path)]) == 130
    assert "nothing is saved" in capsys.readouterr().err


def test_a_run_that_is_interrupted_in_its_first_epoch_says_so(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train.main(program(tmp_path, options=tiny)) == 130
    assert "interrupted: no epoch was finished, so nothing is saved yet: start again" in capsys.readouterr().err


def test_finished_run_resumes_to_its_report(tiny, tmp_path, capsys):
    assert train.main(program(tmp_path, options=tiny)) == 0
    first = capsys.readouterr().out
    assert train.main(program(tmp_path, "--resume", options=tiny)) == 0
    resumed = capsys.readouterr().out
    assert first[first.index("optimizer") :] == resumed[resumed.index("optimizer") :]


def test_checkpoint_of_other_options_is_refused(tiny, tmp_path, capsys):
    assert train.main(program(tmp_path, options=tiny)) == 0
    assert train.main(program(tmp_path, "--lr", "0.1", "--resume", options=tiny)) == 2
    assert "made with other options: lr 0.05, not 0.1" in capsys.readouterr().err


def test_checkpoint_is_not_overwritten_without_resume(tiny, tmp_path, capsys):
    assert train.main(program(tmp_path, options=tiny)) == 0
    assert train.main(program(tmp_path, options=tiny)) == 2
    assert "holds a checkpoint already" in capsys.readouterr().err


def test_damaged_checkpoint_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert train.main(program(tmp_path, "--resume", options=tiny)) == 2
    assert "not a checkpoint of this program" in capsys.readouterr().err


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    from checkpoint import save_checkpoint

    save_checkpoint(str(tmp_path), {"value": 1})

    def half_written(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(str(tmp_path), {"value": 2})
    assert checkpoint(tmp_path) == {"value": 1}
