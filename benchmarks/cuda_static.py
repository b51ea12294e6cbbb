"""What can be known of the CUDA kernels without a GPU: registers, stack, spills, shared memory and occupancy of each, whether its global
accesses are 128 bits wide and the matrix instructions are there; the bytes it must move and the operations it must do at SD3.5-medium's sizes
(cuda_work.py), and the time on an H100 below which it cannot be.

    python benchmarks/cuda_static.py python/ladd/_cuda*.so      # an extension built with LADD_CUDA=1, or objects under build/cuda-*
    python benchmarks/cuda_static.py --main FILE ...            # only what bfloat16 takes where pointers lie on 16 bytes
    python benchmarks/cuda_static.py --floors                   # floors by function: needs no tools

Needs cuobjdump and nvdisasm in PATH (CUDA toolkit, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm). Exit status 1 if a kernel
spills or has a local array, with its name, or if the extension needs a library of NVIDIA's to be loaded.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cuda_work import Work, works

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


def is_main(name: str, names: Collection[str]) -> bool:
    """Whether bfloat16 takes this instance where pointers lie on 16 bytes: no float16, no float32 twin, no narrower twin of a wider one."""
    if "__half" in name or "plain" in name or "_fma_" in name:
        return False
    half = name.replace("float", "__nv_bfloat16")
    if half != name and {half, re.sub(r"(?<=[<, ])4(?=[,>])", "8", half)} & set(names):
        return False
    twins = (re.sub(r"(?<=[<, ])1(?=[,>])", wide, name) for wide in "248")
    return not any(twin != name and twin in names for twin in twins)


def serves(name: str) -> Work | None:
    """The first work that the kernel does."""
    return next((work for work in works() for word in work.kernels.split() if word in re.split(r"\W+", name)), None)


def floor(work: Work) -> tuple[float, str]:
    """Seconds below which it cannot be on an H100, and what bounds it."""
    memory, compute = work.moved / PEAK_BYTES, work.operations / PEAK_FLOPS
    return max(memory, compute), "memory" if memory > compute else "products"


def work_cells(work: Work | None) -> str:
    if work is None:
        return " | | | |"
    seconds, bound = floor(work)
    return f" {work.name}, {work.size} | {work.moved / 1e6:.3g} | {work.operations / 1e9:.3g} | {1e6 * seconds:.3g} us, {bound} |"


def print_kernels(paths: list[str], only_main: bool, arch: str | None) -> int:
    found = [kernel for path in paths for kernel in kernels(path) if arch in (None, kernel.arch)]
    if not found:
        raise SystemExit(f"no kernels{f' of {arch}' if arch else ''} in {', '.join(paths)}")
    words = demangled(sorted({kernel.name for kernel in found}))
    names = set(words.values())
    machine = "threads | registers | stack | spills | shared | occupancy | 128-bit global | narrower | matrix"
    print(f"| kernel | arch | {machine} | does | MB | GFLOP | floor |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|")
    bad = []
    for k in sorted(found, key=lambda k: (words[k.name], k.arch)):
        wide, narrow = count(k, r"(LDG|STG|LDGSTS)\S*\.128"), count(k, r"(LDG|STG|LDGSTS)(?!\S*\.128)")
        spills = count(k, r"(LDL|STL)")
        if spills or k.local or k.stack:
            bad.append(f"{words[k.name]} ({k.arch}): {spills} local accesses, {k.local} bytes of local memory, {k.stack} of stack")
        if only_main and not is_main(words[k.name], names):
            continue
        print(
            f"| `{words[k.name]}` | {k.arch} | {k.threads or '-'} | {k.registers} | {k.stack} | {spills} | {k.shared} "
            f"| {100 * k.occupancy:.0f} % | {wide} | {narrow} | {count(k, r'(HMMA|HGMMA|WGMMA)') or ''} |{work_cells(serves(words[k.name]))}"
        )
    archs = sorted({kernel.arch for kernel in found})
    print(f"\n{len(found)} kernels for {', '.join(archs)}, {len(bad)} of them with spills, local arrays or a stack")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


def print_needs(path: str) -> int:
    """What the loader must find for a shared library: nothing of NVIDIA's, since those are opened at first use."""
    names = re.findall(r"\(NEEDED\).*\[(.+)\]", tool("readelf", "-d", path))
    print(f"\n{path} ({Path(path).stat().st_size / 1e6:.1f} MB) needs {', '.join(names)}")
    wrong = [name for name in names if re.match(r"lib(cu|nv|nccl)", name)]
    if wrong:
        print(f"{path} must load without {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def print_floors() -> None:
    print(f"SD3.5-medium at 1024 x 1024, one picture, bfloat16; H100 SXM: {PEAK_FLOPS / 1e12:.0f} TFLOP/s, {PEAK_BYTES / 1e12:.2f} TB/s\n")
    print("| kernel | size | MB moved | GFLOP | floor | bound by |\n|---|---|--:|--:|--:|---|")
    for work in works():
        seconds, bound = floor(work)
        print(f"| {work.name} | {work.size} | {work.moved / 1e6:.3g} | {work.operations / 1e9:.3g} | {1e6 * seconds:.3g} us | {bound} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="an extension or objects with kernels")
    parser.add_argument("--main", action="store_true", help="only the instances that bfloat16 takes where pointers lie on 16 bytes")
    parser.add_argument("--arch", help="only this architecture, such as sm_90a")
    parser.add_argument("--floors", action="store_true", help="print the table of floors")
    given = parser.parse_args()
    if not given.files and not given.floors:
        parser.error("a file with kernels, or --floors, expected")
    status = print_kernels(given.files, given.main, given.arch) if given.files else 0
    status |= max((print_needs(path) for path in given.files if path.endswith(".so")), default=0)
    if given.floors:
        print_floors()
    return status


if __name__ == "__main__":
    sys.exit(main())
