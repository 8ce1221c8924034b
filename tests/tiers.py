"""Which cases of a test are in the quick tier; ``pytest --full`` runs them all."""

import pytest

full = pytest.mark.full


def quick(keep, cases, ids=None):
    """Cases for ``parametrize``, of which the quick tier has those that are kept.

    Args:
      keep: ids of these cases.
      cases: all cases.
      ids: their ids, by default their texts.
    """
    cases = list(cases)
    ids = [str(case) for case in cases] if ids is None else list(ids)
    assert set(keep) <= set(ids), f"{set(keep) - set(ids)} name no case"
    return [
        pytest.param(case, id=name, marks=() if name in keep else full)
        for case, name in zip(cases, ids, strict=True)
    ]
