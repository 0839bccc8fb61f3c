"""Plain BERT embedders, computed without sentence-transformers: the same vectors, and nothing but plain ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_rag.embedding import BertEncoder, SentenceTransformerEmbedder, unit_length

TEXTS = ["", "hi", "A river. " * 400, "Žluťoučký kůň 🙂", "  wide  ", "[CLS] text [SEP] [MASK]"]
TEXTS += [f"Number {number} of many. " * (1 + number % 9) for number in range(20)]


def change(folder: Path, name: str, **changes: Any) -> Path:
    """Write other values into a JSON file of a model's folder."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.fixture
def copy(embedder_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(embedder_path, tmp_path / "model")


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_vectors_equal_those_of_sentence_transformers(copy: Path, pooling: str) -> None:
    import sentence_transformers

    modes = {"pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}
    change(copy, "1_Pooling/config.json", **modes)
    theirs = sentence_transformers.SentenceTransformer(str(copy), device="cpu").encode(TEXTS, show_progress_bar=False)
    plain = BertEncoder.open(copy)
    assert plain is not None
    ours = plain.encode(TEXTS, batch_size=8)
    assert ours.dtype == np.float32
    assert np.abs(unit_length(ours) - theirs).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"model_type": "mpnet"}),
        ("config.json", {"auto_map": {"AutoModel": "own--code"}}),
        ("config_sentence_transformers.json", {"prompts": {"query": "Question: "}}),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("sentence_bert_config.json", {"max_seq_length": None}),
        ("sentence_bert_config.json", {"model_args": {}}),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}),
    ],
)
def test_anything_more_is_for_sentence_transformers(copy: Path, name: str, changes: dict[str, Any]) -> None:
    assert BertEncoder.open(change(copy, name, **changes)) is None


def test_other_models_go_to_sentence_transformers(copy: Path) -> None:
    modules = json.loads((copy / "modules.json").read_text())
    (copy / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": "models.Dense"}]))
    assert BertEncoder.open(copy) is None
    (copy / "modules.json").unlink()
    assert BertEncoder.open(copy) is None


def test_it_is_used_without_sentence_transformers(embedder_path: Path) -> None:
    code = (
        "import gc, sys; from lmcache_rag.embedding import SentenceTransformerEmbedder; "
        f"SentenceTransformerEmbedder({str(embedder_path)!r}, device='cpu').embed_query('x'); "
        "print('sentence_transformers' in sys.modules, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.strip() == "False True", done.stderr


def test_another_model_uses_sentence_transformers(copy: Path) -> None:
    change(copy, "sentence_bert_config.json", do_lower_case=True)
    other = SentenceTransformerEmbedder(copy, device="cpu")
    same = SentenceTransformerEmbedder(copy.parent / "plain", device="cpu")
    change(shutil.copytree(copy, copy.parent / "plain"), "sentence_bert_config.json", do_lower_case=False)
    # The tokenizer lowers letters by itself, so the two must agree.
    assert np.abs(other.embed_documents(TEXTS) - same.embed_documents(TEXTS)).max() < 1e-6
