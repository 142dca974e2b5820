"""Runs that start from a model of transformers or from a GGUF file: its hidden states are ours, what we cannot do is
named, and it goes back out."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import transformers
from gguf_files import of_library, write_model
from runs import ROOT, one_line, train, write_lines
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from conan_engine.config import chosen_layers
from conan_engine.data.tokenizer import Tokenizer as Ours
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder
from conan_engine.export.gguf import write as write_gguf
from conan_engine.export.sentence_transformers import write
from conan_engine.model import llama, pretrained
from conan_engine.model.transformer import Transformer
from conan_engine.run import checkpoint
from conan_engine.settings import load

SHAPE = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "llama, tied": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "llama 3": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"rope_parameters": LLAMA_3}),
    "llama, heads of a size of their own": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"head_dim": 32}),
    "llama, no head": (transformers.LlamaModel, transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, {"sliding_window": None}),
    "mistral with a window": (transformers.MistralForCausalLM, transformers.MistralConfig, {"sliding_window": 48}),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {"head_dim": 32}),
    "qwen3, tied": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        {"head_dim": 16, "tie_word_embeddings": True},
    ),
}


def save_tokenizer(folder, kind="bytes"):
    """A tokenizer.json: of bytes, as GPT's, Llama 3's and Qwen's are; with a begin token, as Llama 3's; or of pieces,
    as Llama 2's."""
    texts = [f"question {i} answer {i} another wrong bad good label" for i in range(300)]
    if kind == "pieces":
        library = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        library.train_from_iterator(
            texts,
            trainers.BpeTrainer(vocab_size=240, special_tokens=special[:3], initial_alphabet=[], show_progress=False),
        )
        about = json.loads(library.to_str())
        old = about["model"]["vocab"]
        vocabulary = {
            token: i
            for i, token in enumerate(
                [*special, *(token for token in sorted(old, key=old.get) if token not in special)]
            )
        }
        about["model"]["vocab"] = vocabulary
        library = Tokenizer.from_str(json.dumps(about))
        library.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        end, begin = "</s>", "<s>"
    else:
        library = Tokenizer(models.BPE())
        library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = ["<|begin_of_text|>", "<|end_of_text|>"]
        library.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=500,
                special_tokens=special,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        begin, end = special
    if kind != "bytes":
        library.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, library.token_to_id(begin))]
        )
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def make(folder, kind, dtype=torch.float32):
    """A random model of transformers, its attention sharp enough to count, saved; and itself."""
    model, config, options = KINDS[kind]
    theirs = model(config(**{**SHAPE, **options}))
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(torch.rand_like(p) + 0.5 if p.dim() == 1 else 8)
    theirs = theirs.to(dtype)
    theirs.save_pretrained(folder, max_shard_size="100KB" if kind == "qwen3" else "1GB")
    return theirs.float().eval()


def adopted(tmp_path, folder, *options):
    """The config of a run that starts there."""
    path = write_lines(tmp_path / "t.jsonl", [{"query": "a", "pos": ["b"]}])
    (tmp_path / "c.toml").write_text(
        f'stages = ["weak"]\n[weak]\nsteps = 1\nmax_tokens = 32\ndata = {{ "{path}" = 1 }}'
    )
    return load(tmp_path / "c.toml", [f"--init_from={folder}", *options])


def ours_of(tmp_path, folder):
    config = adopted(tmp_path, folder)
    model = Transformer(config.model, 0, "float32")
    llama.load_weights(folder, model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_theirs_causal_and_bidirectional(tmp_path, kind):
    make(tmp_path / "model", kind)
    ours = ours_of(tmp_path, tmp_path / "model")
    lengths = [40, 1, 17]
    ids = [torch.randint(512, (n,)) for n in lengths]
    packed, cu_seqlens = torch.cat(ids).int(), torch.tensor([0, *lengths]).cumsum(0).int()
    for alpha in (0.0, 1.0):
        config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
        config.is_causal = alpha == 0
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "model", config=config)
        with torch.no_grad():
            found = ours(packed, cu_seqlens, alpha).split(lengths)
            for row, own in zip(ids, found):
                torch.testing.assert_close(own, theirs(row[None]).last_hidden_state[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama, no head"])
def test_the_next_tokens_loss_is_theirs(tmp_path, kind):
    theirs = make(tmp_path / "model", kind)
    ours = ours_of(tmp_path, tmp_path / "model")
    assert (ours.lm_head is None) == kind.endswith("tied")
    ids = torch.randint(512, (30,))
    loss = ours.next_token_loss(ids.int(), torch.tensor([0, 30]).int(), torch.cat((ids[1:], torch.tensor([-100])))) / 29
    assert loss.item() == pytest.approx(theirs(ids[None], labels=ids[None]).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_bias": True}, "attention_bias is True: biases in attention, which this engine does not support"),
        ({"mlp_bias": True}, "mlp_bias is True: biases in the FFN"),
        ({"use_sliding_window": True}, "use_sliding_window is True: a sliding window"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': another activation"),
        (
            {"architectures": ["MixtralForCausalLM"]},
            "architectures is MixtralForCausalLM; init_from takes LlamaForCausalLM",
        ),
        ({"num_experts": 8}, "num_experts is 8: a mixture of experts"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "its RoPE scaling is 'yarn'"),
        ({"hidden_size": None}, "hidden_size is None"),
    ],
)
def test_what_we_cannot_do_is_named(tmp_path, change, said):
    make(tmp_path / "model", "llama")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"{path}: ") as error:
        adopted(tmp_path, tmp_path / "model")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.layers=3"], "model.layers is 3; the model in {} has 2; leave it out"),
        (["--model.context=65"], "model.context is 65; the model in {} has 64; set it to at most that"),
        (["--model.rope_scaling.factor=2"], "model.rope_scaling is "),
    ],
)
def test_a_model_that_is_set_otherwise_is_named(tmp_path, options, said):
    make(tmp_path / "model", "llama")
    with pytest.raises(UserError) as error:
        adopted(tmp_path, tmp_path / "model", *options)
    assert said.format(tmp_path / "model") in str(error.value)


def test_the_sliding_window_that_bounds_the_context_is_named(tmp_path):
    make(tmp_path / "model", "mistral with a window")
    with pytest.raises(
        UserError, match="model.context is 49; the model in .* has 48, its sliding window; set it to at most that"
    ):
        adopted(tmp_path, tmp_path / "model", "--model.context=49")


def test_pooling_scale_and_a_shorter_context_are_the_runs_own(tmp_path):
    make(tmp_path / "model", "llama")
    model = adopted(
        tmp_path, tmp_path / "model", "--model.pooling=last", "--model.context=40", "--model.layers=2"
    ).model
    assert (model.pooling, model.context, model.width, model.layers) == ("last", 40, 64, 2)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", "cannot read its weights"),
        ("gone", "cannot read its weights"),
        ("missing", "holds no layers.1.mlp.up_proj.weight"),
        ("more", "holds layers.0.self_attn.q_proj.bias, which this engine's model has no place for"),
        ("shape", "its config.json says"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, damage, said):
    from safetensors.torch import load_file, save_file

    make(tmp_path / "model", "llama")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    else:
        if damage == "missing":
            del tensors["model.layers.1.mlp.up_proj.weight"]
        elif damage == "more":
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        else:
            tensors["model.embed_tokens.weight"] = torch.zeros(500, 64)
        save_file(tensors, path)
    with pytest.raises(UserError, match=f"{tmp_path}/model: ") as error:
        ours_of(tmp_path, tmp_path / "model")
    assert said in str(error.value)


TEXTS = ["question 3 answer", " Ünïcode, 中文 and 😀\n", "x", "word " * 90, "<|end_of_text|> </s> <s> spelled"]


@pytest.mark.parametrize("kind", ["bytes", "begin", "pieces"])
def test_a_tokenizer_json_gives_the_librarys_ids(tmp_path, kind):
    save_tokenizer(tmp_path, kind)
    ours, theirs = Ours.load(tmp_path / "tokenizer.json"), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    begin = [] if kind == "bytes" else [theirs.token_to_id("<s>" if kind == "pieces" else "<|begin_of_text|>")]
    assert (ours.prefix, ours.suffix) == (begin, []) and ours.eos_id == theirs.token_to_id(
        "</s>" if kind == "pieces" else "<|end_of_text|>"
    )
    assert ours.encode_texts(TEXTS, 10**6) == [theirs.encode(text).ids for text in TEXTS]
    theirs.enable_truncation(20)
    assert ours.encode_texts(TEXTS, 20) == [theirs.encode(text).ids for text in TEXTS]
    assert [ours.decode(ids) for ids in ours.encode_batch(TEXTS)] == TEXTS
    assert ours.encode("a\ud800b") == ours.encode("a\ufffdb")


def _without(key):
    def change(folder):
        (folder / "tokenizer_config.json").unlink()
        about = json.loads((folder / "tokenizer.json").read_text())
        for token in about["added_tokens"]:
            token["content"] = f"[{token['id']}]"
        (folder / "tokenizer.json").write_text(json.dumps(about))

    return change


def _lower(folder):
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.normalizer = normalizers.Lowercase()
    library.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot load this tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 5}'), "cannot load this tokenizer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load this tokenizer"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "[END]"}'),
            "has no token '[END]'",
        ),
        (_lower, "this tokenizer loses text"),
        (_without("end"), "does not say which token ends a text"),
    ],
)
def test_a_tokenizer_json_that_will_not_do_is_named(tmp_path, change, said):
    save_tokenizer(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/tokenizer.json: ") as error:
        Ours.load(tmp_path / "tokenizer.json")
    assert said in str(error.value)


SHORT = ["--stages=['sft','weak','supervised']", *(f"--{stage}.steps=3" for stage in ("sft", "weak", "supervised"))]


@pytest.fixture(scope="module")
def shapeless(tiny, tmp_path_factory):
    """The config of small runs without its [model] and [tokenizer], and so without dims."""
    text = tiny.read_text()
    model, tokenizer, rest = text.index("[model]"), text.index("[tokenizer]"), text.index("[pretrain]")
    assert model < tokenizer < rest
    path = tmp_path_factory.mktemp("shapeless") / "c.toml"
    path.write_text((text[:model] + text[rest:]).replace("dims = [8, 16, 32]\n", ""))
    return path


@pytest.mark.parametrize(
    ("kind", "tokenizer"), [("qwen3", "begin"), ("llama 3", "bytes"), ("mistral with a window", "pieces")]
)
@pytest.mark.slow
def test_trained_exported_and_loaded_and_all_the_way_round(shapeless, tmp_path, kind, tokenizer):
    from sentence_transformers import SentenceTransformer

    make(tmp_path / "model", kind, torch.bfloat16)
    save_tokenizer(tmp_path / "model", tokenizer)
    code, out, err = train(shapeless, tmp_path / "run", f"--init_from={tmp_path}/model", *SHORT)
    assert code == 0, err
    encoder = Encoder.load(tmp_path / "run")
    assert (encoder.dims, encoder.model.lm_head, encoder.max_tokens) == ([64], None, 48 if "window" in kind else 64)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", tmp_path / "run", encoder, "float32")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert (
        SentenceTransformer(str(tmp_path / "out"), device="cpu").tokenizer(TEXTS[4])["input_ids"]
        == encoder.tokenizer.encode_texts(TEXTS[4:], 99)[0]
    )

    config = adopted(tmp_path, tmp_path / "out")
    model = Transformer(config.model, 0, "float32")
    llama.load_weights(tmp_path / "out", model)
    again = Encoder(model, Ours.load(config.tokenizer.path), config.model.context, config.supervised.dims)
    (tmp_path / "again").mkdir()
    write(tmp_path / "again", tmp_path / "run", again, "float32")
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 8 and all(
        (tmp_path / "out" / path).read_bytes() == (tmp_path / "again" / path).read_bytes() for path in files
    )

    shutil.rmtree(tmp_path / "model")  # a run goes on without
    shutil.rmtree(tmp_path / "run/checkpoints/supervised-00000003")
    code, out, err = train(shapeless, tmp_path / "run", f"--init_from={tmp_path}/model", *SHORT)
    assert code == 0 and "resuming after step 3 of weak" in out, err


def test_a_start_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="init_from is .*/absent.gguf', which does not exist"):
        adopted(tmp_path, tmp_path / "absent.gguf", f"--out_dir={tmp_path}/run")


def test_the_readmes_command_is_taken(tmp_path):
    make(tmp_path / "model", "llama")
    save_tokenizer(tmp_path / "model")
    (command,) = re.findall(
        r"^    torchrun conan_engine/train.py (configs/finetune.toml .*)$",
        (ROOT / "README.md").read_text().replace("\\\n", ""),
        re.MULTILINE,
    )
    path, *options = shlex.split(command.replace("FOLDER", str(tmp_path / "model")))
    config = load(ROOT / path, [*options, "--weak.max_tokens=64", "--supervised.max_tokens=64"])
    assert (config.model.width, config.supervised.dims, config.tokenizer.path) == (
        64,
        [64],
        f"{tmp_path}/model/tokenizer.json",
    )
    with pytest.raises(UserError, match="weak.max_tokens is 512; expected 1 to model.context = 64"):
        load(ROOT / path, options)


def test_a_run_brings_its_shape_and_tokenizer_too(shapeless, untrained_run, tmp_path):
    code, out, err = train(
        shapeless, tmp_path / "run", f"--init_from={untrained_run}", "--stages=['weak']", "--weak.steps=1"
    )
    assert code == 0, err
    assert Encoder.load(tmp_path / "run").dims == [8, 16, 32]


def test_a_tokenizer_with_more_tokens_than_the_table_is_named(shapeless, untrained_run, tmp_path):
    make(tmp_path / "model", "llama")
    one_line(
        train(
            shapeless,
            tmp_path / "run",
            f"--init_from={tmp_path}/model",
            "--stages=['weak']",
            f"--tokenizer.path={untrained_run}/tokenizer.model",
        ),
        "its 600 tokens are more than model.vocab_size = 512",
    )


def test_what_a_model_does_not_say_is_asked_of_the_kind(tmp_path):
    make(tmp_path / "model", "llama")
    path = tmp_path / "model/config.json"
    about = json.loads(path.read_text())
    for key in ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_parameters", "rms_norm_eps"):
        about.pop(key, None)
    path.write_text(json.dumps(about))
    found, dims = pretrained.of_transformers(tmp_path / "model")
    assert (found["kv_heads"], found["head_dim"], found["tied"], found["rope_theta"], found["norm_eps"], dims) == (
        4,
        0,
        False,
        1e4,
        1e-6,
        None,
    )


def gguf_of(folder, tokenizer="begin", kind="llama"):
    """A GGUF file of a random model and a tokenizer."""
    theirs = make(folder, kind)
    save_tokenizer(folder, tokenizer)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_tokens([f"[{i}]" for i in range(library.get_vocab_size(), SHAPE["vocab_size"])])
    return write_model(
        folder / "model.gguf",
        theirs,
        "Q8_0",
        of_library(library, "gpt-2", "<|end_of_text|>", "<|begin_of_text|>", add_bos=tokenizer == "begin"),
    )


@pytest.mark.slow
def test_a_gguf_file_is_trained_exported_and_started_from_again(shapeless, tmp_path):
    from sentence_transformers import SentenceTransformer

    (tmp_path / "model").mkdir()
    path = gguf_of(tmp_path / "model")
    options = [f"--init_from={path}", "--init_layers=[1, 0]"]
    code, out, err = train(shapeless, tmp_path / "run", *options, *SHORT)
    assert code == 0, err
    encoder = Encoder.load(tmp_path / "run")
    assert encoder.tokenizer.encode_texts(["x"], 9)[0][0] == encoder.tokenizer.library.token_to_id("<|begin_of_text|>")
    for name, write_form in (("st", write), ("gguf", write_gguf)):
        (tmp_path / name).mkdir()
        write_form(tmp_path / name, tmp_path / "run", encoder, "float32")
    theirs = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)

    again = adopted(tmp_path, next((tmp_path / "gguf").iterdir()))
    model = Transformer(again.model, 0, "float32")
    llama.load_weights(again.init_from, model)
    np.testing.assert_allclose(
        Encoder(model, Ours.load(again.tokenizer.path), 64, [64]).encode(TEXTS), encoder.encode(TEXTS), atol=1e-5
    )

    path.unlink()  # a run goes on without
    shutil.rmtree(tmp_path / "run/checkpoints/supervised-00000003")
    code, out, err = train(shapeless, tmp_path / "run", *options, *SHORT)
    assert code == 0 and "resuming after step 3 of weak" in out, err


@pytest.mark.slow
def test_some_layers_of_a_run_with_adapters_on_some_layers_of_a_file(shapeless, tmp_path):
    (tmp_path / "model").mkdir()
    path = gguf_of(tmp_path / "model", kind="llama, tied")
    short = ["--stages=['weak']", "--weak.steps=2", "--weak.lr=1e-2"]
    code, _, err = train(
        shapeless, tmp_path / "run", f"--init_from={path}", "--init_layers=[1, 0, 1]", "--lora.rank=2", *short
    )
    assert code == 0, err
    whole = Encoder.load(tmp_path / "run").model
    config = adopted(tmp_path, tmp_path / "run", "--init_layers=[2, 0]")
    model = Transformer(config.model, 0, "float32")
    checkpoint.start_from(
        config.init_from, model, Ours.load(config.tokenizer.path), layers=chosen_layers(config.init_layers)
    )
    whole.blocks = torch.nn.ModuleList([whole.blocks[2], whole.blocks[0]])
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        torch.testing.assert_close(p, q, msg=name)
    assert not torch.equal(whole.blocks[0].qkv.weight, whole.blocks[1].qkv.weight)

    code, _, err = train(shapeless, tmp_path / "more", f"--init_from={tmp_path}/run", "--init_layers=first:2", *short)
    assert code == 0 and len(Encoder.load(tmp_path / "more").model.blocks) == 2, err


def test_init_layers_and_a_gguf_files_shape_and_tokenizer(tmp_path):
    path = gguf_of(tmp_path)
    config = adopted(tmp_path, path, "--init_layers=first:1")
    assert (config.model.layers, config.model.width, config.supervised.dims, config.tokenizer.path) == (
        1,
        64,
        [64],
        str(path),
    )
    assert adopted(tmp_path, path, "--init_layers=[1, 0, 1]").model.layers == 3
    assert Ours.load(path).hash == Ours.load(config.tokenizer.path).hash


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--init_layers=first:3"], "init_layers is 'first:3'; the model in {} has 2 layers, 0 to 1"),
        (["--init_layers=[0, 2]"], "init_layers is [0, 2]; the model in {} has 2 layers, 0 to 1"),
        (
            ["--init_layers=last:1"],
            "init_layers is 'last:1'; expected \"first:8\" (the first 8), or a list of layers counted from 0",
        ),
        (["--init_layers=first:0"], "init_layers is 'first:0'; expected"),
        (["--init_layers=[-1]"], "init_layers is [-1]; expected"),
        (["--init_layers=1"], "init_layers is 1; expected str or a list of int"),
        (["--init_layers=first:1", "--init_from="], "init_layers is 'first:1'; it needs init_from"),
        (["--init_layers=first:1", "--model.layers=2"], "model.layers is 2; the model in {} has 1"),
    ],
)
def test_layers_that_there_are_not(tmp_path, options, said):
    make(tmp_path / "model", "llama")
    with pytest.raises(UserError) as error:
        adopted(tmp_path, tmp_path / "model", *options)
    assert said.format(tmp_path / "model") in str(error.value)
