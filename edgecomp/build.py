"""The whole way: model and images in, a folder of exported files with their proof out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgecomp import bundle, intake, launched, manifest, planner
from edgecomp.artifact import AtRest, Exported, form_of
from edgecomp.channels import IRRELEVANT, CutPolicy, Pruning
from edgecomp.check import Stage, chance_warning, measure, measure_accuracy
from edgecomp.compress import compress, narrowest_bits, on_grids
from edgecomp.data import TEST_SHARE, LabelledImages, draw
from edgecomp.errors import DataError, UsageError
from edgecomp.files import MANIFEST, MANIFEST_SCHEMA, OVERVIEW, PLAN_FILE, check_output_folder, new_folder, write_file
from edgecomp.graph import Array, Graph
from edgecomp.latency import LatencyLimit
from edgecomp.methods import LRP, OURS, Paper, Scoring, check_method
from edgecomp.overview import overview
from edgecomp.plan import ActRange, CompressionPlan, Io, LayerPlan, Relevance
from edgecomp.preprocessing import Preprocessing
from edgecomp.provenance import tools
from edgecomp.pruning import check_pruning, pruned, sparsified
from edgecomp.quantmath import Grid
from edgecomp.recovering import recover, recovery_settings
from edgecomp.sparsity import NOTHING, masked, zero_share
from edgecomp.spending import Budget, BudgetKind, Candidate, Spent, spend, spend_on_ladder
from edgecomp.strictjson import write_json

if TYPE_CHECKING:
    from edgecomp.pytorch.scores import Scorer

SAMPLE = "sample"
_BATCH = 64
_HELD_OUT = 2000
_MOST_EPOCHS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Built:
    """What a build gives back.

    Attributes:
        folder: where the files are.
        manifest: as written there.
        budget_met: False where even the most precise plan loses more accuracy than allowed.
    """

    folder: Path
    manifest: Mapping[str, object]
    budget_met: bool


def silent(name: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Be a Stage that shows nothing."""
    return nullcontext(lambda n: None)


def build(
    *,
    model: str | None,
    weights: Path | None,
    data: str | None,
    test_share: float | None,
    preprocessing: Preprocessing | None,
    input_shape: tuple[int, int, int] | None,
    n_calibration: int,
    budget: Budget,
    formats: Sequence[str],
    io: Io,
    reconstruction: bool,
    seed: int,
    folder: Path,
    force: bool,
    epochs: int = 0,
    checkpoint: Path | None = None,
    scoring: Scoring = LRP,
    classes: str | None = None,
    pruning: Pruning = IRRELEVANT,
    limit: LatencyLimit | None = None,
    sparsifying: Pruning | None = None,
    paper: Paper | None = None,
    at_rest: AtRest = AtRest.NATIVE,
    stage: Stage = silent,
    warn: Callable[[str], object] = lambda text: None,
) -> Built:
    """Compress a model and write its folder.

    Args:
        model: see `pytorch.load.load_module`; None for the bundled sample.
        weights: a file of weights for the model.
        data: see `data.load`; None for the bundled sample's.
        test_share: how much of data without a test part is measured on, the rest calibrates; None for `TEST_SHARE`.
        preprocessing: what turns pixels into input; None for the sample's own, or pixels / 255 unchanged.
        input_shape: (C, H, W); None for what the preprocessed images have.
        n_calibration: images of the training split to calibrate and score with.
        budget: what may be spent.
        formats: "onnx", "tflite", "tflm", "c".
        io: what the files take and give.
        reconstruction: adjust weights to their widths on the calibration images.
        seed: of every random choice.
        folder: where to write.
        force: replace an earlier build there.
        epochs: of recovery by fine-tuning on the training images; 0 for none.
        checkpoint: where an interrupted recovery is kept and found again; None for `folder`.recover.
        scoring: what tells important from unimportant.
        classes: the classes the files are for, see `selection.parse_classes`; None for all.
        pruning: which channels are cut; what remains is then compressed like any other network.
        limit: the latency that channels are cut for; `pruning` must then be the default.
        sparsifying: which of the weights that remain become 0; None for none.
        paper: whose recipe gives layers their bits; the other arguments must be as it has them. None for our method.
        at_rest: how files store weights.
        stage: shows how far the work is.
        warn: told, before the long work, what looks wrong but is no error.

    Raises:
        EdgecompError: by kind, see `errors`.
        OSError: the folder cannot be written.
    """
    if at_rest is AtRest.PACKED and "tflite" not in formats:
        raise UsageError(f"--weights-at-rest {at_rest} is of TFLite files; add tflite to --format")
    if model is None and weights is not None:
        raise UsageError("--weights without MODEL: name the model they belong to")
    if model is not None and data is None:
        raise UsageError("--data is missing: a model of your own needs labelled images, e.g. --data folder:PATH")
    if n_calibration < 1:
        raise UsageError(f"--calib {n_calibration}: expected at least 1")
    if not 0 <= epochs <= _MOST_EPOCHS:
        raise UsageError(f"--recover {epochs}: expected epochs, 0 to {_MOST_EPOCHS}")
    if checkpoint is not None and not epochs:
        raise UsageError("--checkpoint without --recover: only a recovery has one")
    if checkpoint is not None and checkpoint.absolute() == folder.absolute():
        raise UsageError(f"--checkpoint {checkpoint}: is the output folder; name another file")
    check_pruning(pruning, sparsifying, budget)
    if limit is not None:
        if pruning != IRRELEVANT:
            raise UsageError(f"--max-latency with --prune {pruning.text()}: each says how much to cut; leave one out")
        pruning = Pruning(policy=CutPolicy.ENOUGH)
    check_method(paper, scoring=scoring, pruning=pruning, sparsifying=sparsifying, reconstruction=reconstruction)
    _check_rule(scoring.rule)
    _check_folder(folder, force=force)
    if "tflm" in formats:
        from edgecomp.benchmarks.tflm import load_package

        load_package()  # rather missed now than after the long work
    if "c" in formats:
        from edgecomp.benchmarks.compiled_c import host_compiler

        host_compiler()
    formats = [form_of(name, at_rest) for name in formats]
    if model is None:
        model, weights, preprocessing = intake.sample(preprocessing)
    preprocessing = preprocessing or Preprocessing(mean=(0.0,), std=(1.0,))
    data = data or SAMPLE
    from edgecomp.pytorch.sharing import by_first, join, together

    join()
    with together():
        images = intake.load_images(data, test_share, seed, preprocessing, stage)
        shape = intake.input_shape(images.test, preprocessing, input_shape)
        original = intake.capture(model, weights, shape, images, stage)
        uncut, images, class_weights = intake.select(original, images, classes)
    float_accuracy = by_first(lambda: _float_accuracy(uncut, images.test, preprocessing, stage))
    n_classes = int(np.prod(uncut.tensors[uncut.outputs[0]].shape))
    untrained = chance_warning({"the float network": float_accuracy}, len(images.test), n_classes)
    if untrained:
        without = " (--weights was not given)" if weights is None and ":" in model else ""
        advice = f"is it trained{without}, and do --mean, --std and the like give it what it was trained on?"
        warn(f"{untrained}; {advice}")
    drop_points, rest, held_out = None, images.train, None
    if budget.kind is BudgetKind.MAX_DROP:
        train, rest, held_out = _split(images.train, n_calibration, seed=seed)
        drop_points = _drop_measure(uncut, held_out, preprocessing, formats)
    else:
        if epochs:
            from edgecomp.pytorch.finetune import split

            # Reconstruction must not have seen what recovery is judged by.
            rest, held_out = split(images.train, seed=seed)
        train = draw(rest, n_calibration, seed=seed)
    asked = {
        "pruning": pruning.text(),
        "reconstruction": "weights and biases, by layers" if reconstruction else "none",
        "budget": f"{budget.kind} {budget.asked:g}",
        "formats": ",".join(formats),
        "seed": str(seed),
        "sparsifying": "none" if sparsifying is None else sparsifying.text(),
        **({} if limit is None else {"latency": limit.text()}),
        **({} if classes is None else {"classes": intake.chosen_text(classes, original, uncut)}),
        **({"method": OURS} if paper is None else paper.made_by()),
    }
    if epochs:
        from edgecomp.pytorch import progress

        checkpoint = checkpoint or folder.absolute().with_name(f"{folder.absolute().name}.recover")
        options = {"score": f"{scoring}", "io": io.value, "calibration": str(len(train)), "input": f"{preprocessing}"}
        settings = recovery_settings(epochs, seed, budget, formats, {**asked, **options})
        by_first(lambda: progress.check(checkpoint, settings.key(uncut, rest)))
    batches = _batches(uncut, train, preprocessing)
    scorer = _scorer(scoring, batches, train.labels, class_weights, seed)
    with stage("cutting channels", len(pruning.slices())) as advance:
        dense = pruned(
            uncut,
            pruning,
            scorer,
            held_out,
            preprocessing,
            budget=budget,
            compensation=reconstruction,
            limit=limit,
            progress=advance,
        )
    masks = NOTHING
    if sparsifying is not None:
        with stage("setting weights to zero", len(sparsifying.slices())) as advance:
            masks = sparsified(
                dense,
                uncut,
                sparsifying,
                pruning,
                scorer,
                held_out,
                preprocessing,
                budget=budget,
                compensation=reconstruction,
                progress=advance,
            )
    graph = dense if reconstruction else masked(dense, masks)
    # A paper scores the network once, before anything is pruned.
    relevance, ranges = _explain(graph if paper is None else dense, graph, scorer, batches, stage)
    keep = planner.irrelevant_channels(graph, relevance)

    def planned(rounded: Graph, grids: Mapping[str, Grid]) -> Candidate:
        plan = CompressionPlan(
            graph_digest=rounded.digest(),
            io=io,
            layers={n: LayerPlan(keep=keep[n], weight_bits=narrowest_bits(rounded, n, grids[n])) for n in keep},
            ranges=ranges,
            preprocessing=preprocessing,
            classes=images.classes,
            made_by={
                "relevance": relevance.rule,
                "samples": str(relevance.n_samples),
                **asked,
                "sparsifying": _told(sparsifying, zero_share(masks, graph)),
            },
        )
        return Candidate(graph=rounded, plan=plan)

    def draft(grids: Mapping[str, Grid]) -> Candidate:
        return planned(masked(on_grids(graph, grids), masks), grids)

    def reconstructed(grids: Mapping[str, Grid]) -> Candidate:
        from edgecomp.pytorch.recover import reconstruct

        with stage("reconstruction", sum(manifest.weight_counts(graph).values())) as advance:
            return planned(reconstruct(graph, ranges, grids, batches, masks=masks, progress=advance), grids)

    make = reconstructed if reconstruction else draft

    def weighed() -> Sequence[planner.LayerChoices]:
        with stage("weighing bits", sum(manifest.weight_counts(graph).values())) as advance:
            if reconstruction:
                from edgecomp.pytorch.trial import trial_choices, try_grids

                trials = try_grids(graph, batches, formats, masks=masks, progress=advance)
                return trial_choices(graph, trials, relevance, formats)
            return planner.layer_choices(graph, relevance, keep, formats, progress=advance)

    def bought() -> Spent:
        if paper is None:
            choices = weighed()
            with _searching(budget, stage) as advance:
                return spend(budget, choices, draft, make, formats, drop_points, progress=advance)
        rungs = planner.ladder(planner.layer_scores(relevance, masks), paper.widths)
        with _searching(budget, stage) as advance:
            # Whatever the rung, the weights are these, to be rounded to nearest.
            return spend_on_ladder(
                budget, rungs, lambda grids: planned(graph, grids), formats, drop_points, progress=advance
            )

    spent = by_first(bought)
    if epochs:
        assert checkpoint is not None
        assert held_out is not None
        with stage("fine-tuning", epochs * len(rest)) as advance:
            spent = recover(
                spent,
                uncut,
                dense,
                rest,
                held_out,
                budget=budget,
                formats=formats,
                settings=settings,
                checkpoint=checkpoint,
                masks=masks,
                drop_points=drop_points,
                progress=advance,
            )

    def written() -> Mapping[str, object]:
        from edgecomp.exporters import files_of

        plan = spent.candidate.plan
        quantized = compress(spent.candidate.graph, plan)
        exported = _export(quantized, formats, stage)
        measured = [measure(e, quantized, images.test, preprocessing, stage) for e in exported]
        of_files = {e.name: m["accuracy"]["value"] for e, m in zip(exported, measured, strict=True)}
        ruined = chance_warning(of_files, len(images.test), n_classes)
        if ruined and not untrained:
            much = ", ".join(_asked_for(budget, pruning, sparsifying, limit))
            back = "" if epochs else ", or win accuracy back with --recover"
            warn(f"{ruined}, the float network on {float_accuracy:.2f} %; {much} is too much: ask for less{back}")
        record: dict[str, object] = {
            "schema": MANIFEST_SCHEMA,
            "model": graph.name,
            "data": data,
            "inputs": {
                "network": original.digest(),
                "training images": images.train.digest(),
                "test images": images.test.digest(),
            },
            "test_share": TEST_SHARE if test_share is None else float(test_share),
            "preprocessing": preprocessing.to_json(),
            "classes": list(images.classes),
            "io": io.value,
            "budget": {"kind": budget.kind.value, "asked": budget.asked, "got": spent.got, "met": spent.met},
            "float": manifest.float_entry(original, float_accuracy, len(images.test)),
            "artifacts": [manifest.artifact_entry(e, quantized, m) for e, m in zip(exported, measured, strict=True)],
            "layers": manifest.layer_entries(original, quantized, plan, relevance, exported),
            "graph_digest": plan.graph_digest,
            "seed": seed,
            "tools": tools(),
        }
        files = {name: contents for e in exported for name, contents in files_of(e).items()}
        files |= {bundle.GRAPH_FILE: bundle.to_bytes(spent.candidate.graph), PLAN_FILE: plan.to_json().encode()}
        memory_plan = next((e.memory_plan for e in exported if e.memory_plan is not None), None)
        files[OVERVIEW] = overview(record, plan.made_by, memory_plan).encode()
        record["files"] = {name: hashlib.sha256(contents).hexdigest() for name, contents in sorted(files.items())}
        with new_folder(folder, force=force) as work:
            for name, contents in {**files, MANIFEST: write_json(record).encode()}.items():
                write_file(work / name, contents)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return record

    return Built(folder=folder, manifest=by_first(written), budget_met=spent.met)


def _asked_for(
    budget: Budget, pruning: Pruning, sparsifying: Pruning | None, limit: LatencyLimit | None
) -> list[str]:
    """Name the options that cost accuracy."""
    said = [f"--{budget.kind.value.replace('_', '-')} {budget.asked:g}"]
    if limit is not None:
        said.append(f"--max-latency {limit.most_ms:g}ms")
    elif pruning != IRRELEVANT:
        said.append(f"--prune {pruning.text()}")
    return said if sparsifying is None else [*said, f"--sparsify {sparsifying.text()}"]


def _told(sparsifying: Pruning | None, share: float) -> str:
    return "none" if sparsifying is None else f"{sparsifying.text()}: {100 * share:.2f} % of the weights are 0"


def _check_folder(folder: Path, *, force: bool) -> None:
    """Refuse a folder that may not be written; the first process alone writes, so it alone is asked."""
    if launched.place()[1] == 1:
        return check_output_folder(folder, force=force)
    from edgecomp.pytorch.sharing import by_first, join

    join()
    return by_first(lambda: check_output_folder(folder, force=force))


def _float_accuracy(graph: Graph, test: LabelledImages, preprocessing: Preprocessing, stage: Stage) -> float:
    from edgecomp.pytorch.network import accuracy

    with stage("float accuracy", len(test)) as advance:
        return accuracy(graph, test, preprocessing, progress=advance)


def _split(
    train: LabelledImages, n_calibration: int, *, seed: int
) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Draw training images to calibrate with; also give those they are of, and others to measure accuracy on."""
    n_calibration = min(n_calibration, len(train) // 2)
    if n_calibration < 1:
        raise DataError(f"--max-drop needs at least 2 training images, there are {len(train)}")
    order = np.random.default_rng(seed).permutation(len(train))
    held_out = train.take(order[: min(_HELD_OUT, len(train) - n_calibration)])
    rest = train.take(order[len(held_out) :])
    return draw(rest, n_calibration, seed=seed), rest, held_out


def _check_rule(rule: str) -> None:
    from edgecomp.pytorch.rules import parse_composite

    parse_composite(rule)


def _batches(graph: Graph, train: LabelledImages, preprocessing: Preprocessing) -> list[Array]:
    from edgecomp.pytorch.network import batch_size

    n = batch_size(graph, most=_BATCH)
    return [train.inputs(preprocessing, i, i + n) for i in range(0, len(train), n)]


def _scorer(
    scoring: Scoring, batches: Sequence[Array], labels: Array, class_weights: Array | None, seed: int
) -> Scorer:
    from edgecomp.pytorch.propagate import Start
    from edgecomp.pytorch.rules import parse_composite
    from edgecomp.pytorch.scores import Score, Scorer

    starts = np.cumsum([0, *(len(x) for x in batches)])
    return Scorer(
        kind=Score(scoring.score),
        batches=[(x, labels[start : start + len(x)]) for x, start in zip(batches, starts, strict=False)],
        composite=parse_composite(scoring.rule),
        start=Start(scoring.start),
        class_weights=class_weights,
        seed=seed,
    )


def _explain(
    explained: Graph, graph: Graph, scorer: Scorer, batches: Sequence[Array], stage: Stage
) -> tuple[Relevance, Mapping[str, ActRange]]:
    from edgecomp.pytorch.calibrate import calibrate

    n_images = sum(map(len, batches))
    with stage("relevance", n_images) as advance:
        relevance = scorer.relevance(explained, progress=advance)
    with stage("activation ranges", 2 * n_images) as advance:
        return relevance, calibrate(graph, batches, progress=advance)


def _searching(budget: Budget, stage: Stage) -> AbstractContextManager[Callable[[int], object]]:
    """Show how far a search by measurements is; one by counting has no steps worth showing."""
    if budget.kind is not BudgetKind.MAX_DROP:
        return silent("", 0)
    return stage("searching the smallest file", planner.DROP_STEPS)


def _drop_measure(
    graph: Graph, held_out: LabelledImages, preprocessing: Preprocessing, formats: Sequence[str]
) -> Callable[[Candidate], float]:
    """Make what measures how many points the worst of a candidate's files loses on held-out training images."""
    from edgecomp.benchmarks.runners import default_runtime
    from edgecomp.exporters import export
    from edgecomp.pytorch.network import accuracy
    from edgecomp.pytorch.sharing import by_first

    before = by_first(lambda: accuracy(graph, held_out, preprocessing))

    def drop_points(candidate: Candidate) -> float:
        quantized = compress(candidate.graph, candidate.plan)
        files = (export(quantized, form) for form in formats)
        return before - min(
            measure_accuracy(file.data, default_runtime(file.format), held_out, preprocessing)[0] for file in files
        )

    return drop_points


def _export(quantized: Graph, formats: Sequence[str], stage: Stage) -> list[Exported]:
    from edgecomp.exporters import export

    exported = []
    with stage("writing files", len(formats)) as advance:
        for name in formats:
            exported.append(export(quantized, name))
            advance(1)
    return exported


def rewritten(plan: CompressionPlan, graph: Graph, form: str) -> Exported:
    """Export again from a plan and its graph: neither torch nor data is needed, the bytes are the same."""
    from edgecomp.exporters import export

    exported: Exported = export(compress(graph, plan), form)
    return exported


def yardsticks(plan: CompressionPlan, graph: Graph, format_name: str) -> dict[str, Exported]:
    """Export what a compressed file is compared with: the float model, and plain int8 of every channel."""
    from edgecomp.exporters import export

    eight = plan.without_pruning().with_uniform_bits(8)
    return {"fp32": export(graph, format_name), "int8": export(compress(graph, eight), f"{format_name}-int8")}
