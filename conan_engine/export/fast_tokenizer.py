"""Convert our sentencepiece tokenizer to the `tokenizers` library: the same ids for any text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, normalizers

from conan_engine.data.merges import merges
from conan_engine.data.tokenizer import ESCAPES, SPACE
from conan_engine.errors import UserError

if TYPE_CHECKING:
    import tokenizers

    from conan_engine.data.tokenizer import AnyTokenizer


def convert(tokenizer: AnyTokenizer) -> tokenizers.Tokenizer:
    """conan_engine.data.tokenizer.Tokenizer -> tokenizers.Tokenizer. Raises UserError unless sentencepiece trained
    it by BPE.
    """
    processor, ids = tokenizer.processor, range(tokenizer.vocab_size)
    vocabulary = {processor.id_to_piece(i): i for i in ids}
    # these pieces are in no merge
    apart = (processor.is_byte, processor.is_control, processor.is_unknown, processor.is_unused)
    scores = {piece: processor.get_score(i) for piece, i in vocabulary.items() if not any(kind(i) for kind in apart)}
    unknown = processor.id_to_piece(processor.unk_id())
    fast = Tokenizer(models.BPE(vocabulary, merges(scores), unk_token=unknown, byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Replace(text, code) for text, code in (*ESCAPES.items(), (" ", SPACE))]
    )
    back = [decoders.Replace(code, text) for text, code in reversed(ESCAPES.items())]
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *back])
    every = tokenizer.decode(ids) + tokenizer.decode(reversed(ids))
    if fast.encode(every).ids != tokenizer.encode(every):
        raise UserError(
            "the run's tokenizer is neither a tokenizer.json nor a sentencepiece BPE model; export needs one of these, "
            "such as one trained here (tokenizer.path empty)"
        )
    return fast
