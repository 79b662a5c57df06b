"""What is in the wheel and the source distribution; and the wheel alone, in an environment of its own."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("uv") is None, reason="uv builds the wheel")


def contents(wheel: Path) -> dict[str, str]:
    """SHA-256 of every file in a wheel, but for the list of these."""
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if not name.endswith("/RECORD")]
        return {name: hashlib.sha256(file.read(name)).hexdigest() for name in names}


def tracked(folder: str) -> set[str]:
    """Files of a folder that git knows."""
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


@pytest.mark.thorough
def test_the_wheel_holds_all_that_it_needs(tmp_path: Path) -> None:
    """Code, types, configurations and texts; the same from a clone and from the source distribution."""
    subprocess.run(
        ["uv", "build", "--quiet", "--out-dir", tmp_path], cwd=ROOT, check=True
    )  # wheel of the sdist
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    direct = tmp_path / "direct"
    subprocess.run(["uv", "build", "--quiet", "--wheel", "--out-dir", direct], cwd=ROOT, check=True)
    found = contents(wheel)
    assert found == contents(next(direct.glob("*.whl")))
    expected = {name.removeprefix("src/") for name in tracked("src/nested_learning")}
    expected |= {f"nested_learning/{name}" for name in tracked("configs")}
    inside = {name for name in found if name.startswith("nested_learning/")}
    assert inside == expected and "nested_learning/py.typed" in inside
    assert (
        "nested_learning/configs/pilot_smoke.yaml" in inside
        and "nested_learning/data/text/novel.txt" in inside
    )
    with tarfile.open(sdist) as file:
        kept = {name.partition("/")[2] for name in file.getnames()}
    assert tracked("tests") | {"train.py", "LICENSE", "CHANGELOG.md"} <= kept


@pytest.mark.slow
def test_the_wheel_works_alone() -> None:
    done = subprocess.run(["bash", ROOT / "scripts/check_wheel.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the wheel works\n")
