"""Which records a step draws: shares, epochs, ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from conan_engine.data.order import Sampler

counts = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 60), min_size=1)


@given(counts, st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**31), st.data())
def test_steps_are_shared_out_by_weight_to_within_one(sizes, steps, batch, seed, data):
    weights = {name: data.draw(st.floats(0.1, 10)) for name in sizes}
    sampler = Sampler({name: range(n) for name, n in sizes.items()}, weights, steps, batch, seed)
    for upto in range(1, steps + 1):
        for i, name in enumerate(sizes):
            share = weights[name] / sum(weights.values()) * upto
            assert abs((sampler.source_of_step[:upto] == i).sum() - share) < len(sizes)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**31))
def test_an_epoch_holds_every_record_once_and_epochs_differ(count, batch, seed):
    steps = -(-3 * count // batch)
    sampler = Sampler({"a": range(count)}, {"a": 1.0}, steps, batch, seed)
    drawn = np.concatenate([sampler.draw(step)[1] for step in range(steps)])
    epochs = [drawn[i * count : (i + 1) * count].tolist() for i in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 20:
        assert epochs[0] != epochs[1] != epochs[2]


@given(counts, st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 2**31))
def test_ranks_share_out_the_batch_of_one_rank_in_its_order(sizes, world, seed):
    sampler = Sampler({name: range(n) for name, n in sizes.items()}, dict.fromkeys(sizes, 1.0), 7, 12, seed)
    for step in range(7):
        source, whole = sampler.draw(step)
        parts = [sampler.draw(step, rank, world) for rank in range(world)]
        assert all(name == source for name, _ in parts)
        assert np.concatenate([records for _, records in parts]).tolist() == whole.tolist()


@given(st.integers(1, 80), st.integers(1, 9), st.integers(0, 2**31))
def test_what_all_steps_draw_is_told_beforehand(count, steps, seed):
    sampler = Sampler({"a": range(count), "b": range(30)}, {"a": 2.0, "b": 1.0}, steps, 5, seed)
    for name in ("a", "b"):
        seen = [records for source, records in map(sampler.draw, range(steps)) if source == name]
        assert sampler.drawn_from(name).tolist() == sorted(set(np.concatenate(seen or [np.array([], int)]).tolist()))
