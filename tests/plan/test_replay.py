"""How a schedule takes its time on links."""

import pytest

from conan_engine.plan import replay
from conan_engine.plan.memory import Form
from conan_engine.plan.replay import Links
from conan_engine.plan.schedule import Compute, Send, Wait

LINKS = Links(400.0, 50.0, 8)
FORM = Form("cuda", True, False, 8, 1)


def seconds(kind, size, form, links=LINKS, group="data"):
    return replay.seconds_of(Send(kind, group, size), form, links)[0]


def test_what_is_sent_behind_a_computation_costs_nothing():
    size = 4 * 10**9
    sent, _ = replay.seconds_of(Send("reduce-scatter", "data", size), FORM, LINKS)
    hidden = replay.of([Send("reduce-scatter", "data", size, 0), Compute(2 * sent), Wait(0)], FORM, LINKS)
    assert hidden.step == pytest.approx(2 * sent) and hidden.waits_data == 0 and hidden.sends_data == sent
    shown = replay.of([Compute(2 * sent), Send("reduce-scatter", "data", size, 0), Wait(0)], FORM, LINKS)
    assert shown.step == pytest.approx(3 * sent) and shown.waits_data == pytest.approx(sent)


def test_collectives_of_a_group_run_one_after_another():
    events = [Send("all-gather", "data", 10**9, 0), Send("all-gather", "data", 10**9, 1), Wait(1), Wait(0)]
    assert replay.of(events, FORM, LINKS).step == pytest.approx(2 * seconds("all-gather", 10**9, FORM))


def test_a_step_begins_while_the_last_ones_weights_are_on_their_way():
    """They hide behind what comes before the module that needs them."""
    sent = seconds("all-gather", 10**9, FORM)
    events = [Compute(sent / 2), Wait(0), Compute(1.0), Send("all-gather", "data", 10**9, 0)]
    found = replay.of(events, FORM, LINKS)
    assert found.step == pytest.approx(1.0 + sent) and found.waits_data == pytest.approx(sent / 2)


def test_tensor_ranks_wait_for_each_other_at_once():
    found = replay.of([Send("all-gather", "tensor", 10**9), Compute(1.0)], FORM._replace(data=4, tensor=2), LINKS)
    assert found.waits_tensor > 0 and found.step == pytest.approx(1.0 + found.waits_tensor)


def test_the_rate_is_that_of_the_slowest_links_on_the_way():
    size = 8 * 10**12
    near, far = (seconds("all-gather", size, Form("cuda", True, False, data, 1)) for data in (8, 64))
    assert near == pytest.approx(size * 7 / 8 / (0.8 * 400e9), rel=1e-3)
    assert far == pytest.approx(size * 63 / 64 / (0.8 * 400e9), rel=1e-3), "the eight of a machine have a link each"
    alone = seconds("all-gather", size, Form("cuda", True, False, 8, 8))
    assert alone == pytest.approx(size * 7 / 8 / (0.8 * 50e9), rel=1e-3), "with one of each machine in the group"
    both = seconds("all-reduce", size, FORM)
    assert both == pytest.approx(2 * near, rel=1e-3)


def test_more_ranks_take_more_hops():
    few, many = (seconds("all-gather", 8, Form("cuda", True, False, data, 1)) for data in (64, 1024))
    assert many > 10 * few
