"""Writes docs/api.md from the C++ headers and the Python docstrings.

Usage: api_doc.py [--check]    (--check: say whether the file is up to date, change nothing)
"""

from __future__ import annotations

import inspect
import pathlib
import re
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "api.md"
COMPAT = {
    "seed": [
        "phase_1_batched_attention_triton_op",
        "phase_2_online_softmax_merge_triton_op",
        "BlockAttentionResiduals",
    ],
    "fla": ["fused_attnres"],
    "liger": ["liger_attn_res", "LigerAttnRes"],
    "vllm": ["attn_res"],
    "flashinfer": ["kimi_k3_attn_res", "prepare_kimi_k3_attn_res"],
}
HEADERS = ["types.h", "status.h", "attend.h", "read.h", "quantize.h", "stochastic.h", "fold.h"]


def header_section(path: pathlib.Path) -> str:
    """A header as text: its opening comment, then every documented declaration."""
    lines = path.read_text().splitlines()
    opening = []
    for line in lines:
        if not line.startswith("//"):
            break
        opening.append(line.removeprefix("//").removeprefix(" "))
    parts = [
        f"### `{path.relative_to(ROOT / 'include')}`",
        "```text\n" + "\n".join(opening) + "\n```",
    ]
    index = len(opening)
    while index < len(lines):
        if not lines[index].startswith("///"):
            index += 1
            continue
        comment = []
        while lines[index].startswith("///"):
            comment.append(lines[index].removeprefix("///").removeprefix(" "))
            index += 1
        declaration, index = read_declaration(lines, index)
        parts.append(f"```cpp\n{declaration}\n```")
        parts.append(escape(" ".join(comment)))
    return "\n\n".join(parts)


def read_declaration(lines: list[str], index: int) -> tuple[str, int]:
    """The declaration that starts at a line: a type with its body, or a signature without one."""
    taken: list[str] = []
    depth = 0
    is_type = re.match(r"(typedef )?(struct|class|enum)\b", lines[index]) is not None
    while index < len(lines):
        line = lines[index]
        if not is_type and "{" in line and not line.rstrip().endswith(";"):
            taken.append(line.split("{", 1)[0].rstrip() + ";")
            while "}" not in lines[index] or lines[index].startswith(" "):
                if lines[index].rstrip().endswith("}") and not lines[index].startswith(" "):
                    break
                index += 1
            return "\n".join(taken), index + 1
        taken.append(line)
        depth += line.count("{") - line.count("}")
        index += 1
        if depth == 0 and line.rstrip().endswith(";"):
            break
    return "\n".join(taken), index


def escape(text: str) -> str:
    return re.sub(r"(?<![`\w])([*_<>])", r"\\\1", text) if "`" not in text else text


def python_section() -> str:
    sys.path.insert(0, str(ROOT / "python"))
    import flash_attn_res
    from flash_attn_res import compat, distributed, inference, lens, plan, stream

    parts = []
    for function in (flash_attn_res.attend, flash_attn_res.read):
        parts += entry(f"flash_attn_res.{function.__name__}", function)
    for result in (flash_attn_res.AttendResult, flash_attn_res.ReadResult):
        parts.append(f"### `flash_attn_res.{result.__name__}`")
        parts.append(f"```python\n{inspect.getsource(result).rstrip()}\n```")
    for name in ("quantize", "stochastic_add", "check_finite"):
        parts += entry(f"flash_attn_res.{name}", getattr(flash_attn_res, name))
    parts.append("### `flash_attn_res.QuantizedSource`")
    source = inspect.getsource(flash_attn_res.QuantizedSource).split("\n    def ")[0].rstrip()
    parts.append(f"```python\n{source}\n```")
    dequantize = flash_attn_res.QuantizedSource.dequantize
    parts += entry("flash_attn_res.QuantizedSource.dequantize", dequantize, "####")
    parts += class_entries("flash_attn_res.BlockAttnRes", flash_attn_res.BlockAttnRes)
    parts += class_entries("flash_attn_res.Stream", stream.Stream)
    parts += class_entries("flash_attn_res.Plan", plan.Plan)
    for name in ("attend_out", "attend_workspace_bytes", "read_out", "read_workspace_bytes"):
        parts += entry(f"flash_attn_res.inference.{name}", getattr(inference, name))
    for name in ("Runner", "Step", "BlockBank", "SiteWeights"):
        parts += class_entries(f"flash_attn_res.inference.{name}", getattr(inference, name))
    for name in ("DepthLens", "DepthReport", "NetworkReading", "SiteReading"):
        parts += class_entries(f"flash_attn_res.lens.{name}", getattr(lens, name))
    for name in ("html", "write_html", "write_json", "write_png"):
        parts += entry(f"flash_attn_res.lens.{name}", getattr(lens, name))
    for name in (
        "PipelineLayout",
        "StageAttnRes",
        "Scaled",
        "Stored",
        "TokenShards",
        "ShardedStream",
    ):
        parts += class_entries(f"flash_attn_res.distributed.{name}", getattr(distributed, name))
    for name in ("make_stages", "shared_errors", "paper_volume"):
        parts += entry(f"flash_attn_res.distributed.{name}", getattr(distributed, name))
    for module, names in COMPAT.items():
        for name in names:
            member = getattr(getattr(compat, module), name)
            write = class_entries if inspect.isclass(member) else entry
            parts += write(f"flash_attn_res.compat.{module}.{name}", member)
    return "\n\n".join(parts)


def entry(name: str, member: object, level: str = "###") -> list[str]:
    signature = str(inspect.signature(member)).replace("'", "")
    if len(signature) > 60:
        body = signature[1 : signature.rindex(")")]
        result = signature[signature.rindex(")") + 1 :]
        arguments = re.split(r", (?![^\[\(]*[\]\)])", body)
        signature = "(\n    " + ",\n    ".join(arguments) + f",\n){result}"
    docstring = inspect.cleandoc(member.__doc__ or "")
    return [
        f"{level} `{name}`",
        f"```python\n{name.rsplit('.', 1)[-1]}{signature}\n```",
        "```text\n" + docstring + "\n```",
    ]


def class_entries(name: str, cls: type) -> list[str]:
    parts = entry(name, cls)
    for member_name, member in vars(cls).items():
        if member_name.startswith("_") or member_name in ("forward", "extra_repr"):
            continue
        target = member.__func__ if isinstance(member, classmethod) else member
        if inspect.isfunction(target) and target.__doc__:
            parts += entry(f"{name}.{member_name}", target, "####")
    return parts


def render() -> str:
    headers = [header_section(ROOT / "include" / "flash_attn_res" / name) for name in HEADERS]
    introduction = """\
        # API

        Generated by `tools/api_doc.py` from the headers and docstrings: change those instead.
        Formulas are derived in [math.md](math.md).

        - [Python](#python)
        - [PyTorch operators](#pytorch-operators)
        - [C++ and C](#c-and-c)
        """
    bindings = ROOT / "bindings" / "torch"
    text = (bindings / "ops.cpp").read_text() + (bindings / "inference_ops.cpp").read_text()
    schemas = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text)
    operators = "\n".join(
        "flash_attn_res::" + "".join(re.findall(r'"([^"]*)"', schema)) for schema in schemas
    )
    operators = re.sub(r"(.{1,96})(?: |$)", r"\1\n    ", operators).replace("    flash", "flash")
    parts = [
        textwrap.dedent(introduction).rstrip(),
        "## Python",
        python_section(),
        "## PyTorch operators",
        "Schemas of `torch.ops.flash_attn_res.*`; shapes are in `python/flash_attn_res/ops.py` "
        "and `python/flash_attn_res/inference/operators.py`.",
        "```text\n" + operators.rstrip() + "\n```",
        "## C++ and C",
        "The C header `flash_attn_res/c_api.h` mirrors these functions for other languages; its "
        "comments say how the structures correspond.",
        *headers,
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    text = render()
    if "--check" in sys.argv[1:]:
        if TARGET.exists() and TARGET.read_text() == text:
            return 0
        print("docs/api.md is out of date: run python tools/api_doc.py", file=sys.stderr)
        return 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
