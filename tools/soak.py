"""Runs random programs with state in every way there is, against an interpreter: `make soak`.

A program is made from the seed and its number, so the same numbers are the same programs. One that fails
is made smaller and printed. Each batch of programs has a process of its own: one that crashes or hangs is
a failure too, and what XLA keeps of each program goes with it. Batches that are done are noted in
build/soak/, so that the same command goes on where it was stopped.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "tests", "python"))
BATCH = 250
# Statements in a program: most have few, as more of these can be run.
SIZES = (2, 3, 4, 5, 6, 8, 16)
# Seconds for one program, or for making it smaller.
LIMIT = 600
JAX = importlib.metadata.version("jax")
# Makes XLA several times as fast for small programs. Every tenth batch goes without.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if JAX.startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


# --- A process that runs some programs ------------------------------------------------------------


def run_batch(seed: int, first: int, last: int, singular: bool) -> None:
    """Runs programs `first` to `last` - 1 and prints a line of JSON before and after each."""
    check, check_again, shrink = _singular() if singular else _whole_numbers()
    # A fifth of the time goes to looking for garbage in what JAX keeps.
    gc.freeze()
    gc.disable()
    for number in range(first, last):
        if number % 25 == 0:
            gc.collect()
            gc.freeze()
        tell(number=number, status="started")
        program = program_of(seed, number, singular)
        problems = check(program, number)
        if not problems:
            tell(number=number, status="passed")
            continue
        way, problem = min(problems.items(), key=lambda item: item[0] == "eager")
        tell(number=number, status="shrinking")
        end = time.monotonic() + LIMIT / 2

        def fails(smaller, way=way, end=end, problem=problem):
            if time.monotonic() > end:
                return False
            found = check_again(smaller, way)
            return bool(found) and found[:30] == problem[:30]

        smaller = shrink(program, fails)
        report = f"{smaller}\n\n{way}: {check_again(smaller, way)}\n"
        tell(number=number, status="failed", report=f"{report}Fails in: {', '.join(problems)}.")


def _whole_numbers():
    import random_programs.checker as checker
    from random_programs.shrink import shrink

    check = lambda program, number: checker.check(program, names=checker.sample(number))
    return check, checker.check_way, shrink


def _singular():
    from random_programs.singular import check, shrink

    def check_all(program, _):
        problem = check(program)
        return {program.jit: problem} if problem else {}

    return check_all, lambda program, _: check(program), shrink


def tell(**what) -> None:
    print(json.dumps(what), flush=True)


def program_of(seed: int, number: int, singular: bool):
    if singular:
        from random_programs import singular as made

        return made.random_program(f"{seed}/{number}")
    from random_programs.interpreter import RUNS, Interpreter, TooLarge
    from random_programs.programs import random_program

    attempt, size = 0, random.Random(f"{seed}/{number}").choice(SIZES)
    while True:
        program = random_program(f"{seed}/{number}/{attempt}", size)
        meaning = Interpreter(program)
        try:
            for _ in range(RUNS):
                meaning.run()
        except TooLarge:
            attempt += 1
            continue
        return program


# --- The process that starts them -----------------------------------------------------------------


class Soak:
    def __init__(self, seed: int, programs: int, first: int, singular: bool):
        self.seed, self.programs, self.singular = seed, programs, singular
        kind = "-singular" * singular
        self.done = os.path.join(ROOT, "build", "soak", f"jax-{JAX}{kind}-seed-{seed}.txt")
        os.makedirs(os.path.dirname(self.done), exist_ok=True)
        self.passed = self.failed = 0
        before = {}
        if os.path.exists(self.done):
            with open(self.done) as f:
                lines = [[int(n) for n in line.split()] for line in f]
            before = {(start, end): counts for start, end, *counts in lines}
        self.batches: queue.SimpleQueue = queue.SimpleQueue()
        for start in range(first, first + programs, BATCH):
            batch = start, min(start + BATCH, first + programs)
            if batch in before:
                self.passed += before[batch][0]
                self.failed += before[batch][1]
            else:
                self.batches.put(batch)
        self.lock = threading.Lock()
        self.failed_here = threading.local()
        self.started = time.monotonic()

    def work(self) -> None:
        while True:
            try:
                batch = self.batches.get_nowait()
            except queue.Empty:
                return
            self.failed_here.count = 0
            (number, last) = batch
            while number < last:
                number = self.run(number, last)
            failed = self.failed_here.count
            with self.lock, open(self.done, "a") as f:
                print(*batch, last - batch[0] - failed, failed, file=f)
                minutes = (time.monotonic() - self.started) / 60
                done = self.passed + self.failed
                print(
                    f"{done} of {self.programs}: {self.passed} passed, {self.failed} failed, "
                    f"{minutes:.1f} min",
                    flush=True,
                )

    def run(self, first: int, last: int) -> int:
        """Runs programs in another process, up to one that it does not survive; the next to run."""
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
        if first // BATCH % 10 != 9:
            flags += " " + QUICK
        args = ["--batch", str(first), str(last), "--seed", str(self.seed)]
        process = subprocess.Popen(
            [sys.executable, __file__, *args, *["--singular"] * self.singular],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
        reader.start()
        number, hung = first, []
        while True:
            timer = threading.Timer(LIMIT, lambda: (hung.append(True), process.kill()))
            timer.start()
            line = process.stdout.readline() if process.stdout else ""
            timer.cancel()
            if not line:
                break
            number = self.note(json.loads(line))
        process.wait()
        reader.join()
        if process.returncode == 0:
            return last
        what = f"took more than {LIMIT} s" if hung else f"ended with {process.returncode}"
        report = f"The process {what}.\n{''.join(errors[-20:])}"
        if number < last:
            report = f"{program_of(self.seed, number, self.singular)}\n\n{report}"
        self.fail(number, report)
        return number + 1

    def note(self, told: dict) -> int:
        number: int = told["number"]
        if told["status"] == "passed":
            with self.lock:
                self.passed += 1
        elif told["status"] == "failed":
            self.fail(number, told["report"])
        else:
            return number
        return number + 1

    def fail(self, number: int, report: str) -> None:
        self.failed_here.count += 1
        with self.lock:
            self.failed += 1
            print(f"--- FAILED: program {number} of seed {self.seed}\n{report}\n---", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--singular", action="store_true", help="programs that only lanes that take a branch stand"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch:
        run_batch(args.seed, *args.batch, args.singular)
        return
    soak = Soak(args.seed, args.programs, args.first, args.singular)
    threads = [threading.Thread(target=soak.work) for _ in range(args.workers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    print(f"{soak.passed} passed, {soak.failed} failed")
    sys.exit(soak.failed > 0)


if __name__ == "__main__":
    main()
