"""Hard negatives: pools mined by nearest-neighbour search, and their dynamic replacement while training (recipe section 4)."""

import dataclasses

import numpy as np

from conan_engine.data.known import ranges
from conan_engine.data.shards import order
from conan_engine.errors import UserError

SEARCH = 4096  # queries at a time: a signal is heard between two searches


def should_replace(first, now, rule):
    """Dynamic hard negative mining (arXiv 2509.12892 section 3.4): which negatives have become too easy.

    first: cosine when the negative came into use (S_0); now: its current one (S_i); arrays of one shape -> bool array.
    Replace if S_0 < low, or if factor * S_i < S_0 and S_i < bound. How large the cosines of hard negatives are is a model's own: where
    those of the paper's are above 0.4, others' are all below, and each is replaced by an easier one at every use. `by_quantile` is for these.
    """
    return (first < rule.low) | ((rule.factor * now < first) & (now < rule.bound))


def by_quantile(rule, scores):
    """The rule with bounds that are cosines, where they are shares of `scores`, the cosines of the negatives mined first."""
    if rule.bounds == "cosine" or not len(scores):
        return rule
    low, bound = np.quantile(scores, (rule.low, rule.bound)).tolist()
    return dataclasses.replace(rule, bounds="cosine", low=low, bound=bound)


class Corpus:
    """The documents that a source's queries may be told apart from: each distinct positive once, and every given negative."""

    def __init__(self, shards, known):
        records = np.arange(len(shards), dtype=np.int64)
        self.shards = shards
        self.group_of_record = shards.groups(records)
        _, first = np.unique(self.group_of_record, return_index=True)
        first.sort()
        given = np.maximum(shards.field_counts(records) - 2, 0).astype(np.int64)
        self.given_start = len(first) + np.concatenate(([0], np.cumsum(given)))  # a record's own negatives, in the corpus
        rows, fields = ranges(np.full(len(records), 2), 2 + given)
        self.record = np.concatenate((first, rows))
        self.field = np.concatenate((np.ones(len(first), np.int64), fields))
        # a negative given by hand, if it is nobody's positive, is one for everyone: the data's author chose it
        self.group = np.concatenate((self.group_of_record[first], known.negatives))

    def __len__(self):
        return len(self.record)


class Pools:
    """Per query: candidates best first, the `count` in use, and their first cosines.

    All ranks hold all pools and apply the same updates, so any rank can draw any query next.
    """

    def __init__(self, corpus, queries, candidates, rule):
        """queries: sorted record ids [Q]; candidates: indices into the corpus, int32 [Q, P]."""
        self.corpus, self.queries, self.rule = corpus, queries, rule
        self.candidates = candidates
        self.slot = np.tile(np.arange(rule.count, dtype=np.int32), (len(queries), 1))  # [Q, K]: place in the pool
        self.first = np.full((len(queries), rule.count), np.nan, dtype=np.float32)  # S_0; NaN until first used
        self.replaced = 0

    def draw(self, records):
        """The documents in use for these queries: (records, fields, groups), each int64 [n * K], query by query."""
        rows = np.searchsorted(self.queries, records)
        documents = np.take_along_axis(self.candidates[rows], self.slot[rows], axis=1).ravel()
        return self.corpus.record[documents], self.corpus.field[documents], self.corpus.group[documents]

    def update(self, records, scores):
        """Apply the rule to the cosines [n, K] that the loss has just computed; a replacement is drawn at the next use.
        A pool that has run out keeps what it has."""
        rows = np.searchsorted(self.queries, records)
        first = np.where(np.isnan(self.first[rows]), scores, self.first[rows])
        slot = self.slot[rows]
        due = should_replace(first, scores, self.rule)
        fresh = slot.max(axis=1, keepdims=True) + np.cumsum(due, axis=1)  # the next ones in the pool, in slot order
        due &= fresh < self.candidates.shape[1]
        self.slot[rows] = np.where(due, fresh, slot)
        self.first[rows] = np.where(due, np.nan, first)
        self.replaced += int(due.sum())

    def state(self):
        bounds = np.array((self.rule.low, self.rule.bound))
        return {"queries": self.queries, "candidates": self.candidates, "slot": self.slot, "first": self.first, "bounds": bounds}

    @classmethod
    def from_state(cls, corpus, state, rule):
        if rule.bounds == "quantile":
            low, bound = state["bounds"].tolist()
            rule = dataclasses.replace(rule, bounds="cosine", low=low, bound=bound)
        pools = cls(corpus, state["queries"], state["candidates"], rule)
        pools.slot, pools.first = state["slot"], state["first"]
        return pools


def mine(shards, known, queries, embed, rule, seed, source):
    """Pools for the query records `queries` (sorted int64) from the corpus of `shards`; known: their data.known.Known.

    embed(records, fields) -> unit vectors float32 [n, E]. Candidates are the nearest documents, save those scoring above
    rule.max_ratio of the positive, as likely false negatives. A record's given negatives come first; a pool that the
    search does not fill is filled with random documents. None is of a group that is right for the query.
    """
    corpus = Corpus(shards, known)
    if len(corpus) <= rule.pool:
        raise UserError(
            f"{source}: {len(corpus)} distinct documents cannot fill pools of negatives.pool = {rule.pool}; "
            f"give more data or set negatives.pool below {len(corpus)}"
        )
    if rule.index == "random":
        nothing = np.empty((len(queries), 0))
        scores, found, good = nothing, nothing.astype(np.int64), nothing.astype(bool)
    else:
        scores, found, good = _nearest(corpus, queries, embed, rule)
    candidates = np.empty((len(queries), rule.pool), dtype=np.int32)
    for row, record in enumerate(queries):
        given = np.arange(corpus.given_start[record], corpus.given_start[record + 1])
        right = known.of(record, corpus.group_of_record[record])
        best = _without(right, corpus, np.concatenate((given, found[row, good[row]])))
        if len(best) < rule.pool:
            spare = order(seed, row, len(corpus), np.arange(2 * rule.pool) % len(corpus))
            best = np.concatenate((best, _without(right, corpus, spare)))
        if not len(best):
            raise UserError(
                f"{source}: record {record}: no negative to be found for its query, {len(right)} of its kind are right for it; "
                "give more data, or leave out queries that everything answers"
            )
        distinct = best[np.sort(np.unique(best, return_index=True)[1])]
        candidates[row] = np.resize(distinct, rule.pool)  # repeats only where the corpus has no more to give
    return Pools(corpus, queries, candidates, by_quantile(rule, scores[good & (good.cumsum(axis=1) <= rule.count)]))


def _nearest(corpus, queries, embed, rule):
    """The documents nearest to each query: (cosines float32, places in the corpus, whether each will do as a negative), [Q, n] each."""
    import faiss  # slow to import, and only this stage needs it

    documents = embed(corpus.record, corpus.field)
    asked = embed(queries, np.zeros(len(queries), np.int64))
    positive = np.einsum("qe,qe->q", asked, embed(queries, np.ones(len(queries), np.int64)))
    index = faiss.index_factory(documents.shape[1], rule.index, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(documents)
    index.add(documents)
    blocks = [index.search(block, min(2 * rule.pool, len(corpus))) for block in np.split(asked, range(SEARCH, len(asked), SEARCH))]
    scores, found = map(np.concatenate, zip(*blocks))
    return scores, found, (found >= 0) & (scores <= rule.max_ratio * positive[:, None])


def _without(groups, corpus, documents):
    return documents[~np.isin(corpus.group[documents], groups)]
