"""Measure time, memory and bandwidth of calls that take microseconds to seconds, on a CPU or a CUDA device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

Call = Callable[[], object]

SAMPLE_SECONDS = 2e-4  # shorter calls are repeated within a sample, because of the clock's resolution
GRAPH_BELOW_SECONDS = 5e-3  # the time of longer calls does not depend on launch overhead
GRAPH_SECONDS = 1.0  # total time of the calls in a graph; capturing more would take minutes
MORE_THREADS_BELOW = 0.9  # use more threads if the time falls below this fraction; a smaller gain is noise
SLICES = 10
LEAST_SAMPLES = 3
MOST_COPIES = 512


class CpuStopwatch:
    """Time a call on a CPU, with the fastest of the given numbers of threads."""

    def __init__(self, call: Call, thread_choices: Sequence[int]) -> None:
        self.call = call
        self.samples: list[float] = []
        self.estimate = math.inf
        for threads in sorted(thread_choices):
            seconds, calls = self._try(threads)
            if seconds < MORE_THREADS_BELOW * self.estimate:
                self.estimate, self.calls_a_sample, self.threads = seconds, calls, threads
        self.method = f"{self.threads} thread{'s' if self.threads > 1 else ''}"

    def _try(self, threads: int) -> tuple[float, int]:
        torch.set_num_threads(threads)
        seconds = self._time(1)
        if seconds > 0.2:
            return seconds, 1
        calls = max(1, math.ceil(SAMPLE_SECONDS / self._time(3)))
        return min(self._time(calls) for _ in range(10)), calls

    def _time(self, calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            self.call()
        return (time.perf_counter() - started) / calls

    def start(self) -> None:
        torch.set_num_threads(self.threads)
        if self.estimate < 0.05:
            self.call()  # wake the threads and refill the caches after another variant has run

    def sample(self) -> None:
        self.samples.append(self._time(self.calls_a_sample))


class CudaStopwatch:
    """Time a call on a CUDA device with events.

    Args:
        calls: the same call on several copies of the inputs: enough copies that none is still in the L2 cache when its
            turn comes again (see `copies_past_cache`).
        graph: whether to replay the calls from a CUDA graph, which removes Python's launch overhead. None uses a graph
            for calls shorter than GRAPH_BELOW_SECONDS.
    """

    def __init__(self, calls: Sequence[Call], graph: bool | None = None) -> None:
        self.samples: list[float] = []
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # graph capture requires a warm-up on a side stream
            for _ in range(3):
                calls[0]()
        torch.cuda.current_stream().wait_stream(side_stream)
        rotating = itertools.cycle(calls)
        self._run, self.calls_a_sample, self.method = lambda: next(rotating)(), 1, "events"
        seconds = min(self._time() for _ in range(3))
        if graph or (graph is None and seconds < GRAPH_BELOW_SECONDS):
            self._capture(calls[: max(1, int(GRAPH_SECONDS / seconds))])
        elif seconds < 1e-2:
            self.calls_a_sample = min(len(calls), math.ceil(1e-2 / seconds))
            self._run = lambda: [next(rotating)() for _ in range(self.calls_a_sample)]

    def _capture(self, calls: Sequence[Call]) -> None:
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                for call in calls:
                    call()
        except RuntimeError as error:
            self.method = f"events, no CUDA graph: {str(error).splitlines()[0]}"
            return
        self._run, self.calls_a_sample, self.method = captured.replay, len(calls), f"CUDA graph of {len(calls)}"

    def _time(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.calls_a_sample

    def start(self) -> None:
        self._run()

    def sample(self) -> None:
        self.samples.append(self._time())


def copies_past_cache(input_bytes: int, device: str) -> int:
    """Return how many copies of the inputs to rotate through so that they do not stay in the L2 cache.

    At most MOST_COPIES: inputs of a few kilobytes do stay in the cache, as a layer's activations do when the next
    operation reads them. On a CPU 1, for the same reason.
    """
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, 1 + math.ceil(2 * cache / max(1, input_bytes)))


def round_robin(
    stopwatches: Sequence[CpuStopwatch | CudaStopwatch],
    seconds: float,
    progress: Callable[[float], None],
    most: float = math.inf,
) -> None:
    """Run the stopwatches in alternating slices, so that a slow phase of the machine affects all of them.

    Args:
        stopwatches: the stopwatches to run.
        seconds: time for each stopwatch.
        progress: called after each slice with the fraction of `seconds` it took.
        most: maximum number of samples for each stopwatch.
    """
    spent = [0.0] * len(stopwatches)
    unfinished = list(range(len(stopwatches)))
    with _no_garbage_collection():
        while unfinished:
            for i in list(unfinished):
                gc.collect()
                stopwatches[i].start()
                began, elapsed = time.perf_counter(), 0.0
                while elapsed < seconds / SLICES and len(stopwatches[i].samples) < most:
                    stopwatches[i].sample()
                    elapsed = time.perf_counter() - began
                spent[i] += elapsed
                progress(elapsed / seconds)
                taken = len(stopwatches[i].samples)
                if taken >= most or (spent[i] >= seconds and taken >= LEAST_SAMPLES):
                    unfinished.remove(i)


def paired(stopwatches: Sequence[CpuStopwatch | CudaStopwatch], seconds: float, least: int = LEAST_SAMPLES) -> None:
    """Sample each stopwatch once per round, in alternating order, for at least `seconds` and `least` rounds.

    The samples of a round form pairs, taken at the same clock rate and temperature.
    """
    rounds, began = 0, time.perf_counter()
    with _no_garbage_collection():
        while rounds < least or time.perf_counter() - began < seconds:
            for stopwatch in stopwatches if rounds % 2 else reversed(stopwatches):
                stopwatch.start()
                stopwatch.sample()
            rounds += 1


def paired_ratio(ours: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of ours / other over the rounds of `paired`: low, median, high."""
    return quartiles([a / b for a, b in zip(ours, other, strict=True)])


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable automatic garbage collection. Freezing existing objects makes explicit collections fast."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def peak_memory(call: Call, device: str) -> int | None:
    """Return the peak memory of one call in bytes, including its results, or None if it is unknown.

    On CUDA the figure comes from torch's allocator. On a CPU it is the increase of the process's peak resident size
    (VmHWM, which Linux can reset) after free heap memory has been returned to the system. This includes tensors,
    scratch memory and the autograd graph, but misses small allocations that fit into partly used pages. A profiler
    would see only tensors and would take minutes for a loop over 8192 tokens.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_resident_bytes()
        call()
        return _peak_resident_bytes() - before
    except (OSError, StopIteration):
        return None


def kept_for_backward(call: Call, inputs: Iterable[torch.Tensor]) -> int:
    """Return the bytes that autograd keeps between forward and backward, not counting the inputs."""
    input_addresses = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is reused

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in input_addresses:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storage.nbytes() for storage in kept.values())


def _peak_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def copy_bandwidth(device: str) -> float:
    """Return the bandwidth of the fastest of several large copies: bytes read and written per second."""
    source = torch.ones((2**28 if device == "cuda" else 2**26), device=device)
    target = torch.empty_like(source)
    copy = lambda: target.copy_(source)  # noqa: E731
    copy()
    if device == "cuda":
        stopwatch = CudaStopwatch([copy])
        for _ in range(20):
            stopwatch.sample()
        seconds = min(stopwatch.samples)
    else:
        seconds = min(_timed(copy) for _ in range(7))
    return 2 * source.nbytes / seconds


def _timed(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
