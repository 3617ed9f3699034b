"""Text sources and token windows."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from vptq.errors import ConfigError
from vptq.text import NAMED, read_text, token_windows

LINE = "ba de fi go ku"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join([LINE] * 20), encoding="utf-8")  # 100 tokens
    return path


def test_windows_are_consecutive_cuts_of_the_tokenized_text_without_special_tokens(
    text_file: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    windows = token_windows(text_file, tiny_tokenizer, seqlen=15)
    whole = tiny_tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    assert windows.dtype == torch.int64
    assert windows.shape == (6, 15)  # the last 10 tokens do not fill a window
    assert windows.flatten().tolist() == whole[:90]
    assert tiny_tokenizer.bos_token_id not in windows


class OneTokenACharacter:
    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seqlen=st.integers(2, 40), wanted=st.integers(1, 60))
def test_as_many_windows_as_the_text_fills_and_no_more_than_asked(tmp_path: Path, seqlen: int, wanted: int) -> None:
    path = tmp_path / "letters.txt"
    text = "abcdefghij" * 25
    path.write_text(text, encoding="utf-8")
    tokenizer: Any = OneTokenACharacter()
    windows = token_windows(path, tokenizer, seqlen, wanted)
    count = min(wanted, len(text) // seqlen)
    assert windows.shape == (count, seqlen)
    assert "".join(map(chr, windows.flatten().tolist())) == text[: count * seqlen]


def test_reading_goes_on_until_the_windows_are_full(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens of many more characters than usual: the first guess of how much text to read is too small."""
    path = tmp_path / "sparse.txt"
    path.write_text(("ba" + " " * 100) * 64, encoding="utf-8")
    assert token_windows(path, tiny_tokenizer, 16, 4).shape == (4, 16)


def test_a_short_text_is_one_short_window_and_an_empty_one_none(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "short.txt"
    path.write_text(LINE, encoding="utf-8")
    assert token_windows(path, tiny_tokenizer, 64).shape == (1, 5)
    path.write_text(" \n", encoding="utf-8")
    assert token_windows(path, tiny_tokenizer, 64).shape == (0, 64)


def test_rows_of_a_data_set_are_joined_and_read_only_as_far_as_needed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"id": index, "body": f"row {index}"} for index in range(50)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_text(str(folder)).split("\n\n") == [row["body"] for row in rows]
    assert read_text(str(folder), characters=12) == "row 0\n\nrow 1\n\nrow 2"


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_known_names_stand_for_different_text_to_calibrate_and_to_evaluate_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        asked.append((path, config, options["split"], options["data_files"]))
        return [{"title": "not this", "text": "ba"}, {"title": "nor this", "text": "de"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text(name, purpose="evaluation").split() == ["ba", "de"]
    assert read_text(name, purpose="calibration").split() == ["ba", "de"]
    assert asked[0] != asked[1]
    assert asked[0][0] == asked[1][0] == NAMED[name, "evaluation"].path


def test_a_data_set_may_name_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, config, split, **_: [{"text": f"{path} {config} {split}"}]
    )
    assert read_text("org/name:sub@validation") == "org/name sub validation"
    assert read_text("name") == "name None train"


def test_what_cannot_be_read_is_one_clear_line(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff\xfe")
    for source, message in [
        (binary, "not UTF-8"),
        (tmp_path / "missing.txt", "no text at"),
        ("./missing.txt", "no text at"),
        ("", "no text at"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            read_text(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        token_windows(binary, tiny_tokenizer, 1)
    with pytest.raises(ConfigError, match="at least 1 is needed"):
        token_windows(binary, tiny_tokenizer, 8, 0)


def test_a_data_set_that_fails_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match="first line") as caught:
        read_text("no-such-data-set")
    assert "second" not in str(caught.value)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"number": 1}])
    with pytest.raises(ConfigError, match="no text column; its columns are number"):
        read_text("numbers")


def test_without_the_datasets_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'vptq\[data\]'"):
        read_text("wikitext2")
