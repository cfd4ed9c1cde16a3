import pytest
import torch
import torch.nn.functional as F
from native_cases import DTYPES, assert_same_bits, assert_within, clones, tensors

from esam_kernels.backends import native, reference

LR = 0.05
STEPS = 3
# torch computes half precision in whole vectors one way, and what is left over at a tensor's end another way. The
# reference therefore runs on tensors padded to a multiple of any vector, of which the padding is dropped.
WHOLE_VECTORS = 64
SGD = {
    "plain": {},
    "weight_decay": {"weight_decay": 1e-2},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-2},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "maximize": {"momentum": 0.9, "maximize": True, "weight_decay": 1e-2},
}
SGD_DEFAULTS = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}

ADAM = {
    "adam": {},
    "l2": {"weight_decay": 1e-2},
    "adamw": {"weight_decay": 1e-2, "decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True, "weight_decay": 1e-2},
    "maximize": {"maximize": True, "decoupled_weight_decay": True},
    "beta1_below_half": {"beta1": 0.3},
}
ADAM_DEFAULTS = {
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": False,
}


def padded(lists):
    return [[F.pad(t, (0, -t.numel() % WHOLE_VECTORS)) for t in tensors] for tensors in lists]


def unpadded(lists, like):
    return [[t[: param.numel()] for t, param in zip(tensors, like)] for tensors in lists]


@pytest.mark.parametrize("options", SGD.values(), ids=SGD.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_and_sgd_is_within_one_unit_of_torch(isa, dtype, options):
    options = SGD_DEFAULTS | options
    weights, momentum = tensors(dtype), [torch.full_like(w, torch.nan) for w in tensors(dtype)]
    for step in range(STEPS):
        grads = tensors(dtype)
        perturbed = [torch.full_like(w, torch.nan) for w in weights]
        buffers = clones(momentum)[0]
        expected = padded((perturbed, weights, grads, momentum))
        reference.restore_sgd_(*expected, step == 0, LR, None, **options)
        expected_w, _, _, expected_m = unpadded(expected, weights)

        old_grads = clones(grads)[0]
        native.restore_sgd_(perturbed, weights, grads, buffers, step == 0, LR, None, **options)
        assert_same_bits(grads, old_grads)
        assert_within(1, perturbed, expected_w, weights)
        if options["momentum"]:
            assert_within(1, buffers, expected_m, grads if step == 0 else momentum)
        else:
            assert_same_bits(buffers, momentum)
        # both go on from the reference's state: an error of one unit must not grow in the comparison
        weights, momentum = clones(expected_w, expected_m)


@pytest.mark.parametrize("options", ADAM.values(), ids=ADAM.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_and_adam_is_within_one_unit_of_torch(isa, exact_square_roots, dtype, options):
    options = ADAM_DEFAULTS | options
    weights = tensors(dtype)
    states = [[torch.zeros_like(w) for w in weights] for _ in range(3)]
    counters = [torch.tensor(0.0) for _ in weights]
    for _ in range(STEPS):
        grads = tensors(dtype)
        perturbed = [torch.full_like(w, torch.nan) for w in weights]
        own, own_counters = clones(*states), clones(counters)[0]
        expected = padded((perturbed, weights, grads, *states))
        reference.restore_adam_(*expected, counters, LR, None, **options)
        expected_w, _, _, *expected_states = unpadded(expected, weights)

        native.restore_adam_(perturbed, weights, grads, *own, own_counters, LR, None, **options)
        assert_same_bits(own_counters, counters)
        assert_within(1, perturbed, expected_w, weights)
        for actual, wanted, old in zip(own, expected_states, states):
            assert_within(1, actual, wanted, old)
        weights, *states = clones(expected_w, *expected_states)


def test_counters_of_tensors_may_differ(isa, exact_square_roots):
    options = ADAM_DEFAULTS
    weights, grads = tensors(torch.float32, sizes=(64, 64)), tensors(torch.float32, sizes=(64, 64))
    results = []
    for backend in (reference, native):
        w, m, v = clones(weights, grads, [grad.square() for grad in grads])
        counters = [torch.tensor(3.0), torch.tensor(500.0)]
        backend.restore_adam_(w, weights, grads, m, v, [], counters, LR, None, **options)
        assert [counter.item() for counter in counters] == [4.0, 501.0]
        results.append(w)
    assert_within(1, results[1], results[0], weights)


@pytest.mark.parametrize("lr_tensor", [torch.tensor(LR), torch.tensor([LR], dtype=torch.float64)])
def test_a_learning_rate_in_a_tensor_takes_the_place_of_the_number(isa, lr_tensor):
    weights, grads = tensors(torch.float32), tensors(torch.float32)
    results = []
    for lr, tensor in ((lr_tensor.item(), None), (123.0, lr_tensor)):
        sgd, adam = clones(weights, weights)
        native.restore_sgd_(sgd, weights, grads, [], True, lr, tensor, **SGD_DEFAULTS)
        m, v = clones(grads, [grad.square() for grad in grads])
        counters = [torch.tensor(1.0) for _ in weights]
        native.restore_adam_(adam, weights, grads, m, v, [], counters, lr, tensor, **ADAM_DEFAULTS)
        results.append(sgd + adam)
    assert_same_bits(results[0], results[1])


def test_updates_have_the_same_bits_on_every_isa_and_thread_count(isa, threads):
    weights, grads = tensors(torch.float32), tensors(torch.float32)
    w, m = clones(weights, grads)
    options = SGD_DEFAULTS | {"momentum": 0.9, "weight_decay": 1e-2}
    native.restore_sgd_(w, weights, grads, m, False, LR, None, **options)
    first = _first_result.setdefault("sgd", (w, m))
    assert_same_bits(w + m, [*first[0], *first[1]])


_first_result = {}


# More than the caches hold, and no whole number of their lines: the weights are then written past the caches. In two
# parts they are not.
LARGE = (1 << 22) + 3
PARTS = (slice(0, LARGE // 2), slice(LARGE // 2, LARGE))


def large(dtype=torch.float32):
    return torch.randn(LARGE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [SGD["weight_decay"], SGD["momentum"], SGD["nesterov"]])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_large_weights_take_the_same_sgd_update(isa, shift, first, options, dtype):
    size = LARGE * 4 // dtype.itemsize
    backup, grad, buffer = (torch.randn(size, dtype=dtype) for _ in range(3))
    storage, expected = torch.full((size + shift + 1,), 7.0, dtype=dtype), torch.empty(size, dtype=dtype)
    param = storage[shift:-1]
    rest = (first, LR, None, *(SGD_DEFAULTS | options).values())
    expected_buffer = buffer.clone()
    for part in (slice(0, size // 2), slice(size // 2, size)):
        native.restore_sgd_([expected[part]], [backup[part]], [grad[part]], [expected_buffer[part]], *rest)
    native.restore_sgd_([param], [backup], [grad], [buffer], *rest)
    assert_same_bits([param, buffer], [expected, expected_buffer])
    assert storage[-1] == 7.0
    assert (storage[:shift] == 7.0).all()


@pytest.mark.parametrize("options", [ADAM["adamw"], ADAM["amsgrad"]])
def test_large_weights_take_the_same_adam_update(isa, options):
    lists = [torch.empty(LARGE), large(), large(), large(), large().abs(), large().abs()]
    expected = clones(lists)[0]

    def update(param, backup, grad, mean, square, largest):
        step = torch.tensor(3.0)
        largest = [largest] if options.get("amsgrad") else []
        lists = ([param], [backup], [grad], [mean], [square], largest, [step])
        native.restore_adam_(*lists, LR, None, **(ADAM_DEFAULTS | options))

    for part in PARTS:
        update(*(tensor[part] for tensor in expected))
    update(*lists)
    assert_same_bits(lists, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0, 1])
def test_large_weights_are_restored(isa, shift, dtype):
    storage, backup = torch.full((LARGE + shift + 1,), 7.0, dtype=dtype), large(dtype)
    native.restore_([storage[shift:-1]], [backup])
    assert_same_bits([storage[shift:-1]], [backup])
    assert storage[-1] == 7.0
    assert (storage[:shift] == 7.0).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_misaligned_weights_are_updated_and_their_neighbours_left_alone(isa, momentum):
    storage = torch.full((40_005,), 7.0)
    backup, grad, buffer = tensors(torch.float32, sizes=(40_003,) * 3)
    options = SGD_DEFAULTS | {"momentum": momentum}
    expected, expected_buffer = torch.empty(40_003), buffer.clone()
    reference.restore_sgd_([expected], [backup], [grad], [expected_buffer], False, LR, None, **options)
    native.restore_sgd_([storage[1:-1]], [backup], [grad], [buffer], False, LR, None, **options)
    assert_within(1, [storage[1:-1]], [expected], [backup])
    assert storage[0] == storage[-1] == 7.0
