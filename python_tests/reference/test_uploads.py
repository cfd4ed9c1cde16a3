"""Pinned memory: used in turn by eager code, and kept for the graphs that read it."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import pytest
import torch

from esam_kernels import uploads

CUDA = torch.device("cuda")
STREAM = SimpleNamespace(device_index=0, cuda_stream=7)


class Event:
    """A CUDA event whose device is as far as ``done`` says."""

    done = 0
    records = 0

    def __init__(self):
        self.number = 0

    def record(self, stream):
        assert stream is STREAM
        Event.records += 1
        self.number = Event.records

    def query(self):
        return self.number <= Event.done


@pytest.fixture
def ring(monkeypatch):
    monkeypatch.setattr(Event, "done", 0)
    monkeypatch.setattr(Event, "records", 0)
    return uploads.PinnedRing(torch.zeros(3, 64, dtype=torch.uint8).unbind(), Event, STREAM)


def test_pinned_memory_is_given_out_in_turn_aligned_and_without_overlap(ring):
    places = [ring.place(24) for _ in range(6)]
    starts = [place.data_ptr() - places[0].data_ptr() for place in places]
    assert starts == [0, 32, 64, 96, 128, 160]
    assert {place.numel() for place in places} == {24}


def test_pinned_memory_is_used_again_only_when_the_device_has_read_it(ring):
    first, *_ = [ring.place(64) for _ in range(3)]
    assert ring.place(64) is None
    assert ring.place(16) is None
    Event.done = 1  # the device has read the first segment
    assert ring.place(64).data_ptr() == first.data_ptr()
    assert ring.place(16) is None


def test_what_is_larger_than_a_segment_gets_no_place_and_takes_none(ring):
    assert ring.place(65) is None
    assert [ring.place(64) is None for _ in range(3)] == [False] * 3


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


class Owner:
    """What a graph lives in."""


@pytest.fixture
def device(monkeypatch):
    """A device whose events count as done up to ``Event.done``; pinned memory is ordinary memory."""
    monkeypatch.setattr(Event, "done", 0)
    monkeypatch.setattr(Event, "records", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(uploads, "_pinned", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    for name, empty in (("_staging", []), ("_needed", [0]), ("_retired", []), ("_keepers", [[]])):
        monkeypatch.setattr(uploads, name, empty)
    monkeypatch.setattr(uploads, "_rings", uploads._Rings())


def test_eager_copies_go_through_one_ring_of_each_stream_and_past_it_when_it_is_full(device, monkeypatch):
    monkeypatch.setattr(uploads, "SEGMENT_BYTES", 64)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    given = [torch.arange(6.0).view(2, 3) + i for i in range(8)]
    staged = [uploads.staged(values, CUDA) for values in given]
    ring = uploads._rings.of_stream[0, 7]._segments[0]
    inside = [0 <= values.data_ptr() - ring.data_ptr() < 4 * 64 for values in staged]
    # two of 24 bytes in each of four segments of 64
    assert inside == [True] * 8
    assert not 0 <= uploads.staged(given[0], CUDA).data_ptr() - ring.data_ptr() < 4 * 64
    for values, expected in zip(staged, given, strict=True):
        assert torch.equal(values, expected)
    assert uploads.staged(given[0], torch.device("cpu")) is given[0]


def test_another_thread_is_never_given_memory_from_which_this_one_has_yet_to_queue_its_copy(device, monkeypatch):
    """All threads share the default stream. The device is done with all that was queued."""
    monkeypatch.setattr(uploads, "SEGMENT_BYTES", 64)
    monkeypatch.setattr(Event, "done", 1000)
    ours = uploads.staged(torch.arange(8), CUDA)
    theirs = []
    other = threading.Thread(target=lambda: theirs.extend(uploads.staged(torch.zeros(8), CUDA) for _ in range(8)))
    other.start()
    other.join()
    assert len(theirs) == 8
    assert ours.tolist() == list(range(8))


def test_only_a_cuda_stream_is_asked_whether_it_captures(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert uploads.capturing(CUDA)
    assert not uploads.capturing(torch.device("cpu"))


def test_memory_of_a_captured_graph_is_never_handed_out_twice(device, monkeypatch):
    monkeypatch.setattr(uploads, "capturing", lambda device: True)
    uploads.reserve(1, CUDA)
    first, second = (uploads.staged(torch.arange(numel), CUDA) for numel in (5, 9))
    assert (first.tolist(), second.tolist()) == (list(range(5)), list(range(9)))
    assert second.data_ptr() - first.data_ptr() == 48
    assert len(uploads._staging[0]) == uploads.STAGING_BYTES - 48 - 80
    assert [tensor.data_ptr() for tensor in uploads._keepers[0]] == [first.data_ptr(), second.data_ptr()]


def test_memory_for_captures_is_filled_up_before_one_can_run_out(device, monkeypatch):
    reserved = []
    monkeypatch.setattr(
        uploads, "_pinned", lambda nbytes: reserved.append(nbytes) or torch.empty(nbytes, dtype=torch.uint8)
    )
    uploads.refill()
    uploads.reserve(1000, torch.device("cpu"))
    assert reserved == [], "no step on a GPU takes any"
    for needed, expected in ((1000, [1 << 20]), (2000, [1 << 20]), (3 << 20, [1 << 20, 3 << 20])):
        uploads.reserve(needed, CUDA)
        assert reserved == expected
    uploads._staging[0] = uploads._staging[0][: 3 << 20]
    uploads.refill()
    assert len(reserved) == 2
    # A small step does not make one forget the large one.
    uploads._staging[0] = uploads._staging[0][: (3 << 20) - 16]
    uploads.reserve(1000, CUDA)
    assert reserved[2:] == [3 << 20]


def kept_for(owner):
    """Memory that the graph of ``owner`` reads, and where one can see whether it is still there."""
    with uploads.keeping() as kept:
        uploads.keep(torch.zeros(3))
    uploads.release_with(owner, kept, CUDA)
    return kept


def alive():
    gc.collect()
    return sum(len(kept) for _, kept in uploads._retired)


def test_what_a_graph_reads_goes_with_it_once_the_device_is_done(device):
    owners = [Owner() for _ in range(3)]
    for each in owners:
        kept_for(each)
    del each
    assert alive() == 0
    owners.pop()
    assert alive() == 1, "the device may still be reading"
    owners.pop()
    assert alive() == 2
    Event.done = 3
    owners.pop()
    assert alive() == 0


def test_a_graph_that_goes_during_a_capture_records_no_event_there(device, monkeypatch):
    owner = Owner()
    kept_for(owner)
    with monkeypatch.context() as inside:
        inside.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        del owner
        gc.collect()
        assert (Event.records, alive()) == (0, 1)
    owner = Owner()
    kept_for(owner)
    del owner
    assert (Event.records, alive()) == (1, 2)


def test_graphs_that_others_capture_keep_their_memory(device):
    uploads.keep(torch.zeros(3))
    assert len(uploads._keepers[0]) == 1
    with uploads.keeping() as outer:
        with uploads.keeping() as inner:
            uploads.keep(torch.zeros(3))
        uploads.keep(torch.zeros(3), torch.zeros(3))
    assert (len(inner), len(outer), len(uploads._keepers)) == (1, 2, 1)
