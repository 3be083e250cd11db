"""What pyproject.toml has no settled words for: the compiled loops of reading. Without a compiler numpy does the same."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "stillroom.storage._unpack",
            ["storage/unpack.c"],
            extra_compile_args=["-O3"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
