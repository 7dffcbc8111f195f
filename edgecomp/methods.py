"""By what a build tells important from unimportant; and the papers' own recipes, as values.

A paper says that its method prunes by a score and gives higher scores more bits. What it leaves open is decided here,
once, in one table: `OPEN` and `WIDTHS`. Not here: how a ladder of widths is made and climbed (`planner`, `spending`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgecomp.channels import IRRELEVANT, CutPolicy, Pruning
from edgecomp.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What tells important from unimportant.

    Attributes:
        score: one of `pytorch.scores.Score`.
        rule: of LRP, as `pytorch.rules.parse_composite` reads it.
        start: of LRP: one of `pytorch.propagate.Start`.
    """

    score: str = "lrp"
    rule: str = "epsilon"
    start: str = "logit"


LRP = Scoring()
"""Relevance by the epsilon rule from the true class's logit."""

OURS = "edgecomp"
CHOSEN = "not published, chosen here: "
"""What a plan's `made_by` says before the name of a choice."""
WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that a layer may have by a paper's recipe."""

OPEN: Mapping[str, str] = MappingProxyType(
    {
        "rule": "epsilon in all layers, from the true class's logit",
        "images": "as many training images as --calib says",
        "score of a weight": "its relevance, signed, mean over the images; not normalised",
        "pruned at most": "99 % of a layer's weights",
        "unit of a width": "a layer; a map of widths by weight would itself take 1.5 to 2 bits a weight",
        "score of a layer": "mean |score| of the weights that are not pruned",
        "widths": f"of {', '.join(map(str, WIDTHS))} bits the nearest to c + log2(score of the layer) / 2",
        "budget": "the highest level c within --avg-bits or --max-size, the lowest within --max-drop",
        "rounding": "to the nearest code, one scale a channel; activations int8",
        "training": "none, unless --recover asks for it",
    }
)
"""What neither paper publishes -> what is done here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """The recipe of a paper, as far as it is published; the rest is `OPEN`.

    Attributes:
        name: of the method, as --method takes it.
        source: the publication.
        published: what it says.
        sparsifying: which weights become 0.
        scoring: what scores them.
        widths: bits that a layer may have, rising.
    """

    name: str
    source: str
    published: str
    sparsifying: Pruning
    scoring: Scoring = LRP
    widths: tuple[int, ...] = WIDTHS

    def made_by(self) -> dict[str, str]:
        """Say it, and what was chosen for it, for a plan's `made_by`."""
        chosen = {f"{CHOSEN}{what}": how for what, how in OPEN.items()}
        return {"method": f"{self.name}: {self.published} ({self.source})", **chosen}


PAPERS: Mapping[str, Paper] = MappingProxyType(
    {
        paper.name: paper
        for paper in (
            Paper(
                name="soroush2024",
                source="Soroush, Baradaran and Raji, AISOFT 2024",
                published="weights with an LRP score of 0 are pruned, higher scores get more bits",
                sparsifying=Pruning(policy=CutPolicy.ZERO),
            ),
            Paper(
                name="ghavami2025",
                source="Soroush, Raji and Ghavami, arXiv 2507.05286",
                published="weights with an LRP score of 0 or less are pruned, higher scores get more bits",
                sparsifying=Pruning(policy=CutPolicy.NONPOSITIVE),
            ),
        )
    }
)
"""By name."""

METHODS = (OURS, *PAPERS)
"""What --method takes."""


def check_method(
    paper: Paper | None, *, scoring: Scoring, pruning: Pruning, sparsifying: Pruning | None, reconstruction: bool
) -> None:
    """Refuse what contradicts a paper's recipe.

    Raises:
        UsageError: with the option and what the recipe has in its place.
    """
    if paper is None:
        return
    own = paper.scoring
    for option, asked, wanted in (
        ("--score", scoring.score, own.score),
        ("--rule", scoring.rule, own.rule),
        ("--start", scoring.start, own.start),
        ("--prune", pruning.text(), IRRELEVANT.text()),
        ("--sparsify", "none" if sparsifying is None else sparsifying.text(), paper.sparsifying.text()),
        ("reconstruction", "on" if reconstruction else "off", "off"),
    ):
        if asked != wanted:
            raise UsageError(
                f"--method {paper.name} with {option} {asked}: its recipe has {option} {wanted}; "
                "leave one of the two out"
            )
