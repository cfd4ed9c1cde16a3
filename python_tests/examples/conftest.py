"""Lets the tests import the example programs, as ``python examples/train.py`` lets them import one another."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Trainings as small as these gain nothing from more, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    """Options of a training that takes a fraction of a second."""
    return ["--limit", "150", "--epochs", "2", "--seeds", "1"]
