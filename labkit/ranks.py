"""Run a function in several processes that talk through torch.distributed (gloo, on this machine)."""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, world_size: int, folder: str, function, arguments) -> None:
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, world_size, *arguments), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def run(world_size: int, function, *arguments) -> list:
    """function(rank, world_size, *arguments) in world_size processes; returns what each of them returned, by rank.

    function is one that another process can import. An exception in any rank is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        method = "fork" if sys.platform == "linux" else "spawn"  # a fork need not import torch again
        mp.start_processes(_rank, (world_size, folder, function, arguments), nprocs=world_size, start_method=method)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world_size)]
