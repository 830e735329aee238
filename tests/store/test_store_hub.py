"""Hub ids: fetched through huggingface_hub, and one clear error where that fails."""

import pytest
import tiny
from store_kit import good, refused

import lorakit as lk
from lorakit.errors import FileError
from lorakit.store.read import FILES


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub. Returns what was asked of it; `hub.answer` is a folder, or an exception to raise."""
    import huggingface_hub

    class Hub:
        answer = None
        asked = None

    def download(repository, **options):
        Hub.asked = (repository, options)
        if isinstance(Hub.answer, Exception):
            raise Hub.answer
        return str(Hub.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return Hub


def test_a_hub_id_is_fetched_and_loaded(hub, tmp_path):
    hub.answer = good(tmp_path / "cache")
    model = tiny.gpt2()
    lk.load(model, "someone/adapter")
    assert lk.adapters(model)["default"].active
    assert hub.asked == ("someone/adapter", {"allow_patterns": list(FILES)})
    assert lk.verify("someone/adapter").ok
    assert lk.inspect("someone/adapter").parameters


def test_a_repository_without_an_adapter(hub, tmp_path):
    (tmp_path / "cache").mkdir()
    hub.answer = tmp_path / "cache"
    refused("someone/model", "adapter_config.json: not there", "adapter_model.safetensors: not there")


def test_offline_the_message_names_what_was_tried(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tiny.gpt2()
    with pytest.raises(FileError, match="'someone/adapter' is no folder here, and the hub"):
        lk.load(model, "someone/adapter")
    assert lk.adapters(model) == {}
    (fault,) = lk.verify("someone/adapter").faults
    assert "someone/adapter" in fault


@pytest.mark.parametrize("error", [OSError("cut off"), ConnectionError("no route"), TimeoutError()], ids=repr)
def test_a_download_that_fails(hub, error):
    hub.answer = error
    with pytest.raises(FileError, match="someone/adapter"):
        lk.load(tiny.gpt2(), "someone/adapter")


@pytest.mark.parametrize("source", ["./adapter", "/nowhere/adapter", "~/nowhere-at-all", "adapter", "a/b/c"])
def test_what_can_be_no_hub_id_is_not_asked_for(hub, source):
    with pytest.raises(FileError, match="not there"):
        lk.load(tiny.gpt2(), source)
    assert hub.asked is None


def test_a_folder_here_goes_before_the_hub(hub, tmp_path, monkeypatch):
    good(tmp_path / "someone" / "adapter")
    monkeypatch.chdir(tmp_path)
    lk.load(tiny.gpt2(), "someone/adapter")
    assert hub.asked is None
