"""What is on disk: written whole or not at all, read lazily, damage found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flatq.artifact import INDEX, MANIFEST, Artifact, save_shard
from flatq.errors import ArtifactError
from flatq.files import write_atomically, write_json
from flatq.model.grid import Grid, QuantizedWeight
from flatq.model.weights import dense, load_decoder
from tests.models import RandomWeights, tiny_artifact, tiny_config

GRID = Grid(4, 16)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return tiny_artifact(tmp_path / "artifact", tiny_config(d_v=(16, 8), d_ff=(96, 48)), grid=GRID)


def test_what_is_stored_comes_back(artifact: Artifact) -> None:
    weights = RandomWeights(artifact.config)
    assert artifact.names() == weights.names()
    for name in artifact.names():
        stored = artifact.tensor(name)
        assert isinstance(stored, QuantizedWeight) == (name.removesuffix(".weight") in artifact.grids)
        tolerance = float(stored.scale.max()) if isinstance(stored, QuantizedWeight) else 0
        torch.testing.assert_close(dense(stored), weights.tensor(name), rtol=0, atol=tolerance)


def test_the_configuration_comes_back(artifact: Artifact) -> None:
    assert Artifact.open(artifact.root).config == tiny_config(d_v=(16, 8), d_ff=(96, 48))
    assert set(Artifact.open(artifact.root).grids.values()) == {GRID}


def test_a_run_folder_opens_as_its_artifact(artifact: Artifact) -> None:
    assert Artifact.open(artifact.root.parent).root == artifact.root


def test_two_writes_of_one_model_are_the_same_bytes(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    other = tiny_artifact(tmp_path / "again" / "artifact", artifact.config, grid=GRID)
    assert other.manifest == artifact.manifest
    other.verify()


def test_every_file_is_in_the_manifest_and_whole(artifact: Artifact) -> None:
    artifact.verify()
    assert set(artifact.manifest["files"]) == {path.name for path in artifact.root.iterdir()} - {MANIFEST}


def test_a_flipped_byte_is_found_in_any_file(artifact: Artifact) -> None:
    for name in artifact.manifest["files"]:
        file = artifact.root / name
        whole = file.read_bytes()
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(ArtifactError, match=rf"damaged files: {name}; .*--fresh"):
            artifact.verify()
        file.write_bytes(whole)
    artifact.verify()


def test_a_missing_shard_is_found(artifact: Artifact) -> None:
    (artifact.root / "layer-00001-mlp.safetensors").unlink()
    with pytest.raises(ArtifactError, match="layer-00001-mlp"):
        artifact.verify()


@pytest.mark.parametrize("file", ["config.json", MANIFEST, INDEX])
def test_a_folder_without_its_papers_is_no_artifact(artifact: Artifact, file: str) -> None:
    (artifact.root / file).unlink()
    with pytest.raises(ArtifactError, match="no flatq artifact"):
        Artifact.open(artifact.root)


@pytest.mark.parametrize("file", ["config.json", MANIFEST, INDEX])
def test_damaged_papers_are_told_in_words(artifact: Artifact, file: str) -> None:
    (artifact.root / file).write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        Artifact.open(artifact.root)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_an_index_that_points_out_of_the_folder_is_refused(artifact: Artifact, shard: str) -> None:
    (artifact.root / INDEX).write_text(json.dumps({"weight_map": {"embed.weight": shard}}))
    with pytest.raises(ArtifactError, match="not a plain file name"):
        Artifact.open(artifact.root, check=False)


def test_a_tensor_that_is_not_there_is_told(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"no tensor 'layers\.9\.q\.weight'"):
        artifact.tensor("layers.9.q.weight")


@pytest.mark.parametrize(
    ("grid", "bits_per_weight"),
    [(None, 32), (Grid(4, 16), 4 + 16 / 16), (Grid(4, 16, False), 4 + 16 / 16 + 4 / 16), (Grid(8, -1), None)],
)
def test_bytes_count_codes_by_their_bits(grid: Grid | None, bits_per_weight: float | None, tmp_path: Path) -> None:
    config = tiny_config()
    size = tiny_artifact(tmp_path / "artifact", config, grid=grid).bytes()
    rest = 4 * (config.parameters() - config.decoder_parameters())
    if bits_per_weight is None:
        assert rest + config.decoder_parameters() < size < rest + 1.1 * config.decoder_parameters()
    else:
        assert size == rest + config.decoder_parameters() * bits_per_weight / 8


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    tied = tiny_artifact(tmp_path / "tied", tiny_config(tied_head=True))
    loose = tiny_artifact(tmp_path / "loose", tiny_config(tied_head=False))
    assert "head.weight" not in tied.names()
    assert loose.bytes() - tied.bytes() == 4 * 128 * 64
    assert load_decoder(tied)(torch.arange(6)[None]).shape == (1, 6, 128)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", {"x": object()})
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "a", {"x": float("nan")})
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_shard(tmp_path / "none" / "x.safetensors", {"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_views_and_transposes_are_stored_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    save_shard(tmp_path / "x.safetensors", {"t": whole.T, "part": whole[:, 1:3]})
    import safetensors.torch

    stored = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert torch.equal(stored["t"], whole.T)
    assert torch.equal(stored["part"], whole[:, 1:3])
