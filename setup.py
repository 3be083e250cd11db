"""What pyproject.toml has no settled words for: the compiled loops. Without a compiler numpy and PyTorch do the same."""

from setuptools import Extension, setup

FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno"]  # floating point is that of numpy and PyTorch, bit for bit
VECTORS = ["-fno-trapping-math", "-fopenmp-simd"]  # a loop that is marked may add whole numbers in another order


def loops(folder: str, name: str, *flags: str) -> Extension:
    """An extension of one file, for every Python from 3.11 on; left out where it can not be compiled."""
    return Extension(
        f"stillroom.{folder.replace('/', '.')}._{name}",
        [f"{folder}/{name}.c"],
        extra_compile_args=[*FLAGS, *flags],
        py_limited_api=True,
        optional=True,
    )


setup(
    ext_modules=[loops("storage", "unpack"), loops("storage", "pack"), loops("kernels/sample", "rows", *VECTORS)],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
