"""What can be known of the CUDA kernels without a GPU: registers, stack, spills, shared memory and occupancy of each, whether its global
accesses are 128 bits wide and the matrix instructions are there; and the time below which no kernel can be on an H100, from the bytes and
operations it must do.

    python benchmarks/cuda_static.py python/ladd/_cuda*.so      # an extension built with LADD_CUDA=1, or objects under build/cuda-*
    python benchmarks/cuda_static.py --floors                   # the second table alone: needs no tools

Needs cuobjdump and nvdisasm in PATH (CUDA toolkit, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm). Exit status 1 if a kernel
spills or has a local array, with its name.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

# Of one multiprocessor (CUDA programming guide, technical specifications by compute capability).
SHARED = {"80": 164 << 10, "86": 100 << 10, "89": 100 << 10, "90": 228 << 10, "100": 228 << 10, "120": 100 << 10}
THREADS = {"80": 2048, "86": 1536, "89": 1536, "90": 2048, "100": 2048, "120": 1536}
REGISTERS, BLOCKS = 65536, 32

# H100 SXM: NVIDIA's data sheet. Dense bf16 with float32 sums; HBM3.
PEAK_FLOPS, PEAK_BYTES = 989e12, 3.35e12


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: int = 0
    threads: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's threads that fit, by registers and static shared memory."""
        sm = re.sub(r"\D", "", self.arch)
        warps = -(-self.threads // 32) if self.threads else 8
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256 * warps) if self.registers else BLOCKS
        by_shared = SHARED.get(sm, 100 << 10) // (self.shared + 1024)
        blocks = min(by_registers, by_shared, BLOCKS, THREADS.get(sm, 1536) // (32 * warps))
        return 32 * warps * blocks / THREADS.get(sm, 1536)


def tool(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise SystemExit(
            f"{command[0]} is not in PATH; the CUDA toolkit has it, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)}: {error.stderr.strip()}") from None


def bound_threads(path: str) -> dict[str, int]:
    """The largest block of each kernel, from the PTX's .maxntid."""
    found, name = {}, ""
    for line in tool("cuobjdump", "-ptx", path).splitlines():
        if match := re.search(r"\.entry (\w+)", line):
            name = match[1]
        elif match := re.match(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", line.strip()):
            found[name] = int(match[1]) * int(match[2] or 1) * int(match[3] or 1)
    return found


def kernels(path: str) -> Iterator[Kernel]:
    """All kernels of all architectures in a file."""
    table: dict[tuple[str, str], Kernel] = {}
    arch = name = ""
    for line in tool("cuobjdump", "-res-usage", path).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif "REG:" in line and name:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            table[name, arch] = Kernel(name, arch, numbers["REG"], numbers["STACK"], numbers["SHARED"], numbers["LOCAL"])
            name = ""
    for line in tool("cuobjdump", "-sass", path).splitlines():
        if match := re.match(r"\s*code for (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            name = match[1]
        elif (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", line)) and (name, arch) in table:
            table[name, arch].instructions[match[1]] += 1
    threads = bound_threads(path)
    for kernel in table.values():
        kernel.threads = threads.get(kernel.name, 0)
        yield kernel


def count(kernel: Kernel, pattern: str) -> int:
    return sum(n for op, n in kernel.instructions.items() if re.match(pattern, op))


def demangled(names: list[str]) -> dict[str, str]:
    plain = tool("c++filt", *names).splitlines() if names else []
    short = [re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w+::|^void |\(.*\)$", "", text) for text in plain]
    return dict(zip(names, short))


def print_kernels(paths: list[str]) -> int:
    found = [kernel for path in paths for kernel in kernels(path)]
    if not found:
        raise SystemExit(f"no kernels in {', '.join(paths)}")
    words = demangled(sorted({kernel.name for kernel in found}))
    print("| kernel | arch | threads | registers | stack | spills | shared | occupancy | 128-bit global | narrower | matrix |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    bad = []
    for k in sorted(found, key=lambda k: (words[k.name], k.arch)):
        wide, narrow = count(k, r"(LDG|STG|LDGSTS)\S*\.128"), count(k, r"(LDG|STG|LDGSTS)(?!\S*\.128)")
        spills = count(k, r"(LDL|STL)")
        if spills or k.local:
            bad.append(f"{words[k.name]} ({k.arch}): {spills} local accesses, {k.local} bytes of local memory")
        print(
            f"| `{words[k.name]}` | {k.arch} | {k.threads or '-'} | {k.registers} | {k.stack} | {spills} | {k.shared} "
            f"| {100 * k.occupancy:.0f} % | {wide} | {narrow} | {count(k, r'(HMMA|HGMMA|WGMMA)') or ''} |"
        )
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


# ---- floors ------------------------------------------------------------------------------------------------------------------------------

# SD3.5-medium at 1024 x 1024, one picture, bfloat16: N image tokens, T text tokens, D width, heads of dh.
N, T, D, HEADS, DH, E = 4096, 333, 1536, 24, 64, 2
S = N + T


def floors() -> list[tuple[str, str, float, float]]:
    """(kernel, at what size, bytes it must move, operations it must do): each input read once, each result written once."""
    tokens = N * D * E
    rows = [
        ("linear_forward", f"qkv [{N},{D}] -> {3 * D}", tokens + 3 * D * D * E + 3 * tokens, 2.0 * N * D * 3 * D),
        ("linear_gelu_forward", f"[{N},{D}] -> {4 * D}", tokens + 4 * D * D * E + 2 * 4 * tokens, 2.0 * N * D * 4 * D),
        ("linear_backward", f"dx, dw of [{4 * D},{D}]", 4 * tokens + 2 * tokens + 4 * D * D * (E + 2 * 4), 4.0 * N * D * 4 * D),
        ("attention_forward", f"{S} tokens, {HEADS} heads of {DH}", 4 * S * D * E + S * HEADS * 4, 4.0 * S * S * D),
        ("attention_backward", f"{S} tokens, {HEADS} heads of {DH}", 8 * S * D * E + S * HEADS * 4, 10.0 * S * S * D),
        ("layer_norm_modulate_forward", f"[{N},{D}]", 2 * tokens, 8.0 * N * D),
        ("layer_norm_modulate_backward", f"[{N},{D}]", 4 * tokens, 14.0 * N * D),
        ("gate_residual_forward", f"[{N},{D}]", 3 * tokens, 2.0 * N * D),
        ("gate_residual_backward", f"[{N},{D}]", 3 * tokens, 3.0 * N * D),
        ("rms_norm_heads_forward", f"q of [{N},{D}]", 2 * tokens, 4.0 * N * D),
        ("rms_norm_heads_backward", f"q of [{N},{D}]", 3 * tokens, 9.0 * N * D),
        ("gelu_backward", f"[{N},{4 * D}]", 3 * 4 * tokens, 20.0 * N * 4 * D),
        ("silu_forward, add, axpy, scale", f"[{N},{D}]", 3 * tokens, 2.0 * N * D),
        ("patch_gather, patch_scatter", "[1,16,128,128], 2 x 2", 2 * 16 * 128 * 128 * E, 0.0),
        ("renoise", "[1,16,128,128]", 2 * 16 * 128 * 128 * E, 40.0 * 16 * 128 * 128),
        ("conv2d_forward", "heads: 9 x 9, [1,64,64,64]", 2 * 64 * 64 * 64 * E + 64 * 64 * 81 * E, 2.0 * 64 * 64 * 64 * 64 * 81),
        ("conv2d_backward", "heads: 9 x 9, [1,64,64,64]", 3 * 64 * 64 * 64 * E + 64 * 64 * 81 * (E + 8), 4.0 * 64 * 64 * 64 * 64 * 81),
        ("conv2d_forward", "decoder: 3 x 3, [1,128,1024,1024]", 2 * 128 * 1024**2 * E, 2.0 * 1024**2 * 128 * 128 * 9),
        ("group_norm_forward", "decoder: [1,128,1024,1024]", 2 * 128 * 1024**2 * E, 8.0 * 128 * 1024**2),
        ("adamw", "2.24e9 parameters", 28 * 2.24e9, 12.0 * 2.24e9),
        ("sum_squares", "2.24e9 gradients", 4 * 2.24e9, 2.0 * 2.24e9),
        ("ema", "2.24e9 parameters", 12 * 2.24e9, 3.0 * 2.24e9),
        ("masters to bfloat16", "2.24e9 parameters", 6 * 2.24e9, 0.0),
    ]  # fmt: skip
    return [(name, size, float(moved), operations) for name, size, moved, operations in rows]


def print_floors() -> None:
    print(f"SD3.5-medium at 1024 x 1024, one picture, bfloat16; H100 SXM: {PEAK_FLOPS / 1e12:.0f} TFLOP/s, {PEAK_BYTES / 1e12:.2f} TB/s\n")
    print("| kernel | size | MB moved | GFLOP | floor | bound by |\n|---|---|--:|--:|--:|---|")
    for name, size, moved, operations in floors():
        memory, compute = moved / PEAK_BYTES, operations / PEAK_FLOPS
        print(
            f"| {name} | {size} | {moved / 1e6:.3g} | {operations / 1e9:.3g} | {1e6 * max(memory, compute):.3g} us "
            f"| {'memory' if memory > compute else 'products'} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="an extension or objects with kernels")
    parser.add_argument("--floors", action="store_true", help="print the table of floors")
    given = parser.parse_args()
    if not given.files and not given.floors:
        parser.error("a file with kernels, or --floors, expected")
    status = print_kernels(given.files) if given.files else 0
    if given.floors:
        print_floors()
    return status


if __name__ == "__main__":
    sys.exit(main())
