"""bench exact: blended answers of a server beside those of a full prefill."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache_rag.cli.bars import Bars
from lmcache_rag.cli.render import count, plain
from lmcache_rag.cli.run import Run
from lmcache_rag.cli.verb import verb
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_rag.bench.exact import Exactness
    from lmcache_rag.bench.traces import Source
    from lmcache_rag.engines.base import BlendOptions
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.prompt import PromptBuilder

Documents = Annotated[list[str], typer.Argument(metavar="PATH...", help="Documents to take the chunks from.")]
Engine = Annotated[str, typer.Option("--engine", metavar="URL", help="The server that blends.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Folder or name of its model.", show_default=False)
]
Prompts = Annotated[int, typer.Option("--prompts", metavar="N", min=1, help="Questions over 4 to 8 chunks each.")]
Orders = Annotated[int, typer.Option("--orders", metavar="N", min=0, help="Orders of the same ten chunks.")]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Greedy tokens that are compared.")]
Chunk = Annotated[int, typer.Option("--chunk-tokens", metavar="N", min=32, help="Most tokens of a chunk.")]
Ratio = Annotated[float, typer.Option("--at", metavar="RATIO", min=0, max=1, help="Recompute ratio of the policies.")]
Embedded = Annotated[
    bool, typer.Option("--embedded", help="Measure the embedded engine on the same prompts too; needs --model.")
]


Cold = Annotated[
    bool,
    typer.Option("--cold", help="Do not tell the server where the chunks stand: all their KV comes from LMCache."),
]


@verb()
def exact(
    run: Run,
    documents: Documents,
    *,
    engine: Engine = "http://localhost:8000",
    model: Model = None,
    prompts: Prompts = 50,
    orders: Orders = 20,
    tokens: Tokens = 64,
    chunk_tokens: Chunk = 256,
    at: Ratio = 0.15,
    embedded: Embedded = False,
    cold: Cold = False,
) -> None:
    """Blended answers beside those of a full prefill: are they the same?

    Cuts the documents into chunks, has their KV computed, and asks questions
    over random chunks in random order: without reuse, with everything computed
    again (ratio 1, which must be the same but for near ties of rounding), with
    each policy, and without reuse once more ("again, exact": what differs there
    is the server's own rounding). Then the same ten chunks in many orders: how
    much of them comes from the cache. Whole blocks of LMCache are 100%; what
    the server still holds itself is in smaller blocks, and may make it more.

    [bold]Example[/bold]
      lmcache-rag bench exact docs/ --engine http://localhost:8000
    """
    from lmcache_rag.bench import exact as bench
    from lmcache_rag.bench.traces import EmbeddedSource, ServerSource
    from lmcache_rag.engines.base import BlendOptions
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.prompt import PromptBuilder

    if embedded and not model:
        raise ConfigError("--embedded needs the model's folder or name.", remedy="Give it with --model.")
    server = VLLMEngine(engine, model)
    builder = PromptBuilder(server.tokenizer, server.info)
    chunks = read_chunks(documents, builder, chunk_tokens)
    most = room_for_chunks(server, builder, tokens, chunk_tokens)
    asked = bench.questions(chunks, prompts, least=min(4, most), most=most)
    arms = {
        "query 1": BlendOptions("query", 1.0),
        f"query {at:g}": BlendOptions("query", at),
        f"hkvd {at:g}": BlendOptions("hkvd", at),
        "none": BlendOptions("none", 0.0),
    }
    found: dict[str, list[Exactness]] = {}
    with Bars(run, main="questions") as bars, tempfile.TemporaryDirectory() as folder:
        total, done = (prompts * (2 if embedded else 1)) + orders, 0

        def step() -> None:
            nonlocal done
            done += 1
            bars.update("questions", done, total)

        def measure(name: str, source: Source, kinds: dict[str, BlendOptions]) -> None:
            source.keep(chunks)
            found[name] = bench.compare(source, asked, kinds, tokens=tokens, again=True, on_step=step)

        source = ServerSource(server, builder, named=not cold)
        measure("server", source, arms)
        if orders:
            turned = bench.permutations(chunks[: 10 if most == 8 else most], orders)
            found["orders"] = bench.compare(
                source, turned, {f"query {at:g}": arms[f"query {at:g}"]}, tokens=1, on_step=step
            )
        if embedded:
            from lmcache_rag.engines.embedded import EmbeddedEngine

            own = EmbeddedEngine(model, kv_dir=Path(folder))
            try:
                measure("embedded", EmbeddedSource(own, PromptBuilder(own.tokenizer, own.info)), arms)
            finally:
                own.close()
    server.close()
    if run.json:
        run.emit({name: [plain(each.as_dict()) for each in rows] for name, rows in found.items()})
    else:
        _show(run, found, prompts)


def room_for_chunks(server: VLLMEngine, builder: PromptBuilder, tokens: int, chunk_tokens: int) -> int:
    """So many that the longest prompt and its answer fit the server's context; at most 8.

    Raises:
        ConfigError: There is not even room for two.
    """
    most = min(8, (server.info.context_length - len(builder.prefix_ids) - tokens - 128) // (chunk_tokens + 4))
    if most < 2:
        raise ConfigError("The server's context does not hold two chunks.", remedy="Lower --chunk-tokens.")
    return most


def read_chunks(documents: list[str], builder: PromptBuilder, size: int) -> list[str]:
    """The chunks of all documents that can be read.

    Raises:
        ConfigError: There are too few to measure with.
    """
    from lmcache_rag.documents import Splitter
    from lmcache_rag.ingest import Failure, expand

    splitter = Splitter(builder.encode, chunk_tokens=size)
    read = [item for item in expand(documents) if not isinstance(item, Failure)]
    texts = dict.fromkeys(chunk.text for document in read for chunk in splitter.split(document.text))
    # LMCache keeps whole blocks: a chunk shorter than one is never found.
    long = [text for text in texts if len(builder.chunk_ids(text)) >= builder.info.kv_block]
    if len(long) < 10:
        raise ConfigError(
            f"There are {count(len(long), 'chunk')} of {builder.info.kv_block} tokens and more; 10 are needed.",
            remedy="Name more documents.",
        )
    return long


def _show(run: Run, found: dict[str, list[Exactness]], prompts: int) -> None:
    from rich.table import Table

    table = Table(title=f"{count(prompts, 'question')}: blended beside a full prefill")
    for name in ("engine", "arm", "equal", "near ties", "other", "KL of the first token", "least cover"):
        table.add_column(name, justify="left" if name in ("engine", "arm") else "right")
    for engine, rows in found.items():
        for row in rows:
            low, high = row.kl_interval
            differing = len(row.differences) - row.equal - row.unexplained
            covered = "" if row.least_cover is None else f"{row.least_cover:.1%}"
            kl = f"{row.kl:.4f} [{low:.4f}, {high:.4f}]"
            table.add_row(engine, row.arm, str(row.equal), str(differing), str(row.unexplained), kl, covered)
    run.out.print(table)
