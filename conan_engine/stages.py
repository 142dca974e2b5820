"""What the four stages do: which data comes in, which mask, which loss goes out.

Every stage offers `draw(step)`, this rank's batch of a step as a pure function of the step; `backward(model, batch,
step)`, which adds the gradients of the global mean loss and returns what to log; and `state` / `load_state`.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from conan_engine import losses, negatives
from conan_engine.data.order import Sampler
from conan_engine.encoder import embed_sequences
from conan_engine.errors import UserError

ALPHA = {  # how far the soft mask has opened at progress t / tau in [0, 1] (arXiv 2509.12892 section 3.2)
    "linear": lambda progress: progress,
    "accelerating": lambda progress: progress**2,
    "decelerating": lambda progress: 1 - (1 - progress) ** 2,
}


class Packed(NamedTuple):
    """Sequences end to end: tokens int32 [T], cu_seqlens int32 [B+1]."""

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor

    def split(self, chunk):
        """Pieces of at most `chunk` sequences (all in one if 0), on the device of the whole."""
        count = len(self.cu_seqlens) - 1
        if chunk == 0 or count <= chunk:
            return [self]
        bounds = self.cu_seqlens[::chunk].tolist() + ([] if count % chunk == 0 else [int(self.cu_seqlens[-1])])
        return [
            Packed(self.tokens[start:end], self.cu_seqlens[i * chunk : (i + 1) * chunk + 1] - start)
            for i, (start, end) in enumerate(zip(bounds, bounds[1:]))
        ]


def pack(shards, records, fields, device):
    tokens, cu_seqlens = shards.gather(records, fields)
    return Packed(torch.from_numpy(tokens).to(device), torch.from_numpy(cu_seqlens).to(device))


def concatenate(first, second):
    return Packed(torch.cat((first.tokens, second.tokens)), torch.cat((first.cu_seqlens, second.cu_seqlens[1:] + first.cu_seqlens[-1])))


class LanguageModelling:
    """Stages 1 and 2: next token, causal; of the whole text (pretrain) or of the output only (sft)."""

    def __init__(self, name, config, shards, group):
        self.settings, self.shards, self.group, self.name = getattr(config, name), shards, group, name
        self.sampler = Sampler(shards, self.settings.data, self.settings.steps, split(self.settings.batch, f"{name}.batch", group), config.seed)

    def draw(self, step):
        source, records = self.sampler.draw(step, self.group.rank, self.group.world)
        fields = 1 if self.name == "pretrain" else 3  # instruction, input and output stand one after another
        packed = pack(self.shards[source], np.repeat(records, fields), np.tile(np.arange(fields), len(records)), self.group.device)
        targets = torch.cat((packed.tokens[1:].long(), packed.tokens.new_full((1,), -100).long()))
        targets[packed.cu_seqlens[fields::fields].long() - 1] = -100  # the last token of a sequence has none after it
        if fields == 3:
            position = torch.arange(len(targets), device=targets.device)
            sequence = torch.repeat_interleave(packed.cu_seqlens[::3].diff().long())
            targets[position < packed.cu_seqlens[2::3].long()[sequence] - 1] = -100  # the output's first is predicted by the one before
        return source, Packed(packed.tokens, packed.cu_seqlens[::fields].contiguous()), targets

    def backward(self, model, batch, step):
        source, packed, targets = batch
        counted = self.group.sum((targets != -100).sum())
        loss, start = 0.0, 0
        for part in packed.split(self.settings.chunk):
            with autocast(self.group.device):
                hidden = model(part.tokens, part.cu_seqlens)
            summed, _ = losses.linear_cross_entropy(hidden, model.embedding, targets[start : start + len(part.tokens)])
            (summed / counted).backward()
            loss, start = loss + summed.detach(), start + len(part.tokens)
        return {"loss": (self.group.sum(loss) / counted).item(), "source": source, "tokens": tokens_of(packed, self.group)}

    def state(self):
        return {}

    def load_state(self, state):
        pass


class Weak:
    """Stage 3: InfoNCE with in-batch negatives, while the soft mask opens from causal to bidirectional."""

    def __init__(self, config, shards, group):
        self.settings, self.shards, self.group = config.weak, shards, group
        self.sampler = Sampler(shards, self.settings.data, self.settings.steps, split(self.settings.batch, "weak.batch", group), config.seed)

    def draw(self, step):
        source, records = self.sampler.draw(step, self.group.rank, self.group.world)
        fields = np.repeat([0, 1], len(records))
        packed = pack(self.shards[source], np.tile(records, 2), fields, self.group.device)
        return source, packed, torch.from_numpy(self.shards[source].groups(records)).to(self.group.device)

    def backward(self, model, batch, step):
        source, packed, groups = batch
        alpha = ALPHA[self.settings.alpha](step / max(1, self.settings.steps - 1))

        def loss_of(embeddings):
            queries, documents = embeddings.chunk(2)
            return losses.info_nce(queries, documents, groups, groups, self.settings.temperature, self.group)

        loss, accuracy = embed_and_backward(model, packed, self.settings.chunk, alpha, self.settings.mask, loss_of)
        return {
            "loss": self.group.sum(loss).item(),
            "accuracy": self.group.sum(accuracy).item() / self.group.world,
            "alpha": alpha,
            "source": source,
            "tokens": tokens_of(packed, self.group),
        }

    def state(self):
        return {}

    def load_state(self, state):
        pass


class Supervised:
    """Stage 4: bidirectional; InfoNCE with mined hard negatives, and CoSENT on scored pairs in the same step, each over all
    Matryoshka dims: L = L_InfoNCE + beta * L_CoSENT.

    Cross-GPU batch balance (arXiv 2408.15710 section 3.3): every rank brings its own queries, positives and hard
    negatives, and all ranks' documents serve as negatives, so their number grows with the ranks.
    """

    def __init__(self, config, shards, sts_shards, group):
        self.settings, self.rule, self.seed = config.supervised, config.negatives, config.seed
        self.shards, self.sts_shards, self.group = shards, sts_shards, group
        settings = self.settings
        self.sampler = Sampler(shards, settings.data, settings.steps, split(settings.batch, "supervised.batch", group), config.seed)
        self.sts_sampler = settings.sts and Sampler(
            sts_shards, settings.sts, settings.steps, split(settings.sts_batch, "supervised.sts_batch", group), config.seed
        )
        self.pools = {}

    def mine(self, model):
        """Mine the pools of the queries that this stage will draw, with the model as it stands. Collective."""
        for name, shards in self.shards.items():

            def embed(records, fields, shards=shards):
                return embed_sequences(model, *shards.gather(records, fields), group=self.group)

            self.pools[name] = negatives.mine(shards, self.sampler.drawn_from(name), embed, self.rule, self.seed, name)

    def draw(self, step):
        source, records = self.sampler.draw(step, self.group.rank, self.group.world)
        sts = None
        if self.sts_sampler:
            name, pairs = self.sts_sampler.draw(step, self.group.rank, self.group.world)
            packed = pack(self.sts_shards[name], np.tile(pairs, 2), np.repeat([0, 1], len(pairs)), self.group.device)
            sts = packed, torch.from_numpy(self.sts_shards[name].scores(pairs)).to(self.group.device)
        return source, records, sts

    def backward(self, model, batch, step):
        source, records, sts = batch
        shards, pools, n = self.shards[source], self.pools[source], len(records)
        # The negatives are drawn here, not ahead of time: the step before may have replaced them.
        hard_record, hard_field, hard_group = pools.draw(records)
        packed = pack(
            shards,
            np.concatenate((records, records, hard_record)),
            np.concatenate((np.repeat([0, 1], n), hard_field)),
            self.group.device,
        )
        groups = torch.from_numpy(shards.groups(records)).to(self.group.device)
        document_group = torch.cat((groups, torch.from_numpy(hard_group).to(self.group.device)))
        everything = concatenate(packed, sts[0]) if sts else packed
        settings = self.settings
        dims = settings.dims

        def loss_of(embeddings):
            queries, documents, pairs = embeddings.split((n, len(document_group), len(embeddings) - n - len(document_group)))
            loss, accuracy = losses.info_nce(queries, documents, groups, document_group, settings.temperature, self.group, dims)
            hard = F.cosine_similarity(queries[:, None], documents[n:].view(n, -1, documents.shape[1]), dim=-1)  # [n, K]
            similar = 0.0 * loss
            if sts:
                similar = losses.cosent(*pairs.chunk(2), sts[1], settings.sts_temperature, self.group, dims)
            return loss + settings.beta * similar, accuracy, loss.detach(), similar.detach(), hard.detach()

        total, accuracy, loss, similar, hard = embed_and_backward(model, everything, settings.chunk, 1.0, "column", loss_of)
        everyones = self.group.gather(torch.from_numpy(records).to(self.group.device)).cpu().numpy()
        pools.update(everyones, self.group.gather(hard.float()).cpu().numpy())
        return {
            "loss": self.group.sum(total).item(),
            "info_nce": self.group.sum(loss).item(),
            "cosent": self.group.sum(similar).item(),
            "accuracy": self.group.sum(accuracy).item() / self.group.world,
            "replaced": sum(p.replaced for p in self.pools.values()),
            "source": source,
            "tokens": tokens_of(everything, self.group),
        }

    def state(self):
        return {f"{name}/{key}": value for name, pools in self.pools.items() for key, value in pools.state().items()}

    def load_state(self, state):
        for name, shards in self.shards.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            self.pools[name] = negatives.Pools.from_state(negatives.Corpus(shards), own, self.rule)


def embed_and_backward(model, packed, chunk, alpha, mask, loss_of):
    """Embed the sequences, take the loss of all their embeddings, and backpropagate; returns what `loss_of` gave, detached.

    With chunk > 0 at most that many sequences are in a graph at a time (gradient caching, arXiv 2101.06983): embed all
    without a graph, take the loss's gradient for each embedding, embed again chunk by chunk and hand each its gradient.
    """
    parts = packed.split(chunk)

    def embed(part):
        with autocast(packed.tokens.device):
            return model.embed(part.tokens, part.cu_seqlens, alpha, mask)

    if len(parts) == 1:
        loss, *rest = loss_of(embed(packed))
        loss.backward()
        return loss.detach(), *rest
    with torch.no_grad():
        embeddings = torch.cat([embed(part) for part in parts])
    embeddings.requires_grad_()
    loss, *rest = loss_of(embeddings)
    loss.backward()
    for part, gradient in zip(parts, embeddings.grad.split(chunk)):
        embed(part).backward(gradient)
    return loss.detach(), *rest


def autocast(device):
    """bfloat16 products on CUDA; a CPU computes in float32, where a resumed run is bit-identical."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def split(batch, key, group):
    """The global batch, checked to divide among the ranks."""
    if batch % group.world:
        raise UserError(f"{key} is {batch}, which {group.world} ranks cannot split evenly; make it a multiple of {group.world}")
    return batch


def tokens_of(packed, group):
    return int(group.sum(torch.tensor(len(packed.tokens), device=group.device)))
