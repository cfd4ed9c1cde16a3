"""Real processes over gloo, each call into them with a hard time limit."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# A process that waits for one that is gone gives up after so many seconds.
COLLECTIVE_SECONDS = 30
# torch takes seconds to import: one process imports it, and the ranks are forked from that.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch._dynamo.utils", "torch.distributed.checkpoint", "esam_kernels._native", "training"]
)


class Ranks:
    """The processes of one process group, which wait for functions to call."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        pipes = [_context.Pipe() for _ in range(size)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = []
        for rank, (_, theirs) in enumerate(pipes):
            arguments = (rank, size, f"{self._folder.name}/rendezvous", theirs)
            self._processes.append(_context.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> list[tuple[bool, Any]]:
        """For each rank whether ``function(*args)`` succeeded, and what it returned, how it failed, or None: neither in
        time.
        """
        for connection in self._connections:
            connection.send((function, args))
        deadline = time.monotonic() + seconds
        results: list[tuple[bool, Any]] = []
        for process, connection in zip(self._processes, self._connections):
            try:
                answer = connection.recv_bytes() if connection.poll(max(0.0, deadline - time.monotonic())) else None
                results.append((False, None) if answer is None else torch.load(io.BytesIO(answer), weights_only=False))
            except EOFError:
                process.join()
                results.append((False, process.exitcode))
        return results

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


_idle: dict[int, Ranks] = {}


def run_ranks(
    function: Callable[..., Any], *args: Any, ranks: int = 2, seconds: float = 120, may_die: bool = False
) -> list[Any]:
    """``function(*args)`` on every rank of a process group: what each returns.

    With ``may_die`` a rank that fails is no error: its place holds the text of its exception, or its exit code.
    """
    group = _idle.pop(ranks, None) or Ranks(ranks)
    results: list[tuple[bool, Any]] = []
    try:
        results = group.call(function, args, seconds)
    finally:
        if results and all(succeeded for succeeded, _ in results):
            _idle[ranks] = group
        else:
            group.kill()
    for rank, (succeeded, result) in enumerate(results):
        assert succeeded or result is not None, f"rank {rank} was still running after {seconds} s"
        assert succeeded or may_die, f"rank {rank}: {result}"
    return [result for _, result in results]


def _serve(rank: int, size: int, rendezvous: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timeout)
    while True:
        function, args = connection.recv()
        answer = io.BytesIO()
        try:
            torch.save((True, function(*args)), answer)
        except BaseException:
            answer = io.BytesIO()
            torch.save((False, traceback.format_exc()), answer)
            connection.send_bytes(answer.getvalue())
            os._exit(1)
        connection.send_bytes(answer.getvalue())
