"""The whole stack on a mesh of eight devices does what it does on one.

Axis types × layouts × ways to hold parameters × chains. Only JAX's compiler moves data;
what it moves is read in the compiled program.
"""

import contextlib
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiers import full

import optax_stability as ost
from optax_stability import thresholds
from optax_stability.flax import TrainState, microbatch_gradients

K = 4
# Sums in another order: 1e-6 of a gradient, and at most as much of what Adam makes of
# it, but where a coordinate is next to 0.
CLOSE = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=2e-6)


class Layout(NamedTuple):
    """Axes of a mesh, how the parameters lie on it, and how they are used."""

    axes: dict[str, int]
    lie: dict[str, PartitionSpec]
    used: dict[str, PartitionSpec]


NAMES = ("bias", "hidden", "out", "scale")
COPIED = dict.fromkeys(NAMES, PartitionSpec())
SPLIT = COPIED | dict.fromkeys(("bias", "hidden", "out"), PartitionSpec("data"))
# Columns, then rows (Megatron), and the other dimension over "data".
COLUMNS = COPIED | {
    "bias": PartitionSpec("model"),
    "hidden": PartitionSpec("data", "model"),
    "out": PartitionSpec("model", "data"),
}
GATHERED = COLUMNS | {
    "hidden": PartitionSpec(None, "model"),
    "out": PartitionSpec("model", None),
}
LAYOUTS = {
    "replicated": Layout({"data": 8}, COPIED, COPIED),
    "fsdp": Layout({"data": 8}, SPLIT, COPIED),
    "tensor": Layout({"data": 4, "model": 2}, COLUMNS, GATHERED),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


class Place(NamedTuple):
    """A mesh, and what the user of it says where; without a mesh one device."""

    kind: str = ""
    layout: str = ""

    def mesh(self):
        axes = LAYOUTS[self.layout].axes
        kinds = (KINDS[self.kind],) * len(axes)
        return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)

    def put(self, tree, specs):
        if not self.kind:
            return jax.tree.map(jnp.asarray, tree)
        place = functools.partial(NamedSharding, self.mesh())
        return {k: jax.device_put(tree[k], place(specs[k])) for k in tree}

    def params(self):
        return self.put(make_params(), self.kind and LAYOUTS[self.layout].lie)

    def rows(self, x):
        return self.put({"x": x}, {"x": PartitionSpec("data")})["x"]

    def settle(self, tree):
        """What ``init`` has made on one device goes to all: it will lie there."""
        if not self.kind:
            return tree
        everywhere = NamedSharding(self.mesh(), PartitionSpec())

        def move(x):
            lies = isinstance(getattr(x, "sharding", None), NamedSharding)
            return x if lies else jax.device_put(x, everywhere)

        return jax.tree.map(move, tree)

    def within(self):
        if not self.kind:
            return contextlib.nullcontext()
        return jax.set_mesh(self.mesh())

    def gather(self, params):
        """What FSDP does to parameters before they are used."""
        if not self.kind:
            return params
        move = jax.sharding.reshard
        if self.kind == "auto":
            move = jax.lax.with_sharding_constraint
        used = LAYOUTS[self.layout].used
        return {k: move(params[k], used[k]) for k in params}

    def multiply(self, hidden, out):
        """On an Explicit mesh, a sum over what is split says how the result lies."""
        if self.kind != "explicit":
            return hidden @ out
        return jnp.matmul(hidden, out, out_sharding=PartitionSpec("data"))


ALONE = Place()


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_params():
    return {
        "bias": 0.1 * draw(0, 16),
        "hidden": draw(1, 8, 16),
        "out": draw(2, 16, 8),
        "scale": np.float32(1),
    }


def loss_of(place, params, x):
    params = place.gather(params)
    hidden = jnp.tanh(x @ params["hidden"] + params["bias"])
    found = params["scale"] * place.multiply(hidden, params["out"])
    return jnp.mean((found - 1) ** 2)


def guarded():
    inside = optax.chain(
        ost.estimate_noise_scale(), ost.clip_by_zscore(), ost.safe_adamw(1e-2)
    )
    return ost.skip_spikes(inside, grad_norm=thresholds.constant(100.0))


def stack():
    """Looking takes twice as long to compile, so not every test does."""
    return ost.record_history(optax.chain(ost.record("grad"), guarded()), length=8)


def accumulated():
    inside = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(1e-2))
    return ost.accumulate_moments(ost.skip_spikes(inside), 2, mean_square=False)


CHAINS = {
    "stack": stack,
    "guarded": guarded,
    "accumulated": accumulated,
}


class Net(nnx.Module):
    """The same parameters, as an NNX module holds them."""

    def __init__(self, params):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))


def as_dict(model):
    return {name: getattr(model, name)[...] for name in NAMES}


def add(grads, poison):
    return jax.tree.map(jnp.add, grads, poison)


# Each API: what is carried from step to step, a step, and its parameters and state.


def plain(place, tx):
    gradients = ost.microbatch_gradients(
        functools.partial(loss_of, place), K, vmap_size=1
    )

    def step(carried, x, poison):
        params, state = carried
        loss, grads, moments = gradients(params, x)
        updates, state = tx.update(
            add(grads, poison), state, params, value=loss, moments=moments
        )
        return optax.apply_updates(params, updates), state

    params = place.params()
    return (params, tx.init(params)), step, lambda carried: carried


def linen(place, tx):
    gradients = ost.microbatch_gradients(
        functools.partial(loss_of, place), K, vmap_size=1
    )

    def step(state, x, poison):
        loss, grads, moments = gradients(state.params, x)
        extra = {"value": loss, "moments": moments}
        return state.apply_gradients(grads=add(grads, poison), extra_args=extra)

    state = TrainState.create(apply_fn=None, params=place.params(), tx=tx)
    return state, step, lambda state: (state.params, state.opt_state)


def modules(place, tx):
    model = Net(place.params())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    gradients = microbatch_gradients(
        lambda model, x: loss_of(place, as_dict(model), x), K, vmap_size=1
    )

    def step(state, x, poison):
        model, optimizer = nnx.merge(graphdef, state)
        loss, grads, moments = gradients(model, x)
        leaves, structure = jax.tree.flatten(grads)
        leaves = map(jnp.add, leaves, jax.tree.leaves(poison))
        grads = jax.tree.unflatten(structure, leaves)
        optimizer.update(model, grads, value=loss, moments=moments)
        return nnx.state((model, optimizer))

    def parts(state):
        model, optimizer = nnx.merge(graphdef, state)
        return as_dict(model), nnx.as_pure(optimizer.opt_state)

    return state, step, parts


APIS = {"plain": plain, "linen": linen, "nnx": modules}


@functools.cache
def compiled(place, api, chain):
    """A jitted step that donates, and how to read what it carries."""
    with place.within():
        _, step, parts = APIS[api](place, CHAINS[chain]())

    def logged(carried, x, poison):
        carried = step(carried, x, poison)
        return carried, ost.metrics(parts(carried)[1])

    return jax.jit(logged, donate_argnums=0), parts


NOTHING = {name: np.zeros_like(value) for name, value in make_params().items()}


def poisoned(value):
    """One entry, on one device."""
    poison = {name: zeros.copy() for name, zeros in NOTHING.items()}
    poison["hidden"][5, 11] = value
    return poison


STREAMS = {
    "accumulated": [NOTHING, NOTHING, poisoned(np.nan), NOTHING],
    "stack": [NOTHING, poisoned(np.nan), NOTHING, poisoned(1e4), NOTHING],
}
STREAMS["guarded"] = STREAMS["stack"]


def kinds_of(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@functools.cache
def train(place, api, chain):
    """Parameters, state and every step's metrics."""
    step, parts = compiled(place, api, chain)
    logged = []
    with place.within():
        carried = place.settle(APIS[api](place, CHAINS[chain]())[0])
        before = kinds_of(carried)
        for i, poison in enumerate(STREAMS[chain]):
            lie = place.kind and LAYOUTS[place.layout].lie
            x = place.rows(draw(10 + i, 64, 8))
            carried, measured = step(carried, x, place.put(poison, lie))
            logged.append(jax.device_get(measured))
        assert kinds_of(carried) == before
    return *parts(carried), logged


PLACES = [Place(kind, layout) for kind in KINDS for layout in LAYOUTS]
by_place = pytest.mark.parametrize("place", PLACES, ids="-".join)
by_api = pytest.mark.parametrize("api", APIS)


def name_in(path, leaf, params):
    """Which parameter a leaf of a state belongs to, if it has its shape."""
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    owners = [name for name in NAMES if name in names]
    return next((x for x in owners if leaf.shape == params[x].shape), None)


def looked_at(api):
    return "stack" if api == "plain" else "guarded"


@by_place
@by_api
@pytest.mark.parametrize("accumulates", [False, True], ids=["chain", "accumulate"])
@full
def test_a_mesh_does_what_one_device_does(place, api, accumulates):
    """Also where one entry on one device is NaN, or so large that it is skipped."""
    chain = "accumulated" if accumulates else looked_at(api)
    params, state, logged = train(place, api, chain)
    expected, _, known = train(ALONE, "plain", chain)
    CLOSE(params, expected)
    for found, reference in zip(logged, known, strict=True):
        assert found.keys() == reference.keys()
        for key, x in reference.items():
            is_count = not np.issubdtype(x.dtype, np.floating)
            bound = {"rtol": 0} if is_count else {"rtol": 2e-4, "atol": 1e-5}
            np.testing.assert_allclose(found[key], x, **bound, err_msg=key)
    if accumulates:
        assert logged[-1]["accumulate/rejected_total"] == 1
    else:
        assert [bool(each["skip/skipped"]) for each in logged] == [0, 1, 0, 1, 0]
    # What is like a parameter lies like it; all else is everywhere, and the same there.
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = name_in(path, leaf, params)
        if name is not None:
            assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim), (
                path
            )
            continue
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert leaf.sharding.is_fully_replicated, path
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0])
    lie = LAYOUTS[place.layout].lie
    for name, leaf in params.items():
        expected = NamedSharding(place.mesh(), lie[name])
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), name


# --- what devices send each other ---------------------------------------------------


def update_alone(place, copies):
    """The program of one update of ``copies`` times as many leaves."""

    def repeated(tree):
        return [tree] * copies

    tx = stack()
    with place.within():
        params = repeated(place.params())
        scalar, vector = jnp.float32(2), jnp.ones(len(jax.tree.leaves(params)))
        moments = ost.Moments(jnp.int32(K), scalar, vector, None)
        step = jax.jit(tx.update)
        state = tx.init(params)
        lowered = step.lower(params, state, params, value=scalar, moments=moments)
    return many_devices.collectives(lowered.compile().as_text())


@full
def test_an_update_adds_as_many_small_sums_whatever_the_number_of_leaves():
    few, many = (update_alone(Place("auto", "tensor"), copies) for copies in (1, 3))
    assert {each.kind for each in few + many} == {"all-reduce"}
    assert len(many) == len(few)
    # Next to nothing: a few numbers per leaf.
    assert max(size for each in many for size in each.sizes) <= 4 * 16


@full
def test_an_update_of_what_is_copied_sends_nothing():
    assert not update_alone(Place("auto", "replicated"), 1)


def test_the_parser_reads_programs():
    """One line per kind of line that XLA writes."""
    program = """
  %a = (f32[], /*index=1*/bf16[2,3]{1,0}) all-reduce(%x, %y), channel_id=1
  %b = f32[8]{0} all-gather-start(%x), dimensions={0}
  %c = f32[8]{0} all-gather-done(%b)
  %d = f32[4]{0} fusion(%b), calls=%all-reduce
"""
    found = many_devices.collectives(program)
    assert [tuple(each) for each in found] == [
        ("all-reduce", (4, 12)),
        ("all-gather", (32,)),
    ]


# --- in the company of optax --------------------------------------------------------


def simple():
    guarded = ost.spike_guard(optax.chain(ost.clip_by_zscore(), ost.safe_adamw(1e-2)))
    return optax.chain(ost.record("grad"), guarded)


def is_matrix(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def multi_steps():
    steps = optax.MultiSteps(simple(), 2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


COMPANY = {
    "MultiSteps": multi_steps,
    "masked": lambda: optax.masked(simple(), is_matrix),
    "partition": lambda: optax.partition(
        {True: simple(), False: ost.safe_adamw(1e-3)}, is_matrix
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(ost.safe_adamw)(
        learning_rate=1e-2
    ),
    "scan": simple,
}


def take_steps(tx, place, steps=3):
    """In one program, with a constant gradient."""
    with place.within():
        params = place.params()

        def step(carried, _):
            params, state = carried
            grads = jax.tree.map(lambda p: 0.1 * p, params)
            updates, state = tx.update(grads, state, params, value=jnp.float32(1))
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda carried: jax.lax.scan(step, carried, length=steps)[0])(
            (params, tx.init(params))
        )


@pytest.mark.parametrize("name", COMPANY)
@full
def test_what_optax_wraps_works_on_an_explicit_mesh_and_in_a_scan(name):
    tx = optax.with_extra_args_support(COMPANY[name]())
    place = Place("explicit", "tensor")
    params, _ = take_steps(tx, place)
    expected, _ = take_steps(tx, ALONE)
    CLOSE(params, expected)
    lie = place.params()
    for name, leaf in params.items():
        assert leaf.sharding.is_equivalent_to(lie[name].sharding, leaf.ndim)


@full
def test_an_axis_of_one_device_changes_nothing():
    mesh = jax.make_mesh((8, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    lie = LAYOUTS["tensor"].lie
    params = {
        name: jax.device_put(x, NamedSharding(mesh, lie[name]))
        for name, x in make_params().items()
    }
    tx = simple()
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(
            params, tx.init(params), params, value=jnp.float32(1)
        )
    params = ALONE.params()
    expected, _ = jax.jit(tx.update)(
        params, tx.init(params), params, value=jnp.float32(1)
    )
    CLOSE(updates, expected)


@full
def test_a_state_that_jit_makes_is_copied_where_the_mesh_is_auto():
    """Why the README says to initialise outside of it."""
    place = Place("auto", "tensor")
    with place.within():
        params = place.params()
        outside, inside = simple().init(params), jax.jit(simple().init)(params)
    outside, inside = (ost.metrics(state) and state for state in (outside, inside))
    (mu, *_), (copied, *_) = (
        [x for x in jax.tree.leaves(state) if x.shape == (8, 16)]
        for state in (outside, inside)
    )
    assert mu.sharding.is_equivalent_to(params["hidden"].sharding, 2)
    assert copied.sharding.is_fully_replicated
