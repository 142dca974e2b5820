"""Our sentencepiece tokenizer in the `tokenizers` library's form: the same ids for any text, without sentencepiece."""

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
    """conan_engine.data.tokenizer.Tokenizer -> tokenizers.Tokenizer. Raises UserError if it is not one that
    sentencepiece made by BPE."""
    processor, ids = tokenizer.processor, range(tokenizer.vocab_size)
    vocabulary = {processor.id_to_piece(i): i for i in ids}
    apart = (processor.is_byte, processor.is_control, processor.is_unknown, processor.is_unused)  # no part of any merge
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
            "the run's tokenizer is no sentencepiece BPE model and has no other form; export works with one "
            "trained here (tokenizer.path empty)"
        )
    return fast
