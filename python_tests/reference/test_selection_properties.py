"""Contract point 7 for whatever losses hypothesis thinks of, against plain Python."""

import oracles
import pytest
import torch

from esam_kernels import gather, select

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

quick = settings(max_examples=150, deadline=None)


def losses(width):
    number = st.one_of(
        st.floats(width=width), st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")])
    )
    return st.lists(st.tuples(number, number), min_size=1, max_size=40)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 64), (torch.float32, 32), (torch.float16, 16)])
def test_selection_is_the_oracles(dtype, width):
    @quick
    @given(losses(width), st.data())
    def check(pairs, data):
        k = data.draw(st.integers(1, len(pairs)))
        before, after = (torch.tensor(column, dtype=dtype) for column in zip(*pairs))
        wide = torch.promote_types(dtype, torch.float32)
        # The difference is rounded in the width that the losses are computed in; only the ranking is at stake here.
        rises = (after.to(wide) - before.to(wide)).tolist()
        got = select(before, after, k).tolist()
        assert got == oracles.ranked([0.0] * len(rises), rises, k)
        assert len(got) == k
        assert got == sorted(set(got))

    check()


@quick
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.data())
def test_selection_does_not_depend_on_adding_a_constant_and_prefers_earlier_ties(rises, data):
    k = data.draw(st.integers(1, len(rises)))
    after = torch.tensor(rises, dtype=torch.bfloat16)
    got = select(torch.zeros_like(after), after, k)
    assert torch.equal(got, select(torch.full_like(after, 8.0), after + 8.0, k))
    chosen = set(got.tolist())
    for i in chosen:
        assert all(j in chosen for j in range(i) if rises[j] >= rises[i])


@quick
@given(st.data())
def test_gather_is_python_indexing(data):
    samples = data.draw(st.integers(1, 9))
    rest = data.draw(st.lists(st.integers(0, 4), max_size=3))
    indices = data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=12))
    order = data.draw(st.permutations(range(len(rest) + 1)))
    shape = [samples, *rest]
    memory = torch.arange(torch.tensor(shape).prod().item()).reshape([shape[i] for i in order])
    tensor = memory.permute([order.index(i) for i in range(len(shape))])
    rows = gather(torch.tensor(indices), tensor)
    assert torch.equal(rows, torch.stack([tensor[i] for i in indices]))
