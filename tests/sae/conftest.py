import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from medsae_ray.sae.workers import TorchWorkers


@pytest.fixture(autouse=True)
def _one_thread():
    """These matrices are too small for two: the second only spins, at the cost of everything beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Threads(TorchWorkers):
    """Workers that are threads of this process: every sum waits for all of them."""

    def __init__(self, rank, world, shares, barrier):
        self.rank, self.world, self.shares, self.barrier = rank, world, shares, barrier

    def sum(self, tensor):
        self.shares[self.rank] = tensor.detach().clone()
        self.barrier.wait(60)
        with torch.no_grad():
            tensor.copy_(torch.stack(self.shares).sum(0))
        self.barrier.wait(60)


@pytest.fixture
def on_workers():
    """work(workers) on each of `world` workers at once; their results, in rank order."""

    def run(world, work):
        shares, barrier = [torch.empty(0)] * world, threading.Barrier(world)
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(lambda rank: work(_Threads(rank, world, shares, barrier)), range(world)))

    return run
