"""Times the first batch of a new sampler, and takes the memory that it needs.

``python tests/bench/bench_sampler.py`` prints one line per dataset. The time covers all from the bucket sizes to this
rank's first micro-batch; the memory is the peak that tracemalloc sees on the same way, in a run of its own.
"""

import statistics
import time
import tracemalloc

from diffsynth_pipe.training.sampler import BucketSampler

DATASETS = {
    "1 sample": ({"512x512": 1}, 10**12),
    "10^6 samples": ({"512x512": 10**6}, 10**6),
    "10^6 samples in 40 buckets": ({f"{width}x512": 25_000 for width in range(512, 1152, 16)}, 10**6),
    "10^12 samples": ({"512x512": 10**12}, 1),
}
GLOBAL_BATCH_SIZES = (8, 64)
NUM_ROUNDS = 15


def main():
    print(f"first batch of N samples x dataset_repeat = 10^12, median of {NUM_ROUNDS} rounds")
    print(f"{'dataset':<30}{'repeat':>8}{'global batch':>14}{'ms':>9}{'slowest':>9}{'peak kB':>9}")
    first_batch({"512x512": 1}, 1, 1, seed=0)  # imports that wait for the first call
    for name, (sizes, repeat) in DATASETS.items():
        assert sum(sizes.values()) * repeat == 10**12
        for global_batch_size in GLOBAL_BATCH_SIZES:
            times_s = [timed(sizes, repeat, global_batch_size, seed) for seed in range(NUM_ROUNDS)]
            tracemalloc.start()
            first_batch(sizes, repeat, global_batch_size, seed=NUM_ROUNDS)
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            median, slowest = statistics.median(times_s), max(times_s)
            exponent = f"10^{len(str(repeat)) - 1}"
            print(
                f"{name:<30}{exponent:>8}{global_batch_size:>14}{1e3 * median:>9.3f}{1e3 * slowest:>9.3f}"
                f"{peak_bytes / 1e3:>9.1f}"
            )


def timed(sizes, repeat, global_batch_size, seed):
    start = time.perf_counter()
    first_batch(sizes, repeat, global_batch_size, seed)
    return time.perf_counter() - start


def first_batch(sizes, repeat, global_batch_size, seed):
    sampler = BucketSampler(sizes, global_batch_size, seed)
    assert sampler.num_steps(repeat) * global_batch_size >= sum(sizes.values()) * repeat
    micro_batches = sampler.plan(0).micro_batches(rank=0, world_size=1, batch_size=global_batch_size)
    assert len(micro_batches[0].indices) == global_batch_size


if __name__ == "__main__":
    main()
