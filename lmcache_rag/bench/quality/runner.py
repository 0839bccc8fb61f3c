"""Asks every question in every arm, several at once, and writes a record of each."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.bench.quality.arms import CONTEXTPILOT, AnswerSource, Arm, ArmAnswer
from lmcache_rag.bench.quality.data import Sample
from lmcache_rag.bench.quality.results import Record, ResultFile
from lmcache_rag.bench.quality.tasks import get_style
from lmcache_rag.errors import ContextLengthError, EngineError
from lmcache_rag.prompt import PromptBuilder, PromptFormat, Role, Turn

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, QueryPrompt

OnStep = Callable[[int, int], None]

# ContextPilot runs in an environment of its own: it needs other versions of some packages. It prints a lot.
_CONTEXTPILOT = """
import json, sys
from contextpilot import ContextPilot
orders, places = ContextPilot(use_gpu=False).reorder(json.load(open(sys.argv[1])))
json.dump({"orders": orders, "places": places}, open(sys.argv[2], "w"))
"""


@dataclass(frozen=True)
class QualityRun:
    """Asks questions.

    Attributes:
        engine: Computes the chunks' KV and makes the prompts' ids.
        source: The same engine, as it answers.
        format: The user's prompt texts; a style changes them.
        tenant: The user's tenant.
        arms: The arms.
        max_tokens: Most tokens of an answer; None: by the style.
        concurrency: Questions at once; servers only.
        retrieve: Passages of a question that has none, from the user's store.
        keep: Computes and records KV of the store's passages; None: there is no store.
        forget: Delete the chunks' KV after each cell: it is of no further use in a temporary folder.
        contextpilot: The Python program of an environment with ContextPilot, for that arm.
    """

    engine: Engine
    source: AnswerSource
    format: PromptFormat
    tenant: str
    arms: tuple[Arm, ...]
    max_tokens: int | None = None
    concurrency: int = 1
    retrieve: Callable[[str], Sequence[str]] | None = None
    keep: Callable[[Sequence[str]], object] | None = None
    forget: bool = False
    contextpilot: str = ""

    def run(self, samples: Sequence[Sample], out: ResultFile, on_step: OnStep = lambda done, total: None) -> None:
        """Ask what is not in the file yet.

        Args:
            samples: The questions.
            out: Gets a record of each.
            on_step: Called with (questions done, questions in all) after each.

        Raises:
            ContextLengthError: A prompt does not fit the engine's context; nothing was asked then.
            LMCacheRAGError: The engine failed. What was answered is in the file.
        """
        plain = tuple(arm for arm in self.arms if arm.name != CONTEXTPILOT)
        passes = [(plain, False)]
        if self.contextpilot:
            passes.append((tuple(arm for arm in self.arms if arm.name == CONTEXTPILOT), True))
        groups = [list(group) for _, group in groupby(samples, key=lambda sample: (sample.cell, sample.style))]
        prompts = {style: self._builder(style) for style in {sample.style for sample in samples}}
        for sample in samples:
            self._check_length(sample, len(_prompt(prompts[sample.style], sample)))
        done, total = 0, len(samples) * len(passes)
        for group in groups:
            builder = prompts[group[0].style]
            for arms, reorder in passes:
                names = {arm.name for arm in arms}
                pending = [s for s in group if not names <= _answered(out, s)]
                done += len(group) - len(pending)
                on_step(done, total)
                if not pending:
                    continue
                # ContextPilot plans for all questions together, so that a run that continues has the same orders.
                ordered = self._reordered(self._with_passages(group)) if reorder else self._with_passages(pending)
                missing = {sample.sample_id for sample in pending}
                ready = [sample for sample in ordered if sample.sample_id in missing]
                keys = [] if reorder else self._ingest(ready, builder)
                for record in self._asked(ready, builder, arms):
                    out.add(record)
                    done += 1
                    on_step(done, total)
                if self.forget:
                    self.engine.forget(keys)

    def _builder(self, style: str) -> PromptBuilder:
        form = get_style(style).format(self.format)
        return PromptBuilder(self.engine.tokenizer, self.engine.info, format=form, tenant=self.tenant)

    def _limit(self, sample: Sample) -> int:
        return self.max_tokens or get_style(sample.style).max_tokens

    def _check_length(self, sample: Sample, tokens: int) -> None:
        needed, room = tokens + self._limit(sample), self.engine.info.context_length
        if needed > room:
            raise ContextLengthError(
                f"A question of {sample.cell} takes {needed} tokens with its answer; the engine's context is {room}.",
                remedy="Leave that cell out, lower --top-k, or start the server with a longer context.",
            )

    def _with_passages(self, samples: Iterable[Sample]) -> list[Sample]:
        found = []
        for sample in samples:
            if not sample.passages and self.retrieve is not None:
                sample = replace(sample, passages=tuple(dict.fromkeys(self.retrieve(sample.question))))
            found.append(sample)
        return found

    def _ingest(self, samples: Sequence[Sample], builder: PromptBuilder) -> list[tuple[str, str]]:
        """Compute the KV of all their passages; returns the keys."""
        texts = list(dict.fromkeys(text for sample in samples for text in sample.passages))
        if self.keep is not None:
            self.keep(texts)
        done = self.engine.precompute([builder.ingest(text) for text in texts])
        return [(builder.fingerprint, result.key) for result in done]

    def _asked(self, samples: Sequence[Sample], builder: PromptBuilder, arms: Sequence[Arm]) -> Iterator[Record]:
        """Records as they come, several questions at a time."""
        if self.concurrency == 1:
            yield from (self._ask(sample, builder, arms) for sample in samples)
            return
        waiting = iter(samples)
        running: set[Future[Record]] = set()
        with ThreadPoolExecutor(self.concurrency, "bench-quality") as pool:
            try:
                while True:
                    for sample in islice(waiting, self.concurrency - len(running)):
                        running.add(pool.submit(self._ask, sample, builder, arms))
                    if not running:
                        return
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, sample: Sample, builder: PromptBuilder, arms: Sequence[Arm]) -> Record:
        prompt = _prompt(builder, sample)
        self._check_length(sample, len(prompt))
        # As the model would write it: most tokenizers join a word to the space before it, and a turn begins without.
        gold = builder.encode(sample.answers[0])
        answers = self.source.answers(f"{sample.cell}-{sample.sample_id}", prompt, arms, gold, self._limit(sample))
        fields = {name: _plain(answer, sample) for name, answer in answers.items()}
        facts = (sample.sample_id, sample.cell, sample.task, sample.question, sample.answers, len(prompt))
        return Record(*facts, fields, sample.gated)

    def _reordered(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples in ContextPilot's order, with their passages in its order.

        Raises:
            EngineError: It failed.
        """
        texts = {text: index for index, text in enumerate(dict.fromkeys(t for s in samples for t in s.passages))}
        contexts = [[texts[text] for text in sample.passages] for sample in samples]
        by_index = list(texts)
        with tempfile.TemporaryDirectory() as folder:
            source, result = Path(folder, "contexts.json"), Path(folder, "orders.json")
            source.write_text(json.dumps(contexts))
            try:
                command = [self.contextpilot, "-c", _CONTEXTPILOT, str(source), str(result)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(result.read_text())
            except (OSError, ValueError, subprocess.CalledProcessError) as problem:
                detail = (getattr(problem, "stderr", "") or str(problem)).strip().splitlines()[-1:]
                raise EngineError(
                    f"ContextPilot failed: {' '.join(detail)}",
                    remedy="--contextpilot names the Python program of an environment with the package contextpilot.",
                ) from problem
        ordered = []
        for order, place in zip(found["orders"], found["places"], strict=True):
            if sorted(order) != sorted(contexts[place]):
                raise EngineError("ContextPilot returned other passages.", remedy="Leave the arm contextpilot out.")
            ordered.append(replace(samples[place], passages=tuple(by_index[index] for index in order)))
        return ordered


def _prompt(builder: PromptBuilder, sample: Sample) -> QueryPrompt:
    roles: tuple[Role, Role] = ("user", "assistant")
    history = [Turn(roles[index % 2], text) for index, text in enumerate(sample.history)]
    return builder.query(sample.passages, sample.question, history)


def _answered(out: ResultFile, sample: Sample) -> set[str]:
    record = out.records.get((sample.cell, sample.sample_id))
    return set(record.arms) if record else set()


def _plain(answer: ArmAnswer, sample: Sample) -> dict[str, Any]:
    fields = asdict(answer)
    del fields["tokens"]
    rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in fields.items()}
    return rounded | {"blended": answer.blended, "parsed": get_style(sample.style).answer(answer.text)}
