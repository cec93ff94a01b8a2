import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from transformers import AutoModelForCausalLM

from flatq.artifact import INDEX, Artifact
from flatq.errors import ExportError
from flatq.export.protocols import exporter_named
from flatq.files import write_checksummed
from flatq.model.config import Kind
from flatq.model.decoder import LINEARS, DecoderConfig, Rope
from flatq.model.grid import Grid
from flatq.model.weights import load_decoder
from flatq_safetensors import SafetensorsExporter, SafetensorsOptions
from tests.models import SWITCHES, tiny_artifact, tiny_config

EXPORTER = SafetensorsExporter()
TOLERANCE = 1e-4
FOUR = Grid(4, 32)
MIXED = {"layers.0.down": Grid(8, -1), "layers.1.q": Grid(2, 16)}


def own_widths(**switches: Any) -> DecoderConfig:
    """Widths that no stock class can hold; every one a multiple of 32."""
    return tiny_config(d_qk=32, d_v=(16, 32), d_ff=(96, 64), **switches)


def one_mlp_width(d_v: tuple[int, int] = (16, 32), **switches: Any) -> DecoderConfig:
    return tiny_config(d_qk=32, d_v=d_v, d_ff=(96, 96), **switches)


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def reference(artifact: Artifact) -> np.ndarray:
    with torch.no_grad():
        return load_decoder(artifact)(tokens()).numpy()


def export(artifact: Artifact, out: Path, **options: Any) -> Path:
    return EXPORTER.write(artifact, out, SafetensorsOptions(**options)).root


def difference(artifact: Artifact, folder: Path, **options: Any) -> float:
    runner = EXPORTER.open(folder, SafetensorsOptions(**options))
    return float(np.abs(runner.logits(tokens().numpy()) - reference(artifact)).max())


def test_the_exporter_is_found_by_its_entry_point() -> None:
    assert type(exporter_named("safetensors")).__name__ == "SafetensorsExporter"


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize(
    ("options", "grid", "overrides"),
    [
        ({"format": "fp32"}, None, {}),
        ({"format": "fp32"}, FOUR, {}),
        ({}, FOUR, {}),
        ({}, FOUR, MIXED),
        ({}, None, MIXED),
        ({"packed_embedding": True}, FOUR, {}),
        ({}, Grid(3, 16), {}),
        ({}, Grid(4, 16, symmetric=False), {}),
        ({"format": "gptq"}, FOUR, {}),
        ({"format": "gptq"}, None, MIXED),
        ({"format": "gptq_v2"}, Grid(3, 32, symmetric=False), MIXED),
    ],
)
def test_every_format_opens_with_the_artifacts_logits(
    tmp_path: Path, options: dict[str, Any], grid: Grid | None, overrides: dict[str, Grid], tied_head: bool
) -> None:
    config = own_widths(tied_head=tied_head)
    artifact = tiny_artifact(tmp_path / "a", config, grid=grid, overrides=overrides, embed_grid=Grid(8, -1))
    folder = export(artifact, tmp_path / "out", **options)
    assert difference(artifact, folder, **options) < TOLERANCE


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(8, -1)])
@pytest.mark.parametrize("tied_head", [True, False])
def test_a_packed_embedding_is_unpacked_by_transformers_and_stays_tied(
    tmp_path: Path, grid: Grid, tied_head: bool
) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(tied_head=tied_head), grid=FOUR, embed_grid=grid)
    options: dict[str, Any] = {"packed_embedding": True, "dtype": "fp32"}
    folder = export(artifact, tmp_path / "out", **options)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(stored)
    assert "model.embed_tokens.weight_packed" in stored
    assert ("lm_head.weight_packed" in stored) is not tied_head
    assert "decoded by flatq" not in EXPORTER.open(folder, SafetensorsOptions(**options)).provider
    assert difference(artifact, folder, **options) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "switches", "embed_grid", "complaint"),
    [
        ({"format": "gptq"}, {}, Grid(8, -1), "write format compressed-tensors"),
        ({}, {}, None, "the embedding is not quantized"),
        ({"pad_values": True}, {"tied_head": True}, Grid(8, -1), "before it is unpacked"),
        ({"pad_values": True}, {"tied_head": False}, Grid(8, -1), "before it is unpacked"),
    ],
)
def test_a_packed_embedding_that_nobody_could_read_is_refused(
    options: dict[str, Any], switches: dict[str, Any], embed_grid: Grid | None, complaint: str
) -> None:
    grids = {f"layers.{i}.{name}": FOUR for i in range(2) for name in LINEARS}
    grids |= {} if embed_grid is None else {"embed": embed_grid}
    wanted = SafetensorsOptions(packed_embedding=True, **options)
    config = one_mlp_width(**switches) if wanted.pad_values else own_widths(**switches)
    assert any(complaint in problem for problem in EXPORTER.check(config, grids, wanted))


@pytest.mark.parametrize("form", ["bf16", "fp16"])
def test_half_precision_folders_are_close_and_of_half_the_size(tmp_path: Path, form: str) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths())
    folder = export(artifact, tmp_path / "out", format=form)
    assert difference(artifact, folder, format=form) < (0.2 if form == "bf16" else 0.03)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert {tensor.element_size() for tensor in stored.values()} == {2}


@pytest.mark.parametrize("switches", [{"qkv_bias": True, "o_bias": True, "mlp_bias": True}, {"qk_norm": True}])
def test_biases_and_norms_find_their_places(tmp_path: Path, switches: dict[str, Any]) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(**switches), grid=FOUR)
    assert difference(artifact, export(artifact, tmp_path / "out")) < TOLERANCE


def test_decoding_token_by_token_equals_reading_at_once(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(), grid=FOUR)
    runner = EXPORTER.open(export(artifact, tmp_path / "out"), SafetensorsOptions())
    expected, ids = reference(artifact), tokens().numpy()
    np.testing.assert_allclose(runner.start(ids[:, :4], 16), expected[:, 3], atol=TOLERANCE)
    for position in range(4, 9):
        np.testing.assert_allclose(runner.step(ids[:, position]), expected[:, position], atol=TOLERANCE)


def test_a_padded_row_equals_the_row_alone(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(), grid=FOUR)
    runner = EXPORTER.open(export(artifact, tmp_path / "out"), SafetensorsOptions())
    row = tokens(1, 5).numpy()
    padded = np.concatenate([np.zeros((1, 3), dtype=np.int64), row], 1)
    valid = np.array([[0] * 3 + [1] * 5])
    np.testing.assert_allclose(runner.logits(padded, valid)[:, 3:], runner.logits(row), atol=TOLERANCE)


REMOTE = """
import sys, json
sys.modules["flatq"] = None  # any import of flatq fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(ids).logits
made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
print(json.dumps([type(model).__module__, logits.tolist(), made.shape[1]]))
"""


def test_the_folder_loads_by_its_own_code_where_flatq_is_not_installed(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(rope=Rope(scaling="linear", factor=2.0)), grid=FOUR)
    folder = export(artifact, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(folder), json.dumps(tokens().tolist())],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    module, logits, length = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.")
    assert 9 < length <= 13
    np.testing.assert_allclose(np.array(logits), reference(artifact), atol=TOLERANCE)


def test_the_auto_class_loads_the_folder_once_flatq_is_imported(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(), grid=FOUR)
    model = AutoModelForCausalLM.from_pretrained(export(artifact, tmp_path / "out"))
    assert type(model).__module__ == "flatq.hf.modeling_flatq"


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"format": "fp32"}, None),
        ({"format": "fp32"}, FOUR),
        ({}, Grid(4, 16)),
        ({}, Grid(8, -1)),
        ({"format": "gptq"}, FOUR),
        ({"format": "gptq"}, Grid(4, 16)),
        ({"format": "gptq_v2"}, Grid(4, -1, symmetric=False)),
    ],
)
def test_padded_values_and_one_mlp_width_make_a_plain_llama(
    tmp_path: Path, options: dict[str, Any], grid: Grid | None, tied_head: bool
) -> None:
    artifact = tiny_artifact(tmp_path / "a", one_mlp_width(tied_head=tied_head), grid=grid)
    folder = export(artifact, tmp_path / "out", pad_values=True, **options)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert not list(folder.glob("*.py"))
    runner = EXPORTER.open(folder, SafetensorsOptions(pad_values=True, **options))
    assert type(runner.model).__module__ == "transformers.models.llama.modeling_llama"
    assert float(np.abs(runner.logits(tokens().numpy()) - reference(artifact)).max()) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "switches"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True}),
        ("smollm3", {"qkv_bias": True, "o_bias": True, "other_kinds": (Kind(None),), "kind_of": (0, 1)}),
        ("llama", {"activation": "gelu_tanh"}),
        ("llama", {"rope": Rope(scaling="llama3", factor=8.0, original_max_positions=16)}),
        ("llama", {"rope": Rope(scaling="linear", factor=2.0)}),
    ],
)
def test_a_plain_checkpoint_keeps_its_family(tmp_path: Path, family: str, switches: dict[str, Any]) -> None:
    config = replace(one_mlp_width(**switches), family=family)
    artifact = tiny_artifact(tmp_path / "a", config)
    artifact.settings["pad_token_id"] = 0  # that of some classes is beyond this vocabulary
    folder = export(artifact, tmp_path / "out", format="fp32", pad_values=True)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    assert difference(artifact, folder, format="fp32", pad_values=True) < TOLERANCE


def test_a_family_with_names_of_its_own_is_written_with_flatqs_code(tmp_path: Path) -> None:
    config = tiny_config(family="olmo2", d_v=(16, 16), d_ff=(96, 96), **{**SWITCHES["olmo2"], "tied_head": True})
    artifact = tiny_artifact(tmp_path / "a", config, grid=FOUR)
    folder = export(artifact, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "flatq_hub"
    assert difference(artifact, folder) < TOLERANCE


def test_a_model_that_was_never_narrowed_is_a_plain_checkpoint_without_padding(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", tiny_config(d_qk=32, d_v=(32, 32), d_ff=(96, 96)), grid=FOUR)
    folder = export(artifact, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("options", [{}, {"pad_values": True}, {"pad_values": True, "format": "fp32"}])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("d_v", [(24, 32), (8, 16), (32, 32)])
def test_groups_that_do_not_divide_a_row_or_a_head_are_cut_finer_without_loss(
    tmp_path: Path, d_v: tuple[int, int], symmetric: bool, options: dict[str, Any]
) -> None:
    config = tiny_config(heads=3, kv_heads=1, d_qk=32, d_v=d_v, d_ff=(80, 80), d_model=96)
    artifact = tiny_artifact(tmp_path / "a", config, grid=Grid(4, 32, symmetric))
    folder = export(artifact, tmp_path / "out", **options)
    assert difference(artifact, folder, **options) < TOLERANCE


@pytest.mark.parametrize(
    ("group_size", "d_v", "pad_values", "sizes"),
    [
        (32, (16, 16), False, {32}),
        (32, (16, 16), True, {16}),
        (64, (32, 32), False, {32}),
        (128, (32, 32), False, {-1}),
        (-1, (32, 32), False, {-1}),
    ],
)
def test_gptq_folders_have_one_group_size_unless_bits_differ_or_it_is_not_wanted(
    tmp_path: Path, group_size: int, d_v: tuple[int, int], pad_values: bool, sizes: set[int]
) -> None:
    config, grid = tiny_config(d_qk=32, d_v=d_v, d_ff=(96, 96)), Grid(4, group_size)
    artifact = tiny_artifact(tmp_path / "a", config, grid=grid)
    folder = export(artifact, tmp_path / "one", format="gptq", pad_values=pad_values)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {described["group_size"]} == sizes
    assert "dynamic" not in described
    assert difference(artifact, folder, format="gptq", pad_values=pad_values) < TOLERANCE
    options = SafetensorsOptions(format="gptq", pad_values=pad_values, one_group_size=False)
    grids = dict(artifact.grids)
    assert EXPORTER.bytes(config, grids, options) <= EXPORTER.bytes(
        config, grids, options.model_copy(update={"one_group_size": True})
    )
    mixed = options.model_copy(update={"one_group_size": True}).written_grids(
        config, grids | {"layers.0.q": Grid(8, group_size)}
    )
    assert mixed == options.written_grids(config, grids | {"layers.0.q": Grid(8, group_size)})


def shape_fault(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("config", [own_widths(), one_mlp_width()], ids=["own code", "stock class"])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.1.mlp.up_proj.weight", None),
        ("model.norm.weight", torch.ones(63)),
        ("model.layers.0.extra.weight", torch.ones(3)),
    ],
)
def test_a_tensor_that_does_not_fit_fails_the_check_and_is_named(
    tmp_path: Path, config: DecoderConfig, name: str, tensor: torch.Tensor | None
) -> None:
    options = {"format": "fp32", "pad_values": config.layers[0].d_ff == config.layers[1].d_ff}
    folder = export(tiny_artifact(tmp_path / "a", config), tmp_path / "out", **options)
    shape_fault(folder, name, tensor)
    with pytest.raises(ExportError, match=name):
        EXPORTER.open(folder, SafetensorsOptions(**options))


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ("compressed-tensors", "weight_packed"),
        ("compressed-tensors", "weight_scale"),
        ("gptq", "qweight"),
        ("gptq", "qzeros"),
        ("gptq", "scales"),
        ("gptq", "g_idx"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_a_part_of_a_quantized_linear_that_does_not_fit_fails_the_check(
    tmp_path: Path, form: str, part: str, damage: str
) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(), grid=FOUR)
    folder = export(artifact, tmp_path / "out", format=form)
    name = f"model.layers.1.self_attn.v_proj.{part}"
    stored = safetensors.torch.load_file(folder / "model.safetensors")[name]
    shape_fault(folder, name, None if damage == "missing" else stored[1:])
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.v_proj"):
        EXPORTER.open(folder, SafetensorsOptions(format=form))


@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_shards_hold_everything_and_none_is_larger_than_asked(tmp_path: Path, limit: int, form: str) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(), grid=FOUR)
    folder = export(artifact, tmp_path / "out", format=form, max_shard_size=limit)
    files = sorted(folder.glob("model*.safetensors"))
    assert (len(files) > 1) == (limit < 10**9) == (folder / INDEX).exists()
    sizes = [
        [tensor.numel() * tensor.element_size() for tensor in safetensors.torch.load_file(file).values()]
        for file in files
    ]
    assert all(sum(size) <= limit or len(size) <= 4 for size in sizes)  # 4: the parts of one linear stay together
    assert difference(artifact, folder, format=form) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"format": "gptq"}, {"format": "fp16"}, {"format": "fp32"}, {"dtype": "fp16"}])
def test_the_size_is_known_before_anything_is_written(tmp_path: Path, options: dict[str, Any]) -> None:
    config = own_widths()
    artifact = tiny_artifact(tmp_path / "a", config, grid=FOUR)
    stated = SafetensorsOptions(**{"dtype": "fp32" if options.get("format", "gptq") == "gptq" else None, **options})
    # `bytes` takes what has no dtype as 16 bit; the tiny artifact has float32, so the dtype is stated
    folder = EXPORTER.write(artifact, tmp_path / "out", stated).root
    tensors = safetensors.torch.load_file(folder / "model.safetensors").values()
    assert EXPORTER.bytes(config, artifact.grids, stated) == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("config", "grids", "options", "complaint"),
    [
        (own_widths(), {}, {}, "no linear is quantized"),
        (own_widths(), {"layers.0.q": Grid(4, 4)}, {}, r"layers\.0\.q: groups of 4 among 64 inputs can only be"),
        (own_widths(), {"layers.0.q": Grid(4, 8)}, {"format": "gptq"}, "written as groups of 8; GPTQ readers support"),
        (own_widths(), {"layers.0.q": Grid(4, 32, False)}, {"format": "gptq"}, "write format gptq_v2"),
        (own_widths(), {"layers.0.q": Grid(4, 32, False), "layers.0.k": Grid(3, 32)}, {}, "no release of that package"),
        (own_widths(), {}, {"format": "fp16", "pad_values": True}, "one MLP width, the layers of this model differ"),
        (one_mlp_width(qk_norm=True), {}, {"format": "fp16", "pad_values": True}, "switches of this model"),
        (one_mlp_width(d_v=(20, 32)), {"layers.0.o": FOUR}, {"pad_values": True}, "only be written as groups of 4"),
        (tiny_config(d_v=(8, 16)), {"layers.0.v": FOUR}, {"format": "gptq"}, "blocks of 32 outputs and inputs"),
        (own_widths(), {}, {"format": "fp16", "dtype": "bf16"}, "leave dtype out"),
    ],
)
def test_what_cannot_be_written_is_objected_to_with_a_way_out(
    config: DecoderConfig, grids: dict[str, Grid], options: dict[str, Any], complaint: str
) -> None:
    problems = EXPORTER.check(config, grids, SafetensorsOptions(**options))
    assert any(re.search(complaint, problem) for problem in problems), problems


def test_one_objection_stands_for_all_linears_that_it_fits(tmp_path: Path) -> None:
    config = own_widths()
    problems = EXPORTER.check(config, {f"layers.{i}.q": Grid(4, 4) for i in range(2)}, SafetensorsOptions())
    assert [problem.split(":")[0] for problem in problems] == ["layers.0.q and 1 more"]


def test_a_number_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths())
    shard = artifact.root / "ends.safetensors"
    tensors = safetensors.torch.load_file(shard)
    tensors["norm.weight"][0] = 1e6
    safetensors.torch.save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"norm\.weight: its largest number 1e\+06 is beyond torch\.float16"):
        export(Artifact.open(artifact.root, check=False), tmp_path / "out", format="fp16")
    assert not (tmp_path / "out" / "config.json").exists()


def test_unquantized_and_differing_linears_are_stated_as_each_loader_reads_them(tmp_path: Path) -> None:
    grids = {f"layers.{i}.{name}": FOUR for i in range(2) for name in ("q", "k", "v", "o", "gate", "up")}
    grids["layers.1.gate"] = Grid(8, 32)
    artifact = tiny_artifact(tmp_path / "a", own_widths(), overrides=grids)
    folder = export(artifact, tmp_path / "gptq", format="gptq")
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert described == json.loads((folder / "quantize_config.json").read_text())
    assert (described["bits"], described["group_size"], described["checkpoint_format"]) == (4, 32, "gptq")
    assert described["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.gate_proj$": {"bits": 8, "group_size": 32, "sym": True},
        r"-:^model\.layers\.0\.mlp\.down_proj$": {},
        r"-:^model\.layers\.1\.mlp\.down_proj$": {},
    }
    assert ["mlp.down_proj"] not in described["modules_in_block_to_quantize"]
    described = json.loads((export(artifact, tmp_path / "ct") / "config.json").read_text())["quantization_config"]
    ignored = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"}
    assert set(described["ignore"]) == ignored
    assert "model.layers.1.mlp.gate_proj" in described["config_groups"]["group_1"]["targets"]


@pytest.mark.parametrize(
    ("model_type", "rope", "words"),
    [
        ("granite", Rope(), ["checkpoint of type granite and written as llama"]),
        ("llama", Rope(scaling="yarn", factor=4.0, original_max_positions=64), ["attention_factor is 1"]),
        ("llama", Rope(), []),
    ],
)
def test_the_card_says_what_was_changed_while_reading(
    model_type: str, rope: Rope, words: list[str], tmp_path: Path
) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(rope=rope), grid=FOUR)
    source = {"origin": "model", "model_type": model_type}
    manifest = {"recipe": "version: 1", "source": source, "files": {}}
    write_checksummed(artifact.root / "manifest.json", manifest)
    card = (export(Artifact.open(artifact.root), tmp_path / "out") / "README.md").read_text()
    for word in ("checkpoint of type", "attention_factor"):
        assert (word in card) == any(word in expected for expected in words)
    for word in words:
        assert word in card


def test_the_files_beside_the_weights_come_along_and_the_card_says_how_it_was_made(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(), grid=FOUR)
    (artifact.root / "tokenizer.json").write_text("{}")
    (artifact.root / "chat_template.jinja").write_text("{{ messages }}")
    source = {"origin": "org/name@0123", "hub_id": "org/name", "license": "apache-2.0"}
    manifest = {"recipe": "version: 1\nmodel: org/name", "source": source, "files": {}}
    write_checksummed(artifact.root / "manifest.json", {**manifest, "quality": {"perplexity": 12.5}})
    folder = export(Artifact.open(artifact.root), tmp_path / "out")
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    card = (folder / "README.md").read_text()
    for part in ("license: apache-2.0", "base_model: org/name", "version: 1", "| perplexity | 12.5 |", "16, 32"):
        assert part in card
    assert "trust_remote_code=True" in card
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize("origin", ["/models/My Model", "../model", "package:holder/Model.gguf"])
def test_the_card_of_a_model_from_a_local_path_names_no_base_model(tmp_path: Path, origin: str) -> None:
    """A hub refuses a base_model that is no id of it."""
    artifact = tiny_artifact(tmp_path / "a", own_widths(), grid=FOUR)
    manifest = {"recipe": "version: 1", "source": {"origin": origin, "hub_id": None}, "files": {}}
    write_checksummed(artifact.root / "manifest.json", manifest)
    card = (export(Artifact.open(artifact.root), tmp_path / "out") / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front
    assert front["library_name"] == "transformers"


def test_the_same_artifact_gives_the_same_bytes(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", own_widths(), grid=FOUR)
    one, two = export(artifact, tmp_path / "one"), export(artifact, tmp_path / "two")
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert all(path.read_bytes() == (two / path.name).read_bytes() for path in one.iterdir())
    assert not list(one.glob("*.partial"))
