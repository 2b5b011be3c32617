"""The inference benchmark measures what it says and judges by its limits."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.benchmark_inference import MEBIBYTE, in_turns, markdown, promises

ROOT = Path(__file__).resolve().parents[2]


def report(together: float = 0.4) -> dict:
    return {
        "command": "python tools/benchmark_inference.py",
        "processor": "a processor",
        "network": "a network",
        "start": {"import": 0.1, "matte --help": 2.0},
        "small": {
            "side": 128,
            "seconds": {"first call": 0.2, "second phrase": 0.15, "eight together": together, "eight one by one": 0.8},
            "calls": 200,
            "growth": 3 * MEBIBYTE,
        },
        "full": {
            "bf16": {
                "seconds": {"first call": 10.0, "second phrase": 5.0, "4000 x 3000": 20.0},
                "peaks": {"first call": 500 * MEBIBYTE, "second phrase": 0, "4000 x 3000": 3000 * MEBIBYTE},
            },
            "fp32": {
                "seconds": {"first call": 15.0, "second phrase": 15.0},
                "peaks": {"first call": 900 * MEBIBYTE, "second phrase": 0},
            },
        },
    }


def test_every_promise_is_a_ratio_against_its_limit() -> None:
    found = {item["name"]: (item["value"], item["kept"]) for item in promises(report())}
    assert found["small network: a batch of 8 / one by one"] == (0.5, True)
    assert found["full size: second phrase / first call"] == (0.5, True)
    assert found["full size, first call: fp32 / bf16 time"] == (1.5, False)
    assert found["full size, second phrase: fp32 / bf16 time"] == (3.0, True)
    assert found["full size, 512 x 512: memory beside the weights, MiB"] == (500, True)
    assert found["full size, 4000 x 3000: memory beside the weights, MiB"] == (3000, False)
    assert found["matte --help, seconds"] == (2.0, False)
    assert not promises(report(together=0.7))[0]["kept"]


def test_the_table_says_what_was_promised_and_missed() -> None:
    text = markdown({**report(), "promises": promises(report())})
    assert text.startswith("Measured by `python tools/benchmark_inference.py`")
    assert "| full size, first call: fp32 / bf16 time | 1.50 | >= 2 | **missed** |" in text
    assert "a second phrase takes 0.75 of a first call" in text


def test_times_are_processor_time_and_not_waiting() -> None:
    seconds = in_turns({"wait": lambda: time.sleep(0.05), "work": lambda: sum(range(300_000))}, 3)
    assert seconds["wait"] < 0.02
    assert seconds["work"] > seconds["wait"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_was_let_go_again() -> None:
    # in a process of its own: one that has held gigabytes answers 64 MiB from what it never gave back
    program = (
        "import mmap\n"
        "from tools.benchmark_inference import forget_peak, peak_bytes\n"
        "before = forget_peak()\n"
        f"with mmap.mmap(-1, {64 * MEBIBYTE}) as held: held.write(bytes(1) * {64 * MEBIBYTE})\n"
        "print(peak_bytes() - before, peak_bytes() - forget_peak())\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    held, forgotten = map(int, answer.stdout.split())
    assert held > 60 * MEBIBYTE
    assert forgotten > 50 * MEBIBYTE
