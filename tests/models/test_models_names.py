"""Names: packaged, path, hub id; and what is said of a name that is none."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import filter_repo_objects

from lorakit import models
from lorakit.errors import ModelError


def answer(monkeypatch, *names):
    info = ModelInfo(id="x", siblings=[{"rfilename": name} for name in names])
    assert all(isinstance(sibling, RepoSibling) for sibling in info.siblings)
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: info)


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_an_unknown_name_lists_the_packaged_ones_and_the_nearest(silent_hub):
    with pytest.raises(
        ModelError, match=r"(?s)no model 'smollm-135m'.*does not answer.*minilm-l6.*'smollm2-135m-instruct'"
    ):
        models.load("smollm-135m")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "", "C:\\models\\x", "../x"])
def test_what_can_be_no_hub_id_is_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match="no model"):
        models.load(name)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"1234")
    with pytest.raises(ModelError, match="is a file"):
        models.load(str(tmp_path / "x.bin"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("README.md",), "no transformers model"),
        (("adapter_config.json", "adapter_model.safetensors"), "an adapter, no base model"),
        (("config.json", "pytorch_model.bin"), "pickle"),
        (("config.json",), "no weights"),
    ],
)
def test_a_hub_repository_that_cannot_serve_is_refused_before_any_download(monkeypatch, names, message):
    answer(monkeypatch, *names)
    with pytest.raises(ModelError, match=message):
        models.load("owner/name")


def test_a_cached_hub_model_loads_while_the_hub_is_silent(silent_hub, folder, tmp_path, monkeypatch, llama):
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: pytest.fail("the network was used"))
    loaded = models.load("owner/tiny")
    assert loaded.source == loaded.model.name_or_path == "owner/tiny"
    assert loaded.model.config.hidden_size == llama.config.hidden_size


def test_a_hub_model_is_downloaded_without_pickles_and_code(monkeypatch, folder):
    answer(monkeypatch, "config.json", "model.safetensors", "pytorch_model.bin", "evil.py")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert models.load("owner/tiny", revision="v1").source == "owner/tiny"
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("owner/tiny", "v1", False)
    wanted = list(
        filter_repo_objects(
            ["model.safetensors", "evil.py", "pytorch_model.bin", "config.json", "original/model.safetensors"],
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )
    assert wanted == ["model.safetensors", "config.json"]


def test_a_download_that_breaks(monkeypatch):
    answer(monkeypatch, "config.json", "model.safetensors")

    def broken(*args, **kwargs):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ModelError, match=r"could not be downloaded.*reset by peer"):
        models.load("owner/tiny")
