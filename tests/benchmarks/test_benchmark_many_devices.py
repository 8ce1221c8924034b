"""What is said of many devices is what the last full run has counted."""

from pathlib import Path

import jax
import jax.numpy as jnp
import many_devices
import optax
import pytest
import reporting
from many_devices import Collective
from tiers import full

PAGE = (Path(__file__).parents[2] / "docs" / "evidence" / "devices.md").read_text()


def test_the_page_quotes_the_last_full_run():
    report = reporting.read("many_devices")
    for key in ("counted", "expected"):
        assert f"{report['checked'][key]:,}" in PAGE


@full
def test_an_update_adds_few_and_small_sums():
    """However many leaves there are, but for what XLA can put into one message."""
    report = reporting.read("many_devices")
    assert list(report["messages"]) == list(many_devices.SIDES)
    for by_layout in report["messages"].values():
        assert by_layout["data"]["10"]["messages"] == 0
        few, more, many = (
            by_layout[many_devices.MOST][n] for n in ("10", "100", "1000")
        )
        assert few["messages"] == more["messages"]
        assert many["messages"] <= 4 * few["messages"]
        for row in (few, more, many):
            assert set(row["kinds"]) <= {"all-reduce"}
        assert many["largest"] <= 4 * 1000  # One number per leaf.
    by_devices = [row["messages"] for row in report["by_devices"].values()]
    assert len(set(by_devices)) == 1


@full
def test_microbatches_on_devices_add_next_to_nothing_to_the_gradient():
    plain, spread, _ = reporting.read("many_devices")["gradient"].values()
    for leaves in plain:
        assert set(spread[leaves]["kinds"]) == {"all-reduce"}
        added = spread[leaves]["bytes"] - plain[leaves]["bytes"]
        assert added <= 16 * int(leaves) + 64


@full
def test_xla_counts_what_the_shapes_say():
    checked = reporting.read("many_devices")["checked"]
    assert checked["counted"] == pytest.approx(checked["expected"], rel=1e-5)


def test_programs_are_summarised():
    found = [Collective("all-reduce", (4, 8)), Collective("all-gather", (64,))]
    assert many_devices.summarise(found) == {
        "kinds": ["all-gather", "all-reduce"],
        "messages": 2,
        "arrays": 3,
        "bytes": 76,
        "largest": 64,
    }


def test_a_state_is_split_where_it_has_the_shape_of_a_parameter():
    params = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    assert many_devices.state_sizes(optax.adam(0.1), params) == (2 * 4 * 24, 4)


def test_models_have_the_size_they_are_called_by():
    sizes = {
        name: many_devices.size_of(each.params()) / 4
        for name, each in many_devices.MODELS.items()
    }
    assert sizes == pytest.approx({"1B": 1e9, "70B": 70e9, "1T": 1e12}, rel=0.02)


@pytest.mark.parametrize(
    ("size", "shown"), [(4, "4 B"), (76.6e6, "76.6 MB"), (7.83e9, "7.83 GB")]
)
def test_sizes_are_shown_with_their_unit(size, shown):
    assert many_devices.show_bytes(size) == shown
