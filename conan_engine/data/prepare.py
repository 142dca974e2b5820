"""From the sources that a config names to token shards on disk: the tokenizer trained, each source written once."""

import hashlib
import importlib
import itertools
import json
from pathlib import Path

from tqdm import tqdm

from conan_engine.config import Source
from conan_engine.data import encoding, known
from conan_engine.data.rejects import Rejects
from conan_engine.data.shards import Shards, ShardWriter
from conan_engine.data.sources import files, installed, paths
from conan_engine.data.sources.forms import Bad
from conan_engine.data.tokenizer import Tokenizer, train
from conan_engine.errors import UserError

GOLDEN = (5**0.5 - 1) / 2

# What a stage trains on, and the kinds of record that can be turned into it.
TAKES = {"pretrain": ("text", "instruction"), "sft": ("instruction",), "weak": ("pairs", "instruction"), "supervised": ("pairs", "label", "instruction"), "sts": ("sts",)}  # fmt: skip


def fits(source, about, uses, skip=False):
    """Those of `uses` that take a source's kind of records. Raises UserError where none does. `skip`: without the records that
    cannot be used."""
    kinds = [kind for name, kind in installed.READERS if name == source]
    if not kinds:
        kind, _ = next(files.read(source, about.columns, (lambda place, bad: None) if skip else None))
        kinds = [kind]
    found = [use for use in uses if set(TAKES[use]) & set(kinds)]
    if not found:
        raise UserError(f"validation.data: {source} holds {' or '.join(kinds)} records, which none of {', '.join(uses)} takes; leave it out")
    return found


def read(source, use, about=None, reject=None):
    """The records of a source (a built-in name or a path) for a use (a key of TAKES), as dicts of one kind.

    about: the config's Source. reject: as files.read takes it. Returns (kind, iterator). Raises UserError if the source is
    unknown or its records do not fit the use.
    """
    built_in = [(name, kind) for name, kind in installed.READERS if name == source]
    if built_in:
        for kind in TAKES[use]:
            if (source, kind) in built_in:
                return kind, installed.READERS[source, kind]()
        found = " or ".join(kind for _, kind in built_in)
    else:
        records = files.read(source, about and about.columns, reject)
        found, first = next(records)
        if found in TAKES[use]:
            return found, itertools.chain([first], (record for _, record in records))
    raise UserError(f"{source}: holds {found} records; {use} takes {' or '.join(TAKES[use])}")


def texts(source, use, about=None, skip=False):
    """Every text of a source, for the tokenizer; `skip`: without the records that cannot be used."""
    _, records = read(source, use, about, (lambda place, bad: None) if skip else None)
    for record in records:
        for value in record.values():
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield from value


def make_tokenizer(settings, sources, run, skip=False):
    """Take `settings.path`, or the tokenizer that stands in the folder `run`, or train one on `sources` (a list of (source, use,
    Source)), `skip`: without the records that cannot be used; in the end it stands there."""
    path = Tokenizer.of(run)
    if settings.path:  # a run carries its tokenizer with it
        tokenizer = Tokenizer.load(settings.path)
        if path is None or Tokenizer.load(path).hash != tokenizer.hash:
            Path(run).mkdir(parents=True, exist_ok=True)
            if path:
                path.unlink()
            tokenizer.save(run)
        return tokenizer
    path = path or Path(run, Tokenizer.FILE)
    if not path.exists():
        sources = {source: (source, *how, skip) for source, *how in sources}.values()  # one that several uses share is read for one
        total = sum(len(text) for source in sources for text in texts(*source))
        if total == 0:
            raise UserError(f"the sources {', '.join(s for s, *_ in sources)} hold no text to train a tokenizer on")
        share = settings.train_bytes / total
        everything = (text for source in sources for text in texts(*source))
        # steps of the golden ratio: evenly from all of them, and from each field of a record (every third text would be one field's)
        train((text for i, text in enumerate(everything) if i * GOLDEN % 1 < share), path, settings.vocab_size)
    return Tokenizer.load(path)


def make_shards(source, use, stage, encoders, folder, max_bad_share=None):
    """The token shards of a source for a use, written under `folder` unless they stand there already: a Shards. What an
    earlier run finished before it was stopped is kept: its records are read again, but neither encoded nor written.

    stage: that stage's settings (the source's columns, max_tokens; for "weak" teacher and min_score). encoders:
    encoding.Encoders. max_bad_share: records of the source that cannot be used are left out, counted and listed in
    `folder`, up to this share; None: the first of them raises UserError.
    """
    tokenizer = encoders.tokenizer
    about = (stage.sts if use == "sts" else stage.data).get(source) or Source()
    path = Path(folder) / f"{use}-{_key(source, use, stage, about, tokenizer)}"
    if not (path / "manifest.json").exists():
        shape = {"pretrain": "text", "sft": "instruction", "sts": "sts"}.get(use, "pairs")
        rejects = None if max_bad_share is None else Rejects(folder, source, use, max_bad_share)
        records = _records(source, use, stage, about, shape, rejects)
        with ShardWriter(path, kind=shape, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size, resume=True) as writer:
            bar = tqdm(records, desc=f"{source} for {use}", unit=" records", leave=False, mininterval=1)
            done, batches = encoding.behind(encoding.batches(bar), shape, writer.resumed)
            for encoded in encoders.encode(shape, batches, stage.max_tokens):
                writer.add_records(encoded.after(done))
                done = 0
            if rejects:
                rejects.close()  # here, so that with too many left out the folder stays unfinished
    shards = Shards(path, tokenizer.hash)
    if shards.kind == "pairs":
        known.make(shards)
    return shards


def _records(source, use, stage, about, shape, rejects):
    """The records of a source as a use takes them."""
    kind, records = read(source, use, about, rejects)
    if kind == "label":
        records = _label_pairs(records)
    elif kind == "instruction" and shape == "pairs":
        records = _instruction_pairs(records, source, rejects)
    if rejects:
        records = rejects.counting(records)
    if use == "weak":
        records = _taught(records, source, stage.teacher, stage.min_score)
    return records


def _instruction_pairs(records, source, rejects):
    for number, record in enumerate(records, 1):
        query = encoding.join(record["instruction"], record["input"])
        if query.strip() and record["output"].strip():
            yield {"query": query, "pos": [record["output"]]}
            continue
        bad = Bad("empty text", f"its {'output' if query.strip() else 'instruction and input'} is empty; there is nothing to embed in it: leave it out")
        if not rejects:
            raise UserError(f"{source}: record {number}: {bad}")
        rejects(f"record {number}", bad)


def _key(source, use, stage, about, tokenizer):
    """A new folder for anything that would change what is written in it."""
    facts = [source, use, stage.max_tokens, tokenizer.hash, getattr(stage, "teacher", ""), getattr(stage, "min_score", 0), about.columns]
    if not any(source == name for name, _ in installed.READERS):
        about_files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths.of(source)]
        facts += about_files[0][1:] if about_files[0][0] == source else about_files
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=6).hexdigest()


def _taught(records, source, teacher, min_score):
    """Drop the pairs scored below `min_score` by the teacher, or by their own "score"; a pair without one stays. A teacher
    scores a query with each of its positives."""
    score, kept = None, 0
    if teacher:
        module, _, name = teacher.partition(":")
        try:
            score = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"weak.teacher: cannot load {teacher!r} ({error}); expected \"module:function\"") from None
        records = ({**r, "pos": [positive]} for r in records for positive in r["pos"])
    for batch in encoding.batches(records):
        if score:
            scores = score([r["query"] for r in batch], [r["pos"][0] for r in batch])
            if len(scores) != len(batch):
                raise UserError(f"weak.teacher: {teacher} gave {len(scores)} scores for {len(batch)} pairs; it must score each")
        else:
            scores = [r.get("score", min_score) for r in batch]
        for record, value in zip(batch, scores):
            if value >= min_score:
                kept += 1
                yield {**record, "score": value}
    if not kept:
        judge = f"weak.teacher {teacher!r}" if teacher else "its own \"score\""
        raise UserError(f"{source}: {judge} puts every pair below weak.min_score = {min_score}; lower it, or give other data")


def _label_pairs(records):
    """Classification as InfoNCE: a text's positive is its label's text, or every other time the class's last text; its
    group is the class, so that no other member counts as a negative."""
    last = {}
    for i, record in enumerate(records):
        text, label = record["text"], record["label"]
        yield {"query": text, "pos": [last[label] if i % 2 and label in last else label], "group": label}
        last[label] = text
