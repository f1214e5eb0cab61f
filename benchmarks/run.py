"""Compares storax with doing it by hand and with other libraries: `python benchmarks/run.py`.

Prints tables and goals, and writes them to benchmarks/results/, with pictures. Contenders take turns
within one run, since only ratios mean anything on a shared machine. A missed goal is reported; the
exit status is 1 only if something failed, such as a contender whose results are wrong.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path

from report import Findings, goals_as_markdown

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "slots",
    "call",
    "scan",
    "sizes",
    "eager",
    "flatten",
    "import",
    "tracing",
    "batch_norm",
)
# Those that tell something where JAX has a GPU.
ON_GPU = ("slots", "scan", "sizes", "batch_norm")
PACKAGES = ("storax", "jax", "jaxlib", "equinox", "flax", "numpy")


def main() -> int:
    args = _arguments()
    results = HERE / "results" / "gpu" if args.gpu else HERE / "results"
    folder = args.out or (HERE.parent / "build" / "quick" if args.quick else results)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if args.gpu else "cpu")
    if args.in_this_process:
        return _measure(args.only[0], folder, args.quick, args.large)

    start = time.perf_counter()
    names = args.only or (ON_GPU if args.gpu else BENCHMARKS)
    failed = []
    for name in names:
        print(f"--- {name}\n", flush=True)
        (folder / f"{name}.json").unlink(missing_ok=True)
        # A process each: what one leaves behind is not to slow down the next.
        command = [sys.executable, __file__, "--in-this-process", "--only", name]
        command += ["--out", str(folder)]
        command += [f"--{flag}" for flag in ("quick", "large", "gpu") if getattr(args, flag)]
        if subprocess.run(command).returncode:
            failed.append(name)

    paths = [folder / f"{name}.json" for name in BENCHMARKS]
    findings = [Findings.load(path) for path in paths if path.exists()]
    _write(findings, folder)
    print(_goals([f for f in findings if f.name in names]))
    print(f"\n{time.perf_counter() - start:.0f} s. Results are in {folder}.")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test of less than a minute")
    parser.add_argument("--large", action="store_true", help="also with 10,000 states")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, where JAX has one")
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"{BENCHMARKS}"
    )
    parser.add_argument("--out", type=Path, help="where to write, if not to benchmarks/results")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(name: str, folder: Path, quick: bool, large: bool) -> int:
    environment = _environment()
    start = time.perf_counter()
    try:
        findings = importlib.import_module(f"bench_{name}").measure(quick, large)
    except Exception:
        traceback.print_exc()
        return 1
    environment["took"] = f"{time.perf_counter() - start:.0f} s"
    findings.environment = environment
    findings.save(folder)
    print(findings.as_markdown(), end="\n\n", flush=True)
    return 0


def _environment() -> dict[str, str]:
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    packages = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "commit": _commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}{_gpu()}",
        "software": ", ".join([f"Python {platform.python_version()}", *packages]),
    }


def _gpu() -> str:
    import jax

    device = jax.devices()[0]
    return "" if device.platform == "cpu" else f", {device.device_kind}"


def _commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=HERE.parent, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "python", "src", "include")
    return f"commit {git('rev-parse', '--short', 'HEAD')}{' with changes' if changed else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _goals(findings: list[Findings]) -> str:
    goals = [goal for f in findings for goal in f.goals]
    met = sum(goal.met for goal in goals)
    return f"{met} of {len(goals)} goals met\n\n{goals_as_markdown(goals)}"


def _write(findings: list[Findings], folder: Path) -> None:
    """The tables of every benchmark that has results, and pictures of them."""
    import picture  # here, since the processes that measure don't need matplotlib

    pictures = picture.draw(findings, folder)
    parts = [
        "# Measurements",
        "Written by `python benchmarks/run.py`. Times are medians; ratios are medians of the ratios "
        "within a round, with their quartiles. A/A is the baseline beside its own twin, which says "
        "how far to trust the rest.",
        *[f"![{path.stem}]({path.name})" for path in pictures],
        "## Goals",
        _goals(findings),
        *[f.as_markdown() for f in findings],
        "## Where this was measured",
        "\n".join(f"- {f.name}: {'; '.join(f.environment.values())}" for f in findings),
    ]
    (folder / "results.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    sys.exit(main())
