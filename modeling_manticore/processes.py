"""What processes that train on a small machine are started with."""

# glibc gives freed memory back, and the kernel hands it out again page by page, at every step of a small model.
MEMORY_KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}


def small_process(threads: int) -> dict[str, str]:
    """Environment variables: few threads that sleep when idle, memory kept."""
    return MEMORY_KEPT | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
