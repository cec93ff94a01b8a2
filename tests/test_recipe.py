"""The grammar of recipes: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from flatq.errors import RecipeError
from flatq.recipe.blocks import EvaluationSpec, rows_by_share
from flatq.recipe.grammar import FlatSpec, GptqSpec, Recipe, Spec, explain_options, json_schema
from flatq.recipe.messages import shown
from flatq.recipe.rules import MOST_TOKENS

WHOLE = """\
version: 1
model: meta-llama/Llama-2-7b-hf
calibration: {dataset: wikitext2, samples: 128, seq_len: 2048, seed: 42}
stages:
  - flat: {keep_ratio: 0.7, allocation: iprs}
  - gptq: {bits: 4, group_size: 128, symmetric: true}
exports:
  - onnx: {attention: reduced, precision: int4}
  - gguf: {}
bench: {provider: auto, prompt: 128, new_tokens: 64, baseline: true}
"""
START = "version: 1\nmodel: m\n"


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "r.yaml")
    return caught.value.problems


def only_problem(text: str) -> str:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


# Accepted


def test_a_whole_recipe_is_read_as_written() -> None:
    recipe = Recipe.parse(WHOLE, "recipes/whole.yaml")
    assert recipe.model.path == "meta-llama/Llama-2-7b-hf"
    assert recipe.calibration.samples == 128
    assert [stage.kind for stage in recipe.stages] == ["flat", "gptq"]
    assert recipe.flat == FlatSpec(keep_ratio=0.7, allocation="iprs")
    assert recipe.gptq == GptqSpec(bits=4)
    assert [(export.format, export.name) for export in recipe.exports] == [("onnx", "onnx"), ("gguf", "gguf")]
    assert recipe.exports[0].options == {"attention": "reduced", "precision": "int4"}
    assert recipe.bench is not None
    assert recipe.bench.repeats == 5
    assert (recipe.name, recipe.text) == ("whole", WHOLE)


def test_a_stage_or_an_export_alone_is_a_recipe() -> None:
    alone = Recipe.parse(START + "exports: [{gguf: {}}]")
    assert (alone.flat, alone.gptq, alone.bench) == (None, None, None)
    assert Recipe.parse(START + "stages: [{gptq: {}}]").exports == ()


def test_a_model_can_be_spelt_out() -> None:
    recipe = Recipe.parse("version: 1\nmodel: {path: a/b, revision: abc, dtype: float16}\nexports: [{gguf: {}}]")
    expected = {"path": "a/b", "revision": "abc", "dtype": "float16", "context_length": None}
    assert recipe.model.model_dump() == expected


@pytest.mark.parametrize("ratio", ["1", "1.0", "1e-3", ".5", "0.001"])
def test_the_share_kept_is_any_number_above_zero_up_to_one(ratio: str) -> None:
    recipe = Recipe.parse(START + f"stages: [{{flat: {{keep_ratio: {ratio}}}}}]")
    assert recipe.flat is not None
    assert recipe.flat.keep_ratio == float(ratio)


def test_a_leading_zero_is_no_octal_number() -> None:
    recipe = Recipe.parse(START + "calibration: {dataset: c4, samples: 010}\nexports: [{gguf: {}}]")
    assert recipe.calibration.samples == 10


def test_two_exports_of_one_format_need_names_of_their_own() -> None:
    recipe = Recipe.parse(START + "exports: [{onnx: {name: a, q: 1}}, {onnx: {name: b}}]")
    assert [(export.name, export.options) for export in recipe.exports] == [("a", {"q": 1}), ("b", {})]


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe.parse(WHOLE)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.version = 1  # type: ignore[misc]


def test_what_is_dumped_can_be_read_again() -> None:
    recipe = Recipe.parse(WHOLE)
    again = Recipe.parse(json.dumps(recipe.model_dump()))
    assert again.model_dump() == recipe.model_dump()


# Digest


def test_the_digest_ignores_comments_order_and_spelt_out_defaults() -> None:
    plain = Recipe.parse(START + "stages: [{gptq: {bits: 4}}]", "a.yaml")
    other = Recipe.parse("# why\nmodel: {path: m}\nstages: [{gptq: {damping: 1e-2}}]\nversion: 1", "b.yaml")
    assert plain.digest() == other.digest()
    assert len(plain.digest()) == 64


@pytest.mark.parametrize(("old", "new"), [("0.7", "0.71"), ("42", "43"), ("gguf", "safetensors"), ("reduced", "gqa")])
def test_the_digest_changes_with_every_value(old: str, new: str) -> None:
    assert Recipe.parse(WHOLE).digest() != Recipe.parse(WHOLE.replace(old, new)).digest()


# Refused, one by one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{flat: {keep_ratio: 0}}]", "stages[0].flat.keep_ratio: 0 is not allowed; a number in (0, 1]"),
        ("stages: [{flat: {keep_ratio: 1.01}}]", "a number in (0, 1]"),
        ("stages: [{flat: {keep_ratio: 70}}]", "70 is not allowed; a number in (0, 1] or null; did you mean 0.7 (the "),
        ("stages: [{flat: {keep_ratio: '0.7'}}]", "'0.7' is not allowed; a number in (0, 1]"),
        ("stages: [{flat: {keep_ratio: .nan}}]", "'.nan' is not allowed"),
        ("stages: [{flat: {keep_ratio: 1e999}}]", "'1e999' is not allowed"),
        ("stages: [{flat: {}}]", "stages[0].flat: no budget given; exactly one of keep_ratio: 0.8, size: 90MB, "),
        ("stages: [{flat: {keep_ratio: 1, size: 9MB}}]", "stages[0].flat: keep_ratio and size given; exactly one of "),
        ("stages: [{flat: {size: 90}}]", "flat.size: '90' is not allowed; a size above 0 with its unit, such as 90MB"),
        ("stages: [{flat: {size: 0.0MB}}]", "flat.size: '0.0MB' is not allowed; a size above 0 with its unit"),
        ("stages: [{flat: {size: 90 Mbit}}]", "flat.size: '90 Mbit' is not allowed; a size above 0 with its unit"),
        ("stages: [{flat: {keep_ratio: 1, context: 9}}]", "flat.context: only read with decode_bytes; remove it"),
        ("stages: [{flat: }]", "stages[0].flat: null is not allowed; a mapping with the keys keep_ratio, "),
        ("stages: [{flat: {keep_ratio: 1, rank_multiple: 0}}]", "a whole number in [1, 256]"),
        ("stages: [{flat: {keep_ratio: 1, rank_multiple: 257}}]", "a whole number in [1, 256]"),
        ("stages: [{flat: {keep_ratio: 1, ridge: 0}}]", "a number > 0"),
        ("stages: [{flat: {keep_ratio: 1, uniform: true, allocation: iprs}}]", "flat.uniform: iprs allocates by layer"),
        ("stages: [{flat: {keep_ratio: 1, values: all}}]", "'all' is not allowed; one of output, pca, whole"),
        ("stages: [{gptq: {groupsize: 1}}]", "gptq.groupsize: unknown key; did you mean 'group_size'? allowed: bits, "),
        ("stages: [{gptq: {bits: 5}}]", "5 is not allowed; one of 2, 3, 4, 8"),
        ("stages: [{gptq: {bits: 4.5}}]", "4.5 is not allowed; one of 2, 3, 4, 8"),
        ("stages: [{gptq: {bits: [4]}}]", "a list is not allowed; one of 2, 3, 4, 8"),
        ("stages: [{gptq: {group_size: 0}}]", "one of -1, 16, 32, 64, 128, 256, 512, 1024"),
        ("stages: [{gptq: {symmetric: no}}]", "'no' is not allowed; true or false"),
        ("stages: [{gptq: {symmetric: 1}}]", "1 is not allowed; true or false"),
        ("stages: [{gptq: {damping: 1}}]", "a number in (0, 1)"),
        ("stages: [{gptq: {embedding: {bits: 3}}}]", "stages[0].gptq.embedding.bits: 3 is not allowed; one of 4, 8"),
        ("stages: [{gptq: {embedding: true}}]", "true is not allowed; a mapping with the keys bits, group_size or "),
        ("stages: [{gpqt: {}}]", "stages[0]: unknown key; did you mean 'gptq'? allowed: flat, gptq"),
        ("stages: [gptq]", "'gptq' is not allowed; a mapping with one key, flat or gptq"),
        ("stages: [{flat: {keep_ratio: 1}, gptq: {}}]", "a mapping with one key, flat or gptq"),
        ("stages: 1", "1 is not allowed; a list"),
        ("stages: [{gptq: {}}, {flat: {keep_ratio: 1}}]", "stages[1]: flat comes after gptq"),
        (
            "stages: [{flat: {keep_ratio: 0.8}}, {gptq: {correction: 0.5}}]",
            "stages[1].gptq.correction: the flat stage already corrects 0.5 of the error with respect to",
        ),
        (
            "stages: [{flat: {keep_ratio: 0.8, method: paper, correction: 0.1}}, {gptq: {correction: 1}}]",
            "already corrects 0.1 of the error with respect to the dense",
        ),
        ("stages: [{gptq: {tune_steps: -1}}]", "gptq.tune_steps: -1 is not allowed; a whole number in [0, "),
        (
            "stages: [{gptq: {correction: 0.5, tune_steps: 9}}]",
            "stages[0].gptq.tune_steps: trains towards the outputs before rounding, which undoes `correction`",
        ),
        (
            "calibration: {dataset: c4, samples: 1}\nstages: [{gptq: {tune_steps: 8}}]",
            "stages[0].gptq.tune_steps: a tenth of the sequences is held out of the training; set calibration",
        ),
        ("stages: [{gptq: {correction: 1.5}}]", "1.5 is not allowed; a number in [0, 1]"),
        ("stages: [{gptq: {}}, {gptq: {}}]", "stages[1]: a second gptq stage; keep one"),
        ("stages: [{recover: {}}]", "stages[0]: nothing to recover; add `- flat: {...}` or `- gptq: {...}` before it"),
        ("stages: [{recover: {}}, {gptq: {}}]", "stages[0]: recover comes before a stage that changes the weights"),
        ("stages: [{gptq: {}}, {recover: {}}, {recover: {}}]", "stages[2]: a second recover stage; keep one"),
        ("stages: [{gptq: {}}, {recover: {steps: -1}}]", "-1 is not allowed; a whole number in [0, "),
        ("stages: [{gptq: {}}, {recover: {samples: 1}}]", "samples: 1 is not allowed; a whole number in [2, "),
        ("stages: [{gptq: {}}, {recover: {learning_rate: 0}}]", "0 is not allowed; a number in (0, 0.1]"),
        (
            "budget: {max_damage: 0.1}\nstages: [{gptq: {}}, {recover: {}}]",
            "stages[1]: max_damage is searched by walks without it; remove this stage, or give a size",
        ),
        ("stages: []", "nothing to do; add at least one stage or one export"),
        ("exports: [onnx]", "exports[0]: 'onnx' is not allowed; one format with its options, as in `- onnx: {}`"),
        ("exports: [{onnx: }]", "one format with its options"),
        ("exports: [{onnx: {name: ../x}}]", "exports[0].onnx.name: '../x' is no plain folder name"),
        ("exports: [{onnx: {name: 3}}]", "exports[0].onnx.name: 3 is no plain folder name"),
        ("exports: [{.onnx: {}}]", "exports[0]: '.onnx' is no plain folder name"),
        ("exports: [{onnx: {}}, {onnx: {}}]", "exports[1]: a second export is called 'onnx'"),
        ("exports: [{onnx: {}}, {gguf: {name: ONNX}}]", "exports[1].gguf.name: a second export is called 'ONNX'"),
        ("bench: {threads: -1}\nexports: [{gguf: {}}]", "bench.threads: -1 is not allowed; a whole number in [0, "),
        ("bench: {batch: true}\nexports: [{gguf: {}}]", "true is not allowed; a whole number"),
        ("calibration: {}\nexports: [{gguf: {}}]", "calibration: no text; give `dataset:`, or `mix:` with several"),
        ("calibration: {dataset: wikitext}\nexports: [{gguf: {}}]", "did you mean 'wikitext2'?"),
        ("calibration: {dataset: text}\nexports: [{gguf: {}}]", "calibration: dataset text needs `path:`"),
        ("calibration: {dataset: text, path: a.csv}\nexports: [{gguf: {}}]", "ends in .txt or .jsonl"),
        ("calibration: {dataset: c4, path: a.txt}\nexports: [{gguf: {}}]", "only read with `dataset: text`"),
        ("calibration: {dataset: c4, mix: [{dataset: self, share: 1}]}\nexports: [{gguf: {}}]",
         "calibration.dataset: excluded by `mix:`; remove one of the two"),
        ("calibration: {field: x, mix: [{dataset: self, share: 1}]}\nexports: [{gguf: {}}]",
         "calibration.field: excluded"),
        ("calibration: {mix: [{dataset: self}]}\nexports: [{gguf: {}}]",
         "calibration.mix[0].share: missing; a number > 0"),
        ("calibration: {mix: [{dataset: self, share: 0}]}\nexports: [{gguf: {}}]", "0 is not allowed; a number > 0"),
        ("calibration: {mix: [{dataset: text, share: 1}]}\nexports: [{gguf: {}}]",
         "mix[0]: dataset text needs `path:`"),
        ("calibration: {mix: [{dataset: self, share: 1}, {dataset: self, share: 2}]}\nexports: [{gguf: {}}]",
         "calibration.mix[1]: a second part of the same text; add its share to the first"),
        ("calibration: {samples: 4, mix: [{dataset: self, share: 9}, {dataset: c4, share: 1}]}\nexports: [{gguf: {}}]",
         "calibration.mix[1].share: 1 of 10 is less than one of 4 samples; raise samples or this share"),
        ("calibration: {mix: 1}\nexports: [{gguf: {}}]", "calibration.mix: 1 is not allowed; a list"),
        ("calibration: {dataset: text, path: a.txt, chat_template: true}\nexports: [{gguf: {}}]",
         "calibration.chat_template: only read with `dataset: text` and a .jsonl file"),
        ("evaluation: []\nexports: [{gguf: {}}]", "evaluation: [] is not allowed; a mapping with the keys"),
        ("evaluation: 7\nexports: [{gguf: {}}]", "evaluation: 7 is not allowed; a mapping with the keys"),
        ("evaluation: {tokenz: 7}\nexports: [{gguf: {}}]", "evaluation.tokenz: unknown key; did you mean 'tokens'?"),
        ("evaluation: [{dataset: c4}, {dataset: bog}]\nexports: [{gguf: {}}]",
         "evaluation[1].dataset: 'bog' is not allowed"),
        ("evaluation: [{dataset: c4, tokens: 9}]\nexports: [{gguf: {}}]",
         "evaluation[0].tokens: 9 is not allowed; at least"),
        ("evaluation: [{dataset: c4, name: a}, {dataset: self, name: a}]\nexports: [{gguf: {}}]",
         "evaluation[1].name: a second text is called 'a'; give each its own"),
        ("evaluation: {name: a}\nexports: [{gguf: {}}]",
         "evaluation.name: one name for two texts; write `dataset: held-out`"),
        ("evaluation: {tokens: 100}\nexports: [{gguf: {}}]", "evaluation.tokens: 100 is not allowed; at least one"),
        (
            "calibration: {dataset: c4, samples: 100000, seq_len: 4096}\nexports: [{gguf: {}}]",
            f"409,600,000 tokens; at most {MOST_TOKENS:,}",
        ),
        ("modle: x\nexports: [{gguf: {}}]", "modle: unknown key; did you mean 'model'? allowed: version, model, "),
        ("xyzzy: x\nexports: [{gguf: {}}]", "xyzzy: unknown key; allowed: version, model, "),
        ("<<: {a: 1}\nexports: [{gguf: {}}]", "'<<': unknown key"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_what_is_allowed(text: str, message: str) -> None:
    assert message in only_problem(START + text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1: recipe: null is not allowed; a mapping with the keys version, model, "),
        ("- 1", "a list is not allowed"),
        ("version: 2\nmodel: m\nexports: [{gguf: {}}]", "version: 2 is not allowed; 1"),
        ("version: '1'\nmodel: m\nexports: [{gguf: {}}]", "version: '1' is not allowed; 1"),
        ("version: 1\nmodel: ''\nexports: [{gguf: {}}]", "model.path"),
        ("version: 1\nexports: [{gguf: {}}]", "model: missing; text or a mapping with the keys path, revision, dtype"),
        ("a: &x 1\nb: *x", "r.yaml:1: anchors and aliases (& and *) are not allowed"),
        ("a: *x", "r.yaml:1: anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "tags are not allowed"),
        ("a: !!str 1", "tags are not allowed"),
        ("\n\na: b: c", "r.yaml:3: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "r.yaml:2: not valid YAML"),
        ("? [a]\n: 1", "cannot be a key"),
        ("a: \x07", "character 7 is not allowed"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ('a: "\\uD800"', "half a character"),
        ("%YAML 1." + "9" * 5000 + "\n---\na", "not valid YAML"),
        ("[" * 21, "nested deeper than 20 levels"),
        ("[" * 100_000, "nested deeper than 20 levels"),
        ("\n".join(" " * depth + "a:" for depth in range(30)), "r.yaml:20: nested deeper than 20 levels"),
        ("#" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_text_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    assert message in only_problem(text)


def test_twenty_levels_are_not_too_deep_to_read() -> None:
    found = problems("[" * 20 + "]" * 20)
    assert "nested" not in found[0]


def test_a_duplicate_key_is_told_with_its_own_line() -> None:
    assert (
        only_problem(START + "exports: [{gguf: {}}]\nmodel: n") == "r.yaml:4: model: duplicate key; keep one of the two"
    )


def test_every_mistake_is_told_at_once_in_the_order_of_the_file() -> None:
    found = problems(
        "version: 1\nmodel: m\ncalibration: {dataset: text, samples: 0}\nstages:\n  - gptq:\n      bits: 5\n"
        "      groupsize: 128\n  - flat: {keep_ratio: 70}\nexports:\n  - onnx: {}\n  - onnx: {}\nmodel: n\n"
    )
    places = [problem.split(": ", 2)[:2] for problem in found]
    assert places == [
        ["r.yaml:3", "calibration.samples"],
        ["r.yaml:3", "calibration"],
        ["r.yaml:6", "stages[0].gptq.bits"],
        ["r.yaml:7", "stages[0].gptq.groupsize"],
        ["r.yaml:8", "stages[1].flat.keep_ratio"],
        ["r.yaml:8", "stages[1]"],
        ["r.yaml:11", "exports[1]"],
        ["r.yaml:12", "model"],
    ]


def test_very_many_mistakes_are_counted_not_listed() -> None:
    found = problems(START + "exports: [{gguf: {}}]\n" + "\n".join(f"k{i}: 1" for i in range(1000)))
    assert len(found) == 51
    assert found[-1].endswith("and 950 problems more")


def test_a_control_character_in_a_key_is_not_printed_raw() -> None:
    assert "\x1b" not in only_problem(START + 'exports: [{gguf: {}}]\n"\\e[31m": "\\e[31m"')


def test_a_recipe_made_in_python_keeps_the_same_rules() -> None:
    with pytest.raises(ValidationError, match="flat comes after gptq"):
        Recipe(version=1, model="m", stages=(GptqSpec(), FlatSpec(keep_ratio=1)))  # type: ignore[arg-type]


# Files


def test_a_file_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(WHOLE, encoding="utf-8-sig")
    assert Recipe.load(file).digest() == Recipe.parse(WHOLE).digest()
    assert Recipe.load(file).name == "mine"


@pytest.mark.parametrize("name", ["missing.yaml", ".", "\0", "x" * 5000])
def test_a_place_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(os.fspath(tmp_path) + "/" + name)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("model: café".encode("latin-1"))
    with pytest.raises(RecipeError, match="byte 10 is not UTF-8"):
        Recipe.load(tmp_path / "r.yaml")


def test_a_large_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(RecipeError, match="larger than"):
        Recipe.load(tmp_path / "r.yaml")


# Whatever comes

lines = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from([*WHOLE.splitlines(), "  - flat:", "- &a", "*a", "{", "]", "? ", "|", "!!set", "%YAML 1.1"]),
    ),
    max_size=12,
).map("\n".join)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
keys = st.sampled_from(["version", "model", "stages", "exports", "flat", "gptq", "bits", "name", "path", "dataset"])
values = st.recursive(
    scalars, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(keys, v, max_size=3)), max_leaves=12
)


def outcome(text: str) -> Recipe | list[str]:
    """The recipe or its problems; any other exception fails the test."""
    try:
        return Recipe.parse(text, "r.yaml")
    except RecipeError as error:
        return error.problems


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), lines, values.map(lambda v: yaml.safe_dump(v, allow_unicode=True))))
def test_whatever_the_text_nothing_but_a_recipe_error_is_raised(text: str) -> None:
    read = outcome(text)
    if isinstance(read, Recipe):
        assert len(read.digest()) == 64
    else:
        assert read
        assert all(problem.startswith("r.yaml:") for problem in read)


@settings(max_examples=100, deadline=None)
@given(keys, values)
def test_whatever_the_value_of_a_key_nothing_but_a_recipe_error_is_raised(key: str, value: Any) -> None:
    whole = yaml.safe_load(WHOLE) | {key: value}
    read = outcome(json.dumps(whole))
    assert isinstance(read, Recipe) or read


# Options of exporters


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    precision: str = "int4"
    opset: int = 23


def test_what_an_exporter_refuses_is_told_like_a_mistake_of_the_recipe() -> None:
    recipe = Recipe.parse(START + "exports:\n  - gguf: {}\n  - onnx:\n      opset: x\n      precison: int4\n", "r.yaml")
    with pytest.raises(ValidationError) as refused:
        Options(**recipe.exports[1].options)
    assert explain_options(recipe, 1, Options, refused.value) == [
        "r.yaml:6: exports[1].onnx.opset: 'x' is not allowed; a whole number",
        "r.yaml:7: exports[1].onnx.precison: unknown key; did you mean 'precision'? allowed: precision, opset",
    ]


# Texts


def test_sequences_of_a_mix_are_in_proportion_to_its_shares() -> None:
    parts = ", ".join(f"{{dataset: {name}, share: 1}}" for name in ("self", "c4", "alpaca"))
    mix = f"calibration: {{samples: 7, mix: [{parts}]}}"
    assert Recipe.parse(START + mix + "\nexports: [{gguf: {}}]").calibration.counts() == (3, 2, 2)
    assert rows_by_share([0.5, 0.25, 0.25], 128) == (64, 32, 32)
    assert rows_by_share([1, 2], 4) == (1, 3)


@given(shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), rows=st.integers(1, 100_000))
def test_no_sequence_is_lost_and_none_is_more_than_one_off(shares: list[float], rows: int) -> None:
    counts = rows_by_share(shares, rows)
    assert sum(counts) == rows
    assert all(abs(n - rows * share / sum(shares)) < 1 for n, share in zip(counts, shares, strict=True))


def test_one_block_and_a_list_of_it_are_the_same_evaluation() -> None:
    block = Recipe.parse(START + "evaluation: {seq_len: 64}\nexports: [{gguf: {}}]")
    listed = Recipe.parse(START + "evaluation: [{seq_len: 64}]\nexports: [{gguf: {}}]")
    assert block.digest() == listed.digest()
    assert block.evaluation == (EvaluationSpec(seq_len=64),)
    assert Recipe.parse(START + "exports: [{gguf: {}}]").evaluation == (EvaluationSpec(),)


# Schema


def test_the_schema_has_the_shape_of_the_file() -> None:
    schema = json_schema()
    stage = schema["properties"]["stages"]["items"]
    entries = [schema["$defs"][ref["$ref"].rsplit("/", 1)[-1]] for ref in stage.get("oneOf", stage.get("anyOf"))]
    assert [list(entry["properties"]) for entry in entries] == [["flat"], ["gptq"], ["recover"]]
    assert schema["properties"]["exports"]["items"]["maxProperties"] == 1
    assert {"type": "string"} in [dict(kind) for kind in schema["properties"]["model"]["anyOf"]]
    assert schema["required"] == ["version", "model"]


def blocks(spec: type[BaseModel] = Spec) -> list[type[BaseModel]]:
    below = [block for block in spec.__subclasses__() if "Entry" not in block.__name__]
    return below + [block for parent in below for block in blocks(parent)]


def documented_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required |"
    if isinstance(field.default, bool | int | float | str):
        return f"`{str(shown(field.default)).strip(chr(39))}` |"
    return ""


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.__name__)
def test_every_key_is_documented(block: type[BaseModel]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "writing-a-recipe.md").read_text()
    for name, field in block.model_fields.items():
        assert field.description, name
        if block.__name__ != "ExportSpec":
            assert f"| `{name}` | {documented_default(field)}" in page, name
