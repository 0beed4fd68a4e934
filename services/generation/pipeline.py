"""Generation of a zoo: blocks of candidates are trained, and accepted ones written to disk as they come."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet

from ethogram.errors import IllegalState, InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.generation import GenerationSpec, PartSpec
from services.generation.buckets import Block, BucketTrainer
from services.generation.card import CARD, card
from services.generation.hub import HubUpload
from services.generation.progress import Progress
from services.generation.twins import paired_effect
from services.generation.workers import side_by_side
from services.runtime.checkpoints import link_or_copy
from services.runtime.reading import reading, reading_checkpoint
from services.runtime.run import Run
from services.zoo.dataset import DATA, FORMAT, Zoo, data_file, read_about, write_about
from services.zoo.statistics import Statistics

SHARD = 1024
"""Candidates to a data file, at least."""
DICTIONARY_BYTES = 2**16
"""Of a column's distinct values, at most; a column with more is written as it is."""
BASELINE_INPUT = "signature.baseline"
"""Where a run has the probes that the spec names."""


class DatasetGenerationPipeline:
    """Makes the zoo that a spec asks for: the first ``spec.subjects`` candidates, by index, that pass the checks.

    Candidates train in fixed blocks, on as many threads as torch is set to use; the result depends neither on how many,
    nor on interruptions. A spec with a ``part`` asks for all candidates of some data files instead.
    """

    def __init__(self, spec: GenerationSpec, device: str = "cpu", baseline: Path | None = None) -> None:
        """Arguments and errors as of :class:`BucketTrainer`."""
        self.bucket_trainer = BucketTrainer(spec, device, baseline)
        self.spec, self.patterns = self.bucket_trainer.spec, self.bucket_trainer.patterns
        self._hub: HubUpload | None = None
        self._blocks_per_file = -(-SHARD // self.bucket_trainer.block_size)
        self._file_size = self._blocks_per_file * self.bucket_trainer.block_size
        """Candidates to a data file."""
        self._goal = self.spec.subjects if self.spec.part is None else self.spec.part.count * self._file_size
        """Accepted candidates that are needed; of a part, candidates that are to be trained."""

    def run(self, folder: Path, run: Run | None = None) -> dict[str, Any]:
        """Write the zoo into the new ``folder`` (see :mod:`services.zoo.dataset`); its figures.

        With ``spec.hub`` its files are uploaded as they are made; :meth:`publish` sends the rest. Raises
        :class:`InvalidInput` for a pattern with too few sequences, and when hardly any candidate passes.
        """
        self.bucket_trainer.sampler.check_trainable()
        run = run or Run()
        (folder / DATA).mkdir(parents=True)
        if self.spec.hub is not None:
            self._hub = HubUpload(self.spec.hub, run.log)
            self._write_about(folder, {})
            # A run that begins fails at once without a network or permission; one that resumes has something to lose.
            with nullcontext() if run.resume is None else run.side_output("opening the repository on the Hub"):
                self._hub.open(folder)
        progress = self._gather(folder, run) if self.spec.shards > 1 else None
        progress = progress or self._generate(folder, run)
        rejected = dict(progress.rejected.most_common())
        causes = ", ".join(f"{count} {cause}" for cause, count in rejected.items()) or "none"
        subjects = self.spec.subjects if self.spec.part is None else progress.accepted
        kept = f", the first {subjects} of them kept" if progress.accepted > subjects else ""
        run.log(f"{progress.accepted} of {progress.candidates} candidates accepted{kept}; rejected: {causes}")
        facts: dict[str, Any] = {"subjects": subjects, "candidates": progress.candidates, "rejected": rejected}
        if self.spec.part is None:
            if self.spec.staged is not None:
                with run.side_output("the twins"):
                    facts["twins"] = paired_effect(self.bucket_trainer, run)
            return self._describe(folder, facts, run)
        self._write_about(folder, facts | {"blocks": progress.blocks})
        return facts

    def write(
        self, folder: Path, shards: Iterable[pyarrow.Table], facts: dict[str, Any], run: Run | None = None
    ) -> dict[str, Any]:
        """Write a zoo of records from elsewhere into the new ``folder``; its figures."""
        (folder / DATA).mkdir(parents=True)
        subjects = 0
        for number, shard in enumerate(shards):
            self._write(shard, folder, number)
            subjects += len(shard)
        facts = {"subjects": subjects, "candidates": subjects, "rejected": {}} | facts
        return self._describe(folder, facts, run or Run())

    def publish(self, folder: Path) -> dict[str, Any]:
        """Upload what is not on the Hub yet, where ``spec.hub`` asks for it; what is there then. Raises
        :class:`ethogram.errors.Unavailable` without a Hub, and :class:`InvalidInput` without permission."""
        if self._hub is None or self.spec.hub is None:
            return {}
        self._hub.close(folder)
        return {"hub": {"repo": self.spec.hub.repo, "files": self._hub.sent}}

    def _describe(self, folder: Path, facts: dict[str, Any], run: Run) -> dict[str, Any]:
        """Write what goes with the records; their figures."""
        self._write_about(folder, facts)
        statistics = Statistics.of(folder)
        with run.side_output("the dataset card"):
            (folder / CARD).write_text(card(folder, statistics), encoding="utf-8")
        return statistics.figures()

    def _write_about(self, folder: Path, facts: dict[str, Any]) -> None:
        write_about(folder, self.spec, self.patterns, self.bucket_trainer.probes, facts)

    def _done(self, progress: Progress) -> int:
        """How much of the goal is reached."""
        return progress.accepted if self.spec.part is None else progress.candidates

    def _generate(self, folder: Path, run: Run) -> Progress:
        """Train until the goal is reached."""
        whole, goal = self.spec.part is None, self._goal
        run.stage("generate", goal, "subjects" if whole else "candidates")
        progress, shard = self._resume(folder, run)
        with closing(self._blocks(progress)) as blocks:
            for block in blocks:
                shard = pyarrow.concat_tables([shard, block.table])
                progress.add(len(block.table), dict(Counter(block.causes)))
                done = self._done(progress)
                run.advance(min(done, goal))
                run.metric(progress.candidates, accepted_share=progress.accepted / progress.candidates, **block.means())
                if done >= goal or progress.next_block % self._blocks_per_file == 0:
                    file = (progress.next_block - 1) // self._blocks_per_file
                    self._write(shard.slice(0, len(shard) - max(0, done - goal)), folder, file)
                    shard = self.bucket_trainer.schema.empty_table()
                if done < goal:
                    if whole:
                        progress.check_hope(self.spec, self.bucket_trainer.block_size)
                    if run.checkpoint_due():
                        run.checkpoint(progress.next_block, partial(self._save, folder, progress, shard))
        return progress

    def _blocks(self, progress: Progress) -> Generator[Block, None, None]:
        """Blocks in order from where ``progress`` is, until the goal is reached; a few are in training ahead."""
        trainer = self.bucket_trainer
        workers = torch.get_num_threads() if trainer.on_cpu else 1
        pending: deque[list[Future[Block]]] = deque()
        with side_by_side(trainer, self._goal, workers) as submit:
            number = progress.next_block
            while (missing := self._goal - self._done(progress)) > 0:
                acceptance = progress.acceptance if self.spec.part is None else 1.0
                needed = math.ceil(missing / (trainer.block_size * acceptance))
                # Beside the block that is waited for, which may be at its last bucket.
                while len(pending) < needed and sum(map(len, islice(pending, 1, None))) < 2 * workers:
                    pending.append([submit(number, part) for part in range(len(trainer.buckets(number)))])
                    number += 1
                yield Block.merge([future.result() for future in pending.popleft()])

    def _gather(self, folder: Path, run: Run) -> Progress | None:
        """Have child jobs make parts, and gather what they made; None where there is no platform.

        How many files it takes is known only when the first are there, so there may be several rounds.
        """
        spec, progress, files = self.spec, Progress(), 0
        while progress.accepted < spec.subjects:
            missing = (spec.subjects - progress.accepted) / progress.acceptance
            first, files = files, files + math.ceil(missing / self._file_size)
            files_per_part = -(-(files - first) // spec.shards)
            parts: dict[str, tuple[str, Spec]] = {}
            for start in range(first, files, files_per_part):
                part = PartSpec(first=start, count=min(files_per_part, files - start))
                changes = {"part": part, "shards": 1, "hub": None}
                parts[f"files-{start:05}"] = ("generation", spec.model_copy(update=changes))
            children = run.children(parts)
            if children is None:
                return None
            run.stage("gather", spec.subjects, "subjects")
            for name in parts:
                child = children[name]
                if child.state != "SUCCEEDED":
                    raise IllegalState(f"shard {name} ({child.job}) ended {child.state}: {child.error}")
                self._take(run.output(child, "zoo"), folder, progress)
                run.advance(min(progress.accepted, spec.subjects))
            # Parts themselves do not give up: few of some thousand may pass, and many of the next.
            if progress.accepted < spec.subjects:
                progress.check_hope(spec, self.bucket_trainer.block_size)
        return progress

    def _take(self, part: Path, folder: Path, progress: Progress) -> None:
        """Take as many of a part's records as are missing. Raises :class:`InvalidInput` for a part that an earlier
        version made, whose subjects were trained on another split."""
        about, _, _ = read_about(part)
        if about["format"] != FORMAT:
            text = "a part was made by another version, which split sequences differently; make the zoo anew"
            raise InvalidInput.field("shards", text)
        subjects, blocks = self.spec.subjects, iter(about["blocks"])
        while progress.accepted < subjects and (file_blocks := list(islice(blocks, self._blocks_per_file))):
            before, file = progress.accepted, progress.next_block // self._blocks_per_file
            for accepted, rejected in file_blocks:
                if progress.accepted < subjects:
                    progress.add(accepted, rejected)
            name = data_file(file)
            if progress.accepted > subjects:
                with reading(part, name, "zoo") as path:
                    table = parquet.read_table(path)
                self._write(table.slice(0, subjects - before), folder, file)
            elif (part / name).exists():
                self._copy(part, folder, name)

    def _write(self, shard: pyarrow.Table, folder: Path, number: int) -> None:
        """Write a data file, if it holds anything."""
        if len(shard):
            # Few numbers occur twice; a dictionary of them takes time and space.
            parquet.write_table(shard, folder / data_file(number), dictionary_pagesize_limit=DICTIONARY_BYTES)
            self._upload(folder, data_file(number))

    def _copy(self, source: Path, folder: Path, name: str) -> None:
        shutil.copyfile(source / name, folder / name)
        self._upload(folder, name)

    def _upload(self, folder: Path, name: str) -> None:
        if self._hub is not None:
            self._hub.add(folder, name)

    def _save(self, folder: Path, progress: Progress, shard: pyarrow.Table, target: Path) -> None:
        """Write a checkpoint: the data files so far, and what there is of the next."""
        shutil.copytree(folder / DATA, target / DATA, copy_function=link_or_copy)
        parquet.write_table(shard, target / "shard.parquet")
        progress.save(target)

    def _resume(self, folder: Path, run: Run) -> tuple[Progress, pyarrow.Table]:
        """Progress and the unfinished data file: of the run's checkpoint, or at the start."""
        if run.resume is None:
            first_block = self.spec.part.first * self._blocks_per_file if self.spec.part is not None else 0
            return Progress(first_block), self.bucket_trainer.schema.empty_table()
        progress = Progress.load(run.resume)
        with reading_checkpoint():
            files, shard = sorted((run.resume / DATA).iterdir()), parquet.read_table(run.resume / "shard.parquet")
        for file in files:
            self._copy(run.resume, folder, f"{DATA}/{file.name}")
        run.log(f"resumed from a checkpoint: {progress.accepted} of {progress.candidates} candidates accepted so far")
        return progress, shard


def generate(spec: GenerationSpec, run: Run | None = None) -> Zoo:
    """Generate the zoo that ``spec`` asks for, in memory."""
    run = run or Run()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "zoo"
        DatasetGenerationPipeline(spec, run.device, run.inputs.get(BASELINE_INPUT)).run(folder, run)
        zoo = Zoo.load(folder)
        zoo.load_rest()
        return zoo
