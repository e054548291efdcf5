import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from zimage.checkpoint.bpe import SPLIT
from zimage.testing.configs import SIZES
from zimage.testing.tokenizer import train_tokenizer

TEXTS = [
    "A red fox in the snow, 35mm film; it's 10:45, they'll say \"hello\"!",
    "一只红色的狐狸坐在雪地里，墙上写着「造相」。龘",
    "🦊👩‍🚀 flags 🇨🇳 and é, e\u0301, ﬁ, ½, İ",
    "  two  spaces,\ttabs\r\nand\n\n\nlines  \n ",
    "\x00\x7f\u200b\ufffd",
    "<|im_start|>user\nnot a turn<|im_end|> <think>hm</think>",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return Qwen2Tokenizer.from_pretrained(tiny / "tokenizer")


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", TEXTS)
def test_every_way_to_load_it_gives_the_same_ids(tiny: Path, tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    folder = tiny / "tokenizer"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == ids
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == ids
    rebuilt = Qwen2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    rebuilt.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    rebuilt.add_tokens(["<think>", "</think>"])
    assert rebuilt(text).input_ids == ids


def test_it_splits_as_qwen_does(tokenizer: Any) -> None:
    assert SPLIT == PRETOKENIZE_REGEX
    assert tokenizer.tokenize("1024") == ["1", "0", "2", "4"]
    assert tokenizer.tokenize("a red fox")[:2] == ["a", "Ġred"]


def test_special_tokens_follow_the_vocabulary(tiny: Path, tokenizer: Any) -> None:
    vocabulary = json.loads((tiny / "tokenizer" / "vocab.json").read_text())
    first = len(vocabulary)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(names) == [first, first + 1, first + 2, first + 3, first + 4]
    assert set(tokenizer.all_special_tokens) == set(names[:3])
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == (names[0], names[2], None)
    assert len(tokenizer) <= min(size.vocab_size for size in SIZES.values())


def test_the_text_encoders_config_names_the_same_ids(tiny: Path, tokenizer: Any) -> None:
    config = json.loads((tiny / "text_encoder" / "config.json").read_text())
    assert config["bos_token_id"] == tokenizer.pad_token_id
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_it_pads_on_the_right(tokenizer: Any) -> None:
    out = tokenizer(["a fox", "a red fox in snow"], padding=True)
    short = sum(out.attention_mask[0])
    assert out.attention_mask[0] == [1] * short + [0] * (len(out.input_ids[1]) - short)
    assert out.input_ids[0][-1] == tokenizer.pad_token_id


@pytest.mark.parametrize("prompt", ["a red fox", "一只狐狸", "", " spaces \n"])
def test_the_template_of_one_user_turn(tokenizer: Any, prompt: str) -> None:
    turn = [{"role": "user", "content": prompt}]
    expected = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    render = tokenizer.apply_chat_template
    assert render(turn, tokenize=False, add_generation_prompt=True) == expected
    assert render(turn, tokenize=False, add_generation_prompt=True, enable_thinking=True) == expected
    without = render(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert without == expected + "<think>\n\n</think>\n\n"


def test_the_template_of_other_turns(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    system, user, assistant = tokenizer.apply_chat_template(turns, tokenize=False).split("<|im_end|>\n")[:3]
    assert system == "<|im_start|>system\nbe brief"
    assert (user, assistant) == ("<|im_start|>user\nhi", "<|im_start|>assistant\nhello")


def test_training_is_deterministic(tiny: Path) -> None:
    assert train_tokenizer().to_str() == Tokenizer.from_file(str(tiny / "tokenizer" / "tokenizer.json")).to_str()
