"""The number of threads of a command that computes on a CPU: as many as there are free cores.

On a busy machine more threads wait for each other at every operation, which then takes several times as long.
"""

import os
import sys
from pathlib import Path

__all__ = ["choose_threads"]

_CHOSEN = "APO_TRL_THREADS"  # set if OMP_NUM_THREADS is not the user's, for started processes too
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time, in a period


def choose_threads() -> None:
    """Set `OMP_NUM_THREADS`, unless the user has, and let threads sleep while they wait; call it before torch's import.

    The processes that a launcher starts on one machine share the threads that the launcher chose.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    threads, chosen = os.environ.get("OMP_NUM_THREADS"), os.environ.get(_CHOSEN)
    if threads is None:
        os.environ["OMP_NUM_THREADS"] = os.environ[_CHOSEN] = str(_free_cores())
    elif threads == chosen:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(chosen) // processes))


def _free_cores() -> int:
    import psutil

    usage: list[float] = psutil.cpu_percent(interval=0.3, percpu=True)
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else range(len(usage))
    free: int = round(sum(1 - usage[core] / 100 for core in cores if core < len(usage)))
    limits: list[int] = [free, psutil.cpu_count(logical=False) or free]
    if _QUOTA.is_file() and (quota := _QUOTA.read_text().split())[0] != "max":
        limits.append(int(quota[0]) // int(quota[1]))
    return max(1, min(limits))
