"""The tables of blocks, and the memory from which the capture of a CUDA graph uploads them."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def blocks():
    from esam_kernels.backends.triton import blocks

    return blocks


def test_equal_tensors_share_a_table_and_moved_gradients_only_their_addresses(blocks):
    params, grads, moved = ([torch.zeros(3000), torch.zeros(5)] for _ in range(3))
    first, again, other = (blocks.table([params, lists]) for lists in (grads, grads, moved))
    assert again.addresses is first.addresses
    assert other.addresses is not first.addresses
    assert other.layout is first.layout
    assert other.addresses[2 * 3 - 1].item() == moved[1].data_ptr()


def test_every_element_is_in_one_block(blocks):
    numels = [5000, 0, 1, 2048, 4097]
    table = blocks.table([[torch.zeros(numel) for numel in numels]])
    rest = table.layout[4 * len(numels) :].view(2, table.num_blocks)
    for tensor, numel in enumerate(numels):
        starts = rest[1][rest[0] == tensor]
        assert starts.tolist() == list(range(0, numel, 2048))


def test_positions_beyond_32_bits_are_kept(blocks):
    huge = torch.empty(1, dtype=torch.bfloat16).expand(2**33 + 1)
    table = blocks.table([[huge]], offsets=[2**40])
    assert table.num_blocks == 2**33 // 4096 + 1
    assert table.layout[-1].item() == 2**33
    assert table.layout[1].item() == 2**40


def test_staging_memory_of_a_captured_graph_is_never_handed_out_twice(blocks, monkeypatch):
    monkeypatch.setattr(blocks, "_staging", [torch.empty(128, dtype=torch.uint8)])
    monkeypatch.setattr(blocks, "_captured", [])
    first, second = (blocks._captured_staging(numel, torch.int64) for numel in (5, 9))
    first.copy_(torch.arange(5))
    second.copy_(-torch.arange(9))
    assert first.tolist() == list(range(5))
    assert len(blocks._staging[0]) == 128 - 48 - 80
    assert [tensor.data_ptr() for tensor in blocks._captured] == [first.data_ptr(), second.data_ptr()]


def test_captured_tables_are_kept_out_of_the_cache(blocks, monkeypatch):
    params = [torch.zeros(3000)]
    eager = blocks.table([params])
    monkeypatch.setattr(blocks, "capturing", lambda device: True)
    monkeypatch.setattr(blocks, "_captured", [])
    captured = blocks.table([params])
    assert captured.addresses is not eager.addresses
    assert captured.layout is not eager.layout
    assert [id(tensor) for tensor in blocks._captured] == [id(captured.addresses), id(captured.layout)]


def test_only_a_cuda_stream_is_asked_whether_it_captures(blocks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert blocks.capturing(torch.device("cuda"))
    assert not blocks.capturing(torch.device("cpu"))


def test_adam_counters_on_another_device_are_refused_in_a_capture(kernels, monkeypatch):
    from esam_kernels.backends.triton import update

    monkeypatch.setattr(update, "capturing", lambda device: True)
    w = [torch.zeros(4)]
    steps = [torch.tensor(0.0, dtype=torch.float64)]
    with pytest.raises(RuntimeError, match="capturable"):
        kernels.restore_adam_(w, w, w, w, w, [], steps, 0.1, None, 0.9, 0.9, 1e-8, 0.0, False, False, True)
