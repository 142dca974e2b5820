"""report.html: what it shows of a run, whole, under way or damaged, and that a browser shows it."""

import html
import html.parser
import json
import re
import shutil
import subprocess
import sys

import pytest
from runs import one_line

from conan_engine import evaluate
from conan_engine.report import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
SCORES = {
    "params": 1_234_567,
    "docs.ndcg@10": 0.4321,
    "docs.bm25.ndcg@10": 0.4,
    "cross_lingual.de.recall@20": 0.9,
    "cross_lingual.bm25.de.recall@20": 0.3,
    "dims.8.ndcg@10": 0.2,
    "dims.16.ndcg@10": 0.3,
    "dims.16.binary.ndcg@10": 0.1,
}
OWN = {"queries": 12, "documents": 345, "ndcg@10": 0.5, "bm25.ndcg@10": 0.25}
OWN |= {"de.ndcg@10": 0.6, "de.bm25.ndcg@10": 0.2, "fr.ndcg@10": 0.4, "fr.bm25.ndcg@10": 0.3}


@pytest.fixture(scope="module")
def run(whole, tmp_path_factory):
    """A finished run with every kind of result, whose sample texts count as held out."""
    run = tmp_path_factory.mktemp("report") / "my run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("data", "report.html"))
    texts = json.loads((run / "samples.json").read_text())
    (run / "samples.json").write_text(json.dumps({**texts, "held_out": True}))
    (run / "results.json").write_text(json.dumps(SCORES))
    (run / "retrieval-faq.json").write_text(json.dumps(OWN))
    return run


@pytest.fixture(scope="module")
def written(run):
    return page.write(run).read_text()


class Seen(html.parser.HTMLParser):
    """The text of a page, and whether each element that was opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.ids, self.links = [], [], set(), set()
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.ids.add(dict(attributes).get("id"))
        self.links.add(dict(attributes).get("href") or dict(attributes).get("src"))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.text.append(text)


def test_a_finished_run_left_a_report_of_its_own(whole):
    text = Seen((whole / "report.html").read_text()).text
    assert "24 of 24" in text and "finished; metrics.jsonl" in text and "The run trained on these texts" in text
    assert "0 starts" not in text and "1 start of this run" in text and sys.version.split()[0] in text


def test_the_page_shows_settings_curves_scores_searches_map_and_versions(written):
    seen = Seen(written)
    for said in (
        "my run",
        "0.432",  # scores
        "docs nDCG@10 by Matryoshka dims",
        "language to English, Recall@20",
        "faq",
        "345 documents",
        "gradient norm",
        "alpha, how far the soft mask is open",
        "hard negatives replaced",
        "tokens per second",
        "waiting for data",
        "accuracy",
        "placed by t-SNE",
        "model.head_dim",
        "torch",
        "commit",
    ):
        assert said in seen.text, said
    for stage in ("pretrain", "sft", "weak", "supervised"):
        assert stage in seen.ids
    assert written.count('<div class="search">') == 10
    assert all(link[1:] in seen.ids for link in seen.links if link and link.startswith("#"))


def test_the_page_needs_nothing_from_elsewhere(written):
    assert not re.search(
        r"https?://|<script|@import|url\(",
        re.sub(r"<li.*?</li>|<title>.*?</title>|<p.*?</p>", "", written, flags=re.DOTALL),
    )
    assert Seen(written).links <= {None, "data:,"} | {link for link in Seen(written).links if link and link[0] == "#"}


def test_a_run_that_has_just_begun_has_a_report(whole, tmp_path):
    shutil.copy(whole / "config.json", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "pretrain: 0 of 6 steps" in Seen(page.write(tmp_path).read_text()).text
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:15]) + lines[15][:20])  # the last line is being written
    text = Seen(page.write(tmp_path).read_text()).text
    assert "weak: 3 of 6 steps" in text and "15 of 24" in text
    assert "keeps no pairs" in text and "Not measured yet" in text and "a version that kept none" in text
    shutil.copy(whole / "samples.json", tmp_path)
    assert "There is no checkpoint yet." in Seen(page.write(tmp_path).read_text()).text


def test_weights_that_cannot_be_loaded_leave_the_rest_of_the_page(run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "tokenizer.model").write_bytes(b"nothing")
    text = Seen(page.write(broken).read_text()).text
    assert "The weights cannot be loaded" in text and "gradient norm" in text
    (broken / "samples.json").write_text("{")
    (broken / "results.json").write_text("[]")
    text = Seen(page.write(broken).read_text()).text
    assert "keeps no pairs" in text and "gradient norm" in text


def test_a_report_that_cannot_be_written_does_not_fail_a_finished_run(whole, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(page, "write", lambda run: 1 / 0)
    page.write_at_end(tmp_path, said.append)
    assert len(said) == 1 and "was not written (ZeroDivisionError" in said[0]


def test_evaluate_writes_the_report_again(run, tmp_path, monkeypatch, capsys):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for name in ("report.html", "retrieval-faq.json"):
        (again / name).unlink(missing_ok=True)
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "parse a date"}\n')
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "dates are parsed"}\n{"_id": "e", "text": "x"}\n')
    (tmp_path / "judged.tsv").write_text("q\td\t1\n")
    arguments = [
        f"--{name}={tmp_path / file}"
        for name, file in (("queries", "queries.jsonl"), ("corpus", "corpus.jsonl"), ("qrels", "judged.tsv"))
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate", str(again), *arguments])
    evaluate.main()
    assert f"report: {again}/report.html" in capsys.readouterr().out
    assert "1 queries, 2 documents" in Seen((again / "report.html").read_text()).text


def test_the_command_names_the_page_and_refuses_other_folders(run, tmp_path):
    command = [sys.executable, "-m", "conan_engine.report"]
    done = subprocess.run([*command, run], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html")), done.stderr
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, timeout=120)
    one_line((done.returncode, done.stdout, done.stderr), str(tmp_path), "name the folder of a run")


def browser(*arguments):
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@in_a_browser
def test_a_browser_shows_the_page_without_an_error(run, written, tmp_path):
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    browser("--window-size=1200,2400", f"--screenshot={picture}", (run / "report.html").as_uri())
    seen = imread(picture)[..., :3]
    colours = {tuple(pixel) for pixel in (seen[::3, ::3].reshape(-1, 3) * 15).astype(int)}
    assert len(colours) > 20, "text, lines and bars have their colours"
    for part in (seen[:800], seen[800:1600], seen[1600:]):
        assert part.std() > 0.02, "no part of the page is blank"


@in_a_browser
def test_a_phone_shows_the_page_in_its_width(written, tmp_path):
    measure = """f.onload = () => {
        const page = f.contentDocument, boxes = [...page.querySelectorAll("figure, .search, .facts")];
        const right = Math.max(...boxes.map(box => box.getBoundingClientRect().right));
        document.title = [page.documentElement.scrollWidth, right, page.querySelectorAll("svg").length].join(" ");
    }"""
    phone = tmp_path / "phone.html"
    frame = f'<iframe id=f style="width: 375px; height: 800px; border: 0" srcdoc="{html.escape(written)}"></iframe>'
    phone.write_text(f'<body style="margin: 0">{frame}<script>{measure}</script>')
    shown = browser("--window-size=800,900", "--dump-dom", "--virtual-time-budget=5000", phone.as_uri())
    width, right, charts = re.search(r"<title>(\d+) ([\d.]+) (\d+)</title>", shown).groups()
    assert int(width) <= 375 and float(right) <= 375 and int(charts) > 15
