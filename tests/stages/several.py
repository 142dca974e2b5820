"""Records whose queries have several positives, and their loss as a textbook has it."""

import torch

SEVERAL = [
    {
        "query": f"question {i % 4}",
        "pos": [f"answer {i}", f"answer {(i + 5) % 12}"],
        "neg": [f"answer {(i + 2) % 12}", f"wrong {i}"],
    }
    for i in range(12)
]


def textbook(queries, documents, right, temperature):
    """Mean cross entropy in fp64 of each query over its own positive, documents[i], and those that are not right for
    it."""
    cosine = torch.nn.functional.cosine_similarity(queries[:, None].double(), documents[None].double(), dim=-1)
    own = torch.eye(*cosine.shape, dtype=torch.bool)
    logits = (cosine / temperature).masked_fill(right & ~own, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(queries)))


def texts_of(tokenizer, packed):
    bounds = packed.cu_seqlens.tolist()
    return [tokenizer.decode(packed.tokens[a:b].tolist()) for a, b in zip(bounds, bounds[1:])]
