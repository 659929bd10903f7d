"""Runs tests/gpu on the GPU of this machine and writes benchmarks/results/gpu-tests.json.

Usage: gpu_test.py [--sanitize] [pytest arguments]

--sanitize then runs tools/gpu_sanitize, which adds the outcome of compute-sanitizer. Without it an
outcome on the same sources is kept.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

from source_hash import ROOT, source_hash

RESULT = ROOT / "benchmarks" / "results" / "gpu-tests.json"


def read_driver() -> str:
    """The version of the NVIDIA driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return output.split("\n", 1)[0].strip()


def run_tests(marker: str, arguments: list[str]) -> ElementTree.Element | None:
    """Runs the tests with this marker; the report of pytest, if it wrote one."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", marker]
        subprocess.run([*command, f"--junit-xml={report}", *arguments], cwd=ROOT, check=False)
        return ElementTree.parse(report).getroot() if report.exists() else None


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(
            "gpu-test: there is no GPU here that PyTorch can use "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}). Nothing was run."
        )
        return 1
    arguments = [argument for argument in sys.argv[1:] if argument != "--sanitize"]
    sanitize = len(arguments) < len(sys.argv[1:])
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    failures: list[str] = []
    # Tests that take nearly all of the memory run afterwards, with nothing beside them.
    alone = [*arguments, "-n", "0"] if "-n" in arguments else arguments
    for marker, given in (("not large", arguments), ("large", alone)):
        report = run_tests(marker, given)
        if report is None:
            print("gpu-test: pytest wrote no report; gpu-tests.json is left as it was.")
            return 1
        for suite in report.iter("testsuite"):
            for name in counts:
                counts[name] += int(suite.get(name, 0))
        failures.extend(
            f"{case.get('classname')}::{case.get('name')}"
            for case in report.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        )
    failed = counts["failures"] + counts["errors"]
    returncode = 1 if failed else 0
    result = {
        "device": torch.cuda.get_device_name(),
        "driver": read_driver(),
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "failures": failures,
        "skipped": counts["skipped"],
        "source_hash": source_hash(),
    }
    earlier = json.loads(RESULT.read_text()).get("sanitizer", {}) if RESULT.exists() else {}
    if earlier.get("source_hash") == result["source_hash"]:
        result["sanitizer"] = earlier
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"gpu-test: {result['passed']} passed, {failed} failed, {result['skipped']} skipped")
    if sanitize:
        command = [sys.executable, str(ROOT / "tools" / "gpu_sanitize")]
        returncode = subprocess.run(command, cwd=ROOT, check=False).returncode or returncode
    return returncode


if __name__ == "__main__":
    sys.exit(main())
