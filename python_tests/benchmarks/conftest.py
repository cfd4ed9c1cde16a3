"""What tests of several benchmarks need."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Small work is not divided: with more threads the test mostly waits for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
