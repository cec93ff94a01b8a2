"""A tokenizer is what its tokenizer.json says, and its files travel as they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from flatq.artifact import Artifact, tokenizer_in
from flatq.errors import ArtifactError, RecipeError
from flatq.report.render import read_report
from flatq.sources.source import open_model
from flatq.tokenizer import (
    beyond,
    chat_templates,
    companions,
    deliver_companions,
    generation_settings,
    open_tokenizer,
    save,
)
from tests.conftest import GPTQ, MakeRecipe, digests, flatq
from tests.exporters.test_gguf_tokenizer import byte_level

TEXT = "In 2024, Release 3.11:\n\n\tthe 1st  10 items…"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
BROKEN = '{"model": {"type": "BPE'
Edit = Callable[[Path], Any]


def by_words() -> Tokenizer:
    tokenizer = byte_level()
    cut = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|\p{L}+|[^\s\p{L}\p{N}]+"), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, last])
    return tokenizer


def digit_by_digit() -> Tokenizer:
    return byte_level(digits=True)


def lowered() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def truncating() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    return tokenizer


def folder_with(root: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    return root


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("make", [by_words, digit_by_digit, lowered, byte_level])
def test_it_cuts_as_tokenizer_json_says_whatever_class_is_named(
    tmp_path: Path, make: Callable[[], Tokenizer], kind: str | None
) -> None:
    made = make()
    extra = {"add_bos_token": True, "add_prefix_space": True, "pad_token": "<never seen>", "eos_token": "<|end|>"}
    opened = open_tokenizer(folder_with(tmp_path, made, tokenizer_class=kind, **extra))
    assert opened.backend_tokenizer.to_str() == made.to_str()
    assert opened(TEXT)["input_ids"] == made.encode(TEXT).ids
    assert (opened.eos_token_id, opened.pad_token_id) == (made.token_to_id("<|end|>"), None)


def test_training_settings_of_length_do_not_cut_texts(tmp_path: Path) -> None:
    opened = open_tokenizer(folder_with(tmp_path, truncating()))
    assert opened(TEXT)["input_ids"] == byte_level().encode(TEXT).ids


@pytest.mark.parametrize("stated", ["<|end|>", {"content": "<|end|>", "lstrip": False, "__type": "AddedToken"}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_are_read_in_every_spelling(tmp_path: Path, stated: Any, file: str) -> None:
    root = folder_with(tmp_path, byte_level())
    (root / file).write_text(json.dumps({"eos_token": stated}))
    assert open_tokenizer(root).eos_token == "<|end|>"


def as_list(root: Path) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools" + TEMPLATE}]
    folder_with(root, byte_level(), chat_template=named)


def as_folder(root: Path) -> None:
    folder_with(root, byte_level(), chat_template="not this one")
    (root / "chat_template.jinja").write_text(TEMPLATE)
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates" / "tool_use.jinja").write_text("tools" + TEMPLATE)


def as_text(root: Path) -> None:
    folder_with(root, byte_level(), chat_template=TEMPLATE)


@pytest.mark.parametrize("edit", [as_list, as_folder])
def test_several_chat_templates_are_read_as_transformers_reads_them(tmp_path: Path, edit: Edit) -> None:
    edit(tmp_path)
    assert chat_templates(tmp_path) == {"default": TEMPLATE, "tool_use": "tools" + TEMPLATE}
    assert chat_templates(tmp_path) == AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert open_tokenizer(tmp_path).chat_template == TEMPLATE


@pytest.mark.parametrize("stated", [7, [TEMPLATE], [{"name": "default"}], [{"name": 3, "template": TEMPLATE}]])
def test_a_chat_template_of_another_shape_is_refused(tmp_path: Path, stated: Any) -> None:
    folder_with(tmp_path, byte_level(), chat_template=stated)
    with pytest.raises(RecipeError, match="chat_template is neither"):
        open_tokenizer(tmp_path)


GENERATION = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}


def dressed(root: Path) -> dict[str, str]:
    """A model's folder with everything that can stand beside the weights; digests of those files."""
    described = json.loads((root / "tokenizer.json").read_text())
    (root / "tokenizer.json").write_text(json.dumps(described, indent=1) + "\n\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unknown key": [1]}
    (root / "tokenizer_config.json").write_text(json.dumps(settings, indent=3))
    (root / "special_tokens_map.json").write_text('{"eos_token":   "</s>"}')
    (root / "chat_template.jinja").write_text(TEMPLATE + "\r\n")
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates" / "tool_use.jinja").write_text("tools" + TEMPLATE)
    (root / "generation_config.json").write_text(json.dumps(GENERATION, indent=7))
    return {name: digest for name, digest in digests(root).items() if root / name in companions(root)}


def test_all_of_it_travels_byte_for_byte_into_artifact_and_exports(
    model_copy: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    wanted, out = dressed(model_copy), tmp_path / "out"
    assert len(wanted) == 6
    exports = [
        {"safetensors": {"name": "hf", "format": "fp32"}},
        {"onnx": {"name": "genai", "target": "genai", "precision": "fp32"}},
        {"onnx": {"name": "optimum", "target": "optimum", "precision": "fp32"}},
    ]
    shown = flatq("run", make_recipe(model=str(model_copy), stages=[], exports=exports), "--out", out)
    assert shown.exit_code == 0, shown.stderr
    for place in ("artifact", "exports/hf", "exports/genai", "exports/optimum"):
        assert wanted.items() <= digests(out / place).items(), place
    artifact = Artifact.open(out)
    artifact.verify()
    assert wanted.items() <= artifact.manifest["files"].items()
    assert set(wanted) <= set(artifact.manifest["source"]["files"])
    genai = json.loads((out / "exports/genai/genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == [1, 2]
    assert genai["search"].items() >= {"do_sample": True, "temperature": 0.6, "top_p": 0.9}.items()
    assert genai["search"]["repetition_penalty"] == 1.05
    report = json.loads((out / "report.json").read_text())
    assert not [note for export in report["exports"] for note in export["notes"] if "tokenizer_config" in note]
    (out / "artifact" / "additional_chat_templates" / "tool_use.jinja").write_text("damaged")
    with pytest.raises(ArtifactError, match=r"additional_chat_templates/tool_use\.jinja"):
        artifact.verify()


def test_generation_settings_come_before_the_configuration(model_copy: Path) -> None:
    assert open_model(str(model_copy)).settings()["eos_token_id"] == 1
    (model_copy / "generation_config.json").write_text(json.dumps(GENERATION))
    assert open_model(str(model_copy)).settings() == {"bos_token_id": 0, "eos_token_id": [1, 2]}


def test_settings_that_only_transformers_5_opens_are_changed_in_exports_and_listed(tmp_path: Path) -> None:
    stated = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "eos_token": "</s>"}
    root = folder_with(tmp_path / "model", byte_level(), **stated)
    (tmp_path / "out").mkdir()
    written, changes = deliver_companions(root, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    wanted = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"], "eos_token": "</s>"}
    assert settings == wanted
    assert len(changes) == 2
    assert all(change.startswith("tokenizer_config.json: ") for change in changes)
    assert {path.name for path in written} == {"tokenizer.json", "tokenizer_config.json"}


def test_code_of_its_own_is_not_needed_where_tokenizer_json_is(model_copy: Path, make_recipe: MakeRecipe) -> None:
    settings = {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (model_copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_tokenizer(model_copy)("stone")["input_ids"]
    shown = flatq("check", make_recipe(model=str(model_copy)))
    assert shown.exit_code == 0
    assert "! tokenizer_config.json: in exports auto_map is removed" in shown.stdout


def test_a_tokenizer_without_a_folder_is_saved_for_transformers_4_and_5(tmp_path: Path) -> None:
    opened = open_tokenizer(folder_with(tmp_path / "model", digit_by_digit(), eos_token="<|end|>"))
    opened.chat_template = TEMPLATE
    (tmp_path / "out").mkdir()
    save(opened, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not any(isinstance(value, list) for value in settings.values())
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(TEXT)["input_ids"] == opened(TEXT)["input_ids"]
    assert (again.eos_token, again.chat_template) == ("<|end|>", TEMPLATE)


def test_vocabulary_and_merges_become_a_tokenizer_json(model_copy: Path, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    for path in companions(model_copy):
        path.unlink()
    assert isinstance(tokenizer.model, models.BPE)
    tokenizer.model.save(str(model_copy))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "bos_token": None, "unk_token": None}
    (model_copy / "tokenizer_config.json").write_text(json.dumps(settings))
    source = open_model(str(model_copy))
    (tmp_path / "out").mkdir()
    source.carry_tokenizer(tmp_path / "out")
    before, after = digests(model_copy), digests(tmp_path / "out")
    assert {
        name: before[name] for name in ("vocab.json", "merges.txt", "tokenizer_config.json")
    }.items() <= after.items()
    assert tokenizer_in(tmp_path / "out")(TEXT)["input_ids"] == tokenizer.encode(TEXT).ids


def write(name: str, content: str) -> Edit:
    def edit(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)

    return edit


def only_pieces(root: Path) -> None:
    for path in companions(root):
        path.unlink()
    (root / "tokenizer.model").write_bytes(b"no sentencepiece model")


def own_code(root: Path) -> None:
    only_pieces(root)
    write("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.X", null]}}')(root)


def nothing(root: Path) -> None:
    for path in companions(root):
        path.unlink()


FAULTS: dict[str, tuple[Edit, str]] = {
    "pieces only": (only_pieces, "tokenizer.model: reading it needs the package sentencepiece"),
    "code": (own_code, "its tokenizer needs code of the model folder"),
    "nothing": (nothing, "has no tokenizer; add tokenizer.json"),
    "pointer": (write("tokenizer.json", POINTER), "tokenizer.json: a Git LFS pointer"),
    "truncated": (write("tokenizer.json", BROKEN), "tokenizer.json: damaged"),
    "other": (write("tokenizer.json", "{}"), "tokenizer.json: damaged, or not of the tokenizers library"),
    "settings": (write("tokenizer_config.json", BROKEN), "tokenizer_config.json: is damaged"),
    "settings list": (
        write("tokenizer_config.json", "[]"),
        "is damaged (Input should be a valid dict",
    ),
    "settings pointer": (
        write("tokenizer_config.json", POINTER),
        "tokenizer_config.json: is damaged (it is a Git LFS",
    ),
    "special tokens": (write("special_tokens_map.json", BROKEN), "special_tokens_map.json: is damaged"),
    "end token": (write("tokenizer_config.json", '{"eos_token": 2}'), "eos_token is 2"),
    "generation": (write("generation_config.json", BROKEN), "generation_config.json: is damaged"),
    "generation pointer": (
        write("generation_config.json", POINTER),
        "generation_config.json: is damaged (it is a Git LFS",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_tokenizer_that_cannot_be_opened_is_refused_by_check_plan_and_run(
    name: str, model_copy: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    edit, words = FAULTS[name]
    edit(model_copy)
    recipe = make_recipe(model=str(model_copy))
    for arguments in (("check", recipe), ("plan", recipe), ("run", recipe, "--out", tmp_path / "out")):
        shown = flatq(*arguments)
        assert shown.exit_code == 2, shown.stdout
        assert len(shown.stderr.strip().splitlines()) == 1
        assert words in shown.stderr
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def added(root: Path, *, everywhere: bool = False) -> None:
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|tool|>"])
    if everywhere:
        from tokenizers import processors

        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|tool|> $A", special_tokens=[("<|tool|>", tokenizer.token_to_id("<|tool|>"))]
        )
    tokenizer.save(str(root / "tokenizer.json"))


def test_a_token_without_an_embedding_is_told_and_refused_where_it_is_used(
    model_copy: Path, make_recipe: MakeRecipe, text_file: Path, tmp_path: Path
) -> None:
    added(model_copy)
    assert beyond(open_tokenizer(model_copy), 320) == {320: "<|tool|>"}
    recipe = make_recipe(model=str(model_copy), stages=[GPTQ])
    for verb in ("check", "plan"):
        assert "too few for '<|tool|>' (id 320)" in flatq(verb, recipe).stdout
    assert flatq("run", recipe, "--out", tmp_path / "fine").exit_code == 0
    assert "too few for '<|tool|>' (id 320)" in " ".join(read_report(tmp_path / "fine" / "report.json").notes)
    shown = flatq("generate", tmp_path / "fine", "--prompt", "a <|tool|> b", "--new-tokens", "2")
    assert shown.exit_code == 2
    assert "the prompt holds the token '<|tool|>' (id 320)" in shown.stderr
    (tmp_path / "with.txt").write_text(text_file.read_text().replace("stone", "<|tool|>"))
    usual = yaml.safe_load(recipe.read_text())["calibration"]
    other = make_recipe(
        "other", model=str(model_copy), stages=[GPTQ], calibration={**usual, "path": str(tmp_path / "with.txt")}
    )
    shown = flatq("run", other, "--out", tmp_path / "refused")
    assert shown.exit_code == 2
    assert "holds the token '<|tool|>' (id 320)" in shown.stderr


def test_a_token_without_an_embedding_that_stands_in_every_text_is_refused_early(
    model_copy: Path, make_recipe: MakeRecipe
) -> None:
    added(model_copy, everywhere=True)
    shown = flatq("check", make_recipe(model=str(model_copy)))
    assert shown.exit_code == 2
    assert "adds '<|tool|>' (id 320) to every text" in shown.stderr


def test_a_folder_without_generation_settings_has_none(tmp_path: Path) -> None:
    assert generation_settings(tmp_path) == {}
