"""An answer's text begins behind the prompt's last tokens: it is what vLLM makes of the whole prompt."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from contract_kit import takes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tokenizers.decoders
    from tokenizers import Tokenizer, decoders, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from vllm.v1.engine import detokenizer
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    from lmcache_rag.connector import vllm_patches
    from lmcache_rag.connector.vllm_patches import patch_detokenizer_start

pytestmark = [pytest.mark.filterwarnings("ignore")]
STOCK = getattr(FastIncrementalDetokenizer.__init__, "__wrapped__", FastIncrementalDetokenizer.__init__)
TEXTS = [
    "Plain words, 12 of them; two  spaces.",
    "naïve café",
    "日本語の文章です。",
    "🙂🙃 👩‍👩‍👧 mixed with words",
    "\n\n\tcode(x):\n    y",
]


@pytest.fixture(autouse=True)
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastIncrementalDetokenizer, "__init__", STOCK)
    patch_detokenizer_start()
    assert FastIncrementalDetokenizer.__init__ is not STOCK


def _bytes_and_spaces() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: a sign for the space, dropped at a beginning, and bytes for what is unknown."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁the", "▁word", "s", ".", "é"]
    made = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(params=["bytes and spaces", "smollm2"])
def tokenizer(request: pytest.FixtureRequest, smollm2_path: Any) -> Iterator[PreTrainedTokenizerFast]:
    yield _bytes_and_spaces() if request.param == "bytes and spaces" else AutoTokenizer.from_pretrained(smollm2_path)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, rng: random.Random, length: int) -> list[int]:
    if len(tokenizer) > 1000:
        text = " ".join(rng.choice(TEXTS) for _ in range(length))
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = rng.randrange(len(ids) - length)
        ids = ids[start : start + length]
        ids[-1] = rng.choice([ids[-1], *tokenizer.all_special_ids])
        return ids
    utf8 = [2 + byte for byte in rng.choice(TEXTS).encode()]
    words = rng.choice([0.0, 0.3, 0.9])  # none: bytes alone, no text for the most part
    return [rng.randrange(258, 265) if rng.random() < words else rng.choice(utf8) for _ in range(length)]


def answer(begin: Callable[..., None], tokenizer: Any, prompt: list[int], tokens: list[int], *, skip: bool) -> str:
    made: Any = object.__new__(FastIncrementalDetokenizer)
    sampling = SimpleNamespace(
        stop=[],
        min_tokens=0,
        include_stop_str_in_output=False,
        skip_special_tokens=skip,
        spaces_between_special_tokens=True,
    )
    begin(made, tokenizer, SimpleNamespace(request_id="r", prompt_token_ids=prompt, sampling_params=sampling))
    for token in tokens:
        made.update([token], stop_terminated=False)
    return str(made.output_text)


def test_texts_are_what_vllm_makes_of_the_whole_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(7)
    for round_ in range(400):
        length = rng.choice([1, 31, 32, 33, 40, 200])
        prompt = prompt_ids(tokenizer, rng, length)
        tokens = prompt_ids(tokenizer, rng, 12)
        skip = bool(round_ % 2)
        begin = FastIncrementalDetokenizer.__init__
        ours = answer(begin, tokenizer, prompt, tokens, skip=skip)
        assert ours == answer(STOCK, tokenizer, prompt, tokens, skip=skip), (prompt, tokens, skip)


def test_most_prompts_take_the_short_way(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    real = tokenizers.decoders.DecodeStream

    def stream(ids: list[int] | None = None, **options: Any) -> Any:
        given.append(len(ids or ()))
        return real(ids=ids, **options)

    monkeypatch.setattr(tokenizers.decoders, "DecodeStream", stream)
    rng = random.Random(3)
    for _ in range(50):
        answer(FastIncrementalDetokenizer.__init__, tokenizer, prompt_ids(tokenizer, rng, 200), [5], skip=True)
    assert given.count(vllm_patches.PRIMED) > 25
    assert set(given) <= {vllm_patches.PRIMED, 200}


def test_the_request_itself_keeps_its_prompt() -> None:
    tokenizer = _bytes_and_spaces()
    prompt = [260] * 100
    answer(FastIncrementalDetokenizer.__init__, tokenizer, prompt, [260], skip=True)
    assert prompt == [260] * 100
    takes(STOCK, "tokenizer", "request")


def test_the_wrapper_comes_once_and_only_with_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    once = FastIncrementalDetokenizer.__init__
    patch_detokenizer_start()
    assert FastIncrementalDetokenizer.__init__ is once
    monkeypatch.setattr(FastIncrementalDetokenizer, "__init__", STOCK)
    monkeypatch.delitem(sys.modules, vllm_patches.API_SERVER, raising=False)
    monkeypatch.delitem(sys.modules, detokenizer.__name__)
    patch_detokenizer_start()
    assert FastIncrementalDetokenizer.__init__ is STOCK


def test_an_api_server_loads_what_wraps_it() -> None:
    """The connector's module wraps it. API servers import that for their metrics, others have no use for it."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import metrics

    assert "get_connector_class" in inspect.getsource(metrics)
    code = """
import vllm.v1.engine.detokenizer
from lmcache_rag.connector import plugin

def wrapped():
    return hasattr(vllm.v1.engine.detokenizer.FastIncrementalDetokenizer.__init__, "__wrapped__")

plugin.register()
plain = wrapped()
import lmcache_rag.connector.connector
print(plain, wrapped())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split()[-2:] == ["False", "True"]
