"""Two trainings in two threads of one process: each as if it were alone."""

import sys
import threading

import oracles
import pytest
import torch

from esam_kernels import ESAM


@pytest.fixture(autouse=True)
def threads_that_alternate_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(work, arguments):
    """What ``work`` returns for each of the arguments, all at once."""
    results = {}

    def run(argument):
        try:
            results[argument] = work(argument)
        except BaseException as error:
            results[argument] = error

    threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in results.values():
        if isinstance(error, BaseException):
            raise error
    return [results[argument] for argument in arguments]


@pytest.mark.parametrize("ranking", ["rise", "first_order"])
def test_two_threads_train_as_each_does_alone(ranking):
    def weights_after_200_steps(number):
        model = models[number]
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, ranking=ranking, model=model)
        for _ in range(200):
            optimizer.step(oracles.losses_of(model), *batches[number])
        return oracles.weights_of(model)

    batches = [oracles.batch(8), oracles.batch(12)]
    models = [oracles.mlp(), oracles.mlp()]
    alone = [weights_after_200_steps(number) for number in (0, 1)]
    models = [oracles.mlp(), oracles.mlp()]
    for ours, expected in zip(in_threads(weights_after_200_steps, (0, 1)), alone):
        assert oracles.same_bits(ours, expected)


def test_threads_may_build_optimizers_at_once():
    def build(_):
        for _ in range(200):
            weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(40)]
            ESAM(weights, torch.optim.SGD, lr=0.1)

    in_threads(build, range(4))
