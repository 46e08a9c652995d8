"""The sums over HLO text, on small programs written by hand and one compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcod_jax.plan import hlo

CONFIG = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
PROGRAM = f"""HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%inner_fusion (p: bf16[8,16]) -> bf16[8,16] {{
  %p = bf16[8,16]{{1,0}} parameter(0)
  ROOT %hidden = bf16[8,16]{{1,0}} multiply(%p, %p), {CONFIG % 1000000}
}}

%async_collective_fusion.1 (p: bf16[2,16]) -> bf16[8,16] {{
  %p.1 = bf16[2,16]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %gather.1 = bf16[8,16]{{1,0:T(8,128)(2,1)}} all-gather(%p.1), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {{'y'}}, dimensions={{0}}
}}

%fused_computation.2 (p: bf16[2,16]) -> bf16[8,16] {{
  %p.2 = bf16[2,16]{{1,0}} parameter(0)
  ROOT %gather.2 = bf16[8,16]{{1,0}} all-gather(%p.2), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {{'y'}}, dimensions={{0}}
}}

%all-reduce-scatter.1 (p: f32[7,4]) -> f32[1,4] {{
  %p.3 = f32[7,4]{{1,0}} parameter(0)
  %pad.1 = f32[8,4]{{1,0}} pad(%p.3, %zero), padding=0_1x0_0
  %sum.1 = f32[8,4]{{1,0}} all-reduce(%pad.1), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %own.1 = f32[1,4]{{1,0}} dynamic-slice(%sum.1, %id), dynamic_slice_sizes={{1,4}}
}}

%body (carry: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %carry = (s32[], bf16[8,16]{{1,0}}) parameter(0)
  %f.1 = bf16[8,16]{{1,0}} fusion(%x), kind=kLoop, calls=%inner_fusion, {CONFIG % 10}
  %f.2 = bf16[8,16]{{1,0}} fusion(%y), kind=kOutput, calls=%async_collective_fusion.1, {CONFIG % 5}
  %f.3 = bf16[8,16]{{1,0}} fusion(%y), kind=kCustom, calls=%fused_computation.2
  %kernel = bf16[8,16]{{1,0}} custom-call(%f.3), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], bf16[8,16]{{1,0}}) tuple(%i, %kernel)
}}

%condition (carry: (s32[], bf16[8,16])) -> pred[] {{
  %carry.1 = (s32[], bf16[8,16]{{1,0}}) parameter(0)
  %bound = s32[] constant(28)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}}

ENTRY %main (x: bf16[8,16]) -> f32[] {{
  %x.1 = bf16[8,16]{{1,0}} parameter(0)
  %copy = bf16[8,16]{{1,0}} copy(%x.1), {CONFIG % 3}
  %loop = (s32[], bf16[8,16]{{1,0}}) while(%start), condition=%condition, body=%body
  %big = f32[8,4]{{1,0}} parameter(1)
  %scatter = f32[1,4]{{1,0}} reduce-scatter(%big), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %scatter.1 = f32[1,4]{{1,0}} fusion(%small), kind=kCustom, calls=%all-reduce-scatter.1
  %mean = f32[] all-reduce(%total), channel_id=2, replica_groups={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}, to_apply=%add
  %start.2 = (f32[4], f32[4]) collective-permute-start(%q), channel_id=3, source_target_pairs={{{{0,1}},{{1,0}}}}
  %send = (f32[10]{{0}}, u32[], token[]) send(%mine, %after), channel_id=4, is_host_transfer=true, frontend_attributes={{_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}}
  %recv = (f32[10]{{0}}, u32[], token[]) recv(%after), channel_id=5, is_host_transfer=true, frontend_attributes={{_xla_megascale_transfer_type="ALL_REDUCE"}}
  %to_host = (f32[99]{{0}}, u32[], token[]) send(%mine, %after), channel_id=6, is_host_transfer=true
  ROOT %r = f32[] add(%mean, %mean), {CONFIG % 1}
}}
"""  # noqa: E501 - HLO is written on long lines


@pytest.fixture(scope="module")
def summary():
    return hlo.Summary(PROGRAM)


def test_cycles_and_kernels_follow_the_loops_and_leave_out_fused_bodies(summary):
    assert summary.cycles == 3 + 28 * (10 + 5) + 1
    assert summary.kernels == 28


def test_a_collective_spread_over_fusions_counts_once_and_as_overlapped(summary):
    gathers = [c for c in summary.collectives if c.kind == "all-gather"]
    assert len(gathers) == 1
    assert (gathers[0].times, gathers[0].size, gathers[0].overlapped) == (28, 256, True)
    assert gathers[0].groups == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_bytes_are_those_received_and_sorted_by_network(summary):
    table = hlo.bytes_by_kind(summary, slice_of=[0, 0, 0, 0, 1, 1, 1, 1])
    assert table["all-gather", "ici"] == {"count": 28, "bytes": 28 * 192, "overlapped": 1.0}
    # One that the compiler kept as such, and one that it pads first.
    scattered = {"count": 2, "bytes": 2 * 128 * 7 / 8, "overlapped": 0.0}
    assert table["reduce-scatter", "dcn"] == scattered
    # Four pairs, each of two slices: 2 (n - 1)/n of four bytes. And libtpu's own way between two
    # slices: forty bytes sent through the hosts, which come back summed.
    assert table["all-reduce", "dcn"] == {"count": 2, "bytes": 44.0, "overlapped": 40 / 44}
    three = hlo.bytes_by_kind(summary, slice_of=[0, 0, 1, 1, 1, 2, 2, 2])["all-reduce", "dcn"]
    assert three["bytes"] == pytest.approx(4.0 + 40 * 4 / 3)
    assert table["collective-permute", "ici"] == {"count": 1, "bytes": 16, "overlapped": 1.0}
    one_slice = hlo.bytes_by_kind(summary, slice_of=[0] * 8)
    sent = one_slice.pop(("all-reduce", "dcn"))  # a program of one slice sends nothing so
    assert sent["bytes"] == 0
    assert {network for _, network in one_slice} == {"ici"}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}, x", ((0, 1, 2), (3, 4, 5))),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}, x", ((0, 3), (1, 4), (2, 5))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", ((0, 1, 2, 3),)),
        (
            "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, x",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
        ),
        (
            "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, x",
            ((0, 4), (1, 5), (2, 6), (3, 7)),
        ),
        ("replica_groups={}, x", ()),
        ("channel_id=4", ()),
    ],
)
def test_replica_groups_in_every_form(text, groups):
    assert hlo.replica_groups(text) == groups


def test_an_unknown_form_is_an_error_and_not_all_devices():
    with pytest.raises(ValueError, match="unknown form"):
        hlo.replica_groups("replica_groups=mesh['a'=8] {'a':(2)4}, x")
    with pytest.raises(ValueError, match="unknown form"):
        hlo.replica_groups("replica_groups=something[3], x")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[4,8]{1,0:T(8,128)(2,1)}", 64),
        ("(f32[2]{0}, /*index=1*/s32[], pred[3])", 15),
        ("f32[]", 4),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.array_bytes(shape) == size


def test_a_loop_without_a_bound_is_an_error():
    text = PROGRAM.replace("constant(28)", "parameter(1)")
    with pytest.raises(ValueError, match="no trip count for loop"):
        hlo.Summary(text)


def test_a_program_compiled_here_has_its_collectives_and_loops():
    mesh = Mesh(jax.devices()[:4], ("x",))
    split = NamedSharding(mesh, P("x"))
    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split)

    def step(x):
        body = jax.shard_map(
            lambda y: jax.lax.psum_scatter(
                jax.lax.all_gather(y, "x", tiled=True) * jax.lax.axis_index("x"), "x", tiled=True
            ),
            mesh=mesh,
            in_specs=P("x"),
            out_specs=P("x"),
        )
        return jax.lax.scan(lambda c, _: (body(c) * 0.5, None), x, length=5)[0].sum()

    summary = hlo.Summary(jax.jit(step).lower(shape).compile().as_text())
    found = {(c.kind, c.size, c.times) for c in summary.collectives}
    assert ("all-gather", 8 * 16 * 4, 5) in found
    assert ("reduce-scatter", 8 * 16 * 4, 5) in found
    assert summary.cycles == 0
    assert summary.kernels == 0
