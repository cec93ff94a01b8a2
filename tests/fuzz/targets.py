"""What is fuzzed: the files of a model, a run and an export, each with the function that reads it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import mutated_bytes, mutated_checksummed, mutated_json

Mutate = Callable[[bytes, Any], bytes]
CHAT = [{"role": "user", "content": "The stone?"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<{{ m['content'] | trim }}>{% else %}{{ m.role ~ '!' }}{% endif %}"
    "{% set n = namespace(a=1) %}{% for i in range(3) %}{{ i * 2 ** 3 }}{% endfor %}{% endfor %}{{ messages | length }}"
)


@dataclass(frozen=True)
class Target:
    """A file of a folder that is changed, and the reader that is called with the folder.

    Attributes:
        name: of the target.
        folder: the folder that is copied, relative to the material.
        file: the file in it that is changed.
        read: called with the folder; only errors of flatq may come out.
        mutate: how the file is changed.
    """

    name: str
    folder: str
    file: str
    read: Callable[[Path], object]
    mutate: Mutate = field(default=mutated_json)

    @property
    def slug(self) -> str:
        """The name as the name of a folder."""
        return re.sub(r"\W", "-", self.name)


def read_recipe(folder: Path) -> None:
    """The recipe, and what ``check`` says about it without opening the model."""
    from flatq.recipe.grammar import Recipe

    Recipe.load(folder / "tiny.yaml").digest()


def read_weights(folder: Path) -> None:
    """Every tensor of a Hugging Face folder, also after one was refused."""
    from flatq.errors import FlatqError
    from flatq.sources.source import open_model

    source, refusals = open_model(str(folder)), list[FlatqError]()
    for read in (source.validate, *(partial(source.tensor, name) for name in source.names())):
        try:
            read()
        except FlatqError as refusal:
            refusals.append(refusal)
    if refusals:
        raise refusals[0]


def read_config(folder: Path) -> None:
    """config.json with the shapes that follow from it."""
    from flatq.model.footprint import weight_bytes
    from flatq.sources.source import open_model

    config = open_model(str(folder), need_weights=False).config
    weight_bytes(config, {}, 2)


def read_gguf(folder: Path) -> None:
    """A GGUF file: configuration, tensors and tokenizer."""
    from flatq.errors import FlatqError
    from flatq.sources.source import open_model

    source = open_model(str(folder / "tiny.gguf"))
    for name in source.names():
        with suppress(FlatqError):
            source.tensor(name)
    source.tokenizer()


def read_tokenizer(folder: Path) -> None:
    """The tokenizer, its templates and what exports do with them."""
    from flatq.chats import TemplateRefuses, written_out
    from flatq.tokenizer import beyond, chat_templates, end_tokens, generation_settings, notes, open_tokenizer

    tokenizer = open_tokenizer(folder)
    beyond(tokenizer, 320)
    notes(folder)
    chat_templates(folder)
    end_tokens(generation_settings(folder))
    tokenizer("The stone walks. é\n", add_special_tokens=True, verbose=False)
    if tokenizer.chat_template:
        with suppress(TemplateRefuses):
            list(written_out(tokenizer, [CHAT]))


def read_artifact(folder: Path) -> None:
    """An artifact: its description and all of its tensors; digests are not compared, so that damage gets further."""
    from flatq.artifact import Artifact

    artifact = Artifact.open(folder / "artifact", check=False)
    for name in artifact.names():
        artifact.tensor(name)


def read_export(folder: Path) -> None:
    """An export's description and files."""
    from flatq.export.deliver import reopened

    reopened(folder / "exports" / "gqa")


def read_onnx_contract(folder: Path) -> None:
    """The description of an ONNX export, as a runner reads it."""
    from flatq.export.deliver import opened

    opened(folder / "exports" / "gqa", "cpu", check=False)


def read_run(folder: Path) -> None:
    """Everything that a second run, ``verify`` and ``compare`` read of a run folder."""
    from flatq.integrity import verified
    from flatq.recipe.grammar import Recipe
    from flatq.report.render import read_report
    from flatq.run_folder import RunFolder

    found = RunFolder.open(folder, Recipe.load(folder / "recipe.yaml"))
    _ = found.finished
    read_report(folder / "report.json")
    verified(folder)


def read_work(folder: Path) -> None:
    """What an unfinished run resumes from."""
    from flatq.calibration.walk import blocks_done
    from flatq.errors import RecipeError
    from flatq.pipeline.build import block_reports
    from flatq.recipe.grammar import Recipe
    from flatq.run_folder import RunFolder

    found = RunFolder.open(folder, Recipe.load(folder / "recipe.yaml"))
    blocks_done(found.work)
    found.known("baseline", dict[str, float])
    found.timing()
    block_reports(found.work)
    with suppress(RecipeError):
        found.depend_on({"source": 1})


TARGETS = {
    target.name: target
    for target in (
        Target("recipe", ".", "tiny.yaml", read_recipe, mutated_bytes),
        Target("config.json", "model", "config.json", read_config),
        Target("safetensors", "model", "model.safetensors", read_weights, mutated_bytes),
        Target("index", "sharded", "model.safetensors.index.json", read_weights),
        Target("gguf", "gguf", "tiny.gguf", read_gguf, mutated_bytes),
        Target("tokenizer.json", "model", "tokenizer.json", read_tokenizer),
        Target("tokenizer_config.json", "model", "tokenizer_config.json", read_tokenizer),
        Target("generation_config.json", "model", "generation_config.json", read_tokenizer),
        Target("chat_template", "chat", "chat_template.jinja", read_tokenizer, mutated_bytes),
        Target("manifest.json", "run", "artifact/manifest.json", read_artifact, mutated_checksummed),
        Target("artifact config.json", "run", "artifact/config.json", read_artifact),
        Target("artifact index", "run", "artifact/model.safetensors.index.json", read_artifact),
        Target("export.json", "run", "exports/gqa/export.json", read_export, mutated_checksummed),
        Target("flatq_onnx.json", "run", "exports/gqa/flatq_onnx.json", read_onnx_contract),
        Target("report.json", "run", "report.json", read_run),
        Target("run.json", "run", "run.json", read_run, mutated_checksummed),
        Target("work/state.json", "unfinished", "work/state.json", read_work, mutated_checksummed),
        Target("work/phases", "unfinished", "work/phases/baseline.json", read_work, mutated_checksummed),
        Target("work/inputs.json", "unfinished", "work/inputs.json", read_work, mutated_checksummed),
        Target("work/blocks", "unfinished", "work/blocks/00000-0.json", read_work, mutated_checksummed),
    )
}


def material(root: Path) -> Mapping[str, Target]:
    """Make the folders that the targets change, once; returns the targets."""
    if (root / "whole").exists():
        return TARGETS
    import yaml
    from safetensors.torch import load_file, save_file

    from tests.conftest import ONNX, flatq, usual_recipe, write_model, write_text

    text = write_text(root / "corpus.txt")
    model = write_model(root / "model", text, layers=1)
    recipe = usual_recipe(model, text) | {"exports": [ONNX[1]]}
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    shown = flatq("run", root / "tiny.yaml", "--out", root / "run", "--device", "cpu", "--no-verify")
    assert shown.exit_code == 0, shown.stderr
    shown = flatq(
        "export", root / "run", "--format", "gguf", "--out", root / "gguf", "-o", "precision=f32", "--no-verify"
    )
    assert shown.exit_code == 0, shown.stderr
    next((root / "gguf").glob("*.gguf")).rename(root / "gguf" / "tiny.gguf")
    shutil.copytree(model, root / "chat")
    (root / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(model, root / "sharded")
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    (root / "sharded" / "model.safetensors").unlink()
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, root / "sharded" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(some, file)

    (root / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    _unfinished(root)
    (root / "whole").touch()
    return TARGETS


def _unfinished(root: Path) -> None:
    """A run that was interrupted when its last file was about to be renamed."""
    from unittest.mock import patch

    from tests.conftest import flatq

    with patch("flatq.pipeline.build.finish", side_effect=KeyboardInterrupt):
        shown = flatq("run", root / "tiny.yaml", "--out", root / "unfinished", "--device", "cpu")
    assert shown.exit_code == 130, shown.stderr
