"""CUDA graphs for the decode steps of an engine. Nothing here needs a GPU but `_capture`."""

from functools import partial

import torch


class DecodeGraphs:
    """Decode steps as CUDA graphs: recorded once a batch size, replayed with one launch instead of hundreds.

    A graph repeats the same kernels on the same addresses. So inputs are copied into fixed tensors, batches are padded
    to the next size that is recorded (rows that are added write to no slot, -1, and read no key), and tables have full
    width.
    run(numbers [3, B], table [B, max_pages], kv_lens [B]) -> logits [B, V]. capture(fn) -> (replay, result).
    """

    def __init__(self, run, max_batch, max_pages, device, capture=None):
        self.sizes = [size for size in (1, 2, 4, *range(8, max_batch, 8)) if size < max_batch] + [max_batch]
        self.run, self.max_pages, self.graphs, self.pool = run, max_pages, {}, None
        self.capture = capture or self._capture
        self.numbers = torch.zeros(3, max_batch, dtype=torch.int64, device=device)
        self.table = torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device)
        self.kv_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)

    def __call__(self, numbers, table, kv_lens):
        batch = len(kv_lens)
        size = next(size for size in self.sizes if size >= batch)
        self.numbers[:, :batch] = numbers
        self.numbers[:2, batch:size], self.numbers[2, batch:size] = 0, -1
        self.table[:batch, : table.shape[1]] = table
        self.kv_lens[:batch], self.kv_lens[batch:size] = kv_lens, 0
        if size not in self.graphs:
            views = self.numbers[:, :size], self.table[:size], self.kv_lens[:size]
            self.graphs[size] = self.capture(partial(self.run, *views))
        replay, result = self.graphs[size]
        replay()
        return result[:batch]

    def _capture(self, fn):
        stream = torch.cuda.Stream()  # once before: kernels are compiled, libraries take their workspace
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fn()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = fn()
        self.pool = graph.pool()  # the graphs never run at the same time: they may share memory
        return graph.replay, result
