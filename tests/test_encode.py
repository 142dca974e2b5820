"""`python -m conan_engine.encode`: row i is line i's text; a mistake gets one line and nothing is half written."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT, write_lines

from conan_engine.data.tokenizer import train
from conan_engine.evaluation.encoder import Encoder
from conan_engine.vectors.quantize import quantize, ranges_of

TEXTS = ["Return the shortest path.", "", "Roots of a polynomial, ünïcode and 中文.", "word " * 200]


def encode(*arguments, given=b""):
    done = subprocess.run(
        [sys.executable, "-m", "conan_engine.encode", *map(str, arguments)], input=given, capture_output=True, cwd=ROOT
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_rows_are_unit_vectors_in_the_files_order(untrained_run, tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    code, out, err = encode(untrained_run, path, tmp_path / "out.npy", "--dim", 16)
    assert code == 0, err
    vectors = np.load(tmp_path / "out.npy")
    assert vectors.shape == (4, 16) and vectors.dtype == np.float32 and "[4, 16]" in out
    # of no text there is no direction
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1, 1], atol=1e-5)
    encoder = Encoder.load(untrained_run)
    for row, text in zip(vectors, TEXTS):
        np.testing.assert_allclose(row, encoder.encode([text], 16)[0], atol=1e-5)


def test_queries_and_instructions_are_texts_too(untrained_run, tmp_path):
    pairs = write_lines(tmp_path / "p.jsonl", [{"query": TEXTS[0], "pos": ["x"]}])
    instructions = write_lines(tmp_path / "i.jsonl", [{"instruction": "Find", "input": "a path", "output": "x"}])
    assert (
        encode(untrained_run, pairs, tmp_path / "p.npy")[0]
        == encode(untrained_run, instructions, tmp_path / "i.npy")[0]
        == 0
    )
    encoder = Encoder.load(untrained_run)
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), encoder.encode([TEXTS[0]]), atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "i.npy"), encoder.encode(["Find\na path"]), atol=1e-5)


def test_an_instruction_comes_before_what_has_none(untrained_run, tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    own = write_lines(
        tmp_path / "i.jsonl", [{"instruction": text, "input": "a path", "output": "x"} for text in ("Find", "")]
    )
    for file in (path, own):
        assert encode(untrained_run, file, file.with_suffix(".npy"), "--instruction", "Look for: ü")[0] == 0
    expected = Encoder.load(untrained_run).encode(
        [*(f"Look for: ü\n{text}".rstrip("\n") for text in TEXTS), "Find\na path", "Look for: ü\na path"]
    )
    np.testing.assert_allclose(np.load(tmp_path / "t.npy"), expected[:-2], atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "i.npy"), expected[-2:], atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "dtype", "numbers"), [("float16", "float16", 12), ("int8", "int8", 12), ("binary", "int8", 2)]
)
def test_fewer_bytes(untrained_run, tmp_path, precision, dtype, numbers):
    path = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    code, out, err = encode(untrained_run, path, tmp_path / "out.npy", "--dim", 12, "--precision", precision)
    assert code == 0 and f"out.npy: {dtype} [4, {numbers}]" in out, err
    found, vectors = np.load(tmp_path / "out.npy"), Encoder.load(untrained_run).encode(TEXTS, 12)
    expected = quantize(vectors, precision, ranges_of(vectors))
    assert (
        found.dtype == dtype
        and found.shape == (4, numbers)
        and len(list(tmp_path.glob("*.npy"))) == (2 if precision == "int8" else 1)
    )
    if precision == "float16":
        np.testing.assert_allclose(found, expected, atol=1e-3)
    elif precision == "int8":
        assert abs(found.astype(int) - expected).max() <= 1  # where the last bit of a vector decides between two steps
        np.testing.assert_allclose(np.load(tmp_path / "out.ranges.npy"), ranges_of(vectors), atol=1e-5)
    else:
        differ = np.unpackbits((found ^ expected).astype(np.uint8), axis=1)[:, :12].astype(bool)
        assert (abs(vectors[differ]) < 1e-5).all()


def test_the_ranges_of_documents_serve_further_ones(untrained_run, tmp_path):
    documents = write_lines(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    one = write_lines(tmp_path / "o.jsonl", [{"text": TEXTS[2]}])
    assert encode(untrained_run, documents, tmp_path / "d.npy", "--precision=int8")[0] == 0
    assert (
        encode(untrained_run, one, tmp_path / "o.npy", "--precision=int8", "--ranges", tmp_path / "d.ranges.npy")[0]
        == 0
    )
    assert abs(np.load(tmp_path / "o.npy")[0].astype(int) - np.load(tmp_path / "d.npy")[2]).max() <= 1
    ranges = [np.load(tmp_path / f"{name}.ranges.npy") for name in "do"]
    np.testing.assert_array_equal(*ranges)  # each file of vectors has its own beside it


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--precision=int8"], "holds 1 record; --precision=int8 needs at least 2"),
        (["--precision=binary", "--ranges=r.npy"], "--ranges is for --precision=int8, and --precision is binary"),
        (["--precision=int8", "--ranges=nowhere.npy"], "nowhere.npy: cannot read it as a .npy file of ranges"),
        (["--precision=int8", "--ranges=in.jsonl"], "in.jsonl: cannot read it as a .npy file of ranges"),
        (["--precision=int8", "--ranges=r.npy"], "r.npy: holds float32 [2, 31]; expected float32 [2, 32]"),
        # the largest first
        (["--precision=int8", "--ranges=r.npy", "--dim=31"], "r.npy: holds float32 [2, 31]; expected float32 [2, 31]"),
    ],
)
def test_a_mistake_in_precision_or_ranges_gets_one_line(untrained_run, tmp_path, extra, said):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    np.save(tmp_path / "r.npy", np.array([[1] * 31, [0] * 31], np.float32))
    extra = [
        option.replace("=r", f"={tmp_path}/r").replace("=in", f"={tmp_path}/in", 1) if "--ranges" in option else option
        for option in extra
    ]
    code, _, err = encode(untrained_run, path, tmp_path / "out.npy", *extra)
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("out*"))


def test_ranks_share_a_folder_of_parts(untrained_run, tmp_path):
    """Two ranks under torchrun, killed once, give the bytes of one process; a title is embedded as evaluate does."""
    chance = np.random.default_rng(3)
    words = ["sort", "list", "graph", "ünï", "中文", "x" * 40]
    records = [
        {"_id": f"d{i}", "title": "T", "text": " ".join(chance.choice(words, length))}
        for i, length in enumerate(chance.integers(1, 100, 16_000))
    ]
    path = write_lines(tmp_path / "t.jsonl", records)
    command = [sys.executable, "-m", "conan_engine.encode", untrained_run, path, tmp_path / "out", "--dim=8"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not any(
        json.loads(state.read_text())["finished"] for state in (tmp_path / "out").glob(".partial/units/*.json")
    ):
        assert first.poll() is None
    first.kill()
    first.wait()
    done = subprocess.run([*launcher, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "going on behind" in done.stdout, done.stderr
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "complete already, 16,000 vectors" in again.stdout, again.stderr
    assert encode(untrained_run, path, tmp_path / "out.npy", "--dim=8", "--workers=1")[0] == 0
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert len(index["parts"]) > 2 and index["count"] == 16_000 and index["dim"] == 8
    parts = [np.load(tmp_path / "out" / part["file"]) for part in index["parts"]]
    np.testing.assert_array_equal(np.concatenate(parts), np.load(tmp_path / "out.npy"))
    assert (tmp_path / "out.ids.jsonl").read_text() == "".join(f'"d{i}"\n' for i in range(16_000))
    titled = [f"T\n{record['text']}" for record in records[:50]]
    np.testing.assert_allclose(parts[0][:50], Encoder.load(untrained_run).encode(titled, 8), atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--part=1/2"], "out.npy: parts write into one folder; name a folder in place of a .npy file"),
        (["--part=3/2"], "--part: got '3/2'"),
        (["--workers=0"], "--workers: got 0"),
    ],
)
def test_a_mistake_in_how_the_work_is_shared(untrained_run, tmp_path, extra, said):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    code, _, err = encode(untrained_run, path, tmp_path / "out.npy", *extra)
    assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_folder_of_something_else_is_left_alone(untrained_run, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("x")
    code, _, err = encode(untrained_run, path, tmp_path / "out")
    assert code == 2 and "exists already, and holds something else; name another folder" in err, err
    assert encode(untrained_run, "-", tmp_path / "new", given=b"a\nb")[0] == 0
    assert json.loads((tmp_path / "new/index.json").read_text())["source"] == "standard input"


@pytest.mark.parametrize("as_json", [True, False])
def test_standard_input_is_json_lines_or_a_text_a_line(untrained_run, tmp_path, as_json):
    lines = [json.dumps({"text": text}) if as_json else text for text in TEXTS]
    code, out, err = encode(
        untrained_run, "-", tmp_path / "out.npy", given=b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    )
    assert code == 0, err
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), Encoder.load(untrained_run).encode(TEXTS), atol=1e-5)


def test_a_line_of_text_is_a_record(untrained_run, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    code, out, err = encode(untrained_run, tmp_path / "t.txt", tmp_path / "out.npy")
    assert code == 0 and len(np.load(tmp_path / "out.npy")) == len(TEXTS), err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "standard input: holds no records"),
        (b"a\n\xff\n", "standard input: line 2: not UTF-8"),
        (b'{"text": "a"}\n{', "standard input: line 2: broken JSON"),
        (b'{"sentence1": "a", "sentence2": "b", "score": 1}', "standard input: holds sts records"),
    ],
)
def test_a_mistake_in_standard_input_gets_one_line(untrained_run, tmp_path, given, said):
    code, _, err = encode(untrained_run, "-", tmp_path / "out.npy", given=given)
    assert code == 2 and said in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("content", "extra", "said"),
    [
        (None, [], "no such file"),
        ("", [], "holds no records"),
        ('{"text": "a"}\n{"text": ', [], "line 2"),
        ('{"txt": "a"}\n', [], "line 1"),
        ('{"text": "a"}\n{"text": 5}\n', [], "line 2: 'text' is 5"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', [], "line 2: not UTF-8"),
        ('{"sentence1": "a", "sentence2": "b", "score": 1}\n', [], "holds sts records"),
        ('{"text": "a"}\n', ["--dim", "33"], "--dim is 33; expected 1 to 32"),
        ('{"text": "a"}\n', ["--dim", "0"], "--dim is 0"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_no_file(untrained_run, tmp_path, content, extra, said):
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = encode(untrained_run, path, tmp_path / "out.npy", *extra)
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize(
    ("out", "said"), [("no/out.npy", "its folder does not exist"), ("folder.npy", "cannot write it")]
)
def test_a_place_that_cannot_be_written_is_named(untrained_run, tmp_path, out, said):
    path = write_lines(tmp_path / "t.jsonl", [{"text": "a"}])
    (tmp_path / "folder.npy").mkdir()
    code, _, err = encode(untrained_run, path, tmp_path / out)
    assert code == 2 and f"{tmp_path / out}: {said}" in err and err.count("\n") == 1, err
    assert not any(path.is_file() for path in tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("run", ["nowhere", "t.jsonl", "."])
def test_what_is_no_run_is_named(tmp_path, run):
    path = write_lines(tmp_path / "t.jsonl", [{"text": "a"}])
    code, _, err = encode(tmp_path / run, path, tmp_path / "out.npy")
    assert code == 2 and f"{tmp_path / run}: no trained run here" in err and err.count("\n") == 1, err


def test_a_file_of_before_stays_whole_when_the_new_one_fails(untrained_run, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"text"')
    np.save(tmp_path / "out.npy", np.arange(3))
    assert encode(untrained_run, path, tmp_path / "out.npy")[0] == 2
    assert np.load(tmp_path / "out.npy").tolist() == [0, 1, 2]


def test_another_runs_tokenizer_is_named(untrained_run, tmp_path):
    run = shutil.copytree(untrained_run, tmp_path / "run")
    lines = write_lines(
        tmp_path / "t.jsonl", [{"text": "some other text, with words of its own " * 20 + str(i)} for i in range(50)]
    )
    train((text["text"] for text in map(json.loads, lines.read_text().splitlines())), run / "tokenizer.model", 300)
    code, _, err = encode(run, lines, tmp_path / "out.npy")
    assert code == 2 and "was trained with tokenizer" in err and err.count("\n") == 1, err


def test_a_run_whose_only_checkpoint_is_damaged_is_named(untrained_run, tmp_path):
    run = shutil.copytree(untrained_run, tmp_path / "run")
    next(run.glob("checkpoints/*/model-*.safetensors")).write_bytes(b"cut off")
    path = write_lines(tmp_path / "t.jsonl", [{"text": "a"}])
    code, out, err = encode(run, path, tmp_path / "out.npy")
    assert (
        code == 2
        and "is damaged (model-00000-of-00001.safetensors does not match its checksum)" in out
        and "no whole checkpoint" in err
    )
