"""What pyproject.toml cannot say: a wheel made with XUSHI_KERNELS=1 carries compiled kernels, for
its platform.
"""

import os
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CARRIES = os.environ.get("XUSHI_KERNELS") == "1"


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if CARRIES and not self.editable_mode:
            from xushi.ops.native.build import (
                compile_all,
            )  # needs what xushi needs: pip's --no-build-isolation

            compile_all(Path(self.build_lib) / "xushi" / "ops" / "native" / "built")


class WheelForPlatform(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = self.root_is_pure and not CARRIES

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform if CARRIES else "any"


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelForPlatform})
