"""The parts of `python -m benchmarks.gpu` that are not commands of their own.

    python -m benchmarks.gpu_parts PART --results FILE [--rehearse]

Each case is written before the next begins; cases that the file has are not measured again.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import grpo_kernels
from benchmarks.core import clock, correctness, roofline
from benchmarks.core.case import Case
from benchmarks.core.harness import BUDGET, call_of, describe_error
from benchmarks.core.memory import free_memory, peak_extra_bytes
from benchmarks.core.problem import make_problem
from benchmarks.core.results import Record, ResultFile
from benchmarks.core.shapes import HEADS, Shape
from benchmarks.core.tasks import TASKS
from benchmarks.long_context import measure
from benchmarks.peers import OURS, PEERS
from benchmarks.report.targets import DTYPE, MODEL, TARGETS

ODD_MODELS = ("Llama 3.2 1B + 1", "GPT-2", "Llama 2 + 1")
IN_PLACE = f"{OURS} in place"
ONE_ROW, ALL_ROWS = "rows alone", "rows at odd addresses"
CURVE = (1024, 4096, 16_384, 65_536, 131_072)  # tokens


def odd_vocabulary() -> Iterator[Case]:
    """Yield the row kernels where a row begins at any address, after the aligned one."""
    for model in (MODEL, *ODD_MODELS):
        for name, phase in (("grpo_loss", "both"), ("token_stats", "forward")):
            yield Case(TASKS[name], phase, Shape(model, 8192, DTYPE), OURS)
        yield Case(TASKS["token_stats"], "backward", Shape(model, 8192, DTYPE), OURS)


def one_launch() -> Iterator[Case]:
    """Yield the kernel whose speed depends on the registers that this Triton gives it."""
    for N, dtype in ((8192, "bf16"), (16_384, "bf16"), (8192, "fp32")):
        for peer in (OURS, IN_PLACE):
            yield Case(TASKS["grpo_loss"], "both", Shape(MODEL, N, dtype), peer)


def with_target(level: str) -> Iterator[Case]:
    """Yield the cases of report/targets.py, the shorter first."""
    for target in sorted(TARGETS, key=lambda target: target.N):
        task = TASKS[target.task]
        if task.level == level:
            yield Case(task, target.phase, Shape(MODEL, target.N, DTYPE), OURS)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "odd": odd_vocabulary,
    "one_launch": one_launch,
    "hidden": lambda: with_target("hidden"),
    "logits": lambda: with_target("logits"),
}


def rehearsed(case: Case) -> Case:
    """Return the case at a size that Triton's interpreter runs in milliseconds."""
    model = "tiny + 1" if case.shape.model in ODD_MODELS else "tiny"
    # The odd models would be one case, and so would both numbers of tokens.
    N = 4 + ODD_MODELS.index(case.shape.model) if model != "tiny" else case.shape.N // 4096
    return replace(case, shape=replace(case.shape, model=model, N=N))


def measure_case(case: Case, device: torch.device, *, gate: bool, once: bool) -> Record:
    """Measure a case: correctness gate, memory, time. An error is a result too.

    once: clock one call, as a rehearsal does.
    """
    record = case.new_record()
    try:
        if gate:
            record.errors = correctness.check(case.task, case.shape, case.peer, device)
        peer = PEERS[case.peer]
        problem = make_problem(case.task.level, case.shape, device, case.task.variant)
        call = call_of(peer.tasks[case.task.name], case.phase, peer.prepare(problem))
        record.extra_bytes = peak_extra_bytes(call)
        first = clock.time_call(call)
        rounds, calls = (1, 1) if once else clock.plan_rounds(first, BUDGET[device.type])
        seconds = [
            clock.time_call(lambda: [call() for _ in range(calls)] and None) / calls
            for _ in range(rounds)
        ]
        record.seconds, record.rounds = statistics.median(seconds), rounds
        quartiles = statistics.quantiles(seconds, n=4) if rounds > 1 else seconds * 3
        record.lower_quartile, _, record.upper_quartile = quartiles
        record.bytes = case.task.bytes(problem, case.phase)
        record.flops = case.task.flops(problem, case.phase)
        if device.type == "cuda":
            if case.task.level == "logits":
                amount, roof = record.bytes, roofline.copy_bandwidth(device)
            else:
                amount, roof = record.flops, roofline.matmul_rate(device, case.shape.dtype)
            record.percent_of_roof = 100 * (amount or 0) / record.seconds / roof
    except Exception as error:
        record.status, record.reason = describe_error(error)
    finally:
        free_memory(device)
    return record


def measure_cases(part: str, results: ResultFile, device: torch.device, *, rehearse: bool) -> None:
    for case in CASES[part]():
        case = rehearsed(case) if rehearse else case
        record = case.new_record()
        if record.key not in results.records:
            # The gate takes 32 tokens, which is seconds in the interpreter: there once per task.
            gate = not rehearse or case.shape.N == 2
            results.add(measure_case(case, device, gate=gate, once=rehearse))
            report(results.records[record.key])


def report(record: Record) -> None:
    time = "" if record.seconds is None else f"{1e3 * record.seconds:.3f} ms"
    roof = "" if record.percent_of_roof is None else f"{record.percent_of_roof:.0f}% of the roof"
    parts = (record.task, record.phase, str(record.shape), record.peer, record.status)
    print(", ".join(filter(None, (*parts, record.reason or "", time, roof))), flush=True)


def row_results(x: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute log-prob, entropy and the gradient of both of every row."""
    x = x.detach().requires_grad_()
    stats = grpo_kernels.token_stats(x, tokens)
    (stats.logprob.sum() + 0.1 * stats.entropy.sum()).backward()
    return {"logprob": stats.logprob.detach(), "entropy": stats.entropy.detach(), "d": x.grad}


def compare_bits(results: ResultFile, device: torch.device, *, rehearse: bool) -> None:
    """Compare rows of a large batch with the same rows alone, which are split over programs.

    Errors count the rows that differ in any bit; they must be 0.
    """
    N, few = (8, 1) if rehearse else (4096, 8)
    models = ("tiny", "tiny + 1") if rehearse else (MODEL, *ODD_MODELS)
    for model in models:
        for dtype in ("bf16", "fp32"):
            shape = Shape(model, N, dtype)
            for name in (ONE_ROW, ALL_ROWS):
                record = Record("bits", "both", model, N, dtype, 0.0, 0.0, name)
                if record.key in results.records:
                    continue
                problem = make_problem("logits", shape, device)
                assert problem.logits is not None
                x, tokens = problem.logits.detach().flatten(0, 1), problem.tokens.flatten()
                try:
                    whole = row_results(x, tokens)
                    if name == ONE_ROW:
                        rows = slice(N // 2, N // 2 + few)
                        other = row_results(x[rows].clone(), tokens[rows])
                        whole = {key: value[rows] for key, value in whole.items()}
                    else:
                        # One entry between rows: each begins at another address modulo 16 bytes.
                        apart = x.new_zeros(N, x.shape[1] + 1)[:, 1:]
                        other = row_results(apart.copy_(x), tokens)
                    record.errors = {
                        key: float((value != other[key]).view(len(value), -1).any(1).sum())
                        for key, value in whole.items()
                    }
                    if any(record.errors.values()):
                        record.status, record.reason = "refused", "bits differ"
                except Exception as error:
                    record.status, record.reason = describe_error(error)
                finally:
                    free_memory(device)
                results.add(record)
                report(record)


def memory_curve(results: ResultFile, device: torch.device, *, rehearse: bool) -> None:
    model, dtype = ("tiny", "fp32") if rehearse else (MODEL, DTYPE)
    for N in (4, 8) if rehearse else CURVE:
        record = Record("memory_curve", "both", model, N, dtype, 0.0, 0.0, OURS)
        if record.key in results.records:
            continue
        try:
            head = HEADS[model]
            row = measure(N, head.V, head.H, dtype, device)
            record.extra_bytes, record.seconds = row.extra_bytes, row.seconds
        except Exception as error:
            record.status, record.reason = describe_error(error)
        finally:
            free_memory(device)
        results.add(record)
        report(record)


def launch_each_kernel(device: torch.device) -> None:
    """Launch every row kernel on a few rows, aligned and not: for compute-sanitizer."""
    for V in (96, 67):
        x = torch.randn(4, V, device=device)
        y = torch.randn(4, V, device=device)
        tokens = torch.randint(0, V, (4,), device=device)
        advantages = torch.tensor([1.0, -1.0, 0.0, 2.0], device=device)
        for dtype in (torch.float32, torch.bfloat16):
            leaf, other = x.to(dtype).requires_grad_(), y.to(dtype)
            for keywords in ({}, {"ref_logits": other, "kl": "forward"}, {"softcap": 5.0},
                             {"ref_logits": other, "kl": "reverse"}):  # fmt: skip
                stats = grpo_kernels.token_stats(leaf, tokens, **keywords)
                sum(z.sum() for z in (stats.logprob, stats.entropy, stats.kl) if z is not None
                    ).backward()  # fmt: skip
            config = grpo_kernels.LossConfig.dapo()
            grpo_kernels.grpo_loss(leaf, tokens, advantages, config=config).loss.backward()
            view = leaf.clone()
            out = grpo_kernels.grpo_loss(view, tokens, advantages, config=config, inplace=True)
            out.loss.backward()
            for divergence in ("reverse", "forward", "jsd"):
                loss = grpo_kernels.distillation_loss(leaf, other, divergence=divergence).loss
                loss.backward()
            grpo_kernels.approximate_kl_divergence(other, leaf).backward()
            head = torch.randn(V, 16, device=device).to(dtype).requires_grad_()
            hidden = torch.randn(4, 16, device=device).to(dtype).requires_grad_()
            arguments = (hidden, head, tokens, advantages)
            grpo_kernels.linear_grpo_loss(*arguments, config=config).loss.backward()
    clock.now()
    print("every kernel was launched")


PARTS = (*CASES, "bits", "memory", "launches")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any device")
    arguments = parser.parse_args()
    device = clock.default_device()
    if arguments.part == "launches":
        launch_each_kernel(device)
        return
    measures_roofs = device.type == "cuda" and arguments.part in CASES
    roofs = roofline.measure_roofs(device) if measures_roofs else {}
    results = ResultFile(arguments.results, device, roofs)
    if arguments.part in CASES:
        measure_cases(arguments.part, results, device, rehearse=arguments.rehearse)
    else:
        run = {"bits": compare_bits, "memory": memory_curve}[arguments.part]
        run(results, device, rehearse=arguments.rehearse)
    bad = [record for record in results.records.values() if record.status != "ok"]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(results.records)} cases are not ok")


if __name__ == "__main__":
    main()
