"""Builds libqemb.so by the repository's Makefile and puts it, stripped, into the package."""
import os
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "build/lib/libqemb.so"


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        if not (ROOT / "qemb.h").exists():
            raise SystemExit("qemb: no C sources beside python/ (build it in a checkout of the "
                             "repository: pip install ./python)")
        subprocess.run(["make", "-s", f"-j{os.cpu_count()}", LIBRARY], cwd=ROOT, check=True)
        package = Path("qemb" if self.editable_mode else Path(self.build_lib) / "qemb")
        subprocess.run(["strip", "-o", package / "libqemb.so", ROOT / LIBRARY], check=True)


class AnyPython(bdist_wheel):
    """The library is for one kind of machine, and for every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class WithLibrary(Distribution):
    def has_ext_modules(self):  # which makes the wheel that of a platform
        return True


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPython}, distclass=WithLibrary)
