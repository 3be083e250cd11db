"""What pyproject.toml has no settled words for: the compiled loops of storage. Without a compiler numpy does the same."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            f"stillroom.storage._{name}",
            [f"storage/{name}.c"],
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",
                "-fno-math-errno",
            ],  # floating point is numpy's, bit for bit
            py_limited_api=True,
            optional=True,
        )
        for name in ("unpack", "pack")
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
