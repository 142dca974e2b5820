"""Our sentencepiece tokenizer in the `tokenizers` library's form: the same ids for any text, without sentencepiece."""

from tokenizers import Tokenizer, decoders, models, normalizers

from conan_engine.data.tokenizer import ESCAPES, SPACE
from conan_engine.errors import UserError


def convert(tokenizer):
    """conan_engine.data.tokenizer.Tokenizer -> tokenizers.Tokenizer. Raises UserError if it is not one that sentencepiece made by BPE."""
    processor, ids = tokenizer.processor, range(tokenizer.vocab_size)
    vocabulary = {processor.id_to_piece(i): i for i in ids}
    apart = (processor.is_byte, processor.is_control, processor.is_unknown, processor.is_unused)  # no part of any merge
    scores = {piece: processor.get_score(i) for piece, i in vocabulary.items() if not any(kind(i) for kind in apart)}
    unknown = processor.id_to_piece(processor.unk_id())
    fast = Tokenizer(models.BPE(vocabulary, merges(scores), unk_token=unknown, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Replace(text, code) for text, code in (*ESCAPES.items(), (" ", SPACE))])
    back = [decoders.Replace(code, text) for text, code in reversed(ESCAPES.items())]
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *back])
    every = tokenizer.decode(ids) + tokenizer.decode(reversed(ids))
    if fast.encode(every).ids != tokenizer.encode(every):
        raise UserError("the run's tokenizer is no sentencepiece BPE model and has no other form; export works with one trained here (tokenizer.path empty)")
    return fast


def merges(scores):
    """The pair of pieces that each piece is made of, the best piece first: [(left, right), ...] from {piece: score}.

    sentencepiece joins whatever neighbours make the best piece, leftmost first; `tokenizers` has pairs, each with a rank of its own,
    and would join one pair of a piece before another one of it wherever they stand. But a piece is only ever made in one way:
    what happens within a stretch of text that becomes one piece happens to that stretch alone too, as a merge across its ends
    would keep it from becoming one. So each piece needs the last pair alone of what it is made of by itself.
    """
    found = []
    for piece in sorted((piece for piece in scores if len(piece) > 1), key=scores.get, reverse=True):
        parts = list(piece)
        while len(parts) > 2 and (pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in scores]):
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append(tuple(parts))
    return found
