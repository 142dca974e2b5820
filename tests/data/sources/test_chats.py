"""Conversations in the forms in which people have them, and what of each is learnt."""

import itertools
import json

import numpy as np
import pytest
from runs import shards_of, small_tokenizer, write_lines
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conan_engine.config import Sft, Weak
from conan_engine.data import chat_template
from conan_engine.data.json_tokenizer import JsonTokenizer
from conan_engine.data.sources import chats
from conan_engine.data.sources.bad import Bad
from conan_engine.data.sources.forms import record
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError


def said(messages):
    """[(role, content)], those to learn in capitals."""
    return [
        (message["role"].upper() if message["learn"] else message["role"], message["content"]) for message in messages
    ]


ASK, TELL = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SHARE = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "Because."},
    {"from": "human", "value": "And?"},
    {"from": "gpt", "value": "So."},
]
WHOLE = [("system", "Be brief."), ("user", "Why?"), ("ASSISTANT", "Because."), ("user", "And?"), ("ASSISTANT", "So.")]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": [ASK, TELL], "id": 3}, [("user", "Why?"), ("ASSISTANT", "Because.")]),
        ({"conversations": SHARE}, WHOLE),
        (
            {
                "prompt": [ASK, TELL, {"role": "user", "content": "And?"}],
                "completion": [{"role": "assistant", "content": "So."}],
            },
            [("user", "Why?"), ("assistant", "Because."), ("user", "And?"), ("ASSISTANT", "So.")],
        ),
        ({"prompt": [ASK], "completion": "Because."}, [("user", "Why?"), ("ASSISTANT", "Because.")]),
        (
            {
                "system": "Be brief.",
                "history": [["Why?", "Because."]],
                "instruction": "And?",
                "input": "",
                "output": "So.",
            },
            WHOLE,
        ),
        (
            {"history": [], "instruction": "Say", "input": "why.", "output": "So."},
            [("user", "Say\nwhy."), ("ASSISTANT", "So.")],
        ),
        (
            {"messages": [ASK, {**TELL, "weight": 0}, ASK, {**TELL, "weight": 1}]},
            [("user", "Why?"), ("assistant", "Because."), ("user", "Why?"), ("ASSISTANT", "Because.")],
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "x"},
                    {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
                    {"role": "assistant", "content": None, "tool_calls": [{}]},
                    {"role": "tool", "content": "4"},
                    TELL,
                ]
            },
            [("system", "x"), ("user", "Why?"), ("assistant", ""), ("tool", "4"), ("ASSISTANT", "Because.")],
        ),
    ],
)
def test_conversations_as_people_have_them(row, wanted):
    kind, found = record(row, {})
    assert kind == "chat" and said(found["messages"]) == wanted


def test_a_prompt_with_its_completion_is_an_instruction():
    assert record({"prompt": "Why?", "completion": "Because."}, {}) == (
        "instruction",
        {"instruction": "", "input": "Why?", "output": "Because."},
    )


def test_a_column_of_conversations_may_have_another_name():
    assert said(record({"dialog": [ASK, TELL], "text": "x"}, {"messages": "dialog"})[1]["messages"])[1] == (
        "ASSISTANT",
        "Because.",
    )


def test_what_ms_swift_embeds_are_pairs():
    of = lambda text: [{"role": "user", "content": text}]
    row = {
        "messages": of("query"),
        "positive_messages": [of("right"), of("too")],
        "negative_messages": [of("wrong"), of("bad")],
    }
    assert record(row, {}) == ("pairs", {"query": "query", "pos": ["right", "too"], "neg": ["wrong", "bad"]})
    row = {"messages": [{"role": "system", "content": "Find it."}, *of("query")], "positive_messages": [of("right")]}
    assert record(row, {}) == ("pairs", {"query": "Find it.\nquery", "pos": ["right"]})


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"messages": [ASK]}, "no answer", "no turn of an assistant to learn"),
        ({"messages": []}, "wrong type", r"'messages' is \[\]; expected list of messages"),
        ({"messages": ["x"]}, "wrong type", r"'messages' is \"x\"; expected list of messages such as"),
        (
            {"messages": [{"role": "alien", "content": "x"}]},
            "unknown role",
            "a message of role 'alien'; expected one of system, developer, user",
        ),
        ({"conversations": [{"value": "x"}]}, "unknown role", "'conversations' has a message of role None"),
        ({"messages": [{"role": "user", "content": 3}]}, "wrong type", "'messages' is 3; expected text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "wrong type",
            "expected text, as content of a message",
        ),
        (
            {"history": [["a"]], "instruction": "b", "output": "c"},
            "wrong type",
            "expected list of pairs of question and answer",
        ),
        ({"prompt": 3, "completion": "x"}, "wrong type", "'prompt' is 3"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(row, reason, message):
    with pytest.raises(Bad, match=message) as bad:
        record(row, {})
    assert bad.value.reason == reason


def fields_of(shards):
    for i, count in enumerate(shards.field_counts(np.arange(len(shards)))):
        tokens, bounds = shards.gather(np.full(count, i), np.arange(count))
        yield [tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def test_without_a_template_turns_are_lines_and_answers_end(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    path = write_lines(
        tmp_path / "c.jsonl",
        [{"conversations": SHARE}, {"conversations": [*SHARE, {"from": "human", "value": "unanswered"}]}],
    )
    shards = shards_of(path, "sft", Sft(data={}, max_tokens=200), tokenizer, tmp_path)
    wanted = [
        [],
        tokenizer.encode("Be brief.\n") + tokenizer.encode("Why?\n"),
        [*tokenizer.encode("Because."), tokenizer.eos_id],
        tokenizer.encode("And?\n"),
        [*tokenizer.encode("So."), tokenizer.eos_id],
    ]
    assert list(fields_of(shards)) == [wanted, wanted]


def test_a_question_is_whole_or_not_there(tmp_path, capfd):
    tokenizer = small_tokenizer(tmp_path)
    whole = [
        tokenizer.encode("Be brief.\nWhy?\n"),
        [*tokenizer.encode("Because."), 1],
        tokenizer.encode("And?\n"),
        [*tokenizer.encode("So."), 1],
    ]
    lengths = [len(tokenizer.encode("Be brief.\n")) + len(tokenizer.encode("Why?\n")), *map(len, whole[1:])]
    rows = [
        {"conversations": SHARE},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    ]
    path = write_lines(tmp_path / "c.jsonl", rows)
    for room in range(8, sum(lengths) + 2):
        shards = shards_of(path, "sft", Sft(data={}, max_tokens=room), tokenizer, tmp_path / str(room))
        found = [[len(field) for field in fields] for fields in fields_of(shards)]
        if room <= lengths[0]:
            assert (
                len(found) == 1
                and "1 of 2 conversations have a first question longer than sft.max_tokens" in capfd.readouterr().err
            )
            continue
        kept = found[0][1:]
        assert kept[0] == lengths[0] and kept[1] == min(lengths[1], room - lengths[0])
        after = room - lengths[0] - lengths[1] - lengths[2]
        assert kept[2:] == ([lengths[2], min(lengths[3], after)] if after > 0 else [])
    with pytest.raises(
        UserError,
        match="2 of 2 conversations have a first question longer than sft.max_tokens = 1: there is nothing to learn; "
        "raise it",
    ):
        shards_of(path, "sft", Sft(data={}, max_tokens=1), tokenizer, tmp_path / "none")


def test_in_the_weak_stage_the_first_answer_belongs_to_what_is_before_it(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    path = write_lines(tmp_path / "c.jsonl", [{"conversations": SHARE}, {"messages": [ASK, TELL]}])
    shards = shards_of(path, "weak", Weak(data={}, max_tokens=50), tokenizer, tmp_path)
    assert [[tokenizer.decode(field) for field in fields] for fields in fields_of(shards)] == [
        ["Be brief.\nWhy?", "Because."],
        ["Why?", "Because."],
    ]


# ---- chat templates, as transformers applies them

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "Llama 2": "{% for m in messages %}{% if m.role == 'system' %}{{ bos_token + '<<SYS>> ' + m.content + ' <</SYS>>' "
    "}}{% elif m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + "
    "m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    "with marks": """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant ' }}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
    {%- else %}
        {%- if loop.index > 99 %}{% break %}{% endif %}
        {{- '<|im_start|>' + m.role + ' ' + m.content|trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}""",
}


@pytest.fixture
def library():
    special = ["<|im_start|>", "<|im_end|>", "<bos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("u", "s"), ("us", "e"), ("use", "r"), ("h", "y"), ("e", "c")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges), *special])}
    made = Library(models.BPE(vocab, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


@pytest.fixture(params=TEMPLATES)
def with_template(request, library, tmp_path):
    """A folder with a tokenizer and its template, and transformers' own of it."""
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": "<|im_end|>", "bos_token": {"content": "<bos>"}, "chat_template": TEMPLATES[request.param]}
        )
    )
    return tmp_path, PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<|im_end|>", bos_token="<bos>", chat_template=TEMPLATES[request.param]
    )


MESSAGES = [
    {"role": role.replace("human", "user").replace("gpt", "assistant"), "content": content}
    for role, content in (tuple(turn.values()) for turn in SHARE)
]


def test_tokens_are_those_of_transformers_and_answers_are_learnt_with_their_end(with_template):
    folder, theirs = with_template
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    messages = chats.conversation(MESSAGES, "x")
    (turns,) = chat_template.turns(tokenizer, [chat_template.render(tokenizer, messages)])
    assert (
        sum(itertools.chain(*turns), [])
        == theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)[
            : sum(map(len, itertools.chain(*turns)))
        ]
    )
    assert [tokenizer.decode(answer).replace(" ", "") for _, answer in turns] == ["Because.<|im_end|>", "So.<|im_end|>"]
    assert all(
        "Because" not in tokenizer.decode(question) and "So" not in tokenizer.decode(question) for question, _ in turns
    )


def test_a_template_goes_where_its_tokenizer_goes(with_template, tmp_path):
    folder, theirs = with_template
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again/tokenizer.json")
    assert (again.template, again.begin, again.end, again.hash) == (
        tokenizer.template,
        "<bos>",
        "<|im_end|>",
        tokenizer.hash,
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    assert Tokenizer.load(folder / "tokenizer.json").template == CHATML
    path = write_lines(tmp_path / "c.jsonl", [{"messages": MESSAGES}])
    folders = {
        shards_of(path, "sft", Sft(data={}, max_tokens=200), one, tmp_path / "data").directory
        for one in (JsonTokenizer(tokenizer.model, "<|im_end|>"), Tokenizer.load(folder / "tokenizer.json"))
    }
    assert len(folders) == 2


def test_content_that_spells_a_special_token_is_one_only_in_conversations(with_template):
    tokenizer = Tokenizer.load(with_template[0] / "tokenizer.json")
    special = tokenizer.library.token_to_id("<|im_end|>")
    assert special not in tokenizer.encode("a <|im_end|> b")
    (turns,) = chat_template.turns(tokenizer, [chat_template.render(tokenizer, chats.conversation([ASK, TELL], "x"))])
    assert special in turns[0][1] and special not in tokenizer.encode("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\\nalternate') }}", r"chat template refuses it .roles must alternate.; leave"),
        ("{% for %}", "chat template cannot be read .Expected"),
        ("{{ messages[0].content }}", "chat template leaves out what a message says ..Because"),
        ("{{ messages.__class__.mro() }}", "the tokenizer's chat template refuses it"),
    ],
)
def test_what_a_template_cannot_do_is_one_line(library, template, message):
    tokenizer = JsonTokenizer(library.to_str().encode(), "<|im_end|>", "<bos>", template)
    with pytest.raises((UserError, Bad), match=message) as error:
        chat_template.render(tokenizer, chats.conversation([ASK, TELL], "x"))
    assert "\n" not in str(error.value)


def test_a_conversation_that_the_template_refuses_is_a_bad_record(library, tmp_path):
    template = "{% if messages|length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
    tokenizer = JsonTokenizer(library.to_str().encode(), "<|im_end|>", "<bos>", template)
    good, bad = {"messages": [ASK, TELL]}, {"messages": [ASK, ASK, TELL]}
    path = write_lines(tmp_path / "c.jsonl", [good, bad, good, good])
    sft = Sft(data={}, max_tokens=200)
    with pytest.raises(UserError, match=r"c\.jsonl: line 2: the tokenizer's chat template refuses it .roles must"):
        shards_of(path, "sft", sft, tokenizer, tmp_path / "data")
    shards = shards_of(path, "sft", sft, tokenizer, tmp_path / "data", max_bad_share=0.5)
    assert len(shards) == 3
    (left_out,) = map(json.loads, (tmp_path / "data/rejected.jsonl").read_text().splitlines())
    assert left_out["line"] == 2 and "roles must alternate" in left_out["reason"]
