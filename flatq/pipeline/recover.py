"""The stage ``recover``: a short training of scales and norm gains after the walk, and the artifact with them.

The walk leaves an artifact in the work folder. It is evaluated, trained (``calibration.distillation``) and written
again with other scales and gains; codes and all other files are the same, also the energies of the linears' inputs,
which the training changes a little. With several processes rank 0 trains alone.

It is trained on rows that the walk has not seen: the Grams make the model better on the calibration rows than on other
text, and rows held out of those would judge wrongly.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from flatq.artifact import AGAIN, INDEX, Artifact, Index, finish, save_shard
from flatq.calibration.distillation import Distillation
from flatq.calibration.divergence import DenseStates
from flatq.calibration.factors import Factored
from flatq.files import link_or_copy, read_json
from flatq.job import Job
from flatq.machine import distributed
from flatq.pipeline.quality import log_quality, model_quality
from flatq.recipe.recovery import RecoverSpec

WAIT, DONE = "wait", "done"


def recovered(job: Job, spec: RecoverSpec, dense: DenseStates, walked: Artifact) -> Artifact:
    """The artifact with trained scales and gains, made now or by an earlier process.

    Args:
        job: the artifact is built in ``folder.partial`` and renamed to ``folder.artifact`` at the end.
        spec: of the training.
        dense: the dense model's states, for the quality before the training.
        walked: what the walk has made.
    """
    folder = job.folder

    def make() -> list[dict[str, Any]]:
        quality = model_quality(dense, walked, job.tokens.evaluation, "before recover")
        log_quality(quality, "before recover")
        if not distributed.broadcast(folder.artifact.exists()):
            _train(job, spec, walked)
        return quality

    folder.phase("recover", make, list[dict[str, Any]])
    return Artifact.open(folder.artifact, check=distributed.first())


def _train(job: Job, spec: RecoverSpec, walked: Artifact) -> None:
    """Train and write on rank 0; the others wait for it."""
    if not distributed.first():
        while distributed.broadcast("") != DONE:
            pass
        return
    if job.tokens.recovery is None:
        raise ValueError("the run has no rows for the stage recover")
    training = Distillation(
        walked,
        walked.grids,
        job.source,
        job.tokens.recovery,
        job.folder.work,
        job.execution,
        lambda: distributed.broadcast(WAIT),
    )
    found = training.run(spec.steps, spec.tokens, spec.learning_rate, job.recipe.calibration.seed)
    _write(job, walked, training.best, asdict(found))
    distributed.broadcast(DONE)


def _write(job: Job, walked: Artifact, logs: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    partial, model, files = job.folder.partial, Factored(walked, logs), _by_file(walked)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file, names in files.items():
        save_shard(partial / file, {name: model.tensor(name) for name in names})
    for file in set(walked.manifest["files"]) - {*files, INDEX, "config.json"}:
        link_or_copy(walked.root / file, partial / file)
    finish(
        partial,
        job.folder.artifact,
        config=walked.config,
        grids=walked.grids,
        settings=walked.settings,
        manifest={**walked.manifest, "recover": dict(found)},
        weight_files=list(files),
    )


def _by_file(artifact: Artifact) -> dict[str, list[str]]:
    """Names of the tensors, as in ``Artifact.names``, by the file that holds them."""
    stored, found = read_json(artifact.root / INDEX, Index, AGAIN).weight_map, dict[str, list[str]]()
    for name in artifact.names():
        stem = name.removesuffix(".weight")
        found.setdefault(stored[f"{stem}.codes" if stem in artifact.grids else name], []).append(name)
    return found
