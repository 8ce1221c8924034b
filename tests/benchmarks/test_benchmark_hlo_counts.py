"""Counts in the text of a program, against a program that was counted by hand."""

import hlo_counts
import jax
import jax.numpy as jnp
import pytest

# Two kernels and a loop of three passes of one kernel each; the second kernel writes
# one row of 16 bytes into a buffer of 4096.
GPU = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%row (b: f32[256,4], r: f32[1,4], i: s32[]) -> f32[256,4] {
  %b = f32[256,4]{1,0} parameter(0)
  %r = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %update = f32[256,4]{1,0} dynamic-update-slice(%b, %r, %i, %i)
}

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %v = f32[8]{0} get-tuple-element(%c), index=1
  %w = f32[8]{0} negate(%v)
  ROOT %out = (s32[], f32[8]{0}) tuple(%n, %w)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  ROOT %t = pred[] constant(true)
}

ENTRY %main (a: f32[8], b: f32[256,4], r: f32[1,4], i: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[256,4]{1,0} parameter(1)
  %r = f32[1,4]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %sq = f32[8]{0} multiply(%a, %a)
  %written = f32[256,4]{1,0} fusion(%b, %r, %i), kind=kLoop, calls=%row
  %start = (s32[], f32[8]{0}) tuple(%i, %sq)
  %known = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body, KNOWN
  ROOT %res = f32[8]{0} get-tuple-element(%known), index=1
}
"""
THREE = 'backend_config={"known_trip_count":{"n":"3"}}'


def test_kernels_bytes_and_passes_are_those_counted_by_hand():
    found = hlo_counts.count(GPU.replace("KNOWN", THREE))
    # The square reads 32 bytes once and writes 32; the row reads 16 + 4 and writes 16.
    assert found == hlo_counts.Counts(kernels=2 + 3, asks=0, bytes=64 + 36)


def test_a_loop_of_unknown_length_is_asked_for_and_does_not_run():
    found = hlo_counts.count(GPU.replace("KNOWN", "metadata={}"))
    assert found == hlo_counts.Counts(kernels=2, asks=1, bytes=64 + 36)


def test_single_numbers_and_memory_on_the_chip_are_free_on_a_tpu():
    text = """HloModule jit_step

ENTRY %main (a: f32[8], s: f32[]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %s = f32[]{:T(128)} parameter(1)
  %twice = f32[]{:T(128)} add(%s, %s)
  %near = f32[8]{0:T(128)S(1)} multiply(%a, %a)
  ROOT %far = f32[8]{0:T(128)} negate(%near)
}
"""
    assert hlo_counts.count(text) == hlo_counts.Counts(kernels=2, asks=0, bytes=64)


def test_the_largest_array_of_each_exchange():
    text = """HloModule jit_step

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %one = f32[8]{0} all-reduce(%a), to_apply=%add
  %two = (f32[8]{0}, f32[32]{0}) all-gather-start(%one), dimensions={0}
  ROOT %three = f32[8]{0} all-reduce(%one), to_apply=%add
}
"""
    assert hlo_counts.collectives(text) == {"all-reduce": 32, "all-gather": 128}


@pytest.mark.parametrize(("steps", "asks"), [(4, 0), (None, 1)])
def test_a_program_of_this_machine(steps, asks):
    def loop(x, n):
        return jax.lax.fori_loop(
            0, n if steps is None else steps, lambda _, y: y @ y, x
        )

    x = jnp.eye(64)
    text = jax.jit(loop).lower(x, 3).compile().as_text()
    assert hlo_counts.count(text).asks == asks
