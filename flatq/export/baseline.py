"""The dense model as an artifact, for exporters."""

from __future__ import annotations

from pathlib import Path

from flatq.artifact import Artifact, finish, save_shard, shard_name
from flatq.model.weights import half_names, halves
from flatq.quantize.embedding_and_head import ENDS
from flatq.sources.source import Source


def dense_artifact(source: Source, root: Path) -> Artifact:
    """Write the dense model as an artifact, so that exporters can write it for comparison."""
    config = source.config
    partial = root.with_name(root.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    shards = {shard_name(index, half): half_names(config, index, half) for index, half in halves(config)}
    inside = {name for names in shards.values() for name in names}
    shards[ENDS] = [name for name in source.names() if name not in inside]
    for file, names in shards.items():
        save_shard(partial / file, {name: source.tensor(name) for name in names})
    return finish(
        partial,
        root,
        config=config,
        grids={},
        settings=source.settings(),
        manifest={"recipe": ""},
        weight_files=list(shards),
    )


BASELINE = "baseline"  # name of the dense model's entry in ``Report.bench``
