"""The compiled part, which may be missing: without a C compiler sparsefx falls back to plain torch with the same results."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "sparsefx.ops._native",
            sources=["sparsefx/ops/native.c"],
            depends=[
                "sparsefx/ops/compiler.h",
                "sparsefx/ops/native_kernels.h",
                "sparsefx/ops/native_blocks.h",
                "sparsefx/ops/native_compact.h",
            ],
            extra_compile_args=["-O3", "-std=c11", "-fno-math-errno", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        ),
        Extension(
            "sparsefx.ops._permutation",
            sources=["sparsefx/ops/permutation.c"],
            depends=["sparsefx/ops/compiler.h"],
            extra_compile_args=["-O3", "-std=c11", "-fno-math-errno", "-ffp-contract=off"],
            optional=True,
        ),
    ]
)
