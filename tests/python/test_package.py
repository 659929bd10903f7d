"""The package as users get it: what the wheel holds and what the operators link against."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import numpy
import pytest
import rich
import torch

import compile_once
import flash_attn_res

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LIBRARY = "flash_attn_res_torch.so"

# Every PyTorch function that the operators call. All of them exist in PyTorch 2.10 and belong to
# its stable C interface (torch/csrc/stable/c/shim_function_versions.txt in PyTorch's sources lists
# those that came with 2.10 or later; the others are older). A new name belongs here only after a
# look at that file: one that is younger than 2.10 makes the package unloadable there.
TORCH_2_10 = set(
    """
    aoti_torch_abi_version aoti_torch_delete_library_object aoti_torch_delete_tensor_object
    aoti_torch_device_type_cpu aoti_torch_device_type_cuda aoti_torch_device_type_meta
    aoti_torch_device_type_mps aoti_torch_device_type_privateuse1 aoti_torch_device_type_xpu
    aoti_torch_dtype_bfloat16 aoti_torch_dtype_bool aoti_torch_dtype_complex128
    aoti_torch_dtype_complex32 aoti_torch_dtype_complex64 aoti_torch_dtype_float16
    aoti_torch_dtype_float32 aoti_torch_dtype_float64 aoti_torch_dtype_float8_e4m3fn
    aoti_torch_dtype_float8_e4m3fnuz aoti_torch_dtype_float8_e5m2 aoti_torch_dtype_float8_e5m2fnuz
    aoti_torch_dtype_int16 aoti_torch_dtype_int32 aoti_torch_dtype_int64 aoti_torch_dtype_int8
    aoti_torch_dtype_uint16 aoti_torch_dtype_uint32 aoti_torch_dtype_uint64 aoti_torch_dtype_uint8
    aoti_torch_create_device_guard aoti_torch_delete_device_guard aoti_torch_empty_strided
    aoti_torch_get_device_index aoti_torch_get_device_type aoti_torch_get_dim aoti_torch_get_dtype
    aoti_torch_get_numel aoti_torch_get_size aoti_torch_get_sizes aoti_torch_get_stride
    aoti_torch_get_strides aoti_torch_is_contiguous
    aoti_torch_layout__mkldnn aoti_torch_layout_jagged aoti_torch_layout_sparse_bsc
    aoti_torch_layout_sparse_bsr aoti_torch_layout_sparse_coo aoti_torch_layout_sparse_csc
    aoti_torch_layout_sparse_csr aoti_torch_layout_strided
    aoti_torch_library_def aoti_torch_library_init_def aoti_torch_library_init_fragment
    aoti_torch_library_init_impl aoti_torch_memory_format_channels_last
    aoti_torch_memory_format_channels_last_3d aoti_torch_memory_format_contiguous_format
    aoti_torch_memory_format_preserve_format aoti_torch_new_tensor_handle
    torch_call_dispatcher torch_delete_list torch_delete_string torch_get_const_data_ptr
    torch_get_mutable_data_ptr torch_get_num_threads torch_get_thread_idx torch_library_impl
    torch_list_get_item torch_list_push_back torch_list_set_item torch_list_size
    torch_new_list_reserve_size torch_new_string_handle torch_parallel_for torch_string_c_str
    torch_string_length
    """.split()
)

# These live in libtorch_cuda.so, which a CPU build of PyTorch does not have.
TORCH_CUDA = {"aoti_torch_get_current_cuda_stream"}

# Optional hooks of the toolchain's start-up code.
TOOLCHAIN = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}

# What the file may ask the loader for. cudart is linked statically, so that no CUDA version is
# asked for; OpenMP is absent because the threads are PyTorch's.
MUST_NEED = {"libtorch.so", "libtorch_cpu.so"}
MAY_NEED = MUST_NEED | {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}


def run(*command: str | pathlib.Path, **options) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def library() -> pathlib.Path:
    """The compiled operators that this process has loaded."""
    mapped = pathlib.Path("/proc/self/maps").read_text()
    paths = {pathlib.Path(path) for path in re.findall(rf"\S+/{re.escape(LIBRARY)}", mapped)}
    assert len(paths) == 1
    return paths.pop()


@pytest.fixture(scope="module")
def dynamic_symbols(library: pathlib.Path) -> list[tuple[str, str]]:
    """The (type, name) pairs of the dynamic symbol table, as `nm -D` prints them."""
    lines = run("nm", "-D", library).splitlines()
    return [tuple(line.split()[-2:]) for line in lines]


def audit(symbols: list[tuple[str, str]]) -> list[str]:
    """What is wrong with a list of dynamic symbols.

    The C and C++ run-time libraries version their symbols (``memcpy@GLIBC_2.14``) and PyTorch does
    not: an undefined symbol without a version is PyTorch's.
    """
    problems = []
    for kind, name in symbols:
        if kind not in "Uw":
            problems.append(f"{name} is exported")
        elif "@" in name or name in TOOLCHAIN:
            continue
        elif name in TORCH_CUDA:
            if kind != "w":
                problems.append(f"{name} is not weak: no CPU build of PyTorch could load it")
        elif name not in TORCH_2_10:
            problems.append(f"{name} is no function of PyTorch 2.10's stable interface")
    return problems


def test_symbols(dynamic_symbols):
    assert audit(dynamic_symbols) == []
    undefined = {name for _, name in dynamic_symbols}
    assert "torch_library_impl" in undefined  # the list is what it seems to be


@pytest.mark.parametrize(
    ("symbol", "problem"),
    [
        (("U", "_ZN2at10empty_likeERKNS_6TensorE"), "no function"),
        (("U", "_ZN3c105ErrorC1ENS_14SourceLocationESs"), "no function"),
        (("U", "_ZN5torch8autograd4Node4nameEv"), "no function"),
        (("U", "torch_exception_get_what"), "no function"),
        (("U", "aoti_torch_get_current_cuda_stream"), "not weak"),
        (("T", "flash_attn_res_attend"), "is exported"),
    ],
)
def test_audit_finds(symbol, problem):
    assert re.search(problem, "".join(audit([symbol])))


def test_needed_libraries(library):
    dynamic = run("readelf", "-dW", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert needed >= MUST_NEED
    assert needed <= MAY_NEED
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_no_path_of_the_build_machine(library):
    content = library.read_bytes()
    assert str(ROOT).encode() not in content
    assert str(pathlib.Path(torch.__file__).parent).encode() not in content


def test_version_is_the_same_everywhere():
    pyproject = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', pyproject, re.MULTILINE).group(1)
    assert importlib.metadata.version("flash-attn-res") == version
    assert flash_attn_res.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0].startswith(("Unreleased", f"{version} - "))
    for heading in headings[1:]:  # releases, the newest first
        assert re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading)
    # The C header takes it from CMake, and CMake from pyproject.toml: nowhere else is a number.
    assert "@FlashAttnRes_VERSION@" in (ROOT / "include/flash_attn_res/version.h.in").read_text()
    for name in ("CMakeLists.txt", "python/flash_attn_res/__init__.py"):
        assert version not in (ROOT / name).read_text()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> pathlib.Path:
    """The source distribution of this tree."""
    folder = tmp_path_factory.mktemp("sdist")
    program = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
    return folder / run(sys.executable, "-c", program, folder, cwd=ROOT).split()[-1]


# Forward and backward; queries of zero weigh both sources alike.
PROGRAM = """
import pathlib, torch, flash_attn_res
from flash_attn_res import BlockAttnRes, attend
sources = [torch.ones(3, 4, requires_grad=True), torch.full((3, 4), 3.0, requires_grad=True)]
out = attend(sources, torch.zeros(1, 4)).out
assert torch.equal(out, torch.full_like(out, 2.0)), out
out.sum().backward()
assert all(torch.equal(source.grad, torch.full((3, 4), 0.5)) for source in sources)
attn_res = BlockAttnRes(num_sublayers=6, dim=8, block_size=2)
embedding = torch.randn(2, 8, requires_grad=True)
stream = attn_res.start(embedding)
for _ in range(6):
    stream.write(torch.tanh(stream.read(torch.ones(8))))
stream.finish(torch.ones(8)).sum().backward()
assert embedding.grad.isfinite().all() and attn_res.queries.grad.isfinite().all()
print(flash_attn_res.__file__, flash_attn_res.__version__)
"""


def test_wheel(sdist, tmp_path):
    """Built from the source distribution and used where nothing of this tree is to be found."""
    wheel = build_wheel(sdist, tmp_path)
    look_into(wheel)
    python = empty_environment(tmp_path / "venv")
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps")
    run(python, *pip, "--ignore-installed", wheel)
    alone = {"cwd": tmp_path, "env": {"PATH": str(python.parent), "HOME": str(tmp_path)}}
    where, version = run(python, "-c", PROGRAM, **alone).split()
    assert pathlib.Path(where).is_relative_to(tmp_path / "venv")
    assert version == importlib.metadata.version("flash-attn-res")
    command = python.with_name("flash-attn-res")
    assert run(command, "--version", **alone) == f"flash-attn-res {version}\n"
    assert "train" in run(command, "--help", **alone)
    found = json.loads(run(command, "doctor", "--json", **alone))
    assert pathlib.Path(found["library"]).is_relative_to(tmp_path / "venv")
    assert found["checks"]
    assert not any(check["error"] for check in found["checks"])


def build_wheel(sdist: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """What pip makes of it, without CUDA and without the network."""
    options = [f"build-dir={folder / 'build'}", "cmake.define.FLASH_ATTN_RES_CUDA=OFF"]
    # To compile all of it takes minutes; `make` has compiled the same sources in the tree, or
    # tools/test_with_torch has.
    builds = (ROOT / "build" / name for name in ("python", "wheel"))
    if any(compile_once.known(ROOT, build, folder / "known.json") for build in builds):
        launcher = f"{sys.executable};{compile_once.__file__};{folder / 'known.json'}"
        options.append(f"cmake.define.CMAKE_CXX_COMPILER_LAUNCHER={launcher}")
    run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", sdist),
        *("--no-build-isolation", "--no-deps", "--no-index", f"--wheel-dir={folder}"),
        *(f"--config-settings={option}" for option in options),
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def look_into(wheel: pathlib.Path) -> None:
    # One file for every Python 3 and every PyTorch from 2.10 on.
    assert re.fullmatch(r"flash_attn_res-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        (scripts,) = (archive.read(n).decode() for n in names if n.endswith("/entry_points.txt"))
    package = {name for name in names if ".dist-info/" not in name}
    sources = ROOT / "python" / "flash_attn_res"
    files = [path.relative_to(sources) for path in sources.rglob("*") if path.is_file()]
    caches = re.compile(r"__pycache__|\.")  # what Python and the tools leave behind
    expected = {
        f"flash_attn_res/{path.as_posix()}"
        for path in files
        if not any(caches.match(part) for part in path.parts)
    }
    assert package == expected | {f"flash_attn_res/{LIBRARY}"}
    assert any(name.endswith("/LICENSE") for name in names)
    assert "Requires-Dist: torch>=2.10" in metadata
    assert "flash-attn-res = flash_attn_res.cli:main" in scripts


def empty_environment(folder: pathlib.Path) -> pathlib.Path:
    """A fresh virtual environment, which sees PyTorch and knows nothing of this package."""
    run(sys.executable, "-m", "venv", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder that a .pth file names is searched, but its own .pth files, and so the editable
    # install of this package, are not. A plain install that is there comes after the new one.
    needed = {pathlib.Path(module.__file__).parents[1] for module in (torch, numpy, rich)}
    (site / "torch.pth").write_text("\n".join(map(str, needed)))
    return folder / "bin" / "python"


def test_sdist_holds_all_that_a_build_reads(sdist):
    """Byte for byte: what is built from it is what is built from the tree."""
    with tarfile.open(sdist) as archive:
        prefix = sdist.name.removesuffix(".tar.gz")
        held = {
            member.name.removeprefix(f"{prefix}/"): archive.extractfile(member).read()
            for member in archive
            if member.isfile()
        }
    assert not [path for path in held if path.startswith((".venv", "build/", "runs/"))]
    needed = ["CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"]
    for folder in ("bindings", "cmake", "include", "python", "src"):
        needed += [
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
    for path in needed:
        assert held.get(path) == (ROOT / path).read_bytes(), path
