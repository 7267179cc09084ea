"""What the summary of a profiler trace says, of a made-up one."""

from __future__ import annotations

import pytest

from benchmarks.profile_round import summary


def event(name: str, start: float, length: float, kind: str = "kernel") -> dict:
    return {"name": name, "ts": start, "dur": length, "cat": kind}


def test_kernels_idle_time_and_host_calls_are_counted_by_round():
    events = [
        event("void gemm<float>(int)", 100, 10),
        event("_pool_kernel", 104, 4),  # beside the other: no idle time
        event("VerifyTreeGreedy", 116, 4),
        event("void gemm<float>(int)", 130, 10),
        event("_select_kernel", 140, 2),  # twice a round, as a selector for comparison does
        event("_select_kernel", 142, 2),
        event("_select_kernel", 144, 2),
        event("_select_kernel", 146, 2),
        event("VerifyTreeGreedy", 156, 4),
        event("cudaGraphLaunch", 90, 1, "cuda_runtime"),
        event("cudaGraphLaunch", 120, 1, "cuda_runtime"),
    ]
    found = summary(events, top=4)
    assert (found["rounds"], found["round_us"], found["idle_us"]) == (2, 30, 12)
    assert found["kernels"]["gemm"] == {"us": 10, "calls": 1}
    assert found["gaps"] == {"VerifyTreeGreedy > gemm": 5, "_select_kernel > VerifyTreeGreedy": 4}
    assert found["host_calls"]["cudaGraphLaunch"] == 1
    with pytest.raises(SystemExit, match="no kernels"):
        summary(events[-2:], top=4)
