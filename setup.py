"""The one thing about the build that pyproject.toml cannot say: which files of the checkout go into the wheel beside the code.

Launchers, TOMLs, recipes and DeepSpeed JSONs have one copy, at the top of the checkout; ``deberta_dist/files/shipped.py`` finds
them there and in ``deberta_dist/_shipped`` of an installed package. The demo and everything that sets up a checkout stay out.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = (
    "ds_configs/*.json",
    "launchers/*.toml",
    "launchers/pretrain_*.sh",
    "launchers/finetune_*.sh",
    "launchers/start.sh",
    "launchers/finetune_recipes/*.toml",
)
NOT_SHIPPED = ("launchers/pretrain_demo.sh", "launchers/pretrain_demo.toml")  # its text is in a checkout alone


def shipped_files() -> list[str]:
    """Paths in the checkout, in order."""
    found = {path.relative_to(ROOT).as_posix() for pattern in SHIPPED for path in ROOT.glob(pattern)}
    return sorted(found - set(NOT_SHIPPED))


class BuildWithShipped(build_py):
    """Copies the shipped files into the tree that becomes the wheel; an editable install is a checkout and has none."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._pairs():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What was built, which an installation records."""
        return [*super().get_outputs(include_bytecode), *(str(target) for _, target in self._pairs())]

    def get_source_files(self) -> list[str]:
        """What a source distribution needs."""
        return [*super().get_source_files(), *shipped_files()]

    def _pairs(self) -> list[tuple[Path, Path]]:
        folder = Path(self.build_lib) / "deberta_dist" / "_shipped"
        return [(ROOT / name, folder / name) for name in shipped_files()]


setup(cmdclass={"build_py": BuildWithShipped})
