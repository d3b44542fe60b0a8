"""The assembler that turns Triton's PTX into machine code, and where it is known to fail."""

__all__ = ["drops_work", "ptxas_in_use"]


def ptxas_in_use(arch: int) -> tuple[str, tuple[int, int]]:
    """Path and release, (12, 8), of the `ptxas` that Triton calls for an architecture.

    Triton brings its own and reads TRITON_PTXAS_PATH.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(arch)
    major, minor = tool.version.split(".")
    return tool.path, (int(major), int(minor))


def drops_work(release: tuple[int, int]) -> bool:
    """Whether this `ptxas` takes some products of sm_90 for zero, silently.

    Where the accumulator of a sliced product begins at zero and integer operations read its bits,
    the PTX is right, but the machine code reads constants: the products, or their results, are
    left out. So compiled with ptxas 12.8 and 12.9 from the PTX of Triton 3.6 to 3.9; right with
    ptxas 13.1, 13.3, 13.4 and 13.5, and where the first slice's product starts the accumulator.
    """
    return release < (13, 0)
