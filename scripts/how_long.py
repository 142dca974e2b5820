"""How long would a config's training take on this machine's processor? Measured on a few hundred tokens, said in a
line.

    python scripts/how_long.py CONFIG [--section.key=value ...]

Ends with 0 where there is a GPU, else with 2.
"""

import sys
import time

import torch

from conan_engine import command
from conan_engine.errors import UserError
from conan_engine.model.transformer import Transformer, count_parameters
from conan_engine.settings import load

TOKENS, TEXTS = 1024, 8


def tokens_per_second(model):
    """Of a forward and backward of TEXTS texts, by the quicker of two."""
    vocab_size = len(model.embedding)
    tokens = torch.randint(vocab_size, (TOKENS,), dtype=torch.int32)
    cu_seqlens = torch.arange(0, TOKENS + 1, TOKENS // TEXTS, dtype=torch.int32)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        model.embed(tokens, cu_seqlens).sum().backward()
        seconds.append(time.perf_counter() - began)
    return TOKENS / min(seconds)


FILLED = 1 / 4  # of max_tokens, by a text on average (configs/smollm.toml's weak stage: 44 of 256 tokens)


def tokens(config):
    """That the config's stages compute, roughly; with gradient caching each text of a pair is computed once more,
    forward.
    """
    total = 0
    for name in config.stages:
        stage = getattr(config, name)
        if name in ("pretrain", "sft"):
            total += stage.steps * stage.batch * stage.max_tokens
        else:
            texts = stage.batch * (2 if name == "weak" else 2 + config.negatives.count) + (
                2 * stage.sts_batch if name == "supervised" and stage.sts else 0
            )
            total += (
                stage.steps * texts * stage.max_tokens * FILLED * (4 / 3 if stage.chunk or stage.chunk_tokens else 1)
            )
    return total


def main():
    path, *settings = sys.argv[1:]
    config = load(path, settings)
    if torch.cuda.is_available():
        return
    vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    rate = tokens_per_second(Transformer(config.model, vocab_size, config.precision).init_weights(0))
    days = tokens(config) / rate / 86400
    raise UserError(
        f"no GPU here: {path} has {count_parameters(config.model, vocab_size) / 1e6:.0f}M parameters and "
        f"would take about {days:.1f} days on this processor "
        f"({rate:,.0f} tokens/s, measured just now); make smollm-cpu trains its first 6 layers in an hour and a half, "
        "make smollm ANYWAY=1 all of them"
    )


if __name__ == "__main__":
    command.run(main)
