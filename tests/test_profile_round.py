"""What the summary of a profiler trace says, of a made-up one."""

from __future__ import annotations

import pytest

from benchmarks.profile_round import parts, steps, summary


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
    with pytest.raises(SystemExit, match="no verifies"):
        summary(events[:2], top=4)


def test_a_device_that_waits_for_the_host_is_told_from_one_that_was_given_its_work():
    """A graph whose launch returned in the gap, and a kernel that was launched long before."""

    def call(name: str, start: float, length: float, number: int) -> dict:
        return {**event(name, start, length, "cuda_runtime"), "args": {"correlation": number}}

    events = [
        {**event("copy", 100, 10), "args": {"correlation": 1}},
        {**event("VerifyTreeGreedy", 140, 5), "args": {"correlation": 2}},  # 30 idle, 22 of them late
        {**event("of_the_same_graph", 147, 3), "args": {"correlation": 2}},
        {**event("early", 160, 10), "args": {"correlation": 3}},
        {**event("Memcpy", 180, 5, "gpu_memcpy"), "args": {"correlation": 4}},  # whose call waits for it
        call("cudaMemcpyAsync", 90, 2, 1),
        call("cudaGraphLaunch", 105, 27, 2),
        call("cudaLaunchKernel", 133, 2, 3),
        call("cudaMemcpyAsync", 135, 60, 4),
    ]
    found = summary(events, top=8)
    assert (found["idle_us"], found["late_us"]) == (52, 22)
    assert found["late"] == {
        "copy > VerifyTreeGreedy": 22,
        "of_the_same_graph > early": 0,
        "early > Memcpy": 0,
        "VerifyTreeGreedy > of_the_same_graph": 0,
    }


def test_a_step_without_a_draft_is_a_launch_of_a_graph_and_has_a_part_that_selects():
    step = [
        event("_score_kernel", 100, 4),
        event("pool_logits_kernel", 104, 2),
        event("_select_kernel", 106, 2),
        event("_list_pages_kernel", 108, 2),
        event("_verify_kernel", 110, 6),
        event("cudaGraphLaunch", 90, 1, "cuda_runtime"),
    ]
    layers = 2
    events = [{**e, "ts": e["ts"] + 20 * i} for i in range(4 * layers) for e in step[:-1]]
    events += [{**step[-1], "ts": 90 + 20 * layers * i} for i in range(4)]
    found = summary(events, top=4, rounds_of=steps)
    assert (found["rounds"], found["round_us"], found["idle_us"]) == (4, 39, 7)  # none after the last
    assert found["parts"] == {"page_scores": 12, "pages": 4, "tokens": 0, "kept": 0, "select": 4, "rest": 12}
    assert found["select_share"] == round(20 / 39, 4)
    with pytest.raises(SystemExit, match="no steps"):
        summary(events[:-4], top=4, rounds_of=steps)


def test_kernels_of_the_same_name_elsewhere_are_not_of_a_selection():
    found = parts({"_plan_kernel": 1, "at::native::reduce_kernel": 2, "flash::prepare_select_kernel": 4})
    assert found == {"page_scores": 0, "pages": 0, "tokens": 0, "kept": 0, "select": 0, "rest": 7}
    found = parts({"_score_tokens_kernel": 1, "_list_kernel": 2, "pool_logits_kernel": 4})
    assert found == {"page_scores": 4, "pages": 0, "tokens": 1, "kept": 0, "select": 2, "rest": 0}
