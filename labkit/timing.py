"""How long a call takes on a GPU: CUDA graphs over rotated inputs, timed by events.

A decode step is a few microseconds, less than Python needs to launch it. So the calls are captured once into a CUDA
graph and the graph is replayed. Each call of a graph reads its own copy of the inputs, together more than the L2
cache holds: a cache that stays warm between calls would flatter every kernel that reads little.
"""

import math
import subprocess

import torch

WARMUPS, REPLAYS, MIN_MS, ROUND_MS = 3, 25, 1.0, 60.0
EAGER_CALLS = 64  # at most so many calls a measurement where they cannot be captured
MATMUL_SIZE = 8192
MATMUL_FLOPS = 2 * MATMUL_SIZE**3


def cold_bytes() -> float:
    """Bytes that the copies of a graph hold together: 1.5 times the L2 cache; without a GPU, as on the largest."""
    return 1.5 * torch.cuda.get_device_properties().L2_cache_size if torch.cuda.is_available() else 200e6


def num_copies(num_bytes: int) -> int:
    """How many sets of inputs it takes to keep the L2 cache cold. One of a gigabyte does it alone."""
    return max(1 if num_bytes >= 1e9 else 2, math.ceil(cold_bytes() / max(num_bytes, 1)))


def gpu_timer(calls, graph: bool = True):
    """Prepare functions without arguments, the same work on different inputs, for timing.

    Returns (sample, mode): sample() gives 3 to REPLAYS measurements, microseconds a call; mode is "graph", or "eager"
    if graph is False or the calls cannot be captured. Eager times hold the launch as well.
    """

    def run():
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, allocates and picks algorithms outside the capture
        run()
    torch.cuda.synchronize()
    replay = _capture(run, 1, stream) if graph and not _waits(calls[0]) else None
    if not replay and graph:  # not to be captured: single calls from Python, of which a few do
        del calls[EAGER_CALLS:]
    if replay:
        replay()  # the first replay uploads the graph
    ms = max(_elapsed_ms(replay or run), 1e-3)
    passes = max(1, math.ceil(MIN_MS / ms))
    if replay and passes > 1:
        replay = _capture(run, passes, stream)
    # Thousands of copies in one graph are an average already: a round of them takes ROUND_MS, and three replays.
    replays = max(3, min(REPLAYS, int(ROUND_MS / (ms * passes))))
    warmups = min(WARMUPS, replays // 3)

    def eager():
        for _ in range(passes):
            run()

    def sample():
        for _ in range(warmups):
            (replay or eager)()
        return [_elapsed_ms(replay or eager) * 1e3 / (passes * len(calls)) for _ in range(replays)]

    return sample, "graph" if replay else "eager"


def _waits(call) -> bool:
    """Whether a call waits for the GPU. torch says so without a capture: one that fails leaves its allocator unable to
    free cached memory when there is none left, and the capturing stream current, for the rest of the process."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _capture(run, passes, stream):
    """A function that replays run, passes times over; None if it cannot be captured (it synchronises, say)."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(passes):
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _elapsed_ms(run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def ceiling_calls(device) -> dict[str, tuple[list, int]]:
    """What the device can do at most: {name: (calls, bytes)}. copy counts reads and writes; matmul is bf16."""
    size = 2_000_000_000
    if torch.device(device).type == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=device) for _ in "ab")
    c = torch.empty_like(a)
    return {
        "copy": ([lambda: target.copy_(source)], 2 * source.nbytes),
        "read": ([lambda: source.sum()], source.nbytes),
        "matmul": ([lambda: torch.mm(a, b, out=c)], 3 * a.nbytes),
    }


def nvidia_smi(*fields: str) -> str:
    """Fields of `nvidia-smi --query-gpu` for the current GPU, comma-separated; "unknown" without such a tool."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        command += ["-i", f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, AttributeError, AssertionError, RuntimeError, subprocess.SubprocessError):
        return "unknown"
