"""What the tests of the stages share."""

import pytest
import torch
from runs import shards_of, small_tokenizer, write_lines
from several import SEVERAL

from conan_engine.config import Source
from conan_engine.model.transformer import Transformer
from conan_engine.settings import load


@pytest.fixture
def several(tiny, tmp_path):
    """A config whose pairs have queries of several positives, which other records give as negatives; and who is right
    by text."""
    path = write_lines(tmp_path / "several.jsonl", SEVERAL)
    right = {}
    for record in SEVERAL:
        right.setdefault(record["query"], set()).update(record["pos"])

    def make(name, *overrides):
        source = f'{{ "{path}" = 1 }}'
        tiny_like = (f"--{name}.{key}" for key in (f"data={source}", "max_tokens=16", "steps=3", "batch=16"))
        config = load(
            tiny, [f"--out_dir={tmp_path}", "--negatives.pool=4", "--negatives.count=2", *tiny_like, *overrides]
        )
        getattr(config, name).data = {str(path): Source()}
        tokenizer = small_tokenizer(tmp_path)
        model = Transformer(config.model, tokenizer.vocab_size).init_weights(0)
        shards = {str(path): shards_of(path, name, getattr(config, name), tokenizer, tmp_path / "data")}
        return config, tokenizer, model, shards

    def mask(queries, documents):
        return torch.tensor([[document in right[query] for document in documents] for query in queries])

    return make, mask
