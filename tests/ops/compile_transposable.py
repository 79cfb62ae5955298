"""Run by a test in a process of its own: Triton compiles the kernel for two kinds of GPUs, down to their machine code."""

from __future__ import annotations

import itertools

import triton
from triton.backends.compiler import GPUTarget

from sparsefx.ops.cuda_transposable_kernel import transposable_kernel

FLAGS = ("HAS_MASK", "WRITE_MASK", "PACK", "WRITE_DENSE")
USES = {
    "pack": (False, True, True, False),
    "pack with a mask": (True, False, True, False),
    "mask": (False, True, False, False),
    "dense with a mask": (True, False, False, True),
}


def main() -> None:
    for capability, (name, flags) in itertools.product((80, 90), USES.items()):
        # A float32 weight, as under autocast, for one of them.
        pointers = {"weight": "*fp32" if name == "pack with a mask" else "*bf16", "values": "*bf16", "values_t": "*bf16"}
        bytes_and_words = {"given": "*u8", "mask_out": "*u8", "words": "*i16", "words_t": "*i16"}
        sizes = dict.fromkeys(("rows", "columns"), "i32")
        named = {**pointers, **bytes_and_words, **sizes, **dict.fromkeys(FLAGS, "constexpr")}
        signature = {name: named[name] for name in transposable_kernel.arg_names}
        source = triton.compiler.ASTSource(transposable_kernel, signature, dict(zip(FLAGS, flags, strict=True)))
        made = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8, "enable_fp_fusion": False}
        )
        size, shared = len(made.asm["cubin"]), made.metadata.shared
        print(f"sm_{capability} {name}: {size} bytes of code, {shared} of shared memory")  # noqa: T201


if __name__ == "__main__":
    main()
