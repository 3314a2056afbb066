"""Kernels compiled before anything is timed: Triton compiles on one core, and a GPU's minutes are few."""

import importlib
import multiprocessing
import os
import time

from labkit import bench, trials

PROCESSES = 8  # each has the GPU open and one case's inputs on it


def compile_ahead(jobs, seconds) -> None:
    """Run `warm` for all jobs, (topic, number), in processes beside each other; what is not done in time is left."""
    start = time.monotonic()
    if not jobs:
        return
    count = min(PROCESSES, os.cpu_count())
    with multiprocessing.get_context("spawn").Pool(count, _alone) as pool:  # its end ends them
        done = pool.starmap_async(warm, jobs, chunksize=1)
        done.wait(seconds)
        why = "" if done.ready() and done.successful() else ", not all of it: the rest is compiled when it is met"
    print(f"Compiled ahead in {time.monotonic() - start:.0f} s{why}", flush=True)


def _alone() -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # torch.compile would start a process for every core, in each


def warm(topic, number) -> None:
    """Call what compiles of a topic's case, or of a trial (topic "trials"), once. Triton keeps the result on disk."""
    device = importlib.import_module("kernels").DEVICE
    if topic == "trials":
        trial = trials.TRIALS[number]
        return bench.warm(trials.bench_case(trial), trials.ops_of(trial), device)
    bench.warm(bench.topic_cases(topic)[number], importlib.import_module(f"kernels.{topic}"), device)
