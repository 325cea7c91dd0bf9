"""Ids of the Hugging Face Hub: what is fetched, what is a path before it is an id, and one line for what cannot be fetched."""

import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from selfspan_jax import SpanLM
from selfspan_jax.weights import hub, importing
from tests.selfspan_jax.weights import pretrained

pytestmark = pytest.mark.filterwarnings("ignore")  # `transformers` warns about itself
ID = "somebody/tiny-llama_2.1"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The Hub with one model; what it was asked for."""
    calls = []
    model = pretrained.directory(tmp_path / "snapshot")
    monkeypatch.chdir(tmp_path)

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_an_id_is_fetched_as_data(asked):
    lm = SpanLM.load(ID)
    assert asked[0][0] == ID and lm.model.vocab.num_labels == 256
    assert importing.load(Path(ID), num_labels=4)[0].vocab.num_labels == 4 and len(asked) == 2
    wanted = ["config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"]
    wanted += ["model.safetensors.index.json", "tokenizer_config.json", "chat_template.jinja", "adapter.safetensors", "vocab.json"]
    others = ["modeling_x.py", "pytorch_model.bin", "model.pkl", "model.gguf", "onnx/model.safetensors", "consolidated.safetensors"]
    others += ["model.pt", "runs/model.safetensors", "tf_model.h5", "README.md", "tokenizer.pickle", "x/config.json"]
    patterns = {name: asked[0][1][name] for name in ("allow_patterns", "ignore_patterns")}
    assert [*filter_repo_objects([*wanted, *others], **patterns)] == wanted


def test_what_is_a_path_is_never_asked_for(asked, tmp_path):
    with pytest.raises(ValueError, match="neither a directory nor a GGUF file"):
        SpanLM.load(__file__)
    here = pretrained.directory(tmp_path / "somebody")
    assert hub.locate("somebody") == Path("somebody") and hub.locate(here) == here
    pretrained.directory(here / "tiny")
    assert SpanLM.load("somebody/tiny").model.config.num_layers == 2
    for name in ("somebody/typo", tmp_path / "none", "none", "other/model.gguf", "a/b/c", "./a", "../a/b", "/a/b"):
        with pytest.raises(FileNotFoundError, match="no such"):
            SpanLM.load(name)
    assert not asked


FAILURES = {
    "offline": (errors.LocalEntryNotFoundError("Cannot find\nthe snapshot"), "the Hugging Face Hub cannot be reached"),
    "unknown": (errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError, "404"), "no such model on the Hugging Face Hub"),
    "a bad id": (errors.HFValidationError("Repo id must"), "not to be fetched from the Hugging Face Hub .HFValidationError"),
    "no connection": (errors.HfHubHTTPError.__mro__[1]("broken"), "not to be fetched"),
    "a full disk": (OSError(28, "No space left"), "not to be fetched .*No space left"),
}


@pytest.mark.parametrize(("error", "message"), FAILURES.values(), ids=FAILURES)
def test_what_cannot_be_fetched_is_one_line(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=f"{ID}: no such path[,;] (and )?{message}") as found:
        SpanLM.load(ID)
    assert "\n" not in str(found.value)


def test_without_a_network_the_library_itself_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"{ID}: no such path; the Hugging Face Hub cannot be reached"):
        SpanLM.load(ID)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="need the package huggingface_hub"):
        SpanLM.load(ID)
