"""What the tests count reaches the end of their output, once."""

import survival


def test_what_is_counted_is_taken_once():
    survival.count(survival.KILLS, 2)
    survival.count(survival.KILLS)
    assert survival.take() == {survival.KILLS: 3}
    assert not survival.take()
