"""The tables of blocks, and the memory from which the capture of a CUDA graph uploads them."""

from __future__ import annotations

import weakref

import pytest
import torch
import triton
import triton.language as tl

from esam_kernels import uploads as host
from esam_kernels.backends.triton.blocks import block_at

# The convolutions and normalization layers of ResNet-50 and its head: 161 tensors.
RESNET_50 = [9408, 64, 64]
for stage, depth in enumerate((3, 4, 6, 3)):
    width = 64 << stage
    for number in range(depth):
        before = 4 * width if number else (64 if stage == 0 else 2 * width)
        for weights, channels in ((before * width, width), (9 * width * width, width), (4 * width * width, 4 * width)):
            RESNET_50 += [weights, channels, channels]
        if number == 0:
            RESNET_50 += [before * 4 * width, 4 * width, 4 * width]
RESNET_50 += [2048 * 1000, 1000]


@triton.jit
def block_kernel(addresses_ptr, layout_ptr, num_tensors, num_blocks, block, found_ptr, BLOCK: tl.constexpr):
    tensor, start, numel, vectorized = block_at(addresses_ptr, layout_ptr, num_tensors, num_blocks, block, BLOCK)
    tl.store(found_ptr, tensor)
    tl.store(found_ptr + 1, start)
    tl.store(found_ptr + 2, numel)
    tl.store(found_ptr + 3, vectorized)


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


def find_block(table, block, size):
    """What the kernels' search says of one block: the tensor, the start in it, its length, whether it is vectorized."""
    found = torch.zeros(4, dtype=torch.int64)
    block_kernel[(1,)](*table, block, found, size)
    return found.tolist()


def test_every_element_is_in_one_block(blocks):
    numels = [0, 5000, 0, 1, 2048, 0, 0, 4097, 0]
    table = blocks.table([[torch.zeros(numel) for numel in numels]])
    expected = [[tensor, start, numel] for tensor, numel in enumerate(numels) for start in range(0, numel, 2048)]
    assert [find_block(table, block, 2048)[:3] for block in range(table.num_blocks)] == expected


def test_positions_beyond_32_bits_are_kept(blocks):
    huge = torch.empty(1, dtype=torch.bfloat16).expand(2**33 + 1)
    table = blocks.table([[huge, huge]], offsets=[2**40, 2**41])
    assert table.num_blocks == 2 * (2**33 // 4096 + 1)
    assert find_block(table, table.num_blocks - 1, 4096)[:3] == [1, 2**33, 2**33 + 1]
    assert table.layout[2:4].tolist() == [2**40, 2**41]


@pytest.fixture
def uploads(blocks, monkeypatch):
    """Weak references to what has been uploaded, from empty caches on."""
    made = []

    def upload(values, device):
        copy = values.clone()
        made.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(blocks, "upload", upload)
    for cached in (blocks._addresses, blocks._layout):
        cached.cache_clear()
    yield made
    for cached in (blocks._addresses, blocks._layout):
        cached.cache_clear()


def bytes_kept(uploads):
    return sum(kept.nbytes for made in uploads if (kept := made()) is not None)


def test_a_thousand_draws_of_resnet_50s_tensors_keep_under_a_megabyte(blocks, uploads):
    """Each draw of mask="tensor" is a list of its own, with tables that are hardly ever asked for again."""
    params = [torch.empty(1).expand(numel) for numel in RESNET_50]
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        drawn = (torch.rand(len(params), generator=generator) < 0.6).nonzero().flatten().tolist()
        lists = [[params[i] for i in drawn]] * 3
        groups, offsets = [0] * len(drawn), [4 * i for i in drawn]
        blocks.table(lists[:1], adaptive=[False] * len(drawn))
        blocks.table(lists, offsets=offsets, groups=groups, adaptive=[False] * len(drawn))
    assert len(uploads) > 3000
    assert bytes_kept(uploads) < 1 << 20


def test_the_tables_of_a_billion_weights_are_as_small_as_their_list(blocks, uploads):
    params = [torch.empty(1).expand(4096 * 4096) for _ in range(60)]
    blocks.table([params, params])
    assert bytes_kept(uploads) == (3 + 5) * 8 * len(params)


def test_captured_tables_are_kept_out_of_the_cache_and_kept_for_the_graph(blocks, monkeypatch):
    params = [torch.zeros(3000)]
    eager = blocks.table([params])
    monkeypatch.setattr(host, "capturing", lambda device: True)
    monkeypatch.setattr(host, "_pinned", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    with host.keeping() as kept:
        captured = blocks.table([params])
    assert captured.addresses is not eager.addresses
    assert captured.layout is not eager.layout
    assert {id(captured.addresses), id(captured.layout)} <= {id(tensor) for tensor in kept}


def test_adam_counters_on_another_device_are_refused_in_a_capture(kernels, monkeypatch):
    from esam_kernels.backends.triton import adam

    monkeypatch.setattr(host, "capturing", lambda device: True)
    monkeypatch.setattr(adam, "_are_on", lambda device, steps: False)
    w, steps = [torch.zeros(4)], [torch.tensor(0.0)]
    with pytest.raises(RuntimeError, match="capturable"):
        kernels.restore_adam_(w, w, w, w, w, [], steps, 0.1, None, 0.9, 0.9, 1e-8, 0.0, False, False, True)
