"""What the timers count and what they make of a profile."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import timing
from benchmarks.timing import DeviceEvent


def test_every_repetition_calls_as_often_as_asked_for():
    calls = []
    seconds = timing.run_seconds(lambda: calls.append(0), queued=3, warm_ups=2, repetitions=4)
    assert len(calls) == 3 * (2 + 4) and len(seconds) == 4 and min(seconds) >= 0
    assert timing.median_and_spread([3.0, 1.0, 2.0]) == (2.0, 2.0)
    assert timing.timed(jnp.negative, jnp.float32(2))[0] == -2


def test_profiles_are_summed_up_by_kind_and_by_kernel(monkeypatch):
    attend, combine = DeviceEvent("span_decode_attend", "custom-call.1", 2.0), DeviceEvent("span_decode_combine", "custom-call.2", 1.0)
    copy = DeviceEvent("loop_fusion", "fusion.7", 0.5)
    devices = [[attend, attend, combine, copy], [attend, attend, combine, copy]]
    monkeypatch.setattr(timing, "device_events", lambda function: devices)
    times = timing.device_times(lambda: None, steps=2)
    assert times["device_ms_by_kind"] == {"attention": 2.5, "the rest": 0.25}
    assert next(iter(times["longest_operations_ms"].items())) == ("custom-call.1: span_decode_attend", 2.0)
    assert timing.kernel_us(lambda: None, "span_decode") == pytest.approx(3000)


def test_a_cpu_has_no_device_events_and_a_header_says_what_was_measured_with():
    assert timing.device_times(lambda: jnp.ones(4).sum(), 1) == {"device_ms_by_kind": {}, "longest_operations_ms": {}}
    header = timing.report_header()
    assert set(header) == {"device", "versions", "read_ceiling_terabytes_per_second"} and header["versions"]["jax"]
    assert timing.header_line(header, "2 devices").startswith("2 devices, JAX ")


def test_rows_of_kernels_stand_beside_their_bytes(tmp_path, monkeypatch, capsys):
    header = {"device": "some GPU", "versions": {"jax": "1"}, "read_ceiling_terabytes_per_second": 2.0}
    monkeypatch.setattr(timing, "report_header", lambda: header)
    report = timing.KernelReport(tmp_path / "report.json", seed=3)
    report.add("a kernel", 10.0, 5_000_000, {"name": "a"}, spread_microseconds=1.0)
    report.save()
    written = json.loads((tmp_path / "report.json").read_text())
    row = {"name": "a", "microseconds": 10.0, "bytes": 5_000_000, "roofline_microseconds": 2.5, "terabytes_per_second": 0.5}
    assert written == {**header, "seed": 3, "cases": [row | {"percent_of_ceiling": 25.0, "spread_microseconds": 1.0}]}
    assert "25% of the ceiling" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("all-reduce.3 ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("all-gather-start.1 ncclDevKernel_AllGather_RING_LL", "communication"),
        ("custom-call.7 span_decode_attend", "attention"),
        (" masked_attention_forward", "attention"),
        ("custom-call.8 prompt_attention", "attention"),
        ("custom-call.8 _kernel_mosaic_gpu_kernel", "attention"),
        ("custom-call.9 nvjet_tst_128x8_64x12_4x1_v_bz_TNT", "matrix products"),
        ("custom-call fused_linear", "matrix products"),
        ("loop_add_fusion.12 loop_add_fusion_12", "the rest"),
    ],
)
def test_a_devices_programs_are_told_apart_by_their_names(program, kind):
    assert timing.kind_of(program) == kind
