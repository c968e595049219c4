"""Everything to be done once on a GPU machine, in one command: build, check, memory check, time, one JSON.

Every step gets what is left of the time budget; a step or an operator that fails is reported and skipped. With
--device cpu the same path runs without a GPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("build", "check", "memcheck", "ceilings", "time")
LAUNCHES = 20  # in one graph: a launch from Python costs more than a small kernel


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1500, help="budget of the codes run (default: 1500)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", default=",".join(STEPS), help="which of " + ", ".join(STEPS))
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, default=None, help="default: benchmarks/results/gpu-TIME.json")
    args = parser.parse_args()
    args.steps = args.steps.split(",")
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"--steps must name {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    args.end = time.monotonic() + args.seconds
    return args


def left(args: argparse.Namespace) -> float:
    return args.end - time.monotonic()


def command(args: argparse.Namespace, *words: object, **environment: str) -> tuple[int, str]:
    """Exit status and output; 124 where the budget ended it."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")} | environment
    try:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=ROOT,
            env=env,
            timeout=max(1.0, left(args)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        return 124, output.decode(errors="replace") if isinstance(output, bytes) else output
    return done.returncode, done.stdout


def build(args: argparse.Namespace) -> dict[str, object]:
    cuda = "on" if args.device == "cuda" else "off"
    begin = time.monotonic()
    folder = ROOT / "build" / "gpu"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DQK_INPLACE=ON", f"-DQK_CUDA={cuda}"]
    status, output = command(args, *configure, f"-DPython_EXECUTABLE={sys.executable}")
    if status == 0:
        status, output = command(args, "cmake", "--build", folder)
    if status:
        print(output[-3000:])
        sys.exit("gpu.py: the build failed, so nothing else can run.")
    return {"seconds": time.monotonic() - begin}


def pytest(args: argparse.Namespace, choose: str, *before: str) -> dict[str, object]:
    """Runs the operators' tests; which operators failed, by the names of their test files."""
    files = [p for p in sorted((ROOT / "tests" / "ops").glob("test_*.py")) if args.only in p.stem]
    status, output = command(args, *before, sys.executable, "-m", "pytest", "-q", "-k", choose, *files)
    failed = sorted(set(re.findall(r"^(?:FAILED|ERROR) \S*?test_(\w+)\.py", output, re.M)))
    summary = next((line for line in reversed(output.splitlines()) if re.search(r"passed|failed|error", line)), "")
    for line in re.findall(r"^(?:FAILED|ERROR) .*", output, re.M)[:20]:
        print("  " + line[:200])
    broken = status not in (0, 1, 5, 124)  # no tests chosen is 5; anything else ended without a verdict
    if broken:
        print(output[-2000:])
    summary = "ended by the time budget" if status == 124 else summary.strip("= ")
    return {"status": status, "summary": summary, "failed": failed, "output": output[-4000:] * broken}


def check(args: argparse.Namespace) -> dict[str, object]:
    return pytest(args, "cuda" if args.device == "cuda" else "generic and registration")


def memcheck(args: argparse.Namespace) -> dict[str, object]:
    tool = shutil.which("compute-sanitizer")
    if args.device == "cpu" or not tool:
        return {"summary": "skipped: " + ("no GPU" if args.device == "cpu" else "compute-sanitizer is not installed")}
    sanitizer = (tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all")
    # The allocator of torch would hide an access past the end of a tensor inside its own larger block.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    result = pytest(args, "cuda and registration", *sanitizer)
    del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    return result


class Clock:
    """Seconds of a run: events around replays of a graph on CUDA, the wall clock on the CPU."""

    def __init__(self, device: str, rounds: int):
        import torch

        self.torch, self.device, self.rounds = torch, device, rounds
        if device == "cuda":
            l2 = torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(3 * l2, dtype=torch.uint8, device=device)

    def graph(self, run: Callable[[], object]) -> Callable[[], object]:
        torch = self.torch
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(LAUNCHES):
                run()
        return graph.replay

    def seconds(self, run: Callable[[], object]) -> list[float]:
        if self.device == "cpu":
            run()
            times = []
            for _ in range(min(3, self.rounds)):
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
            return sorted(times)
        torch, replay = self.torch, self.graph(run)
        replay()
        times = []
        for _ in range(self.rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
        return sorted(times)

    def cold(self, run: Callable[[], object]) -> float | None:
        """With L2 overwritten before every launch; what the overwriting takes is measured alone and taken off."""
        if self.device == "cpu":
            return None

        def after_flush():
            self.flush.zero_()
            run()

        return median(self.seconds(after_flush)) - median(self.seconds(self.flush.zero_))


def ceilings(args: argparse.Namespace) -> dict[str, float]:
    """What the machine reaches: bytes a second of a copy, operations a second of torch's own products."""
    import torch

    clock, size = Clock(args.device, args.rounds), 8192 if args.device == "cuda" else 256
    source = torch.ones(size * size, device=args.device)
    target = torch.empty_like(source)
    reached = {"copy_bytes": 8 * source.numel() / median(clock.seconds(lambda: target.copy_(source)))}
    floats = torch.randn(size, size, device=args.device)
    products = {"float32_operations": lambda: floats @ floats}
    if args.device == "cuda":
        half = torch.randn(size, size, device="cuda", dtype=torch.float16)
        codes = torch.randint(-128, 128, (size, size), device="cuda", dtype=torch.int8)
        products = {
            "float16_operations": lambda: half @ half,
            "int8_operations": lambda: torch._int_mm(codes, codes.t()),
        }
    for name, run in products.items():
        reached[name] = 2 * size**3 / median(clock.seconds(run))
    for name, value in reached.items():
        print(f"  {name:22s}{value / 1e12:10.3f} T/s")
    return reached


def benchmarks(args: argparse.Namespace, failed: list[str]):
    """(operator, cases of its benchmark) for each benchmarks/ops/bench_*.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import harness

    for path in sorted((ROOT / "benchmarks" / "ops").glob("bench_*.py")):
        operator = path.stem.removeprefix("bench_")
        if args.only not in operator:
            continue
        if operator in failed:
            print(f"  {operator}: skipped, its tests fail")
            continue
        try:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            parsed = getattr(module, "options", harness.options)("").parse_args(["--device", args.device])
            yield operator, module.cases(parsed)
        except Exception as error:  # one benchmark that cannot start must not take the others along
            print(f"  {operator}: cannot start: {error}")


def time_all(args: argparse.Namespace, failed: list[str], reached: dict[str, float]) -> list[dict[str, object]]:
    clock, records = Clock(args.device, args.rounds), []
    print(f"  {'case':46s}{'us':>10s}{'cold':>10s}{'floor':>10s}{'x floor':>9s}  peers, x ours")
    for operator, cases in benchmarks(args, failed):
        cases = iter(cases)
        while left(args) > 10:
            record: dict[str, object] = {"operator": operator}
            try:
                case = next(cases, None)
                if case is None:
                    break
                record["case"] = case.name
                case.check()
                times = clock.seconds(case.ours)
                ours, cold = median(times), clock.cold(case.ours)
                floor = case.moved_bytes / reached["copy_bytes"] if reached else 0.0
                if reached.get("int8_operations") and case.operations:
                    floor = max(floor, case.operations / reached["int8_operations"])
                peers = {name: median(clock.seconds(run)) for name, run in case.peers.items()}
            except Exception as error:  # reported, and the next case goes on
                record["error"] = f"{type(error).__name__}: {error}"[:500]
                print(f"  {record.get('case', operator)}: {record['error'][:150]}")
                records.append(record)
                continue
            ratios = ", ".join(f"{name} {value / ours:.2f}" for name, value in peers.items())
            record |= {"median": ours, "p10": times[len(times) // 10], "p90": times[-1 - len(times) // 10]}
            record |= {"runs": len(times), "cold": cold, "bytes": case.moved_bytes, "operations": case.operations}
            record |= {"floor": floor, "peers": peers}
            records.append(record)
            shown = [f"{1e6 * value:10.2f}" if value else f"{'-':>10s}" for value in (ours, cold, floor)]
            share = f"{ours / floor:9.2f}" if floor else f"{'-':>9s}"
            print(f"  {case.name[:45]:46s}{''.join(shown)}{share}  {ratios}")
    return records


def machine(args: argparse.Namespace) -> dict[str, object]:
    import torch

    import qk

    facts: dict[str, object] = {"torch": torch.__version__, "qk": qk.build_facts(), "device": args.device}
    facts["commit"] = command(args, "git", "rev-parse", "HEAD")[1].strip()
    if args.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts |= {"gpu": p.name, "cc": f"{p.major}.{p.minor}", "sms": p.multi_processor_count, "l2": p.L2_cache_size}
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem"
        facts["driver, clocks"] = command(args, "nvidia-smi", query, "--format=csv,noheader")[1].strip()
    return facts


def main() -> None:
    args = options()
    sys.path.insert(0, str(ROOT / "python"))
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "gpu.py: no usable GPU, torch.cuda.is_available() is false. --device cpu tries the script without one."
        )
    result: dict[str, object] = {}
    for step in ("build", "check", "memcheck"):
        if step in args.steps and left(args) > 0:
            print(f"{step} ({left(args):.0f} s left)")
            result[step] = {"build": build, "check": check, "memcheck": memcheck}[step](args)
            print("  " + str(result[step].get("summary", "done")))
    result["machine"] = machine(args)
    if "ceilings" in args.steps and left(args) > 0:
        print(f"ceilings ({left(args):.0f} s left)")
        result["ceilings"] = ceilings(args)
    if "time" in args.steps and left(args) > 0:
        print(f"time ({left(args):.0f} s left)")
        failed = result.get("check", {}).get("failed", [])
        result["cases"] = time_all(args, failed, result.get("ceilings", {}))
    path = args.json or ROOT / "benchmarks" / "results" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
