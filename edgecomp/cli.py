"""The command line: each verb reads files and writes files. The only module that prints.

Exit codes: 0 done; 1 a defect of ours; 2 usage, configuration, unreadable input or a full disk; 3 a budget is not met;
4 parity or accuracy is not met; 5 the model or format is not supported; 6 a runtime or device is missing or its run is
not valid; 130 interrupted. Of the processes of torchrun the first alone prints; all leave with its exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from edgecomp import __version__, errors, launched, options, pipelines

EXIT_CODES: tuple[tuple[type[errors.EdgecompError], int], ...] = (
    (errors.UnsupportedOp, 5),
    (errors.ExportError, 5),
    (errors.BudgetError, 3),
    (errors.ParityError, 4),
    (errors.TargetError, 6),
    (errors.GraphError, 1),
    (errors.EdgecompError, 2),
)
"""The first row whose class fits counts."""
INTERRUPTED = 130
OPTIONAL = {
    **dict.fromkeys(("torch", "torchvision", "safetensors", "PIL", "onnx", "onnxruntime"), "build"),
    **dict.fromkeys(("ai_edge_litert", "flatbuffers"), "build"),
    **dict.fromkeys(("cyclonedx", "packageurl"), "sbom"),
}
"""What the base install lacks, and the extra that brings it."""


def entry() -> NoReturn:
    """Be the console command: run and leave with the exit code."""
    code = main()
    if launched.place()[1] > 1:
        # torchrun ends the others as soon as one has ended with an error: each is to leave with its own code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        the exit code.
    """
    _open_standard_streams()
    interrupted: list[int] = []

    def interrupt(number: int, frame: object) -> NoReturn:
        interrupted.append(number)
        raise KeyboardInterrupt

    before = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # ignored by nohup
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT, *hangup)}
    try:
        return _run(_parser().parse_args(argv))
    except BaseException as e:
        # Native code in the middle of an import turns the interruption into an error of its own.
        if interrupted:
            # CPython counts one inside exec("...") as unhandled, and dies of it in the end, until the next exec.
            exec("")
            how_to_go_on = str(e) if isinstance(e, KeyboardInterrupt) else ""
            return _complain(how_to_go_on or "interrupted; nothing was left half-written", INTERRUPTED)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace) -> int:
    try:
        if args.verb != "build" and launched.place()[1] > 1:
            raise errors.UsageError(f"{args.verb} is the work of one process; of the verbs torchrun shares only build")
        code = _VERBS[args.verb](args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except errors.EdgecompError as e:
        return _complain(str(e), next(code for kind, code in EXIT_CODES if isinstance(e, kind)))
    except ImportError as e:
        package = (e.name or "").partition(".")[0]
        if package not in OPTIONAL or "initialization" in str(e):
            raise
        extra = OPTIONAL[package]
        return _complain(f"{package} cannot be imported ({e}); install it with: pip install 'edgecomp[{extra}]'", 6)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); what is left to print is not wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _complain("out of memory; try fewer --calib images, or a machine with more", 2)
    except OSError as e:
        place = e.filename or getattr(args, "output", None) or f"standard output or {tempfile.gettempdir()}"
        return _complain(f"{place}: {e.strerror or e}; nothing was left half-written", 2)
    return code


def _open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr something there.

    Otherwise the next file that is opened gets that number, and what is printed lands in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _complain(message: str, code: int) -> int:
    if launched.is_first():
        print(f"edgecomp: {' '.join(message.split())}", file=sys.stderr)
    return code


def _warn(text: str) -> None:
    _complain(f"warning: {text}", 0)


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        _complain(f"{message}; see {self.prog} --help", 2)
        raise SystemExit(2)


class _Print(argparse.Action):
    """Prints a path and leaves; argparse's own way of printing a text breaks it into lines."""

    def __init__(self, *, const: Path, **given: Any) -> None:
        super().__init__(nargs=0, const=const, **given)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            print(self.const, flush=True)
        except OSError as e:
            raise SystemExit(_complain(f"standard output: {e.strerror}", 2)) from e
        raise SystemExit(0)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="edgecomp",
        description="Compress a trained CNN by explanations: prune what does not matter, give each layer the bits it "
        "deserves, write small files that run on stock runtimes.",
        epilog="exit codes: 0 done, 1 defect, 2 usage or input, 3 budget, 4 parity, 5 unsupported, "
        "6 runtime or device, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"edgecomp {__version__}")
    where = "print the folder of the CMake package: -Dedgecomp_DIR=$(edgecomp --cmake-dir)"
    parser.add_argument("--cmake-dir", action=_Print, const=pipelines.CMAKE_DIR, help=where)
    where = "print the file to include in a Makefile: include $(shell edgecomp --make-include)"
    parser.add_argument("--make-include", action=_Print, const=pipelines.MAKE_INCLUDE, help=where)
    options.add_verbs(parser.add_subparsers(dest="verb", required=True, metavar="VERB"))
    return parser


# ---- progress --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stage(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a bar with the time left on a terminal; be silent elsewhere, and where tqdm is not installed."""
    if not (sys.stderr.isatty() and launched.is_first()):
        yield lambda n: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda n: None
        return
    shape = "{desc:<28}{percentage:3.0f} % |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    with tqdm(total=total, desc=name, file=sys.stderr, bar_format=shape, unit_scale=total > 100_000) as bar:
        yield bar.update


# ---- verbs -----------------------------------------------------------------------------------------------------------


def _build(args: argparse.Namespace) -> int:
    from edgecomp import bundle
    from edgecomp.artifact import AtRest
    from edgecomp.build import build
    from edgecomp.channels import IRRELEVANT, parse_pruning
    from edgecomp.methods import OPEN, PAPERS, Scoring
    from edgecomp.overview import results_table
    from edgecomp.plan import Io

    sys.path.insert(0, os.getcwd())  # package.module:factory is looked for where the user stands
    paper, limit = PAPERS.get(args.method), options.latency_limit_of(args)
    sparsifying = None if paper is None else paper.sparsifying
    built = build(
        model=args.model,
        weights=args.weights,
        data=args.data,
        test_share=args.test_share,
        preprocessing=options.preprocessing_of(args),
        input_shape=args.input_shape,
        n_calibration=args.calib,
        budget=options.budget_of(args),
        formats=args.format,
        io=Io(args.io),
        scoring=options.scoring_of(args, Scoring() if paper is None else paper.scoring),
        reconstruction=paper is None and not args.no_reconstruct,
        seed=args.seed,
        folder=args.output,
        force=args.force,
        classes=args.classes,
        epochs=args.recover,
        checkpoint=args.checkpoint,
        limit=limit,
        pruning=IRRELEVANT if args.prune is None else parse_pruning(args.prune),
        sparsifying=sparsifying if args.sparsify is None else parse_pruning(args.sparsify, "--sparsify"),
        paper=paper,
        at_rest=AtRest(args.weights_at_rest),
        stage=_stage,
        warn=_warn,
    )
    if launched.is_first():
        print(results_table(built.manifest))
        if paper is not None:
            print(f"\n{paper.name}: {paper.published} ({paper.source}); not published, chosen here:")
            print("\n".join(f"- {what}: {how}" for what, how in OPEN.items()))
        if limit is not None:
            print(f"\n{limit.told(bundle.load(args.output / bundle.GRAPH_FILE))}")
        print(f"\n{args.output}: README.md there explains the files")
    if not built.budget_met:
        asked, got = args.max_drop, built.manifest["budget"]["got"]  # type: ignore[index]
        return _complain(f"budget: at most {asked:g} points lost asked for, the most precise plan loses {got:g}", 3)
    return 0


def _export(args: argparse.Namespace) -> int:
    from edgecomp import bundle
    from edgecomp.artifact import FILES, AtRest, form_of
    from edgecomp.build import rewritten
    from edgecomp.errors import PlanError, UsageError
    from edgecomp.exporters import files_of
    from edgecomp.exporters.c_layouts import layout_files, layout_names
    from edgecomp.files import check_new_files, write_files
    from edgecomp.plan import CompressionPlan
    from edgecomp.report import table

    try:
        plan = CompressionPlan.from_json(args.plan.read_text("utf-8"), str(args.plan))
    except UnicodeDecodeError as e:
        raise PlanError(f"{args.plan}: is not text; expected a plan.json") from e
    at_rest = AtRest(args.weights_at_rest)
    if at_rest is AtRest.PACKED and "tflite" not in args.format:
        raise UsageError(f"--weights-at-rest {at_rest} is of TFLite files; add tflite to --format")
    for option, given in (("--layout", args.layout != "flat"), ("--name", args.name is not None)):
        if given and "c" not in args.format:
            raise UsageError(f"{option} is of C; add c to --format")
    graph = bundle.load(args.graph)
    # What a layout adds is called after the network, which is not known before it is written.
    names = [name for each in args.format for name in (layout_names(args.layout) if each == "c" else FILES[each])]
    check_new_files(args.output, names, force=args.force)
    named = {"c": replace(graph, name=args.name or graph.name)}
    exported = [rewritten(plan, named.get(each, graph), form_of(each, at_rest)) for each in args.format]
    written: dict[str, bytes] = {}
    rows = []
    for file in exported:
        files = files_of(file)
        if file.format == "c":
            files = layout_files(files, args.layout)
        (path,) = (name for name in files if name.rpartition("/")[2] == file.name)
        rows.append((str(args.output / path), len(file.data), sum(w.stored_bytes for w in file.weights), file.sha256()))
        written |= files
    check_new_files(args.output, written, force=args.force)
    write_files(args.output, written)
    print(table(rows, ("file", "bytes", "weight bytes", "sha256")))
    return 0


def _unpack(args: argparse.Namespace) -> int:
    from edgecomp.errors import UsageError
    from edgecomp.report import table
    from edgecomp.runtime import CPP_HEADER, unpack_file

    if args.cpp_header and args.file is args.output is None and not args.force and not args.unsigned:
        print(CPP_HEADER)
        return 0
    if args.cpp_header or args.file is None or args.output is None:
        raise UsageError("expected IN and -o OUT, or --cpp-header alone; see edgecomp unpack --help")
    sizes = unpack_file(args.file, args.output, force=args.force, unsigned=args.unsigned)
    print(table(list(sizes.items()), ("file", "bytes")))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from edgecomp.verifying import verify

    result = verify(
        args.folder, data=args.data, per_layer=args.per_layer, reference=args.reference, stage=_stage
    )
    print(json.dumps(result.to_json(), indent=1) if args.json else result.table())
    return 0 if result.passed else _complain(result.reason(), 4)


def _bench(args: argparse.Namespace) -> int:
    from edgecomp.benching import MIN_S, bench_artifact, bench_target
    from edgecomp.comparing import check_asked, check_not_slower, plot
    from edgecomp.devices import (
        Flags,
        bench_devices,
        bench_emulated_board,
        bench_gathered,
        check_options,
        kind_of,
    )
    from edgecomp.files import write_file

    kind = kind_of(args.target, args.gathered)
    how = {"runtime": args.runtime, "seed": args.seed, "stage": _stage}
    flags = Flags(profile=args.profile, cores=args.cores, repeat=args.repeat)
    check_options(kind, flags, threads=args.threads, min_s=args.min_secs, compiler=args.compiler)
    before = check_asked(
        args.artifacts,
        kind,
        svg=args.svg,
        force=args.force,
        percent=args.fail_if_slower,
        baseline=args.baseline,
    )
    if kind == "core":
        if len(args.artifacts) > 1:
            raise errors.UsageError(f"--target {args.target[0]}: takes one folder at a time")
        report = bench_target(args.artifacts[0], args.target[0], compiler=args.compiler, **how)
        print(json.dumps(report.to_json(), indent=1) if args.json else report.table())
        return 0
    if kind == "emulated":
        found: Sequence[Any] = bench_emulated_board(args.artifacts, args.target[0], **how)
    elif kind == "gathered":
        if args.runtime is not None or args.threads != 1:
            raise errors.UsageError("--runtime and --threads with --gathered: it was measured already")
        found = [bench_gathered(args.artifacts, args.gathered, seed=args.seed)]
    else:
        how |= {"threads": args.threads, "min_s": MIN_S if args.min_secs is None else args.min_secs}
        there = kind == "ssh"
        found = (
            bench_devices(args.artifacts, args.target, flags=flags, **how)
            if there
            else bench_artifact(args.artifacts, repeat=flags.repeat, **how)
        )
    values = [json.loads(each.comparison.to_json()) for each in found] if args.json else []
    print(json.dumps(values, indent=1) if args.json else "\n\n".join(each.table() for each in found))
    compared = [each.comparison for each in found]
    if args.svg is not None:
        write_file(args.svg, plot(compared, [each.title for each in found]).encode())
    judging = args.fail_if_slower is not None
    if judging:
        check_not_slower(compared, before, args.fail_if_slower)
    spoilt = [f"{each.title}: {why}" for each in found for why in each.comparison.reports[0].not_valid]
    # On this machine, used by others too, the table says it: ratios are of models in turns, which a drift hits alike.
    if spoilt and (judging or kind in ("ssh", "gathered")):
        verdict = ", so not judged by --fail-if-slower; measure again" if judging else ""
        return _complain(f"not valid{verdict}: {'; '.join(spoilt)}", 6)
    return 0


def _gate(args: argparse.Namespace) -> int:
    from edgecomp.files import write_file
    from edgecomp.gating import Limits, gate

    limits = Limits(flash_bytes=args.max_flash, ram_bytes=args.max_ram, drop_points=args.max_drop)
    judged = gate(
        args.folder,
        limits,
        target=args.target,
        baseline=args.baseline,
        manifest=args.manifest,
        report=args.report,
        stage=_stage,
    )
    if args.report is None:
        print(judged)
    else:
        write_file(args.report, f"{judged}\n".encode())
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from edgecomp.exporters.describe import describe_tables
    from edgecomp.inspecting import inspect

    found = inspect(args.file, execution=args.execution)
    print(json.dumps(found, indent=1) if args.json else describe_tables(found))
    return 0


def _sbom(args: argparse.Namespace) -> int:
    from edgecomp.exporters.to_cyclonedx import to_cyclonedx
    from edgecomp.files import MANIFEST, check_new_files, write_file
    from edgecomp.folder import open_folder

    if args.force and args.output is None:
        raise errors.UsageError("--force is of -o, which is not given")
    folder = open_folder(args.folder)
    if args.output is not None:
        check_new_files(args.output.parent, [args.output.name], force=args.force)
    own = [args.folder / name for name in (*folder.record["files"], MANIFEST)]
    if args.output is not None and args.output.exists() and any(p.exists() and p.samefile(args.output) for p in own):
        raise errors.UsageError(f"{args.output}: is a file that the bill is about; choose another -o")
    text = to_cyclonedx(folder)
    if args.output is None:
        print(text, end="")
    else:
        write_file(args.output, text.encode())
    return 0


def _estimate(args: argparse.Namespace) -> int:
    from edgecomp.estimating import estimate_model
    from edgecomp.from_counts import estimate_report
    from edgecomp.targets import load

    if args.model.endswith(".json"):
        for name in ("runtime", "precision", "threads", "profile", "weights", "input_shape"):
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise errors.UsageError(f"{option} is not for a report of executed instructions; leave it out")
        counted = estimate_report(Path(args.model), load(args.target))
        print(json.dumps(counted.to_json(), indent=1) if args.json else counted.table())
        return 0
    sys.path.insert(0, os.getcwd())  # package.module:factory is looked for where the user stands
    found = estimate_model(
        args.model,
        target=load(args.target),
        runtime=args.runtime,
        precision=args.precision or "int8",
        threads=1 if args.threads is None else args.threads,
        profile=args.profile,
        weights=args.weights,
        input_shape=args.input_shape,
        stage=_stage,
    )
    print(json.dumps(found.to_json(), indent=1) if args.json else found.table())
    return 0


def _targets(args: argparse.Namespace) -> int:
    from edgecomp.boards import (
        board_facts,
        board_table,
        boards_table,
        check_asked,
        install,
        write_native_runner,
        write_runner,
    )

    check_asked(args.name, install=args.install, runner=args.runner, force=args.force, as_json=args.json)
    if args.install:
        print(install(args.name, stage=_stage))
        return 0
    if args.runner is not None:
        where, force = args.runner, args.force
        print(write_runner(where, force=force) if not args.cpu else write_native_runner(where, args.cpu, force=force))
        return 0
    if args.cpu is not None:
        raise errors.UsageError("--cpu is for --runner")
    shown = boards_table() if args.name is None else board_table(args.name)
    print(json.dumps(board_facts(args.name), indent=1) if args.json else shown)
    return 0


_VERBS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "build": _build,
    "export": _export,
    "unpack": _unpack,
    "verify": _verify,
    "bench": _bench,
    "gate": _gate,
    "inspect": _inspect,
    "sbom": _sbom,
    "estimate": _estimate,
    "targets": _targets,
}
