"""Two tiers of tests: ``pytest`` runs the quick one, ``pytest --full`` all of them.

``@full`` leaves a test to the second. ``@quick_only("float32", …)`` leaves all cases of
a parametrised test to it, but for those with these ids.
"""

import collections

import pytest

full = pytest.mark.full
quick_only = pytest.mark.quick_only
# Not a tier: what it runs takes longer than to compile, so its code is optimized.
long_run = pytest.mark.long_run


def together(group, cases):
    """Cases for ``parametrize``, by id; those of one id run in one worker.

    So what is compiled for a case is compiled once, whichever test needs it.
    """
    return [
        pytest.param(case, id=name, marks=pytest.mark.xdist_group(f"{group} {name}"))
        for name, case in cases.items()
    ]


MARKERS = (
    "full: only with --full",
    "quick_only(*ids): other cases of this test only with --full",
    "long_run: takes longer than its compilation; conftest.py optimizes its code",
)


def mark(items):
    """Marks what ``quick_only`` leaves to the full tier.

    Raises:
      pytest.UsageError: an id is that of no case.
    """
    known = collections.defaultdict(set)
    for item in items:
        if chosen := item.get_closest_marker("quick_only"):
            known[item.function, chosen.args].add(item.callspec.id)
            if item.callspec.id not in chosen.args:
                item.add_marker(full)
    for (function, chosen), ids in known.items():
        if unknown := set(chosen) - ids:
            raise pytest.UsageError(
                f"{function.__qualname__} has no case {', '.join(sorted(unknown))}; "
                f"quick_only takes {', '.join(sorted(ids))}."
            )


def is_quick(item):
    """Whether a test is in the quick tier."""
    return not item.get_closest_marker("full")
