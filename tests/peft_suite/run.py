"""Runs the test suite of the installed PEFT with the methods of bem_peft; exit code 0 only if nothing fails.

    python tests/peft_suite/run.py [--only FILE] [--source DIR] [pytest arguments]

The tests come from the source distribution of the installed version, into a cache folder outside the repository.
They run offline on tiny random checkpoints.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from cases import SUITE
from checkpoints import build_checkpoints, checkpoint_key

import bem_peft  # noqa: F401  # registers the methods

FILES = {
    "config": "test_config.py",
    "custom": "test_custom_models.py",
    "decoder": "test_decoder_models.py",
    "encoder_decoder": "test_encoder_decoder_models.py",
    "feature_extraction": "test_feature_extraction_models.py",
    "seq_classifier": "test_seq_classifier.py",
    "token_classification_qa": "test_token_classification_qa.py",
}
SHARED = ("testing_common.py", "testing_utils.py")


def fetch_source(cache: Path) -> Path:
    """The unpacked source distribution of the installed PEFT, downloaded once."""
    name = f"peft-{version('peft')}"
    if not (cache / name / "tests").is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(cache)]
        subprocess.run([*command, f"peft=={version('peft')}"], check=True)
        with tarfile.open(cache / f"{name}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    return cache / name


def prepare_package(source: Path, folder: Path) -> Path:
    """Copy the test files that are run into a package of their own: `tests` would clash with other packages."""
    package = folder / SUITE
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for name in (*SHARED, *FILES.values()):
        shutil.copy(source / "tests" / name, package / name)
    (package / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return package


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other arguments go to pytest.")
    parser.add_argument("--only", choices=sorted(FILES), action="append", help="run this file (repeatable)")
    parser.add_argument("--source", type=Path, help="unpacked source of the installed PEFT, instead of a download")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "bem_peft_suite", help="for source and checkpoints"
    )
    options, pytest_arguments = parser.parse_known_args(arguments)
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    source = options.source.resolve() if options.source else fetch_source(cache)
    checkpoints = cache / f"checkpoints-{checkpoint_key()}"
    build_checkpoints(checkpoints)
    # runs side by side must not share the copied tests
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache) as folder:
        package = prepare_package(source, Path(folder))
        os.chdir(checkpoints)  # "owner/name" of a hub id is a folder here
        sys.path.insert(0, folder)
        ini = ["-c", str(Path(folder) / "pytest.ini"), "--rootdir", folder, "-p", "no:cacheprovider"]
        options_shown = ["-q", "--tb=short", "--disable-warnings"]
        files = [str(package / FILES[name]) for name in options.only or FILES]
        return int(pytest.main([*ini, "-p", "suite_plugin", *options_shown, *files, *pytest_arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
