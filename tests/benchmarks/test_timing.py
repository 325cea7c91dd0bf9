"""What the timers count and what they make of a profile."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import linear, many_rows, prompt_attention, span_decode, timing, training
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
    assert times["device_ms_by_kind"] == {"attention": 2.5, "the rest": 0.25} and times["launches_per_step"] == 2
    assert next(iter(times["longest_operations_ms"].items())) == ("custom-call.1: span_decode_attend", 2.0)
    assert timing.kernel_us(lambda: None, "span_decode") == pytest.approx(3000)


PROGRAM = """
%fused_computation (param_0: f32[8,4]) -> bf16[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  ROOT %convert.1 = bf16[8,4]{1,0} convert(%param_0), metadata={op_name="inner"}
}

ENTRY %main (x: f32[8,4]) -> (bf16[8,4], f32[]) {
  %x.1 = f32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %mask.2 = pred[8]{0} parameter(1)
  %loop_convert_fusion.3 = (bf16[8,4]{1,0}, f32[]) fusion(%x.1, %mask.2), kind=kLoop, metadata={op_name="jit(f)/mul"}
  ROOT %copy-done = f32[] copy(%loop_convert_fusion.3)
}
"""


def test_passes_name_their_arrays_and_where_they_come_from(monkeypatch):
    """128 bytes of float32 and 8 of booleans are read, 64 of bfloat16 and 4 written; a kernel of two runs is one row."""
    run, product = DeviceEvent("loop_convert_fusion_3", "", 1e-6), DeviceEvent("nvjet_gemm", "", 1.0)
    monkeypatch.setattr(timing, "device_events", lambda function: [[run, run, product, DeviceEvent("unknown", "", 5e-7)]])
    first, second = timing.device_times(lambda: None, 1, PROGRAM)["longest_passes"]
    assert first["kernel"] == "loop_convert_fusion_3" and first["runs"] == 2 and first["ms"] == pytest.approx(2e-6)
    assert (first["arrays"], first["bytes"], first["source"]) == ("f32[8,4] pred[8] -> bf16[8,4] f32[]", 128 + 8 + 64 + 4, "jit(f)/mul")
    assert first["terabytes_per_second"] == pytest.approx(204 * 2 / 2e-9 / 1e12)
    assert set(second) == {"kernel", "ms", "runs"}


def test_a_cpu_has_no_device_events_and_a_header_says_what_was_measured_with():
    assert timing.device_times(lambda: jnp.ones(4).sum(), 1) == {
        "launches_per_step": 0,
        "device_ms_by_kind": {},
        "longest_operations_ms": {},
    }
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
        ("psum.7.2_fusion psum_7_2_fusion_1", "communication"),  # a sum that XLA compiles
        ("custom-call.7 span_decode_attend", "attention"),
        (" masked_attention_forward", "attention"),
        ("custom-call.8 prompt_attention", "attention"),
        ("custom-call.8 _kernel_mosaic_gpu_kernel", "attention"),
        ("custom-call.9 fused_linear_swiglu_mosaic_gpu_kernel", "matrix products"),
        ("custom-call.9 nvjet_tst_128x8_64x12_4x1_v_bz_TNT", "matrix products"),
        ("custom-call fused_linear", "matrix products"),
        ("loop_add_fusion.12 loop_add_fusion_12", "the rest"),
    ],
)
def test_a_devices_programs_are_told_apart_by_their_names(program, kind):
    assert timing.kind_of(program) == kind


WRONG = {  # arguments of a benchmark, and what is said of them
    "--matrices 7b-q": (linear, "'7b-q' is none of 7b-qkv"),
    "--layers x": (linear, "'x' is none of llama2-7b"),
    "--rows 129": (many_rows, "--rows is 129; allowed: multiples of 8"),
    "--shapes b1-1k,b2": (span_decode, "'b2' is none of b1-1k"),
    "--plot out.png": (span_decode, "--plot needs --json FILE"),
    "--shapes b1": (prompt_attention, "'b1' is none of b1-8k"),
    "--implementations xla": (prompt_attention, "'xla' is none of mosaic"),
    "--tokens 100 --step-tokens 128": (training, "--step-tokens is 128; allowed: multiples of 100"),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_end_in_one_line(words, call):
    module, message = WRONG[words]
    status, _, err = call(module.main, *words.split())
    assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
