"""BM25 is bm25s' where texts have spaces, and finds something where they have none."""

import bm25s
import numpy as np
import pytest

from conan_engine.evaluation import retrieval, tasks
from conan_engine.evaluation.bm25 import bm25_ranks, bm25_scores, words
from conan_engine.evaluation.metrics import ndcg
from conan_engine.evaluation.tasks import Search


def test_bm25_finds_words_and_nothing_where_none_is_shared():
    documents = ["a graph with weighted edges", "the roots of a polynomial", "matrix of zeros"]
    search = Search(
        ["polynomial roots", "weighted graph", "entirely elsewhere", "été"], documents, np.array([1, 0, 2, 2]), ndcg
    )
    assert bm25_ranks(search).tolist() == [1, 1, 3, 3]


def test_words_are_those_of_bm25s_where_there_are_spaces():
    texts = [text for doc in tasks.held_out_docs()[:500] for text in (doc.summary, doc.rest)]
    texts += ["L'été à Besançon, 3.14 and a_b c", "Съешь же ещё этих мягких булок", "", "a b"]
    assert [words(text) for text in texts] == bm25s.tokenize(texts, return_ids=False, show_progress=False)


@pytest.mark.parametrize(("text", "wanted"), [
    ("日本語", ["日", "本", "語", "日本", "本語"]),
    ("Djangoの設定 file", ["django", "の", "設", "定", "の設", "設定", "file"]),
    ("한국어 문서", ["한", "국", "어", "한국", "국어", "문", "서", "문서"]),
    ("น้ำ", ["น้", "ำ", "น้ำ"]),
    ("中", ["中"]),
])  # fmt: skip
def test_without_spaces_characters_and_their_pairs_are_words(text, wanted):
    assert words(text) == wanted


def test_a_text_is_found_by_a_part_of_it_in_a_script_without_spaces():
    documents = [
        "東京は日本の首都です。",
        "京都には寺がたくさんあります。",
        "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
        "เชียงใหม่อยู่ทางภาคเหนือ",
    ]
    search = Search(["日本の首都", "京都の寺", "เมืองหลวงของไทย", "เชียงใหม่"], documents, np.arange(4), ndcg)
    assert bm25_ranks(search).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("documents", [["a b"], ["", ""], ["the"]])
def test_documents_without_a_word_are_not_found(documents):
    assert [scores.tolist() for scores in bm25_scores(["a word", ""], documents)] == [[0.0] * len(documents)] * 2
    assert retrieval.bm25(["a word"], [(str(i), text) for i, text in enumerate(documents)]) == [[]]
