"""``tools/benchmark.py ops``: the native operators against the reference and PyPI peers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bevperception.benchmarks.ops_cases import CASES
from bevperception.benchmarks.ops_worker import KEEP, PEERS, PUBLISHED, RETURN
from bevperception.benchmarks.roofline import Machine, Work, forward_work, measure_machine
from bevperception.benchmarks.timing import median_ms
from bevperception.errors import BevError
from bevperception.files import check_output_file, write_json
from bevperception.ops import backend_report
from bevperception.ops.native import ISA_VARIABLE
from bevperception.processes import interrupts_held, program_name
from bevperception.ranges import Range, add_number

DESCRIPTION = """\
Time the native operators, the plain-PyTorch grid_sample reference and every installed PyPI peer
(torch-ms-deform-attn, deformops) at the shapes of real models, forward (no_grad) and forward + backward.

Every competitor runs in a process of its own, once as it is, once with THP_MEM_ALLOC_ENABLE=1 (PyTorch's
own use of huge pages) and once with that and a C library that keeps what is freed (clearing a large fresh
result can cost more than computing it); the best of the three counts. The competitors take turns, several
rounds, so that a disturbance hits all of them; the median over all rounds is shown, and the most memory a
call needs beyond its arguments. A competitor that does not compute the same numbers as the reference is not
measured.

Spatial cross-attention (c1, c2) is one operator in native. The others are BEVFormer's published scheme, which
copies every camera's queries into a batch padded to the longest, around their own ms_deform_attn; "published"
is that scheme around the native ms_deform_attn.

The bound is the least time this machine could need for a forward call: every argument and result moved once
at the measured bandwidth of memory, or all multiply-adds at the measured peak, whichever takes longer. Shapes
that fit a cache can be faster than a bound by memory. For those there is a bound by the cache that the cores
share: every argument and result handed over once, but for cells of a map that no point looks at. Only what
the cores' own caches still hold of the call before can make a call faster."""

EPILOG = """\
cases:
{cases}

examples:
  bevperception benchmark ops               all shapes (some minutes; the reference needs 6 GB at iv)
  bevperception benchmark ops --cases i,ii,v --rounds 9
  bevperception benchmark ops --cases s1,s2,s3,s4 --threads 1 --json out/ops.json
  bevperception benchmark ops --isa avx2 --competitors native"""

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
SETTINGS = ("as it is", "huge pages", "huge pages, kept memory")
"""Of memory, tried for every competitor."""


@dataclass
class Measurements:
    """Seconds by setting and memory that one competitor takes in one case."""

    forward: dict[str, list[float]] = field(default_factory=dict)
    both: dict[str, list[float]] = field(default_factory=dict)
    forward_bytes: list[int] = field(default_factory=list)
    both_bytes: list[int] = field(default_factory=list)
    missing: str | None = None

    def add(self, setting: str, answer: dict[str, Any]) -> None:
        """Take a worker's answer in."""
        self.missing = answer.get("missing")
        if self.missing is None:
            self.forward.setdefault(setting, []).extend(answer["forward"])
            self.both.setdefault(setting, []).extend(answer["both"])
            if answer["forward_bytes"] is not None:
                self.forward_bytes.append(answer["forward_bytes"])
                self.both_bytes.append(answer["both_bytes"])

    @property
    def memory(self) -> str:
        """Least extra memory of any round, MB forward / forward + backward."""
        if not self.forward_bytes:
            return ""
        return f"{min(self.forward_bytes) / 1e6:>8.1f} / {min(self.both_bytes) / 1e6:>7.1f} MB"

    @property
    def forward_ms(self) -> float:
        """Median of the best setting, forward."""
        return min(median_ms(samples) for samples in self.forward.values())

    @property
    def both_ms(self) -> float:
        """Median of the best setting, forward + backward."""
        return min(median_ms(samples) for samples in self.both.values())


class Worker:
    """A process that measures one competitor with one setting."""

    def __init__(self, competitor: str, setting: str, options: argparse.Namespace) -> None:
        self.competitor, self.setting = competitor, setting
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        environment.pop(HUGE_PAGES, None)
        if "huge pages" in setting:
            environment[HUGE_PAGES] = "1"
        if options.isa:
            environment[ISA_VARIABLE] = options.isa
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [
            sys.executable,
            "-m",
            "bevperception.benchmarks.ops_worker",
            competitor,
            str(options.threads),
            KEEP if "kept memory" in setting else RETURN,
        ]
        with interrupts_held():
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            BevError: the process ended.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer(f"at case {request['case']}")

    def wait_until_ready(self) -> None:
        """Wait until the process has imported what it needs, so that it does not disturb others.

        Raises:
            BevError: the process ended.
        """
        self._answer("before it began")

    def _answer(self, when: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise BevError(
                f"the process that measures {self.competitor} ended with code {code} {when}; "
                "if it was killed, memory ran out: leave that case out with --cases"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End the process in the middle of whatever it does."""
        self._process.kill()

    def close(self) -> None:
        """Let the process end."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


@contextmanager
def open_workers(options: argparse.Namespace) -> Iterator[list[Worker]]:
    """A process for every competitor and setting."""
    workers: list[Worker] = []
    try:
        for competitor in options.competitors:
            workers.extend(Worker(competitor, setting, options) for setting in SETTINGS)
        for worker in workers:
            worker.wait_until_ready()
        yield workers
    except BaseException:  # an interrupt does not wait for a measurement
        for worker in workers:
            worker.kill()
        raise
    finally:
        for worker in workers:
            worker.close()


def measure_all(options: argparse.Namespace, machine: Machine) -> dict[str, dict[str, Measurements]]:
    """Results by case and competitor."""
    results = {key: {name: Measurements() for name in options.competitors} for key in options.cases}
    with open_workers(options) as workers:
        for key in options.cases:
            request = {
                "case": key,
                "locations": options.locations,
                "dtype": options.dtype,
                "seconds": options.seconds,
            }
            for number in range(options.rounds):
                for worker in workers:
                    result = results[key][worker.competitor]
                    if number == 0 or result.missing is None:
                        _show_progress(
                            f"case {key}, round {number + 1} of {options.rounds}: {worker.competitor}"
                        )
                        result.add(worker.setting, worker.ask(request))
            _show_progress("")
            print(format_case(key, results[key]), flush=True)
            print(format_bound(key, results[key], machine, options), flush=True)
    return results


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def format_header(options: argparse.Namespace) -> str:
    """One measurement: competitor, case and time."""
    report = backend_report()
    return (
        f"PyTorch {torch.__version__}, {platform.machine()}, {options.threads} threads, {options.dtype}, "
        f"{options.locations} locations, native kernels: {options.isa or report.isa}\n"
        f"milliseconds (forward / forward + backward), medians of {options.rounds} rounds; "
        "x: how many times slower than native"
    )


def format_case(key: str, results: dict[str, Measurements]) -> str:
    """One case as lines: a competitor each, with its ratios to native."""
    case = CASES[key]
    lines = [f"\n{key}  {case.operator}, {case.title}"]
    native = results.get("native")
    for name, result in results.items():
        if result.missing is not None:
            lines.append(f"    {name:<22}-  ({result.missing})")
            continue
        times = f"{result.forward_ms:>9.2f} / {result.both_ms:>9.2f}"
        ratio = ""
        if native is not None and native.missing is None and result is not native:
            forward = result.forward_ms / native.forward_ms
            ratio = f"   {forward:>6.1f}x / {result.both_ms / native.both_ms:>5.1f}x"
        lines.append(f"    {name:<22}{times}{result.memory:>22}{ratio}")
    return "\n".join(lines)


def format_bound(
    key: str, results: dict[str, Measurements], machine: Machine, options: argparse.Namespace
) -> str:
    """The bounds of one case's forward, and how far native is from them."""
    work = _work(key, options)
    lines = []
    for limit, bound_ms in (
        (machine.limit(work), machine.bound_ms(work)),
        ("the cache", machine.cache_bound_ms(work)),
    ):
        if bound_ms is None:
            continue
        line = f"    {'bound by ' + limit:<22}{bound_ms:>9.3f}"
        native = results.get("native")
        if native is not None and native.missing is None:
            line += f"   native forward takes {native.forward_ms / bound_ms:.1f} times as long"
        lines.append(line)
    return "\n".join(lines)


def _work(key: str, options: argparse.Namespace) -> Work:
    return forward_work(CASES[key], getattr(torch, options.dtype).itemsize, options.locations)


def format_summary(results: dict[str, dict[str, Measurements]]) -> str:
    """The smallest ratios over all cases, by operator."""
    lines = ["\nsmallest ratios to native (forward / forward + backward):"]
    for operator in dict.fromkeys(CASES[key].operator for key in results):
        of_operator = [result for key, result in results.items() if CASES[key].operator == operator]
        for name in dict.fromkeys(name for result in of_operator for name in result if name != "native"):
            pairs = [
                (result[name], result["native"])
                for result in of_operator
                if "native" in result and not (result[name].missing or result["native"].missing)
            ]
            if pairs:
                forward = min(other.forward_ms / native.forward_ms for other, native in pairs)
                both = min(other.both_ms / native.both_ms for other, native in pairs)
                lines.append(f"    {operator:<20}{name:<22}{forward:>6.1f}x / {both:>5.1f}x")
    return "\n".join(lines)


def to_json(
    options: argparse.Namespace, results: dict[str, dict[str, Measurements]], machine: Machine
) -> dict[str, Any]:
    """Everything measured, as plain values."""
    return {
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "torch": torch.__version__,
        "isa": options.isa or backend_report().isa,
        "machine": asdict(machine),
        "bound_ms": {key: machine.bound_ms(_work(key, options)) for key in results},
        "cache_bound_ms": {key: machine.cache_bound_ms(_work(key, options)) for key in results},
        "results": {
            key: {
                name: {"missing": result.missing}
                if result.missing
                else {
                    "forward_ms": result.forward_ms,
                    "both_ms": result.both_ms,
                    "forward_bytes": result.forward_bytes,
                    "both_bytes": result.both_bytes,
                    "forward_s": result.forward,
                    "both_s": result.both,
                }
                for name, result in by_name.items()
            }
            for key, by_name in results.items()
        },
    }


def _names_of(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"unknown {unknown}; allowed: {', '.join(allowed)}")
        return names

    return parse


def build_parser(program: str) -> argparse.ArgumentParser:
    """The subcommand's options."""
    cases = "\n".join(f"  {case.key:<4}{case.operator:<20}{case.title}" for case in CASES.values())
    parser = argparse.ArgumentParser(
        program,
        description=DESCRIPTION,
        epilog=EPILOG.format(cases=cases),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    competitors = ["native", "reference", PUBLISHED, *PEERS]
    parser.add_argument(
        "--cases", type=_names_of(list(CASES)), default=list(CASES), help="comma-separated; default: all"
    )
    parser.add_argument(
        "--competitors",
        type=_names_of(competitors),
        default=competitors,
        help=f"comma-separated, of {', '.join(competitors)}; default: all that are installed",
    )
    add_number(
        parser,
        "--threads",
        int,
        Range(1, 1024),
        default=torch.get_num_threads(),
        help="default: PyTorch's, here %(default)s",
    )
    add_number(
        parser,
        "--rounds",
        int,
        Range(1, 1_000_000),
        default=5,
        help="turns of every competitor; default %(default)s",
    )
    add_number(
        parser,
        "--seconds",
        float,
        Range(0.0, 3600.0),
        default=0.3,
        help="shortest time of a turn, for each measurement; at least 3 calls; default %(default)s",
    )
    parser.add_argument(
        "--locations",
        choices=("local", "uniform"),
        default="local",
        help="local: sampling points around each query's own place, as in the models; uniform: anywhere",
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--isa", help="instruction set of the native kernels: avx512, avx2 or baseline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        arguments: of the command line, after ``ops``.

    Raises:
        BevError: a competitor's process failed, or an option is impossible.
    """
    options = build_parser(f"{program_name('benchmark')} ops").parse_args(arguments)
    if options.json:
        check_output_file(options.json)
    print(format_header(options), flush=True)
    machine = measure_machine(options.threads, getattr(torch, options.dtype))
    print(
        f"memory {machine.bytes_per_s / 1e9:.1f} GB/s, "
        f"shared cache {machine.cached_bytes_per_s / 1e9:.1f} GB/s, "
        f"arithmetic {machine.flops_per_s / 1e9:.0f} Gflop/s",
        flush=True,
    )
    results = measure_all(options, machine)
    print(format_summary(results))
    if options.json:
        write_json(options.json, to_json(options, results, machine), indent=1)
    return 0
