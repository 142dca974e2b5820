"""The four stages: which data each reads, which attention mask it uses, which loss it minimises.

Every stage has

- `draw()`: this rank's batch of the next step;
- `backward(model, batch, step, before_last)`: adds the gradients of the global mean loss and returns the row to log,
  with what `sizes` counts. It calls before_last() before the last backward pass;
- `attention(step)`: the soft mask's alpha and kind;
- `teach(mesh)`: asks the teacher, before the first step;
- `state()` and `load_state()`: the position in the data;
- `close()`: ends the loaders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import conan_kernels
from conan_engine.data import known as known_positives
from conan_engine.data.loader import Loader
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import embed_sequences
from conan_engine.model import losses
from conan_engine.model.transformer import positions
from conan_engine.negatives import distilling, mining
from conan_engine.negatives.pools import Pools

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Config, Source
    from conan_engine.config import Stage as StageSettings
    from conan_engine.data.loader import Batch
    from conan_engine.data.shards import Shards
    from conan_engine.data.tokenizer import AnyTokenizer
    from conan_engine.model.transformer import Transformer
    from conan_engine.parallel.mesh import Group, Mesh
    from conan_kernels import Known


ALPHA = {  # alpha, how far the soft mask is open, at progress t / tau in [0, 1] (arXiv 2509.12892, section 3.2)
    "linear": lambda progress: progress,
    "accelerating": lambda progress: progress**2,
    "decelerating": lambda progress: 1 - (1 - progress) ** 2,
    "open": lambda progress: 1.0,  # bidirectional from the first step
    "closed": lambda progress: 0.0,  # causal to the last step
}


class Packed(NamedTuple):
    """Sequences end to end: tokens int32 [T], cu_seqlens int32 [B+1]."""

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor

    def cut(self, settings: StageSettings, rows: Tensor | None = None) -> tuple[list[Packed], Tensor | None]:
        """What a rank computes at a time, as settings.chunk or settings.chunk_tokens says: (pieces, order).

        order: None, or int64 [B]: sequence i of the pieces is sequence order[i] here. rows: as in `split`. On a CPU
        each piece is sorted by length: attention takes neighbours of one length together.
        """
        if settings.chunk_tokens:
            parts, order = self.split_by_tokens(settings.chunk_tokens)
        else:
            parts, order = self.split(settings.chunk, rows), None
        if self.tokens.is_cuda or order is not None:  # split_by_tokens has sorted them
            return parts, order
        within = [part.cu_seqlens.diff().argsort(stable=True) for part in parts]
        firsts = accumulate((len(one) for one in within), initial=0)
        moved = torch.cat([first + one for first, one in zip(firsts, within)])
        parts = [part.taken(one) for part, one in zip(parts, within)]
        return parts, moved

    def split(self, chunk: int, rows: Tensor | None = None) -> list[Packed]:
        """Cut into pieces of at most `chunk` sequences; 0 gives one piece.

        With `rows`, int32 [R+1], pieces have at most `chunk` rows instead; rows[r] is the first sequence of row r, and
        rows[R] the number of sequences. The pieces are views on the same device.
        """
        count = len(self.cu_seqlens) - 1 if rows is None else len(rows) - 1
        if chunk == 0 or count <= chunk:
            return [self]
        edges = [*range(0, count, chunk), count]
        return self._between(edges if rows is None else rows[edges].tolist())

    def split_by_tokens(self, most: int) -> tuple[list[Packed], Tensor | None]:
        """Cut into pieces of at most `most` tokens, as `cut` returns them; a longer sequence is a piece of its own.

        Sequences of similar length come together, the longest first. All pieces but the first are full: ranks exchange
        gradients during the last one.
        """
        lengths = self.cu_seqlens.diff().cpu()
        if len(lengths) < 2 or lengths.sum() <= most:
            return [self], None
        order = lengths.argsort(stable=True, descending=True)
        edges, filled = [len(order)], 0
        for i, length in reversed(list(enumerate(lengths[order].tolist()))):
            if filled + length > most and i + 1 < edges[-1]:
                edges.append(i + 1)
                filled = 0
            filled += length
        order = order.to(self.cu_seqlens.device)
        return self.taken(order)._between([0, *reversed(edges)]), order

    def taken(self, order: Tensor) -> Packed:
        """The sequences in another order, int64 [B]."""
        lengths, starts = self.cu_seqlens.diff()[order], self.cu_seqlens[order]
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        count = len(self.tokens)
        before = (starts - cu_seqlens[:-1]).repeat_interleave(lengths, output_size=count)
        return Packed(self.tokens[before + torch.arange(count, device=before.device)], cu_seqlens)

    def _between(self, edges: list[int]) -> list[Packed]:
        bounds = self.cu_seqlens[edges].tolist()
        return [
            Packed(self.tokens[start:end], self.cu_seqlens[first : last + 1] - start)
            for first, last, start, end in zip(edges, edges[1:], bounds, bounds[1:])
        ]


def packed(batch: Batch) -> Packed:
    """The sequences of a batch."""
    return Packed(batch.tokens, batch.cu_seqlens)


def nothing(batch: Batch) -> Batch:
    """A batch of the same source without records."""
    return batch._replace(
        tokens=batch.tokens[:0], cu_seqlens=batch.cu_seqlens[:1], records=batch.records[:0], groups=batch.groups[:0]
    )


def concatenate(*parts) -> Packed:
    """The sequences of all parts, one part after another."""
    cu_seqlens, end = [parts[0].cu_seqlens], parts[0].cu_seqlens[-1]
    for part in parts[1:]:
        cu_seqlens.append(part.cu_seqlens[1:] + end)
        end = end + part.cu_seqlens[-1]
    return Packed(torch.cat([part.tokens for part in parts]), torch.cat(cu_seqlens))


class Stage:
    """What all stages share: their loaders by name, and the position of each."""

    def __init__(self, name: str, config: Config, group: Group) -> None:
        self.name, self.config, self.settings, self.group, self.loaders = name, config, getattr(config, name), group, {}

    def add_loader(self, name: str, shards: dict[str, Shards], data: dict[str, Source], key: str, **options) -> None:
        """Add a loader. key: the setting that says how much is in a step, over all ranks. Raises UserError if the ranks
        cannot split it evenly.
        """
        batch, world = getattr(self.settings, key), self.group.world
        if key != "batch_tokens" and batch % world:
            raise UserError(
                f"{self.name}.{key} is {batch}, which {world} ranks cannot split evenly; use a multiple of {world}"
            )
        weights = {source: about.weight for source, about in data.items()}
        self.loaders[name] = Loader(
            shards, weights, batch=batch, max_tokens=self.settings.max_tokens, size_power=self.settings.size_power,
            seed=self.config.seed,
            group=self.group, threads=self.config.loader_threads, skip_bad_records=self.config.skip_bad_records,
            **options,
        )  # fmt: skip

    def draw(self) -> Any:
        """This rank's batch of the next step."""
        return self.loaders["data"].next()

    def teach(self, mesh: Mesh) -> None:
        """Ask the stage's teacher, unless its answers are kept from before. All ranks take part; none is in a
        collective.
        """

    def state(self) -> dict[str, np.ndarray]:
        """The position of each loader, as arrays for the checkpoint."""
        return {f"loader/{name}": loader.state for name, loader in self.loaders.items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from the position that `state` gave."""
        for name, loader in self.loaders.items():
            loader.state = state[f"loader/{name}"]

    def skipped_records(self) -> int:
        """Records left out over all ranks since this process began."""
        return int(
            self.group.sum(
                torch.tensor(sum(loader.skipped for loader in self.loaders.values()), device=self.group.device)
            )
        )

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()


class LanguageModelling(Stage):
    """Stages 1 and 2: predict the next token, causal; of the whole text (pretrain) or of the answers alone (sft).

    With pretrain.masked: predict masked tokens, bidirectional (masked next token, LLM2Vec, arXiv 2404.05961).
    """

    def __init__(self, name: str, config: Config, shards: dict[str, Shards], group: Group) -> None:
        super().__init__(name, config, group)
        self.masked = config.pretrain.masked if name == "pretrain" else 0.0
        if self.masked:  # a model trained on the next token has no mask token: LLM2Vec takes "_"
            self.mask_token = tokenizer_of(config).encode("_")[-1]
        self.add_loader(
            "data",
            shards,
            self.settings.data,
            "batch",
            kind="text" if name == "pretrain" else "instruction",
            shape="rows",
        )

    def attention(self, step: int) -> tuple[float, str]:
        return 0.0, "column"  # for validation, whose loss is that of the next token, with and without masked

    def backward(
        self, model: Transformer, batch: Batch, step: int, before_last: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        sequences, targets, alpha = packed(batch), batch.targets.long(), 0.0
        if self.masked:
            alpha = 1.0
            hidden = chosen(sequences, self.masked, self.config.seed + step)
            sequences, targets = hide(sequences, targets, hidden, self.mask_token)
        counted = self.group.sum((targets != -100).sum())
        loss: Any = 0.0
        start = 0
        parts, order = sequences.cut(self.settings, batch.rows)
        if order is not None:
            targets = sequences._replace(tokens=targets).taken(order).tokens
        for part in parts:
            summed = model.next_token_loss(
                part.tokens, part.cu_seqlens, targets[start : start + len(part.tokens)], alpha
            )
            if part is parts[-1]:
                before_last()
            (summed / counted).backward()
            loss, start = loss + summed.detach(), start + len(part.tokens)
        return {
            "loss": (self.group.sum(loss) / counted).item(),
            "source": batch.source,
            **sizes(sequences, self.group, alpha > 0, counted),
        }


def chosen(sequences: Packed, share: float, seed: int) -> Tensor:
    """Choose a share of a batch's tokens by a hash of token, position and seed: bool [T]. The choice does not depend on
    the rank.
    """
    x = (
        sequences.tokens.long() * 0x9E3779B1
        + positions(sequences.cu_seqlens, len(sequences.tokens)) * 0x85EBCA77
        + seed * 0xC2B2AE3D
    )
    for _ in range(2):  # overflow is harmless: this is a hash
        x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x2C1B3C6D & 0xFFFFFFFF
    return (x ^ (x >> 15)) & 0xFFFFFF < share * 2**24


def hide(sequences: Packed, targets: Tensor, hidden: Tensor, token: int) -> tuple[Packed, Tensor]:
    """Replace the tokens at `hidden`, bool [T], by `token`, and keep only the targets of the tokens before them.

    Returns (Packed, targets int64 [T]).
    """
    next_hidden = hidden.roll(-1)
    ends = sequences.cu_seqlens[1:].long() - 1
    next_hidden[ends[ends >= 0]] = False  # the token after a sequence's last one belongs to another sequence
    return sequences._replace(tokens=sequences.tokens.masked_fill(hidden, token)), targets.masked_fill(
        ~next_hidden, -100
    )


class Contrastive(Stage):
    """What the stages of pairs share: which documents are known to be right for which query."""

    def __init__(self, name: str, config: Config, shards: dict[str, Shards], group: Group) -> None:
        super().__init__(name, config, group)
        self.known = {source: known_positives.of(s) for source, s in shards.items()}

    def known_in(self, batch: Batch, document_group: Tensor) -> Known | None:
        """The known positives of this rank's queries among the documents of all ranks, or None. A collective.

        document_group: int64 [m], the groups of this rank's documents.
        """
        of_source = self.known[batch.source]
        if not len(of_source.records):
            return None
        everyones = self.group.gather(document_group, self.group.counts(len(document_group)))
        found = of_source.among(batch.records, everyones.cpu().numpy())
        return found and conan_kernels.Known(*(torch.from_numpy(x).to(self.group.device) for x in found))


class Weak(Contrastive):
    """Stage 3: InfoNCE with in-batch negatives, while the soft mask opens from causal to bidirectional.

    With weak.distil, texts without pairs learn a teacher's vectors: L = L_InfoNCE + distil_weight * L_cosine.
    """

    def __init__(
        self, config: Config, shards: dict[str, Shards], texts_shards: dict[str, Shards], group: Group
    ) -> None:
        super().__init__("weak", config, shards, group)
        key, shape = ("batch_tokens", "tokens") if self.settings.batch_tokens else ("batch", "records")
        self.add_loader("data", shards, self.settings.data, key, kind="pairs", shape=shape)
        self.texts_shards, self.targets = texts_shards, {}
        if texts_shards:
            self.add_loader(
                "texts", texts_shards, self.settings.texts, "texts_batch", kind="pairs", shape="records", fields=1
            )

    def teach(self, mesh: Mesh) -> None:
        tokenizer = self.settings.distil and tokenizer_of(self.config)
        for name, shards in self.texts_shards.items():
            records = self.loaders["texts"].drawn_from(name, self.settings.steps)
            asked = distilling.Texts(
                shards, records, self.settings.distil_teacher or self.settings.teacher, tokenizer, name, mesh
            )
            self.targets[name] = asked.make(Path(self.config.out_dir, "texts"))
            if asked.width > self.config.model.width:
                raise UserError(
                    f"{distilling.VECTORS}: the teacher's vectors have {asked.width} numbers, the model's have "
                    f"{self.config.model.width}; raise model.width, or name a smaller teacher"
                )

    def attention(self, step: int) -> tuple[float, str]:
        return ALPHA[self.settings.alpha](step / max(1, self.settings.steps - 1)), self.settings.mask

    def draw(self) -> tuple[Batch, Batch | None]:
        return super().draw(), self.loaders["texts"].next() if self.texts_shards else None

    def backward(
        self, model: Transformer, batch: Any, step: int, before_last: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        batch, texts = batch
        groups, settings = batch.groups.to(self.group.device), self.settings
        sequences = concatenate(packed(batch), packed(texts)) if texts else packed(batch)
        known = self.known_in(batch, groups)
        alpha, mask = self.attention(step)

        def loss_of(embeddings):
            pairs, alone = embeddings.split((2 * len(groups), len(embeddings) - 2 * len(groups)))
            loss, accuracy = losses.info_nce(
                *pairs.chunk(2),
                groups,
                groups,
                settings.temperature,
                self.group,
                settings.dims or None,
                known,
                losses.margin_of(settings),
                settings.symmetric,
                settings.same_side,
            )
            if not texts:
                return loss, accuracy
            targets = torch.from_numpy(self.targets[texts.source].of(texts.records)).to(alone.device)
            taught = losses.toward(alone, targets, self.group)
            return loss + settings.distil_weight * taught, accuracy, loss.detach(), taught.detach()

        total, accuracy, *parts = embed_and_backward(model, sequences, settings, alpha, mask, loss_of, before_last)
        return {
            "loss": self.group.sum(total).item(),
            **{name: self.group.sum(part).item() for name, part in zip(("info_nce", "distil"), parts)},
            "accuracy": self.group.sum(accuracy).item(),
            "alpha": alpha,
            "source": batch.source,
            **sizes(sequences, self.group, alpha > 0),
        }


class Supervised(Contrastive):
    """Stage 4: InfoNCE with mined hard negatives and CoSENT on scored pairs, over all Matryoshka dims, bidirectional.

    L = L_InfoNCE + beta * L_CoSENT, with both in the same step. With supervised.distil, + distil_weight * L_distil: the
    scores that a teacher gives to a query's positive and its hard negatives.

    Cross-GPU batch balance (arXiv 2408.15710, section 3.3): every rank brings its own queries, positives and hard
    negatives, and the documents of all ranks are negatives, so their number grows with the ranks. A source may ask for
    fewer hard negatives, or for its own hard negatives alone.
    """

    def __init__(self, config: Config, shards: dict[str, Shards], sts_shards: dict[str, Shards], group: Group) -> None:
        super().__init__("supervised", config, shards, group)
        self.shards = shards
        self.pools = {}
        self.corpora = {}
        self.rules = {}
        self.mined = Path(config.out_dir, "negatives")
        for name, about in self.settings.data.items():
            self.rules[name] = dataclasses.replace(config.negatives, count=about.count(config.negatives))
            if self.rules[name].count:
                self.corpora[name] = mining.Corpus(shards[name], self.known[name])
                self.rules[name] = self._fitted(name, about)
        self.add_loader("data", shards, self.settings.data, "batch", kind="pairs", shape="records")
        if self.settings.sts:
            self.add_loader("sts", sts_shards, self.settings.sts, "sts_batch", kind="sts", shape="records")

    def _fitted(self, name, about):
        wanted, corpus = self.rules[name], self.corpora[name]
        rule = mining.fitted(wanted, corpus)
        if rule.count < wanted.count:
            if not (rule.count or about.in_batch_negatives):
                raise UserError(
                    f"{name}: all its queries have the same answer, and in_batch_negatives is false, so it has no "
                    "negatives; leave it out, or set in_batch_negatives = true"
                )
            if self.group.rank == 0:
                print(
                    f"{name}: {len(corpus)} different answers, so {rule.count or 'no'} hard "
                    f"negative{'s' * (rule.count != 1)} per query instead of {wanted.count}",
                    flush=True,
                )
        return rule

    def mine(self, model: Transformer, mesh: Mesh) -> None:
        """Mine the pools of the queries that this stage will draw, or load them if this model has mined them before.

        All ranks take part; the only collectives are those of one copy of the model.
        """
        weights = mining.digest(model, mesh.tensor)
        for name, shards in self.shards.items():
            rule = self.rules[name]
            if not rule.count:
                continue

            def embed(records, fields, shards=shards):
                return embed_sequences(model, *shards.gather(records, fields))

            corpus, queries = self.corpora[name], self.queries_of(name)
            folder = self.mined / mining.key(rule, shards.fingerprint, weights, queries, self.config.seed)
            mining.Mining(corpus, self.known[name], queries, rule, self.config.seed, name, folder, mesh).run(embed)
            self.pools[name] = Pools.mapped(corpus, queries, rule, folder)

    def teach(self, mesh: Mesh) -> None:
        tokenizer = self.settings.distil and tokenizer_of(self.config)
        taught = [name for name in self.pools if self.settings.distil and self.settings.data[name].distil]
        for name in taught:
            self.pools[name].targets = distilling.Targets(
                self.pools[name], self.settings.teacher, tokenizer, name, mesh
            ).make()
        if (
            self.settings.distil
            and not self.settings.teacher
            and all(np.isnan(self.pools[name].targets[:, 0]).all() for name in taught)
        ):
            raise UserError(
                "supervised.distil: no record has scores (pos_scores, neg_scores), and supervised.teacher is empty; "
                "set supervised.teacher, or leave distil out"
            )

    def queries_of(self, name: str) -> np.ndarray:
        """The records of a source that the stage will draw as queries."""
        return self.loaders["data"].drawn_from(name, self.settings.steps)

    def attention(self, step: int) -> tuple[float, str]:
        return 1.0, "column"

    def draw(self) -> tuple[Batch, Batch | None]:
        return super().draw(), self.loaders["sts"].next() if "sts" in self.loaders else None

    def backward(
        self, model: Transformer, batch: Any, step: int, before_last: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        batch, sts = batch
        if sts and self.settings.balance == "alternating":
            batch, sts = (nothing(batch), sts) if step % 2 else (batch, None)
        device, pools, n = self.group.device, self.pools.get(batch.source), len(batch.records)
        count = self.rules[batch.source].count
        # The negatives are drawn now, not ahead of time: the step before may have replaced some.
        hard_record, hard_field, hard_group = pools.draw(batch.records) if pools else np.empty((3, 0), np.int64)
        targets = torch.from_numpy(pools.targets_of(batch.records)) if pools and pools.targets is not None else None
        tokens, cu_seqlens = self.shards[batch.source].gather(hard_record, hard_field, self.settings.max_tokens)
        hard = Packed(torch.from_numpy(tokens).to(device), torch.from_numpy(cu_seqlens).to(device))
        groups = batch.groups.to(device)
        document_group = torch.cat((groups, torch.from_numpy(hard_group).to(device)))
        in_batch = self.settings.data[batch.source].in_batch_negatives
        known = self.known_in(batch, document_group) if in_batch else None
        everything = concatenate(packed(batch), hard, *([packed(sts)] if sts else []))
        settings = self.settings
        dims, margin = settings.dims, losses.margin_of(settings)

        def loss_of(embeddings):
            queries, documents, pairs = embeddings.split(
                (n, len(document_group), len(embeddings) - n - len(document_group))
            )
            hard = documents[n:].view(n, count, documents.shape[1])
            if in_batch:
                loss, accuracy = losses.info_nce(
                    queries,
                    documents,
                    groups,
                    document_group,
                    settings.temperature,
                    self.group,
                    dims,
                    known,
                    margin,
                    settings.symmetric,
                    settings.same_side,
                )
            else:
                loss, accuracy = losses.info_nce_of_own(
                    queries, documents[:n], hard, settings.temperature, self.group, dims, margin
                )
            hard = F.cosine_similarity(queries[:, None], hard, dim=-1)  # [n, K]
            similar = 0.0 * loss
            if sts:
                similar = losses.cosent(
                    *pairs.chunk(2), sts.scores.to(device), settings.sts_temperature, self.group, dims
                )
            taught = 0.0 * loss
            if targets is not None:
                own = torch.cat((documents[:n, None], documents[n:].view(n, count, -1)), dim=1)
                taught = losses.distil(
                    queries,
                    own,
                    targets,
                    settings.distil,
                    settings.temperature,
                    settings.distil_temperature,
                    self.group,
                    dims,
                )
            total = loss + settings.beta * similar + settings.distil_weight * taught
            return total, accuracy, loss.detach(), similar.detach(), taught.detach(), hard.detach()

        total, accuracy, loss, similar, taught, hard = embed_and_backward(
            model, everything, settings, *self.attention(step), loss_of, before_last
        )
        if pools:
            counts = self.group.counts(n)
            everyones = self.group.gather(torch.from_numpy(batch.records).to(device), counts).cpu().numpy()
            pools.update(everyones, self.group.gather(hard.float(), counts).cpu().numpy())
        return {
            "loss": self.group.sum(total).item(),
            "info_nce": self.group.sum(loss).item(),
            "cosent": self.group.sum(similar).item(),
            **({"distil": self.group.sum(taught).item()} if settings.distil else {}),
            "accuracy": self.group.sum(accuracy).item(),
            "replaced": sum(p.replaced for p in self.pools.values()),
            "source": batch.source,
            **sizes(everything, self.group, both_ways=True),
        }

    def state(self) -> dict[str, np.ndarray]:
        return super().state() | {
            f"pool/{name}/{key}": value for name, pools in self.pools.items() for key, value in pools.state().items()
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        super().load_state(state)
        for name in self.shards:
            if not self.rules[name].count:
                continue
            own = {
                key.removeprefix(f"pool/{name}/"): value
                for key, value in state.items()
                if key.startswith(f"pool/{name}/")
            }
            folder = self.mined / own["folder"].tobytes().decode()
            self.pools[name] = Pools.mapped(self.corpora[name], self.queries_of(name), self.rules[name], folder)
            self.pools[name].load_state(own)


def make(name: str, config: Config, shards: dict[tuple[str, str], Shards], group: Group) -> Any:
    """The stage `name` of a config.

    shards: Shards by (use, source), as datasets.prepare gives them. group: the ranks that share out the data.
    """
    mine, sts, texts = (
        {source: s for (use, source), s in shards.items() if use == wanted} for wanted in (name, "sts", "texts")
    )
    if name == "weak":
        return Weak(config, mine, texts, group)
    if name == "supervised":
        return Supervised(config, mine, sts, group)
    return LanguageModelling(name, config, mine, group)


def tokenizer_of(config: Config) -> AnyTokenizer:
    """The tokenizer in the run's folder."""
    return Tokenizer.load(Tokenizer.of(config.out_dir) or "")


def embed_and_backward(
    model: Transformer,
    packed: Packed,
    settings: StageSettings,
    alpha: float,
    mask: str,
    loss_of: Callable,
    before_last: Callable[[], None],
) -> tuple:
    """Embed the sequences, compute the loss of all embeddings, and backpropagate.

    Returns what loss_of(embeddings) gave, detached. before_last() is called before the last backward pass of the
    weights.

    With settings.chunk or chunk_tokens, at most that much is in a graph at a time (gradient caching, arXiv 2101.06983):
    embed all pieces; compute the gradient of the loss for each embedding; embed again, piece by piece, and pass each
    piece its gradients. The last piece's graph is kept from the first time.
    """
    parts, order = packed.cut(settings)
    *others, last = parts

    def embed(part):
        return model.embed(part.tokens, part.cu_seqlens, alpha, mask)

    with torch.no_grad():
        early = [embed(part) for part in others]
    kept = embed(last)
    embeddings = torch.cat([*early, kept.detach()]).requires_grad_()
    loss, *rest = loss_of(embeddings if order is None else embeddings[order.argsort()])
    loss.backward()
    *gradients, of_kept = embeddings.grad.split([len(part.cu_seqlens) - 1 for part in parts])
    if not others:
        before_last()
    kept.backward(of_kept)
    for part, gradient in zip(others, gradients):
        if part is others[-1]:
            before_last()
        embed(part).backward(gradient)
    return loss.detach(), *rest


def sizes(packed: Packed, group: Group, both_ways: bool, learnt: int | Tensor = 0) -> dict[str, int]:
    """Counts over the sequences of all ranks: tokens, pairs of tokens that attend to each other, and learned tokens.

    both_ways: each of the two tokens attends to the other.
    """
    lengths = packed.cu_seqlens.diff().long()
    tokens, squares = group.sum(torch.stack((lengths.sum(), lengths.square().sum()))).tolist()
    return {"tokens": tokens, "pairs": squares if both_ways else (squares + tokens) // 2, "learnt": int(learnt)}
