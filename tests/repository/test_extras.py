"""The base installation is a small client; each extra adds what it says, in an environment of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVLLM
from openai_kit import vllm_serving

ROOT = Path(__file__).parents[2]
MOST_MB = 150
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
HEAVY = ("torch", "transformers", "sentence_transformers", "sklearn", "faiss", "numpy", "pypdf", "bs4", "llama_index")

full = pytest.mark.full


class Environment:
    """A virtual environment with this package and some extras, in the versions that are tested here."""

    def __init__(self, place: Path, extras: str = "") -> None:
        self.place, self.python = place, place / "venv" / "bin" / "python"
        with_torch = extras == "embedded"
        venv.create(place / "venv", with_pip=with_torch, symlinks=True)
        if with_torch:  # the documented command
            self.run("sh", ROOT / ".ci" / "install-torch", self.python)
        source = place / "source"  # a copy: what earlier builds left in the checkout cannot get in
        for name in ("lmcache_rag", "integrations", "examples/data"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source / name)
        pins = place / "pins.txt"
        versions = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
        versions = {name: version for name, version in versions.items() if not (with_torch and name == "torch")}
        pins.write_text("".join(f"{name}=={version}\n" for name, version in versions.items() if name != "lmcache-rag"))
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--link-mode", "copy", "--python", self.python]
        self.run(*uv, "--constraint", pins, f"{source}[{extras}]" if extras else source)
        shutil.rmtree(source)
        # As pip does; torch carries files of a newer Python.
        subprocess.run([self.python, "-m", "compileall", "-qq", place / "venv" / "lib"], check=False)
        print(f"\n{extras or 'base':<12} {self.megabytes:6.0f} MB")

    @property
    def megabytes(self) -> float:
        """Size of what is installed; there is no pip."""
        return sum(file.stat().st_size for file in (self.place / "venv" / "lib").rglob("*") if file.is_file()) / 1e6

    def run(self, *command: Any, status: int = 0) -> str:
        """Run a command; gives its output and errors."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=self.place, env=kept, capture_output=True, text=True, check=False)
        assert done.returncode == status, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def cli(self, *arguments: Any, status: int = 0) -> str:
        """Run our command."""
        return self.run(self.place / "venv" / "bin" / "lmcache-rag", *arguments, status=status)

    def modules(self, names: tuple[str, ...] = HEAVY) -> list[str]:
        """Those of these modules that are installed."""
        code = f"import importlib.util, json; print(json.dumps([n for n in {names} if importlib.util.find_spec(n)]))"
        found: list[str] = json.loads(self.run(self.python, "-c", code))
        return found


def environment(extras: str) -> Any:
    """A fixture: one environment for all tests that need it."""

    @pytest.fixture(scope="module")
    def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
        place = tmp_path_factory.mktemp("clean")
        yield Environment(place, extras)
        shutil.rmtree(place)

    return made


base = environment("")
langchain = environment("langchain")
llama_index = environment("llama-index")
documents = environment("documents")
embedded = environment("embedded")


@pytest.fixture
def server(tokenizer: Any) -> Iterator[FakeVLLM]:
    with vllm_serving(tokenizer) as running:
        yield running


ASK = """
import sys
from lmcache_rag import PromptBuilder, VLLMEngine
from lmcache_rag.engines.base import BlendOptions, Sampling
engine = VLLMEngine(sys.argv[1], tokenizer=sys.argv[2])
assert engine.info.kv_bytes_per_token == 30 * 3 * 64 * 2 * 2
prompts = PromptBuilder(engine.tokenizer, engine.info)
passages = [("Quince ripens in March. " * 20), ("Figs ripen in May. " * 20)]
assert all(result.computed for result in engine.precompute(map(prompts.ingest, passages)))
blend = BlendOptions("query", 0.15, always=True)
done = engine.generate(prompts.query(passages[::-1], "What ripens?"), Sampling(max_tokens=8), blend)
print(done.text, "| blended:", done.stats.blended)
"""


@full
def test_the_base_is_small_and_has_no_torch(base: Environment) -> None:
    assert base.megabytes < MOST_MB
    assert base.modules() == []


@full
def test_a_base_client_ingests_and_blends(base: Environment, server: FakeVLLM, smollm2_path: Path) -> None:
    assert "| blended: True" in base.run(base.python, "-c", ASK, server.url, smollm2_path)


@full
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("ingest words.md", "embedded"),
        ("ask What?", "embedded"),
        ("demo", "demo"),
        ("ingest words.md --engine {url}", "documents"),
        ("ask What? --engine {url}", "store"),
        ("search What?", "store"),
        ("serve model", "gpu"),
    ],
)
def test_a_missing_extra_is_named_with_its_command(
    base: Environment, server: FakeVLLM, command: str, extra: str
) -> None:
    (base.place / "words.md").write_text("Quince ripens in March.")
    shutil.rmtree(base.place / "lmcache-rag-store", ignore_errors=True)
    if command.startswith(("ask", "search")):
        make = "from lmcache_rag.store import Store; Store.open('lmcache-rag-store').close()"
        base.run(base.python, "-c", make)
    words = command.format(url=server.url).split()
    assert f'pip install ".[{extra}]"' in base.cli(*words, status=2)


@full
def test_a_base_command_line_helps_and_lists_settings(base: Environment) -> None:
    assert "ingest" in base.cli("--help")
    assert "chunk_tokens" in base.cli("settings")
    assert "lmcache-rag" in base.cli("--version")


@full
def test_a_base_command_line_looks_after_a_store(base: Environment, server: FakeVLLM) -> None:
    base.run(base.python, "-c", "from lmcache_rag.store import Store; Store.open('another').close()")
    assert json.loads(base.cli("list", "--store", "another", "--json"))["documents"] == []
    assert '"documents"' in base.cli("status", "--store", "another", "--engine", server.url, "--json")
    assert base.cli("warm", "--store", "another", "--engine", server.url)


@full
@pytest.mark.parametrize(("module", "extra"), [("langchain", "langchain"), ("llama_index", "llama-index")])
def test_a_missing_framework_is_named_with_its_command(base: Environment, module: str, extra: str) -> None:
    code = f"import lmcache_rag.integrations.{module}"
    assert f'pip install ".[{extra}]"' in base.run(base.python, "-c", code, status=1)


CHAIN = """
import sys
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore
from langchain_openai import OpenAI
from lmcache_rag.integrations.langchain import LMCacheVectorStore, blend

class Listed(VectorStore):
    texts = []
    def add_texts(self, texts, metadatas=None, *, ids=None, **kwargs):
        self.texts += texts
        return list(ids or map(str, range(len(self.texts))))
    def similarity_search(self, query, k=4, **kwargs):
        return [Document(text) for text in self.texts[:k]]
    @classmethod
    def from_texts(cls, texts, embedding, metadatas=None, **kwargs):
        raise NotImplementedError

llm = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model=sys.argv[2], max_tokens=8)
store = LMCacheVectorStore(Listed(), llm, store=sys.argv[3])
store.add_documents([Document(page_content=text * 20) for text in ("Quince ripens in March. ", "Figs ripen in May. ")])
found = store.similarity_search("?")[::-1]
answer = blend(llm, store=sys.argv[3]).invoke({"documents": found, "question": "What ripens?"})
print("answer:", answer)
"""


@full
def test_langchain_needs_no_model_library(langchain: Environment, server: FakeVLLM, smollm2_path: Path) -> None:
    assert langchain.modules() == []
    assert smollm2_path.is_dir()  # prepared once: the client takes the tokenizer from there
    answer = langchain.run(langchain.python, "-c", CHAIN, server.url, server.model, langchain.place / "registry")
    assert "answer: " in answer
    assert len(server.questions) == 1
    assert "lmcache_rag.chunks" in server.questions[0]["kv_transfer_params"]


@full
def test_llama_index_needs_no_model_library(llama_index: Environment) -> None:
    assert "torch" not in llama_index.modules()
    code = "from lmcache_rag.integrations.llama_index import LMCacheRetriever; print(LMCacheRetriever.__name__)"
    assert "LMCacheRetriever" in llama_index.run(llama_index.python, "-c", code)


@full
def test_documents_are_read_and_split_without_torch(documents: Environment) -> None:
    assert set(documents.modules()) == {"pypdf", "bs4"}
    (documents.place / "page.html").write_text("<h1>Quince</h1><p>It ripens in March.</p>")
    code = (
        "from lmcache_rag.documents.loading import load_document as load\n"
        "from lmcache_rag.documents import Splitter\n"
        "text = load('page.html').text\n"
        "print(Splitter(lambda t: t.split(), chunk_tokens=32).split(text))"
    )
    assert "It ripens in March." in documents.run(documents.python, "-c", code)


@full
def test_without_a_gpu_the_embedded_engine_has_no_cuda(embedded: Environment, smollm2_path: Path) -> None:
    assert {"torch", "transformers", "sentence_transformers", "faiss", "pypdf", "bs4"} <= set(embedded.modules())
    assert embedded.modules(("vllm", "nicegui", "llama_index", "pytest")) == []
    if shutil.which("nvidia-smi") is None:
        embedded.run(embedded.python, "-c", "import torch; assert torch.version.cuda is None")
        assert not list((embedded.place / "venv").glob("lib/python*/site-packages/nvidia*"))
    (embedded.place / "words.md").write_text("Quince ripens in March. " * 20)
    assert "1 added" in embedded.cli("ingest", "words.md", "--model", smollm2_path)


# -- without an installation ------------------------------------------------------------------------------------------


def test_extras_contain_what_they_are_said_to() -> None:
    def names(extra: str) -> set[str]:
        found = set()
        for line in EXTRAS[extra]:
            if inner := re.fullmatch(r"lmcache-rag\[(.*)\]", line):
                found |= {name for each in inner[1].split(",") for name in names(each)}
            else:
                found.add(re.split(r"[^\w-]", line)[0])
        return found

    assert {"faiss-cpu", "sentence-transformers"} <= names("store")
    for extra in ("embedded", "gpu"):
        assert names("store") | names("documents") <= names(extra)
    assert names("embedded") <= names("demo")
    assert names("demo") | names("langchain") | names("llama-index") <= names("all") <= names("dev")
