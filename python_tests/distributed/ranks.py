"""Real processes over gloo for one test, each with a hard time limit."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A process that waits for one that is gone gives up after so many seconds.
COLLECTIVE_SECONDS = 20
# torch takes seconds to import: one process imports it, and the ranks of all tests are forked from that.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch._dynamo.utils", "torch.distributed.checkpoint", "esam_kernels._native", "training"]
)


def run_ranks(
    function: Callable[..., Any], *args: Any, ranks: int = 2, seconds: float = 60, may_die: bool = False
) -> list[Any]:
    """``function(*args)`` on every rank of a process group: what each returns.

    With ``may_die`` a rank that fails is no error: its place holds the text of its exception, or its exit code.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_rank, args=(rank, ranks, folder, function, args), daemon=True)
            for rank in range(ranks)
        ]
        deadline = time.monotonic() + seconds
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        for process in processes:
            process.kill()
            process.join()
        results: list[Any] = []
        for rank, process in enumerate(processes):
            error, result = Path(folder, f"error{rank}"), Path(folder, f"result{rank}")
            if result.exists() and process.exitcode == 0:
                results.append(torch.load(result, weights_only=False))
            else:
                results.append(error.read_text() if error.exists() else process.exitcode)
                assert may_die, f"rank {rank}: {results[-1]}; ran out of time: {late}"
        assert not late, f"ranks {late} were still running after {seconds} s"
        return results


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    try:
        torch.save(function(*args), f"{folder}/result{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
