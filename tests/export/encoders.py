"""A model to export whose attention, norms and positions count: as drawn, they hardly would."""

import torch

from conan_engine.config import Model, RopeScaling
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.evaluation.encoder import Encoder
from conan_engine.model.transformer import Transformer

TEXTS = [
    "Return the shortest path between two nodes of a graph.",
    "Wie komme ich zum Bahnhof?",
    "Où est la gare, s'il vous plaît ?",
    "Где находится вокзал?",
    "駅はどこですか。",
    "火车站在哪里？",
    "기차역이 어디에 있습니까?",
    "أين تقع محطة القطار؟",
    "रेलवे स्टेशन कहाँ है?",
    "Πού είναι ο σταθμός;",
    "איפה תחנת הרכבת?",
    "สถานีรถไฟอยู่ที่ไหน",
    "x",
    " leading, and trailing ",
    "def f(x):\n\treturn x  # 12345",
    "👩\u200d👩\u200d👧 a family",
    "</s> is a token's name",
    "word " * 100,
]


OTHER = {  # what an imported model may have besides, all at once
    "qk_norm": True,
    "head_dim": 32,
    "norm_eps": 1e-3,
    "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16),
    "vocab_size": 640,
}


def sharp(run, pooling="mean", context=48, **other):
    """An Encoder with the tokenizer of a run; other: keys of config.Model."""
    tokenizer = Tokenizer.load(run / "tokenizer.model")
    shape = Model(
        layers=2,
        width=64,
        ffn=96,
        heads=4,
        kv_heads=2,
        context=context,
        rope_theta=1e4,
        embedding_scale=3.0,
        pooling=pooling,
        **other,
    )
    model = Transformer(shape, tokenizer.vocab_size).init_weights(torch.randint(2**31, ()).item())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand_like(p) + 0.5 if p.dim() == 1 else 8)
    return Encoder(model, tokenizer, context, [16, 64])
