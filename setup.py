"""The configs live once, in `strategies/` and `callbacks/`; a wheel carries them in `lightning_async/configs`, with
the README of each folder.

Everything else about the build is in pyproject.toml. An editable install copies nothing: the command finds the folders
beside the package.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

GROUPS = ("strategies", "callbacks")


class BuildWithConfigs(build_py):
    """Copies the YAML files and their READMEs beside the Python files."""

    def run(self) -> None:
        """Build the package, then copy the configs into it."""
        super().run()
        if not self.editable_mode:
            for source, target in self._configs().items():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        """Also name the configs, so that a source distribution carries them."""
        return [*super().get_source_files(), *self._configs()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Also name the copies."""
        copies = [] if self.editable_mode else list(self._configs().values())
        return [*super().get_outputs(include_bytecode), *copies]

    def _configs(self) -> dict[str, str]:
        inside = Path(self.build_lib or "", "lightning_async", "configs")
        files = [file for group in GROUPS for file in [*sorted(Path(group).glob("*.yaml")), Path(group, "README.md")]]
        return {str(file): str(inside / file) for file in files}


setup(cmdclass={"build_py": BuildWithConfigs})
