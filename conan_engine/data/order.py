"""Which records each step draws: a pure function of (seed, step), so that a run resumes anywhere and on any number of ranks."""

import numpy as np

from conan_engine.data.shards import order


class Sampler:
    """Every step draws one batch from one source: in-batch negatives are then of one kind, and so hard.

    The steps are shared out in exact proportion to the weights: each goes to the source furthest behind its share. A
    source is an endless run of epochs, each in its own seeded permutation; nothing is stored but one number a step.
    """

    def __init__(self, sources, weights, steps, batch, seed):
        """sources: name -> object with len(); weights: name -> float; batch: records a step, over all ranks."""
        self.sources, self.batch, self.seed = sources, batch, seed
        self.names = list(weights)
        shares = np.array([weights[name] for name in self.names]) / sum(weights.values())
        self.source_of_step = np.empty(steps, dtype=np.int32)
        self.visit_of_step = np.empty(steps, dtype=np.int64)  # how often that source was drawn before
        drawn = np.zeros(len(self.names), dtype=np.int64)
        for step in range(steps):
            pick = int(np.argmax(shares * (step + 1) - drawn))
            self.source_of_step[step], self.visit_of_step[step] = pick, drawn[pick]
            drawn[pick] += 1

    def draw(self, step, rank=0, world=1):
        """The source's name and this rank's share of the step's records, int64 [batch / world]."""
        share = self.batch // world
        start = int(self.visit_of_step[step]) * self.batch + rank * share
        return self._records(int(self.source_of_step[step]), np.arange(start, start + share))

    def drawn_from(self, name):
        """All records of a source that the steps draw, sorted: int64."""
        source = self.names.index(name)
        visits = int((self.source_of_step == source).sum())
        wanted = min(visits * self.batch, len(self.sources[name]))  # past one epoch every record is drawn
        return np.unique(self._records(source, np.arange(wanted))[1])

    def _records(self, source, positions):
        name = self.names[source]
        count = len(self.sources[name])
        records = np.empty(len(positions), dtype=np.int64)
        epochs = positions // count
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            # each source its own permutations: the name's place is part of the seed
            records[rows] = order(self.seed + 1_000_003 * source, int(epoch), count, positions[rows] % count)
        return name, records
