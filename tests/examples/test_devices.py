"""Meshes and processes of the trainer: what is asked for, and where arrays lie."""

import dataclasses

import devices
import jax
import jax.numpy as jnp
import many_devices
import model
import numpy as np
import pytest
import training
from config import Config, check
from flax import nnx
from inputs import InputError
from jax.sharding import PartitionSpec
from tiers import full


@pytest.fixture
def small(monkeypatch):
    """A GPT that compiles in seconds."""
    size = dataclasses.replace(
        model.SIZES["tiny"], layers=1, width=32, heads=4, context=16
    )
    monkeypatch.setitem(model.SIZES, "tiny", size)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (None, {"data": 8}),
        ("data=4,model=2", {"data": 4, "model": 2}),
        ("fsdp=8", {"fsdp": 8}),
        ("data=2,fsdp=2,model=2", {"data": 2, "fsdp": 2, "model": 2}),
    ],
)
def test_a_mesh_is_read(text, sizes):
    assert devices.parse_mesh(text) == sizes
    assert dict(devices.make_mesh(text).shape) == sizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "data=4"}, "data=4 needs 4 devices, but there are 8"),
        ({"mesh": "date=8"}, "date=8 is not a mesh; give sizes of data, fsdp, model"),
        ({"mesh": "data=4,data=2"}, "is not a mesh"),
        ({"mesh": "data=8,model=0"}, "is not a mesh"),
        ({"mesh": "model=8"}, "cannot split 4 heads of attention"),
        (
            {"mesh": "data=2,fsdp=4", "batch_size": 12},
            "--batch-size: 12 cannot be split into 8 parts",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(settings, message):
    with pytest.raises(InputError, match=message):
        check(Config(**{"batch_size": 16, **settings}))


@pytest.mark.parametrize("text", ["2", "host:12,2/2", "host,0/2", "host:12,-1/2"])
def test_a_place_among_processes_that_is_none_is_refused(text):
    with pytest.raises(
        InputError, match=f"--processes: {text} is not valid; give auto"
    ):
        devices.join(text)


def test_without_a_cluster_there_is_none_to_join(monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="JAX finds no cluster here"):
        devices.join("auto")


def test_an_axis_that_does_not_divide_is_named():
    mesh = devices.make_mesh("fsdp=8")
    matrix = {"mlp_in": {"kernel": jnp.ones((12, 8))}}
    with pytest.raises(InputError, match=r"fsdp=8 does not divide mlp_in/kernel, \(12"):
        devices.shardings(matrix, mesh, model.SPLIT)


def test_every_device_has_its_part_of_a_batch():
    mesh = devices.make_mesh("data=2,fsdp=2,model=2")
    batch = np.arange(24).reshape(8, 3)
    placed = devices.place(batch, devices.batch_sharding(mesh))
    np.testing.assert_array_equal(placed, batch)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


def begin(config):
    def create():
        return training.create(config, 256)

    graphdef = nnx.graphdef(nnx.eval_shape(create))
    state = jax.eval_shape(
        lambda: training.TrainState(nnx.split(create())[1], loss_scale=None)
    )
    return graphdef, state


def compile_step(config, look=None):
    """The trainer's step on a mesh, and where the state lies."""
    graphdef, state = begin(config)
    mesh = devices.make_mesh(config.mesh)
    lie = devices.shardings(state, mesh, model.SPLIT)
    state = jax.tree.map(lambda x, where: x.update(sharding=where), state, lie)
    shape = config.batch_size, model.SIZES["tiny"].context + 1
    windows = jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=devices.batch_sharding(mesh)
    )

    def step(state, windows):
        return training.train_step(graphdef, config, state, windows, {}, look)

    step = jax.jit(
        step, donate_argnums=0, out_shardings=(lie, devices.replicated(mesh))
    )
    with jax.set_mesh(mesh):
        return step.lower(state, windows).compile(), state


@full
def test_the_optimizer_keeps_what_is_like_a_parameter_where_that_is(small):
    del small
    _, state = begin(Config(mesh="fsdp=4,model=2"))
    mesh = devices.make_mesh("fsdp=4,model=2")
    lie = devices.shardings(state, mesh, model.SPLIT)
    kernels = [
        where.spec
        for leaf, where in zip(
            jax.tree.leaves(state), jax.tree.leaves(lie), strict=True
        )
        if leaf.shape == (32, 128)  # mlp_in and its two moments
    ]
    assert kernels == [PartitionSpec("fsdp", "model")] * 3


@full
def test_a_step_moves_no_array_from_one_split_to_another(small):
    """Sums, and where parameters are split they are gathered: no exchange.

    (A step that measures also brings the queries and keys of each head together.)
    """
    del small
    config = Config(mesh="fsdp=4,model=2", batch_size=32, microbatches=2)
    compiled, state = compile_step(config, look=False)
    found = many_devices.messages_of(compiled)
    assert {each.kind for each in found} == {"all-reduce", "all-gather"}
    largest = max(leaf.size for leaf in jax.tree.leaves(state.arrays[0]))
    assert max(max(each.sizes) for each in found) <= 4 * largest
