"""What gets installed: real files under hstu_compile/, though ops and passes are links there, and nothing beside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from setuptools import build_meta; import sys; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(kind: str, source: Path, target: Path) -> Path:
    target.mkdir()
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(target)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (built,) = target.iterdir()
    return built


def test_wheel_and_sdist(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("hstu_compile", "ops", "passes", "bench", "tests"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    sdist = build("sdist", checkout, tmp_path / "sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    expected = {"hstu_compile/py.typed"}
    for folder, inside in (("ops", "hstu_compile/ops"), ("passes", "hstu_compile/passes")):
        expected |= {f"{inside}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "hstu_compile").rglob("*.py")}
    for source, name in ((checkout, "from_checkout"), (unpacked, "from_sdist")):
        with zipfile.ZipFile(build("wheel", source, tmp_path / name)) as wheel:
            names = {name for name in wheel.namelist() if ".dist-info/" not in name}
            (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
            assert "[torch_dynamo_backends]\nhstu = hstu_compile:backend" in wheel.read(entry_points).decode()
        assert names == expected
